"""The part of the schema that says which rows are read, and how; see spec.py for the whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, field_validator, model_validator

Format = Literal[
    "auto", "multiple_choice", "lettered", "messages", "sharegpt", "prompt_completion", "instruction", "text"
]  # fmt: skip
QuestionFormat = Literal["multiple_choice", "lettered"]
Column = Literal[
    "question", "options", "answer", "answer_idx", "choices", "answerKey", "ctx", "endings", "label",
    "opa", "opb", "opc", "opd", "ope", "cop",
    "messages", "tools", "conversations", "prompt", "completion", "instruction", "input", "output", "text",
]  # fmt: skip


Clash = tuple[str, str]
"""The dotted key, "" for the section itself, and why it cannot be."""


class Part(BaseModel):
    """A section of the file: unknown keys are refused, a number is a number, nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def clashes(self) -> Iterable[Clash]:
        """Options of the section that do not go together."""
        return ()

    @model_validator(mode="after")
    def _together(self) -> Self:
        if found := tuple(self.clashes()):
            raise ClashError(found)
        return self


class ClashError(ValueError):
    """Everything in a section that does not go together."""

    def __init__(self, found: Sequence[Clash]) -> None:
        self.found = found
        super().__init__("; ".join(f"{key} {why}".lstrip() for key, why in found))


class RowTemplate(Part):
    """What a row says, in Jinja, with its columns as variables: user and assistant (and system), or text."""

    system: str | None = None
    user: str | None = None
    assistant: str | None = None
    text: str | None = None
    """All of it is trained, and no chat template is used."""

    @property
    def sources(self) -> dict[str, str]:
        """The parts that are set, in the order of a conversation."""
        return {part: source for part, source in self if source is not None}

    @field_validator("*")
    @classmethod
    def _valid(cls, source: str | None) -> str | None:
        from jobqueue.templates import syntax_error  # Jinja: only where it is needed

        wrong = syntax_error(source) if source is not None else None
        if wrong:
            raise ValueError(wrong)
        return source

    def clashes(self) -> Iterator[Clash]:
        if set(self.sources) not in ({"user", "assistant"}, {"system", "user", "assistant"}, {"text"}):
            yield "", "needs user and assistant (and perhaps system), or text alone"


class RowsSpec(Part):
    """Rows to train on or to ask about."""

    source: Annotated[str, Field(min_length=1)]
    """A hub id, a file on this machine (JSONL, JSON, CSV, TSV, Parquet; .gz, .zst), or an fsspec URL."""
    name: str | None = None
    """Of a hub data set: which of its configurations."""
    revision: str | None = None
    """Of a hub data set: a branch, tag or commit."""
    split: str = "train"
    """Of a hub data set; a file has no splits."""
    format: Format = "auto"
    columns: dict[Column, str] = {}
    """What the file calls a column, where it is not the name on the left."""
    system_prompt: str | None = None
    """A system turn for every conversation that has none."""
    limit: PositiveInt | None = None
    """Take the first so many rows."""


class ReplaySpec(RowsSpec):
    """Rows of another kind that are mixed in, so that the model keeps what it could do before."""

    fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of all rows trained on that come from here."""
    seed: NonNegativeInt = 3407
    """Another seed draws others."""

    def wanted(self, own: int) -> int:
        """How many rows make the fraction, with `own` others."""
        return round(own * self.fraction / (1 - self.fraction))


class DataSpec(RowsSpec):
    """Rows to train on."""

    template: RowTemplate | None = None
    """Instead of a format: what a row says, in Jinja."""
    validation_split: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the rows that is kept back: they are not trained on, and the loss on them is reported."""
    validation_seed: NonNegativeInt = 3407
    """Another seed keeps others back. Equal rows are always on one side."""
    replay: ReplaySpec | None = None
    """Section, see below. Without it these rows alone are trained on."""

    def clashes(self) -> Iterator[Clash]:
        if self.template and (self.format != "auto" or self.columns):
            yield "template", "says how a row is read; format and columns go without it"


class EwcSpec(Part):
    """Elastic weight consolidation (arXiv:1612.00796): with from_adapter, weights that its rows need are held."""

    ewc_lambda: Annotated[float, Field(ge=0)]
    """Weight of the penalty: the loss gets ewc_lambda / 2 times the sum of F x (weight - weight before) squared. F is
    the mean square of the gradient of a row's log-likelihood."""
    samples: PositiveInt = 256
    """How many of the rows F is estimated from."""
    seed: NonNegativeInt = 3407
    """Another seed draws others."""
    data: DataSpec | None = None
    """The rows that from_adapter was trained on, a section like data; None: those of the trial that it names."""

    def clashes(self) -> Iterator[Clash]:
        if self.data and self.data.replay:
            yield "data.replay", "mixes rows into a training, and here nothing is trained"
