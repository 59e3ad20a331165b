"""From a row of a data file to a question with options, or to a conversation; pure.

A format is one entry of `FORMATS`: the columns it needs and how one row is converted. A row that cannot be
converted raises `SkipRow` with the reason; whoever reads the file counts those.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
Message = dict[str, str]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ROLES = ("system", "user", "assistant")


class SkipRow(Exception):
    """This row cannot be used; the text says why."""


@dataclass(frozen=True)
class MultipleChoice:
    """A question, its options by letter, and the letter of the right one."""

    question: str
    options: dict[str, str]
    answer: str

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
        return [
            {"role": "user", "content": self.prompt},
            {"role": "assistant", "content": self.reply(letter or self.answer)},
        ]


@dataclass(frozen=True)
class Example:
    """A usable row: what is trained on, and the question where there is one."""

    conversation: list[Message]
    choice: MultipleChoice | None = None


def _text(value: object, name: str) -> str:
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


def _parsed(value: object) -> object:
    """A list or dict that a CSV file can only hold as text (JSON, or Python's own notation)."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return value


def _options(value: object) -> dict[str, str]:
    value = _parsed(value)
    if value is None:
        raise SkipRow("options is null")
    if isinstance(value, Mapping):
        # A Parquet file gives every row every key that any row has, as null.
        pairs = [(str(key).strip(), option) for key, option in value.items() if option is not None]
    elif isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        pairs = list(zip(LETTERS, value, strict=False))
    else:
        raise SkipRow("options is neither a list nor a dict")
    options = {letter: _text(option, "an option") for letter, option in pairs}
    if len(options) < 2:
        raise SkipRow("fewer than two options")
    return options


def _letter(value: object, options: dict[str, str], text_first: bool) -> str:
    """The letter that `value` means: an option's text, its letter, or its place from 0."""
    if value is None or isinstance(value, (bool, dict, list)):
        raise SkipRow("answer is null" if value is None else "answer is not text")
    wanted = _text(value, "answer")
    by_text = next((letter for letter, text in options.items() if text == wanted), None)
    by_letter = next((letter for letter in options if letter.casefold() == wanted.casefold()), None)
    found = (by_text or by_letter) if text_first else (by_letter or by_text)
    if found is None and wanted.removesuffix(".0").isdecimal() and int(wanted.removesuffix(".0")) < len(options):
        found = list(options)[int(wanted.removesuffix(".0"))]
    if found is None:
        raise SkipRow("answer is not among the options")
    return found


def _multiple_choice(row: Row) -> Example:
    """question, options (list or dict), answer (text, letter or place), answer_idx (letter or place)."""
    question, options = _text(row.get("question"), "question"), _options(row.get("options"))
    named = [
        _letter(row[column], options, text_first=column == "answer")
        for column in ("answer_idx", "answer")
        if row.get(column) is not None
    ]
    if not named:
        raise SkipRow("answer is null")
    if options[named[0]] != options[named[-1]]:
        raise SkipRow("answer and answer_idx disagree")
    choice = MultipleChoice(question, options, named[0])
    return Example(choice.conversation(), choice)


LETTERED = ("opa", "opb", "opc", "opd", "ope")


def _lettered(row: Row) -> Example:
    """question, opa to opd (or ope), cop: the place of the right one from 0, as MedMCQA has it."""
    given = {letter: row.get(column) for letter, column in zip(LETTERS, LETTERED, strict=False)}
    return _multiple_choice({"question": row.get("question"), "options": given, "answer_idx": row.get("cop")})


def _content(value: object) -> str:
    """A turn's text; a list of parts, as some chat files have it, is joined."""
    if isinstance(value, list):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in value]
        if not all(isinstance(part, str) for part in parts):
            raise SkipRow("a turn has a part that is not text")
        value = "".join(str(part) for part in parts)
    return _text(value, "a turn's content")


def _messages(row: Row) -> Example:
    """messages: a list of {role, content}, with at least one turn of the assistant."""
    turns = _parsed(row.get("messages"))
    if not isinstance(turns, list) or not turns:
        raise SkipRow("messages is not a list of turns" if turns else "messages is empty")
    conversation: list[Message] = []
    for turn in turns:
        if not isinstance(turn, Mapping) or "role" not in turn or "content" not in turn:
            raise SkipRow("a turn lacks role or content")
        if turn["role"] not in ROLES:
            raise SkipRow(f"a turn has a role that is none of {', '.join(ROLES)}")
        conversation.append({"role": str(turn["role"]), "content": _content(turn["content"])})
    if not any(message["role"] == "assistant" for message in conversation):
        raise SkipRow("no turn of the assistant")
    return Example(conversation)


SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}  # the others have the name they need


def _sharegpt(row: Row) -> Example:
    """conversations: a list of {from, value}, from being human, gpt or system."""
    turns = _parsed(row.get("conversations"))
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise SkipRow("conversations is not a list of turns")
    messages = [
        {"role": SHAREGPT_ROLES.get(str(turn.get("from")), turn.get("from")), "content": turn.get("value")}
        for turn in turns
    ]
    return _messages({"messages": messages})


def _prompt_completion(row: Row) -> Example:
    """prompt and completion: each a text, or a list of {role, content}."""
    prompt, completion = _parsed(row.get("prompt")), _parsed(row.get("completion"))
    turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    reply = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
    return _messages({"messages": [*turns, *reply]})


def _instruction(row: Row) -> Example:
    """instruction, output and, where it is not empty, input: what the instruction is about (Alpaca)."""
    asked = _text(row.get("instruction"), "instruction")
    about = row.get("input")
    if about is not None and str(about).strip():
        asked = f"{asked}\n\n{_text(about, 'input')}"
    reply = {"role": "assistant", "content": _text(row.get("output"), "output")}
    return Example([{"role": "user", "content": asked}, reply])


@dataclass(frozen=True)
class RowFormat:
    """One way to lay out a row."""

    needs: tuple[tuple[str, ...], ...]
    """Columns: one of each group must be there."""
    convert: Callable[[Row], Example]

    def missing(self, columns: Iterable[str]) -> list[str]:
        """The groups of which no column is there, written for a message."""
        present = set(columns)
        return [" or ".join(group) for group in self.needs if not present.intersection(group)]


# In the order in which they are looked for.
FORMATS: dict[str, RowFormat] = {
    "multiple_choice": RowFormat((("question",), ("options",), ("answer", "answer_idx")), _multiple_choice),
    "lettered": RowFormat((("question",), ("opa",), ("opb",), ("cop",)), _lettered),
    "messages": RowFormat((("messages",),), _messages),
    "sharegpt": RowFormat((("conversations",),), _sharegpt),
    "prompt_completion": RowFormat((("prompt",), ("completion",)), _prompt_completion),
    "instruction": RowFormat((("instruction",), ("output",)), _instruction),
}


def detect(columns: Iterable[str]) -> str | None:
    """The first format whose columns are there."""
    present = list(columns)
    return next((name for name, row_format in FORMATS.items() if not row_format.missing(present)), None)


def conversation(row: Row) -> list[Message]:
    """The conversation of one row, its format read off its columns. Raises SkipRow."""
    name = detect(row)
    if name is None:
        raise SkipRow("no known format has these columns")
    return FORMATS[name].convert(row).conversation
