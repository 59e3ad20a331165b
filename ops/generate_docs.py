"""Write docs/sweep-file.md from the pydantic models, docs/settings.md from the settings, docs/commands.md from the
Click commands, docs/failures.md from the table of retries, docs/metrics.md from the table of metrics.

python ops/generate_docs.py            writes them
python ops/generate_docs.py --check    exit code 1 where one of them is not what it would write
"""

from __future__ import annotations

import ast
import difflib
import inspect
import itertools
import json
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel

from cli.main import COMMANDS, exit_codes, loraq
from gpu_worker.metrics import METRICS
from jobqueue import data_spec, ensemble_spec, export_spec, judge_spec, random_spec, spec
from jobqueue.retry import TABLE, Rule
from jobqueue.settings import Settings

DOCS = Path(__file__).parents[1] / "docs"
NOTE = "<!-- Written by ops/generate_docs.py: change the code, then run `make docs`. -->"

SECTIONS = (
    ("", spec.SweepFile),
    ("data", data_spec.DataSpec),
    ("data.template", data_spec.RowTemplate),
    ("data.replay", data_spec.ReplaySpec),
    ("ewc", data_spec.EwcSpec),
    ("lora", spec.LoraSpec),
    ("lora.loftq_config", spec.LoftqSpec),
    ("training", spec.TrainingSpec),
    ("evaluation", spec.EvaluationSpec),
    ("evaluation.judge", judge_spec.JudgeSpec),
    ("export", export_spec.ExportOptions),
    ("resources", spec.ResourcesSpec),
    ("sweep", spec.SweepSpec),
    ("sweep.random", random_spec.RandomSpec),
    ("sweep.random.parameters.KEY", random_spec.ParameterSpec),
    ("ensembles", ensemble_spec.EnsembleSpec),
)

# What a key means where the model says nothing, since the name is Hugging Face's, PEFT's or TRL's own.
MEANINGS: Mapping[str, str] = {
    "name": "What the batch is called.",
    "method": "qlora: base model in 4 bits; lora: in 16 bits; full: all weights are trained.",
    "data": "Section, see below. " + "{doc}",
    "lora": "Section, see below.",
    "training": "Section, see below.",
    "evaluation": "Section, see below. Without it nothing is scored.",
    "export": "Section, see below. Without it the adapter alone is kept.",
    "resources": "Section, see below.",
    "sweep": "Section, see below. Without it the file is one configuration.",
    "data.format": "How a row looks; auto: by the names of its columns.",
    "data.replay.format": "How a row looks; auto: by the names of its columns.",
    "data.template.system": "What the system turn says.",
    "data.template.user": "What the user says.",
    "data.template.assistant": "What the assistant says, which is trained.",
    "lora.r": "Rank of the adapter: larger learns more and takes more memory.",
    "lora.lora_alpha": "The adapter's weight is lora_alpha / r.",
    "lora.lora_dropout": "Share of the adapter's inputs that are dropped in training.",
    "lora.bias": "Which biases are trained as well.",
    "lora.target_modules": "The layers that get an adapter.",
    "lora.use_gradient_checkpointing": "Compute activations again instead of keeping them: less memory, more time.",
    "lora.random_state": "Seed of the adapter's first weights.",
    "lora.use_rslora": "Weight lora_alpha / sqrt(r) instead of lora_alpha / r.",
    "lora.loftq_config.loftq_bits": "Bits of the quantised base model.",
    "lora.loftq_config.loftq_iter": "How often quantising and fitting are repeated.",
    "training.per_device_train_batch_size": "Rows per forward pass.",
    "training.gradient_accumulation_steps": "Forward passes per optimizer step.",
    "training.warmup_steps": "Steps until the learning rate is reached.",
    "training.learning_rate": "The highest learning rate.",
    "training.logging_steps": "Report progress every so many steps.",
    "training.optim": "The optimizer, by transformers' name.",
    "training.weight_decay": "Pull of the weights towards zero.",
    "training.lr_scheduler_type": "How the learning rate falls, by transformers' name.",
    "training.seed": "Seed of the order of the rows.",
    "training.max_seq_length": "Tokens of a row; what is longer is cut.",
    "training.dataset_num_proc": "Accepted for the sake of notebooks: rows are prepared by threads, however many.",
    "training.report_to": "Experiment trackers, by transformers' names.",
    "export.formats": "merged_16bit: a model that needs no adapter; gguf: a file for llama.cpp, on workers with "
    "`LORAQ_GGUF_CONVERTER`.",
    "evaluation.split": "Of a hub data set; a file has no splits.",
    "evaluation.metrics": "likelihood: the option with the highest log-probability; generated: the written answer; "
    "perplexity of the right answers; bleu: the written answer against the right one. The last two take rows of any "
    "format.",
    "evaluation.compare_with_base": "Ask the base model too. It is asked once for the same questions, then reused.",
    "evaluation.per_device_eval_batch_size": "Questions at a time.",
    "evaluation.max_new_tokens": "Length of a written answer.",
}


