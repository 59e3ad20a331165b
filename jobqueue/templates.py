"""Jinja templates, sandboxed: those of chat models, and those that a user writes for rows.

A chat template is code of whoever published the model, a row template is code of whoever submits, and both run on
workers. Both are rendered in Jinja's immutable sandbox, set up as transformers sets it up, so that a template gives
the same text here as it does where the model is used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError, Undefined, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Templates that print a date print this one, or two runs of one configuration differ by the day.
DATE = datetime(2024, 7, 26, tzinfo=UTC)

# For base models that have none. Where a turn ends with the tokenizer's own end token, any tokenizer will do;
# chatml, llama-3 and gemma are for models that know these tokens.
NAMED: Mapping[str, str] = {
    "alpaca": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m['role'] == 'system' %}{{ m['content'] + '\\n\\n' }}"
        "{% elif m['role'] == 'user' %}{{ '### Instruction:\\n' + m['content'] + '\\n\\n' }}"
        "{% else %}{{ '### Response:\\n' + m['content'] + eos_token + '\\n\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' + m['content'] | trim"
        " + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
    "llama-3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n'"
        " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% elif m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
}


class RenderError(Exception):
    """A template cannot be rendered with these values; one line."""


class _Generation(Extension):
    """`{% generation %}` marks answers for other trainers; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _no_null(value: Any) -> Any:
    """An empty cell would be written as the word None."""
    return _raise("a value is null") if value is None else value


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=2)
def _environment(strict: bool) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, loopcontrols],
        undefined=StrictUndefined if strict else Undefined,
        finalize=_no_null if strict else None,
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = DATE.strftime
    return environment


@lru_cache(maxsize=64)
def _compiled(source: str, strict: bool) -> Template:
    return _environment(strict).from_string(source)


def syntax_error(source: str) -> str | None:
    """What is wrong with a template, in a line; None where nothing is."""
    try:
        _compiled(source, False)
    except TemplateSyntaxError as error:
        return f"is no valid Jinja template: {error.message} (line {error.lineno})"
    return None


def variables(source: str) -> set[str]:
    """The names that a template takes from its surroundings."""
    environment = _environment(False)
    return meta.find_undeclared_variables(environment.parse(source)) - environment.globals.keys()


def render(source: str, values: Mapping[str, Any], *, strict: bool = False) -> str:
    """The text of a template. Raises RenderError; `strict`: also where a name is unknown."""
    try:
        return _compiled(source, strict).render(values)
    except RecursionError as error:
        raise RenderError("it nests too deeply") from error
    except Exception as error:  # Jinja's own, and whatever an expression of the template raises
        raise RenderError(" ".join(str(error).split()) or type(error).__name__) from error
