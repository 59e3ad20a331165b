"""Conversations to token ids and labels: the loss falls on the assistant's answers only, for any chat template.

A conversation is rendered once as text and tokenised once. Which characters are an answer is found by rendering
the conversation up to it with a generation prompt; which tokens are trained follows from their offsets. So no
template needs markers, and no token differs from what the model reads when it is asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from gpu_worker.trainer.failures import bad_data, bad_spec, one_line
from jobqueue.formats import Message

IGNORED = -100  # label of a token without loss
# Templates that print a date print this one, or two runs of one configuration differ by the day.
DATE = datetime(2024, 7, 26, tzinfo=UTC)
CHUNK = 1000  # rows tokenised at a time


@dataclass(frozen=True)
class Tokens:
    """One row: both lists have one entry per token."""

    input_ids: list[int]
    labels: list[int]


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
    preview: str = ""
    """The first row, what is trained in double angle brackets."""


@dataclass(frozen=True)
class Span:
    """Characters of an answer, its end token included; `append_eos`: the template does not end it."""

    start: int
    end: int
    append_eos: bool = False


class BadTurn(Exception):
    """The template cannot render this conversation."""


def render(tokenizer: Any, conversation: list[Message], generation_prompt: bool = False) -> str:
    """The conversation as the model reads it. Raises BadTurn; JobFailure where there is no template."""
    if not tokenizer.chat_template:
        raise bad_spec(
            "this base model has no chat template; take its instruct version, or a folder whose tokenizer has one"
        )
    try:
        return str(
            tokenizer.apply_chat_template(
                conversation,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                date_string=DATE.strftime("%d %b %Y"),
                strftime_now=DATE.strftime,
            )
        )
    except Exception as error:  # jinja2's, and whatever a template's own code raises
        raise BadTurn(one_line(f"the chat template refuses it: {error}")) from error


def prompt_ids(tokenizer: Any, conversation: list[Message]) -> list[int]:
    """Token ids of everything before the assistant's next answer."""
    text = render(tokenizer, conversation, generation_prompt=True)
    return _with_bos(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])


def answer_text(tokenizer: Any, conversation: list[Message]) -> str:
    """The last answer as the template writes it after the generation prompt, without its end token."""
    text = render(tokenizer, conversation)
    span = answer_spans(tokenizer, conversation, text)[-1]
    content = conversation[-1]["content"].strip()
    place = text.rfind(content, span.start, span.end)
    return content if place < 0 else text[span.start : place + len(content)]


def answer_spans(tokenizer: Any, conversation: list[Message], text: str) -> list[Span]:
    """The answers in `text`, which is the conversation rendered. Raises BadTurn where one cannot be found."""
    spans: list[Span] = []
    special = _special_tokens(tokenizer)
    for turn, message in enumerate(conversation):
        if message["role"] != "assistant":
            continue
        begun = spans[-1].end if spans else 0
        content = message["content"].strip()
        start = _answer_start(tokenizer, conversation[:turn], text, begun, content)
        last = turn == len(conversation) - 1
        until = len(text) if last else _common_prefix(text, render(tokenizer, conversation[: turn + 1]))
        place = text.find(content, start, until)
        content_end = place + len(content) if place >= 0 else start
        ends = [
            found + len(token)
            for token in special
            if (found := text.find(token, content_end, until)) >= 0 and not text[content_end:found].strip()
        ]
        if ends:
            spans.append(Span(start, min(ends)))
        elif place < 0:
            raise BadTurn("the chat template does not show an answer as it is written")
        else:
            spans.append(Span(start, content_end, append_eos=last))
    return spans


def _answer_start(tokenizer: Any, before: list[Message], text: str, begun: int, content: str) -> int:
    if before:
        prefix = render(tokenizer, before, generation_prompt=True)
        if text.startswith(prefix):
            return len(prefix)
    # Some templates write earlier turns differently once later ones follow; then the answer's own words tell.
    found = text.find(content, begun)
    if found < 0:
        raise BadTurn("the chat template does not show an answer as it is written")
    return found


def _common_prefix(text: str, other: str) -> int:
    """How many leading characters are the same."""
    if text.startswith(other):
        return len(other)
    return next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))


def _special_tokens(tokenizer: Any) -> list[str]:
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return list(dict.fromkeys([*added, *tokenizer.all_special_tokens]))