def main() -> int:
    pages = {
        "sweep-file.md": sweep_file_page(),
        "commands.md": commands_page(),
        "settings.md": settings_page(),
        "failures.md": failures_page(),
        "metrics.md": metrics_page(),
    }
    if sys.argv[1:] == ["--check"]:
        return sum(_differs(DOCS / name, text) for name, text in pages.items())
    for name, text in pages.items():
        (DOCS / name).write_text(text, encoding="utf-8")
    return 0


def _differs(file: Path, wanted: str) -> bool:
    found = file.read_text(encoding="utf-8") if file.exists() else ""
    if found != wanted:
        print(f"{file} is not up to date; run `make docs`")
        print("\n".join(difflib.unified_diff(found.splitlines(), wanted.splitlines(), "is", "should be", "", "", 0)))
    return found != wanted


# -- settings


def settings_page() -> str:
    """Every setting with its default and the docstring that stands below it in the code."""
    source = ast.parse(inspect.getsource(Settings)).body[0]
    assert isinstance(source, ast.ClassDef)
    meanings = {
        field.target.id: " ".join(str(ast.literal_eval(text.value)).split())
        for field, text in itertools.pairwise(source.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr)
    }
    lines = ["| variable | default | meaning |", "| --- | --- | --- |"]
    for field in fields(Settings):
        default = "" if field.default in (MISSING, None) else f"`{_setting(field.default)}`"
        lines.append(_row(f"`LORAQ_{field.name.upper()}`", default, meanings[field.name]))
    text = (
        "Read once, by the command line and by workers: from the environment, else from `~/.config/loraq/config.toml` "
        "(or the file that `LORAQ_CONFIG` names, which must be there), there in small letters and without the prefix: "
        "`lease_s = 30`. Times are in seconds."
    )
    return "\n\n".join(["# Settings", NOTE, _wrapped(text), "\n".join(lines), *PROFILES]) + "\n"


PROFILES = (
    "## Profiles",
    textwrap.fill(
        "Whoever has several clusters writes a table for each into that file. `loraq --profile lab ls` and "
        "`LORAQ_PROFILE=lab` choose one, `profile` at the top the one that counts where none is chosen.",
        118,
    ),
    """```toml
profile = "lab"                  # the default
owner = "ann"                    # goes for all of them

[profiles.lab]
redis_url = "redis://:PASSWORD@lab.example.org:6379/0"
storage = "/mnt/team/loraq"

[profiles.cloud]
redis_url = "rediss://:PASSWORD@cloud.example.org:6379/0"
storage = "s3://bucket/loraq"
```""",
    textwrap.fill(
        "From the strongest to the weakest: the profile that `--profile` names, variables, the profile of "
        "`LORAQ_PROFILE` or of the file, the top of the file. So a variable goes before the file as it does without "
        "profiles, and yet an exported `LORAQ_REDIS_URL` sends no `loraq --profile lab rm` to another cluster. "
        "`loraq doctor` says what counts, in that order.",
        118,
    ),
    textwrap.fill(
        "Workers read the same: `loraq --profile lab worker`, `loraq --profile lab up`, or `LORAQ_PROFILE` in their "
        "environment. A started worker keeps the settings that it was started with, whatever the file says later. "
        "A machine has one worker for each data folder: `up` with another profile stops the one before, unless each "
        "profile has a `data_dir` of its own.",
        118,
    ),
)


