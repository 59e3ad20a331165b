"""The layouts of rows that are known, and which one a file has; pure.

A format is one entry of `FORMATS`: the columns it needs and how one row is converted. A row that cannot be
converted raises `SkipRow` with the reason; whoever reads the file counts those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from jobqueue import questions, turns
from jobqueue.data_spec import RowTemplate
from jobqueue.example import Example, Message, Row, SkipRow, checked_text


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

    def found(self, columns: Iterable[str]) -> list[str]:
        """The columns by which it is recognised."""
        present = set(columns)
        return [column for group in self.needs for column in group if column in present]


# In the order in which they are looked for.
FORMATS: dict[str, RowFormat] = {
    "multiple_choice": RowFormat((questions.QUESTION, questions.OPTIONS, questions.ANSWER), questions.multiple_choice),
    "lettered": RowFormat((("question",), ("opa",), ("opb",), ("cop",)), questions.lettered),
    "messages": RowFormat((("messages",),), turns.messages),
    "sharegpt": RowFormat((("conversations",),), turns.sharegpt),
    "prompt_completion": RowFormat((("prompt",), turns.COMPLETION), turns.prompt_completion),
    "instruction": RowFormat((("instruction",), turns.OUTPUT), turns.instruction),
    "text": RowFormat((("text",),), turns.plain),
}


def templated(template: RowTemplate) -> RowFormat:
    """The format of rows that a user's own template writes out; it needs the columns that the template names.

    `row` has them all, for names that are no words.
    """
    from jobqueue.templates import variables  # Jinja: only where it is needed

    used = sorted({name for source in template.sources.values() for name in variables(source)} - {"row"})
    return RowFormat(tuple((name,) for name in used), partial(_templated, template))


def _templated(template: RowTemplate, row: Row) -> Example:
    from jobqueue.templates import RenderError, render

    written = {}
    for part, source in template.sources.items():
        try:
            written[part] = checked_text(
                render(source, {"row": row, **row}, strict=True), f"what the template writes as {part}"
            )
        except RenderError as error:
            raise SkipRow(f"the template's {part} cannot be rendered: {error}") from None
    if "text" in written:
        return Example([], text=written["text"])
    return Example([{"role": role, "content": content} for role, content in written.items()])


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