def end_ids(tokenizer: Any, model: Any) -> list[int]:
    """Tokens at which an answer ends: the model's own, the tokenizer's, and the one of the chat template."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ids = list(own) if isinstance(own, (list, tuple)) else [own]
    example = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    row = next(_tokenised(tokenizer, [example]), None)
    last = [label for label in row.labels if label != IGNORED][-1] if isinstance(row, Tokens) else None
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return sorted({i for i in (*ids, tokenizer.eos_token_id, last if last in special else None) if i is not None})


def _with_bos(tokenizer: Any, ids: list[int]) -> list[int]:
    """Exactly one BOS where the model's tokenizer puts one, whether or not the template wrote it."""
    bos = tokenizer.bos_token_id
    if bos is None or ids[:1] == [bos]:
        return ids
    adds = tokenizer("x")["input_ids"][:1] == [bos]
    return [bos, *ids] if adds else ids


def _tokenised(tokenizer: Any, conversations: Iterable[list[Message]]) -> Iterator[Tokens | str]:
    """Tokens of each conversation, or why it has none."""
    texts: list[tuple[str, list[Span]] | str] = []
    for conversation in conversations:
        try:
            text = render(tokenizer, conversation)
            texts.append((text, answer_spans(tokenizer, conversation, text)))
        except BadTurn as reason:
            texts.append(str(reason))
    plain = [item[0] for item in texts if not isinstance(item, str)]
    # One call for all of them: the tokenizers library spreads it over the CPU's cores.
    encoded = tokenizer(plain, add_special_tokens=False, return_offsets_mapping=True) if plain else {"input_ids": []}
    done = iter(range(len(plain)))
    for item in texts:
        if isinstance(item, str):
            yield item
            continue
        index = next(done)
        yield _labelled(tokenizer, encoded["input_ids"][index], encoded["offset_mapping"][index], item[1])


def _labelled(tokenizer: Any, ids: list[int], offsets: list[tuple[int, int]], spans: list[Span]) -> Tokens:
    labels = [IGNORED] * len(ids)
    for span in spans:
        for index, (start, end) in enumerate(offsets):
            # A space before a word is in the token but, in some tokenizers, not in its offsets.
            if span.start <= start and end <= span.end and start < end:
                labels[index] = ids[index]
    if spans[-1].append_eos and tokenizer.eos_token_id is not None:
        # What the template puts after an answer that it does not end (a line break) would follow the end.
        kept = max(index for index, label in enumerate(labels) if label != IGNORED) + 1
        ids, labels = [*ids[:kept], tokenizer.eos_token_id], [*labels[:kept], tokenizer.eos_token_id]
    whole = _with_bos(tokenizer, ids)
    return Tokens(whole, [IGNORED] * (len(whole) - len(ids)) + labels)


def tokenise(
    tokenizer: Any, conversations: list[list[Message]], max_seq_length: int
) -> tuple[list[Tokens], DataReport]:
    """Rows to train on, none longer than `max_seq_length` tokens, and what became of the conversations.

    A longer row loses its end; one that keeps no part of an answer is dropped. Raises JobFailure: bad_data
    where nothing is left, bad_spec where the tokenizer has no chat template.
    """
    report = DataReport(rows=len(conversations))
    rows: list[Tokens] = []
    seen: set[tuple[int, ...]] = set()
    for first in range(0, len(conversations), CHUNK):
        for row in _tokenised(tokenizer, conversations[first : first + CHUNK]):
            if isinstance(row, str):
                report.dropped[row] = report.dropped.get(row, 0) + 1
                continue
            report.longest = max(report.longest, len(row.input_ids))
            cut = Tokens(row.input_ids[:max_seq_length], row.labels[:max_seq_length])
            if all(label == IGNORED for label in cut.labels):
                reason = "no answer within max_seq_length" if len(row.labels) > max_seq_length else "an empty answer"
                report.dropped[reason] = report.dropped.get(reason, 0) + 1
                continue
            report.truncated += len(row.input_ids) > max_seq_length
            key = tuple(row.input_ids)
            report.duplicates += key in seen
            seen.add(key)
            rows.append(cut)
    if not rows:
        reasons = "; ".join(f"{count} rows: {reason}" for reason, count in report.dropped.items())
        raise bad_data(f"no row is left to train on ({reasons}); the longest has {report.longest} tokens")
    report.used = len(rows)
    report.tokens = sum(len(row.input_ids) for row in rows)
    report.trained_tokens = sum(label != IGNORED for row in rows for label in row.labels)
    report.preview = preview(tokenizer, rows[0])
    return rows, report


def preview(tokenizer: Any, row: Tokens) -> str:
    """The row as text, what is trained in double angle brackets."""
    parts: list[str] = []
    start = 0
    for index in range(1, len(row.labels) + 1):
        trained = row.labels[start] != IGNORED
        if index == len(row.labels) or (row.labels[index] != IGNORED) != trained:
            text = tokenizer.decode(row.input_ids[start:index], skip_special_tokens=False)
            parts.append(f"<<{text}>>" if trained else text)
            start = index
    return "".join(parts)
