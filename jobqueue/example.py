"""What a row of a data file becomes: a question with options, a conversation, or plain text; pure."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

Row = Mapping[str, Any]
Message = dict[str, Any]
"""`role` and `content`, both text; a turn that calls tools has `tool_calls` as well."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class SkipRow(Exception):
    """This row cannot be used; the text says why."""


@dataclass(frozen=True)
class MultipleChoice:
    """A question, its options by letter, and the letter of the right one."""

    question: str
    options: dict[str, str]
    answer: str
    system_prompt: str | None = None

    @property
    def prompt(self) -> str:
        """What the user asks."""
        options = "\n".join(f"{letter}. {text}" for letter, text in self.options.items())
        return f"{self.question}\n\nOptions:\n{options}\n\nPlease choose the correct answer."

    def reply(self, letter: str) -> str:
        """What the assistant says who holds `letter` to be right."""
        return f"The correct answer is {self.options[letter]}."

    def conversation(self, letter: str | None = None) -> list[Message]:
        """The question and its answer: the right one, or that of `letter`."""
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return [
            *system,
            {"role": "user", "content": self.prompt},
            {"role": "assistant", "content": self.reply(letter or self.answer)},
        ]


@dataclass(frozen=True)
class Example:
    """A usable row: what is trained on, and the question where there is one."""

    conversation: list[Message]
    choice: MultipleChoice | None = None
    text: str | None = None
    """Text to go on with as it is: then there is no conversation, and all of it is trained."""
    tools: list[dict[str, Any]] | None = None
    """What the assistant may call, as JSON schemas."""

    def with_system(self, prompt: str | None) -> Example:
        """With a system turn that says `prompt`, unless it has one of its own."""
        if not prompt or not self.conversation or self.conversation[0]["role"] == "system":
            return self
        choice = replace(self.choice, system_prompt=prompt) if self.choice else None
        return replace(self, conversation=[{"role": "system", "content": prompt}, *self.conversation], choice=choice)

    @property
    def key(self) -> bytes:
        """The same for rows that say the same."""
        said = [self.conversation, self.text, self.tools]
        return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode("utf-8", "replace")).digest()


def checked_text(value: object, name: str) -> str:
    """A text that can be tokenised, not empty."""
    if value is None or isinstance(value, (bool, dict, list)):
        raise SkipRow(f"{name} is {'null' if value is None else 'not text'}")
    if isinstance(value, float) and value != value:
        raise SkipRow(f"{name} is null")
    text = str(value).strip()
    if not text:
        raise SkipRow(f"{name} is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise SkipRow(f"{name} has half a character (a lone surrogate)") from None
    return text


def parsed(value: object) -> object:
    """A list or dict that a CSV file can only hold as text (JSON, or Python's own notation)."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return value


def first(row: Row, columns: tuple[str, ...]) -> object:
    """The first of the columns that is not null."""
    return next((row[column] for column in columns if row.get(column) is not None), None)