def _setting(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


# -- failures


def failures_page() -> str:
    """The table by which jobs are tried again."""
    cap = Settings.max_failures
    lines = ["| reason | meaning | attempts | wait before the next | its settings | what to do |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for reason, rule in TABLE.items():
        again = rule.failures > 1 or not rule.counts
        wait, settings = (_wait(rule), rule.settings) if again else ("-", "-")
        lines.append(_row(f"`{reason}`", rule.meaning, _attempts(rule), wait, settings, rule.remedy))
    text = (
        "An attempt that fails has one of these reasons, and this table says what it leads to. `loraq show JOB` has "
        "the reason of each attempt, what to do about it, and the last lines of the log. Failures that cost something "
        f"are counted together: at `LORAQ_MAX_FAILURES` ({cap}) a job has failed, or earlier where the table says so. "
        "A wait doubles with each failure of the job and is spread over 0.5 to 1.5 of that, so that jobs which failed "
        "together do not come back together. Training goes on from the newest complete checkpoint. `loraq retry` "
        "begins the count again."
    )
    return "\n\n".join(["# Failures", NOTE, _wrapped(text), "\n".join(lines)]) + "\n"


def _attempts(rule: Rule) -> str:
    if rule.counts:
        return str(rule.failures)
    return f"{rule.in_a_row} in a row; costs no failure" if rule.in_a_row else "any number; costs no failure"


def _wait(rule: Rule) -> str:
    return f"{rule.delay_s:g} s, {2 * rule.delay_s:g} s, ..." if rule.delay_s else "none"


# -- metrics


def metrics_page() -> str:
    """What was written by hand stays; the table below it is the code's."""
    written = (DOCS / "metrics.md").read_text(encoding="utf-8").partition(NOTE)[0]
    lines = ["| metric | type | labels | meaning |", "| --- | --- | --- | --- |"]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        lines.append(_row(f"`{metric.name}`", metric.kind, labels or "-", metric.meaning))
    return f"{written}{NOTE}\n\n" + "\n".join(lines) + "\n"


# -- the sweep file


def sweep_file_page() -> str:
    example = (Path(__file__).parents[1] / "cli" / "demo" / "sweep.yaml").read_text(encoding="utf-8")
    parts = [
        "# The sweep file",
        NOTE,
        _wrapped(
            "A sweep file is YAML 1.2: `2e-4` is a number, `no` is text. Unknown keys are refused, and every mistake "
            "is reported at once with its line before anything is submitted; try `loraq submit FILE --dry-run`. "
            "Names are those of Hugging Face, PEFT, TRL and Unsloth; what is left out has the default of Unsloth's "
            "notebook for Llama-3.2-1B. Relative paths count from the file's folder. On the command line "
            "`--set training.max_steps=20` overrides a key, `--set sweep.grid.lora.r=[4,8]` what is varied."
        ),
        "The one that `loraq demo` runs:",
        f"```yaml\n{example.strip()}\n```",
    ]
    for prefix, model in SECTIONS:
        parts.append(f"## `{prefix}`" if prefix else "## Top level")
        parts.append(_summary(model))
        parts.append(_table(prefix, model))
    return "\n\n".join(parts) + "\n"


def _summary(model: type[BaseModel]) -> str:
    text = " ".join((model.__doc__ or "").split())
    return text if text.endswith((".", ":")) else f"{text}."


def _table(prefix: str, model: type[BaseModel]) -> str:
    schema = model.model_json_schema()
    lines = ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in schema["properties"].items():
        default = "required" if name in schema.get("required", ()) else _default(field.get("default"))
        cells = (f"`{name}`", _kind(field, schema), default, _meaning(prefix, name, model))
        lines.append(_row(*cells))
    return "\n".join(lines)


def _kind(field: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """What may be written, in words; `field` is a part of a JSON schema."""
    if "$ref" in field:
        return "section"
    if "anyOf" in field:
        kinds = [_kind(one, schema) for one in field["anyOf"] if one != {"type": "null"}]
        return " or ".join(dict.fromkeys(kinds))
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if field.get("type") == "array":
        return f"list of {_kind(field['items'], schema) or 'values'}"
    if field.get("type") == "object":
        values = field.get("additionalProperties")
        return f"keys with {_kind(values, schema)}" if isinstance(values, dict) and _kind(values, schema) else "keys"
    word = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true, false"}
    kind = word.get(str(field.get("type")), "")
    return " ".join([kind, *_bounds(field)]) if kind else ""


def _bounds(field: Mapping[str, Any]) -> Iterator[str]:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    for key, sign in signs.items():
        if key in field:
            yield f"{sign} {field[key]:g}"


def _default(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return "-" if not value else "its defaults"
    if isinstance(value, list):
        return "`[" + ", ".join(map(str, value)) + "]`" if value else "-"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def _meaning(prefix: str, name: str, model: type[BaseModel]) -> str:
    said = ""
    for cls in reversed(model.__mro__):  # a section may add keys to those of another
        if issubclass(cls, BaseModel) and cls is not BaseModel:
            said = _attribute_docstrings(cls).get(name, said)
    key = f"{prefix}.{name}" if prefix else name
    other = MEANINGS.get(key, MEANINGS.get(f"data.{name}", "") if prefix == "evaluation" else "")
    if not (said or other):
        raise SystemExit(f"nothing says what {key} means: give it a docstring in {spec.__file__}")
    return other.replace("{doc}", said).strip() if "{doc}" in other else said or other


def _attribute_docstrings(cls: type[BaseModel]) -> dict[str, str]:
    """The string below each attribute, which Python itself throws away."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for before, after in zip(tree.body, tree.body[1:], strict=False):
        match before, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = " ".join(text.split()).replace("None:", "left out:")
    return found


# -- the commands


def commands_page() -> str:
    parts = ["# Commands", NOTE, "Every command ends with one of these codes:", _exit_codes()]
    context = click.Context(loraq, info_name="loraq")
    for name in COMMANDS:
        command = loraq.get_command(context, name)
        assert command is not None
        below = click.Context(command, info_name=name, parent=context)
        parts += _command(command, below)
        for inner in command.commands.values() if isinstance(command, click.Group) else ():
            parts += _command(inner, click.Context(inner, info_name=inner.name, parent=below))
    return "\n\n".join(part for part in parts if part) + "\n"


def _exit_codes() -> str:
    return "\n".join(
        ["| code | meaning |", "| --- | --- |", *(_row(str(code), meaning) for code, meaning in exit_codes())]
    )


def _command(command: click.Command, context: click.Context) -> Iterator[str]:
    yield f"## {context.command_path}"
    yield f"```\n{context.command_path} {' '.join(command.collect_usage_pieces(context))}\n```"
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    yield "\n\n".join(_wrapped(paragraph) for paragraph in paragraphs)
    rows = [
        record
        for parameter in command.get_params(context)
        if "--help" not in parameter.opts and (record := parameter.get_help_record(context)) and record[1]
    ]
    if rows:
        lines = [_row(f"`{flags}`", text) for flags, text in rows]
        yield "\n".join(["| option | meaning |", "| --- | --- |", *lines])


def _row(*cells: str) -> str:
    """A row of a Markdown table."""
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def _wrapped(text: str) -> str:
    """A paragraph; one that begins with Click's mark for lines to be left alone shows commands."""
    if text.startswith("\b\n"):
        return f"```\n{text[2:]}\n```"
    return textwrap.fill(" ".join(text.split()), 118, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    sys.exit(main())
