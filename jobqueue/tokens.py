"""Examples to token ids and labels: the loss falls on the assistant's answers only, for any chat template."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice

from jobqueue.chat import BadTurn, Chat, Span
from jobqueue.errors import DataError
from jobqueue.example import Example

IGNORED = -100  # label of a token without loss
CHUNK = 1000  # rows tokenised at a time
BINS = 12  # of the histogram of lengths


@dataclass(frozen=True)
class Tokens:
    """One row: both lists have one entry per token."""

    input_ids: list[int]
    labels: list[int]

    @property
    def trained(self) -> int:
        """How many tokens the loss falls on."""
        return len(self.labels) - self.labels.count(IGNORED)

    def cut(self, length: int) -> Tokens:
        """Its first tokens."""
        return self if len(self.labels) <= length else Tokens(self.input_ids[:length], self.labels[:length])


@dataclass
class DataReport:
    """What became of the rows. Counts of rows, and of tokens."""

    rows: int = 0
    used: int = 0
    duplicates: int = 0
    """Rows that read the same as an earlier one; they are kept."""
    truncated: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    """Tokens of the longest row, before it was cut."""
    histogram: list[tuple[int, int, int]] = field(default_factory=list)
    """Rows by their tokens before they were cut: (from, to, rows), both ends included."""
    notes: list[str] = field(default_factory=list)
    """What was done to all rows alike."""
    preview: str = ""
    """The first row, what is trained in double angle brackets."""


def tokenise(chat: Chat, examples: Sequence[Example], max_seq_length: int) -> tuple[list[Tokens], DataReport]:
    """Rows to train on, none longer than `max_seq_length` tokens, and what became of the examples.

    A longer row loses its end; one that keeps no part of an answer is dropped. Raises DataError where nothing is
    left, ChatTemplateError where a conversation needs a template and there is none.
    """
    rows, report = survey(chat, examples, max_seq_length)
    if not rows:
        reasons = "; ".join(f"{count} rows: {reason}" for reason, count in report.dropped.items())
        raise DataError(
            f"no row is left to train on ({reasons}); the longest has {report.longest} tokens",
            "Raise max_seq_length, correct the rows, or give another `chat_template`.",
        )
    report.preview = "".join(f"<<{text}>>" if trained else text for text, trained in segments(chat, rows[0]))
    return rows, report


def survey(chat: Chat, examples: Sequence[Example], max_seq_length: int) -> tuple[list[Tokens], DataReport]:
    """The same, also where no row is left."""
    report = DataReport(rows=len(examples), notes=_notes(chat, examples))
    rows: list[Tokens] = []
    lengths: list[int] = []
    seen: set[tuple[int, ...]] = set()
    for row in label(chat, examples):
        if isinstance(row, str):
            report.dropped[row] = report.dropped.get(row, 0) + 1
            continue
        lengths.append(len(row.input_ids))
        cut = row.cut(max_seq_length)
        if not cut.trained:
            reason = "no answer within max_seq_length" if row.trained else "an empty answer"
            report.dropped[reason] = report.dropped.get(reason, 0) + 1
            continue
        report.truncated += len(row.input_ids) > max_seq_length
        key = tuple(row.input_ids)
        report.duplicates += key in seen
        seen.add(key)
        rows.append(cut)
    report.used = len(rows)
    report.longest = max(lengths, default=0)
    report.histogram = histogram(lengths)
    report.tokens = sum(len(row.input_ids) for row in rows)
    report.trained_tokens = sum(row.trained for row in rows)
    return rows, report


def fingerprint(rows: Sequence[Tokens]) -> str:
    """sha256 of what is trained and validated on, hex: the same for the same tokens, labels and order."""
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps([row.input_ids, row.labels]).encode())
    return found.hexdigest()


def label(chat: Chat, examples: Iterable[Example]) -> Iterator[Tokens | str]:
    """Each example as tokens, not cut, or why it cannot be."""
    remaining = iter(examples)
    while chunk := list(islice(remaining, CHUNK)):
        found = [_located(chat, example) for example in chunk]
        encoded = iter(chat.encode([item[0] for item in found if not isinstance(item, str)]))
        for item in found:
            yield item if isinstance(item, str) else _labelled(chat, *next(encoded), item[1])


def segments(chat: Chat, row: Tokens) -> list[tuple[str, bool]]:
    """The row's text in pieces, and whether each is trained."""
    pairs = zip(row.input_ids, row.labels, strict=True)
    groups = groupby(pairs, key=lambda pair: pair[1] != IGNORED)
    return [(chat.decode([token for token, _ in group]), trained) for trained, group in groups]


def histogram(lengths: Sequence[int], bins: int = BINS) -> list[tuple[int, int, int]]:
    """How many lengths are in each of at most `bins` ranges of one width: (from, to, count), both ends included."""
    if not lengths:
        return []
    low, high = min(lengths), max(lengths)
    width = -(-(high - low + 1) // bins)
    counts = [0] * (-(-(high - low + 1) // width))
    for length in lengths:
        counts[(length - low) // width] += 1
    return [(low + i * width, min(low + (i + 1) * width - 1, high), count) for i, count in enumerate(counts)]


def _notes(chat: Chat, examples: Sequence[Example]) -> list[str]:
    conversations = [example.conversation for example in examples if example.conversation]
    notes = []
    if any(turns[0]["role"] == "system" for turns in conversations) and not chat.takes_system:
        notes.append("the chat template has no system turn: what it says is put before the first user turn")
    if conversations and chat.turn_end is None:
        eos = chat.special_tokens.get("eos_token", "no token")
        notes.append(f"the chat template ends no answer with a special token: {eos} is put after the last one")
    return notes


def _located(chat: Chat, example: Example) -> tuple[str, list[Span]] | str:
    """The text of an example and what in it is trained, or why there is none."""
    if example.text is not None:
        return example.text, [Span(0, len(example.text), append_eos=True)]
    try:
        text = chat.render(example.conversation, example.tools)
        spans = chat.answer_spans(example.conversation, text, example.tools)
    except BadTurn as reason:
        return str(reason)
    if not spans:
        return "an empty answer"
    # What the template puts after an answer that it does not end (a line break) would follow the end token.
    return (text[: spans[-1].end] if spans[-1].append_eos else text), spans


def _labelled(chat: Chat, ids: list[int], offsets: list[tuple[int, int]], spans: list[Span]) -> Tokens:
    labels = [IGNORED] * len(ids)
    current = 0
    for index, (start, end) in enumerate(offsets):
        while current < len(spans) and spans[current].end <= start:
            current += 1
        if current == len(spans):
            break
        # A space before a word is in the token but, in some tokenizers, not in its offsets.
        if spans[current].start <= start < end <= spans[current].end:
            labels[index] = ids[index]
    if spans[-1].append_eos and chat.eos_id is not None:
        ids, labels = [*ids, chat.eos_id], [*labels, chat.eos_id]
    whole = chat.with_bos(ids)
    labels = [IGNORED] * (len(whole) - len(ids)) + labels
    labels[:1] = [IGNORED] * len(labels[:1])  # nothing stands before the first token to predict it from
    return Tokens(whole, labels)
