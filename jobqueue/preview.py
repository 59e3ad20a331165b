"""What a training would read: the layout of the rows, their tokens, and one row with what is trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from jobqueue import advice, replay, rows, sources
from jobqueue.chat import Chat
from jobqueue.data_spec import RowsSpec
from jobqueue.errors import DataError, LoraqError, Problem, SpecError
from jobqueue.example import Example, Message
from jobqueue.sweep import Sweep
from jobqueue.tokens import DataReport, Tokens, label, segments, survey

Part = Literal["read", "trained", "cut"]


@dataclass(frozen=True)
class RowPreview:
    """One row of the file."""

    number: int  # from 1
    skipped: str | None  # why it is left out
    conversation: list[Message]
    segments: list[tuple[str, Part]]  # the text that the model reads; empty where there are no tokens
    tokens: int  # before it is cut
    trained_tokens: int


@dataclass(frozen=True)
class Preview:
    """A data file as one configuration trains on it."""

    source: str
    base_model: str
    rows: rows.Summary
    kept_back: int  # for validation
    replayed: int  # of other data, mixed in
    max_seq_length: int
    tokens: DataReport | None
    no_tokens: str | None
    """Why there are none."""
    row: RowPreview
    warnings: list[str]


def preview(sweep: Sweep, chat: Chat | str, number: int | None, data_alone: bool = False) -> Preview:
    """The first configuration of a sweep, its tokens, and row `number` (from 1; None: the first that is used).

    `chat` is the tokenizer, or why there is none; `data_alone`: nobody has said yet how to train. Raises DataError
    where the file has no such row, SpecError where the sweep trains nothing.
    """
    run = sweep.trials[0].run
    if run.data is None:
        raise SpecError([Problem("trains nothing: it has no data section", str(sweep.file))])
    data = sources.readable(run.data, sweep.file.parent)
    loaded = rows.load(data)
    trained, kept_back = rows.split(data, [example for _, example in loaded.examples])
    limit = run.training.max_seq_length
    mixed_in = replay.draw(data.replay, len(trained))
    seen = len(trained) + (len(mixed_in.examples) if mixed_in else 0)
    warnings = [] if data_alone else list(advice.on_training(run, seen))
    if mixed_in and mixed_in.shortage:
        warnings.append(f"replay: {mixed_in.shortage}")
    report = None
    if isinstance(chat, Chat):
        report = survey(chat, trained, limit)[1]
        warnings += [*report.notes, *advice.on_data(report, limit)]
    if run.evaluation is not None:
        warnings += _leaks(trained, sources.readable(run.evaluation, sweep.file.parent))
    return Preview(
        source=run.data.source,
        base_model=run.base_model,
        rows=loaded.summary,
        kept_back=len(kept_back),
        replayed=len(mixed_in.examples) if mixed_in else 0,
        max_seq_length=limit,
        tokens=report,
        no_tokens=chat if isinstance(chat, str) else None,
        row=_row(loaded, data, number, chat, limit),
        warnings=warnings,
    )


def _row(loaded: rows.Rows, data: RowsSpec, number: int | None, chat: Chat | str, limit: int) -> RowPreview:
    examples = dict(loaded.examples)
    index = loaded.examples[0][0] if number is None else number - 1
    if not 0 <= index < loaded.summary.rows:
        raise DataError(f"{data.source} has no row {number}", f"It has the rows 1 to {loaded.summary.rows}.")
    if index not in examples:
        return RowPreview(index + 1, loaded.unusable[index], [], [], 0, 0)
    example = examples[index]
    said = example.conversation or [{"role": "text", "content": example.text}]
    if isinstance(chat, str):
        return RowPreview(index + 1, None, said, [], 0, 0)
    row = next(label(chat, [example]))
    if isinstance(row, str):
        return RowPreview(index + 1, row, said, [], 0, 0)
    kept = row.cut(limit)
    why = None if kept.trained else "no answer within max_seq_length"
    return RowPreview(index + 1, why, said, list(_parts(chat, row, limit)), len(row.input_ids), kept.trained)


def _parts(chat: Chat, row: Tokens, limit: int) -> Iterator[tuple[str, Part]]:
    for text, trained in segments(chat, row.cut(limit)):
        yield text, "trained" if trained else "read"
    if len(row.input_ids) > limit:
        yield chat.decode(row.input_ids[limit:]), "cut"


def _leaks(trained: Sequence[Example], asked: RowsSpec) -> Iterator[str]:
    """Questions that are asked after they were trained on; a source that cannot be read here is not looked at."""
    try:
        questions = [example for _, example in rows.load(asked).examples]
    except LoraqError:
        return
    known = {_question(example) for example in trained}
    count = sum(_question(example) in known for example in questions)
    if count:
        yield f"{count} of {len(questions)} questions of the evaluation are also trained on"


def _question(example: Example) -> str:
    return example.choice.prompt if example.choice else str(example.conversation[:-1])
