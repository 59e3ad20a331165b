"""Score the replies to questions: sums of the log-probabilities of their tokens, given the prompt.

Shared: one row per question holds the prompt once, then the replies as a tree in which what several begin with is
there once. A token sees the prompt and its own ancestors (a mask of four dimensions) and has the position that it
would have in its reply (SpecInfer's tree attention, arXiv:2305.09781). So the scores are those of the plain way, which
runs the model over each reply with its whole prompt. Some models cannot do that: a few questions are scored in
both ways first, and where these disagree, all are scored in the plain way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, TypeVar

import numpy as np
import torch

from gpu_worker.trainer.failures import one_line
from gpu_worker.trainer.questions import Question, padded

log = logging.getLogger("loraq.trainer")
Progress = Callable[[int], None]
T = TypeVar("T")
LOGIT_BYTES = 2 * 2**30  # at most so much of logits per batch, whatever the vocabulary; and of masks
CHECKED = 4  # questions that are scored in both ways first
ALIGNED = 8  # the attention kernels copy a mask whose rows are not a multiple of this
# By how much the two ways may differ on average, as a share of a score (of 1 at least). Batches of other sizes change a
# score by 1% in bf16, 0.0005% in 32 bits; a model that ignores the mask or the positions is far beyond.
AGREEMENT = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}
# Two scores that differ by a smaller share are a tie: what is in the batch, or the GPU, may turn the pick.
TIES = {torch.float32: 1e-5, torch.float16: 4 * 2**-10, torch.bfloat16: 4 * 2**-7}


@dataclass(frozen=True)
class Tree:
    """The replies to a question, without their last tokens, which only are predicted.

    Node 0 is the end of the prompt; the nodes from 1 on are tokens, each after its parent.
    """

    tokens: list[int] = field(default_factory=lambda: [-1])
    parents: list[int] = field(default_factory=lambda: [0])
    depths: list[int] = field(default_factory=lambda: [0])
    edges: dict[tuple[int, int], int] = field(default_factory=dict)
    """(node, the token that is predicted from it) -> number."""
    replies: dict[str, list[int]] = field(default_factory=dict)
    """Letter -> its edges."""

    @classmethod
    def of(cls, replies: dict[str, list[int]]) -> Tree:
        tree, children = cls(), dict[tuple[int, int], int]()
        for letter, reply in replies.items():
            node, tree.replies[letter] = 0, []
            for place, token in enumerate(reply):
                tree.replies[letter].append(tree.edges.setdefault((node, token), len(tree.edges)))
                if place == len(reply) - 1:
                    break
                if (node, token) not in children:
                    children[node, token] = len(tree.tokens)
                    tree.tokens.append(token)
                    tree.parents.append(node)
                    tree.depths.append(tree.depths[node] + 1)
                node = children[node, token]
        return tree

    def sees(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """(nodes, nodes): itself and its ancestors, of each."""
        seen = np.eye(len(self.tokens), dtype=bool)
        for node in range(1, len(self.tokens)):
            seen[node] |= seen[self.parents[node]]
        return seen


def score(model: Any, questions: list[Question], batch_size: int, progress: Progress) -> str | None:
    """Fill in every question's scores, `batch_size` rows at a time or fewer.

    Returns why the questions do not share the computation of their prompt; None where they do.
    """
    reason = why_not_shared(model, questions)
    window = _window(model.config)
    if reason is None:
        # Beyond an attention window the mask would have to differ from layer to layer.
        short = [question for question in questions if question.longest <= window]
        if len(short) < len(questions):
            reason = f"{len(questions) - len(short)} questions are longer than the model's attention window, {window}"
    else:
        short = []
    if reason:
        log.info("each option is scored with its whole prompt: %s", reason)
    if short:
        score_shared(model, short, batch_size, progress)
    shared = {question.index for question in short}
    rest = [question for question in questions if question.index not in shared]
    if rest:
        score_plainly(model, rest, batch_size, lambda done: progress(len(short) + done))
    return reason


def why_not_shared(model: Any, questions: list[Question]) -> str | None:
    """Score a few questions in both ways; None where they agree. The scores are left empty."""
    window = _window(model.config)
    ordered = sorted((q for q in questions if q.longest <= window), key=lambda question: question.longest)
    if not ordered:
        return f"the questions are longer than the model's attention window, {window}"
    places = {round(place * (len(ordered) - 1) / (CHECKED - 1)) for place in range(CHECKED)}
    sample = [ordered[place] for place in sorted(places)]
    score_plainly(model, sample, len(sample), lambda _: None)
    plain = [question.scores for question in sample]
    try:
        score_shared(model, sample, len(sample), lambda _: None)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, RuntimeError, AttributeError, IndexError, KeyError, NotImplementedError) as error:
        return one_line(f"this model refuses the mask that it takes ({type(error).__name__}: {error})")
    far = fmean(
        abs(question.scores[letter] - score) / max(1.0, abs(score))
        for question, scores in zip(sample, plain, strict=True)
        for letter, score in scores.items()
    )
    for question in sample:
        question.scores = {}
    if not far <= AGREEMENT[model.dtype]:  # NaN is far too
        return f"this model's scores would differ by {100 * far:.2g}%"
    return None


def _window(config: Any) -> int:
    """Tokens that a token sees at most, itself included, in the layer where that is least."""
    text = config.get_text_config()
    sizes = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((size for size in sizes if isinstance(size, int) and size > 0), default=2**31)


def score_shared(model: Any, questions: list[Question], batch_size: int, progress: Progress) -> None:
    """Each prompt is computed once."""
    items = [(question, Tree.of(question.replies)) for question in questions]
    items.sort(key=_width)
    vocabulary: int = model.get_input_embeddings().weight.shape[0]
    size: int = model.dtype.itemsize

    def most_bytes(batch: Sequence[tuple[Question, Tree]]) -> int:
        nodes, width = max(len(tree.tokens) for _, tree in batch), max(map(_width, batch))
        return len(batch) * size * max(nodes * vocabulary, 2 * width * width)

    done = 0
    waiting: tuple[list[tuple[Question, Tree]], torch.Tensor] | None = None
    for batch in batches(items, batch_size, most_bytes):
        found = _edges(model, batch)
        if waiting:  # read while the GPU is at the next batch
            _sum(*waiting)
        waiting = batch, found
        done += len(batch)
        progress(done)
    if waiting:
        _sum(*waiting)


def _sum(batch: list[tuple[Question, Tree]], found: torch.Tensor) -> None:
    for (question, tree), values in zip(batch, found.tolist(), strict=True):
        question.scores = {letter: sum(values[edge] for edge in edges) for letter, edges in tree.replies.items()}


def _width(item: tuple[Question, Tree]) -> int:
    """Tokens of a row: node 0 is the prompt's last one."""
    question, tree = item
    return len(question.prompt) - 1 + len(tree.tokens)


def _edges(model: Any, batch: list[tuple[Question, Tree]]) -> torch.Tensor:
    """Log-probabilities, (questions, edges of the largest tree). All rows end in the same column."""
    nodes = max(len(tree.tokens) for _, tree in batch)  # so many columns have what is predicted
    width = max(map(_width, batch))
    width += -width % ALIGNED
    edges = max(len(tree.edges) for _, tree in batch)
    ids = np.zeros((len(batch), width), dtype=np.int64)
    positions = np.zeros((len(batch), width), dtype=np.int64)
    starts = np.empty((len(batch), 1, 1), dtype=np.int64)
    seen = np.ones((len(batch), nodes, nodes), dtype=bool)  # by what lies in the last columns, of what does
    predicted = np.zeros((len(batch), 2, edges), dtype=np.int64)  # in which of those columns, which token
    for row, (question, tree) in enumerate(batch):
        length, count = len(question.prompt), len(tree.tokens)
        start = starts[row] = width - _width((question, tree))
        ids[row, start:] = question.prompt + tree.tokens[1:]
        positions[row, start:-count] = np.arange(length - 1)
        positions[row, -count:] = np.add(tree.depths, length - 1)
        seen[row, -count:, -count:] = tree.sees()
        predicted[row, :, : len(tree.edges)] = np.array(list(tree.edges)).T
        predicted[row, 0] += nodes - count

    def there(array: Any) -> torch.Tensor:
        return torch.from_numpy(array).to(model.device)

    with torch.inference_mode():
        column = torch.arange(width, device=model.device)
        sees = (column <= column[:, None]) & (column >= there(starts))  # (questions, width, width)
        sees[:, -nodes:, -nodes:] &= there(seen)
        sees |= torch.eye(width, dtype=torch.bool, device=model.device)  # padding sees itself, or it would be NaN
        mask = torch.zeros(sees.shape, dtype=model.dtype, device=model.device)
        mask.masked_fill_(~sees, torch.finfo(model.dtype).min)
        logits = model(
            input_ids=there(ids),
            attention_mask=mask[:, None],
            position_ids=there(positions),
            use_cache=False,
            logits_to_keep=nodes,
        ).logits  # (questions, nodes, vocabulary)
        check_shape(logits, len(batch), nodes)
        return torch.stack(
            [
                row[column, token] - row.logsumexp(-1)[column]
                for row, (column, token) in zip(_as_float(logits), there(predicted), strict=True)
            ]
        )


def _as_float(logits: torch.Tensor) -> Iterator[torch.Tensor]:
    """Row by row: all of them in 32 bits would be twice as large as what LOGIT_BYTES allows."""
    return (row.float() for row in logits)


def score_plainly(model: Any, questions: list[Question], batch_size: int, progress: Progress) -> None:
    """Each reply with its whole prompt."""
    items = [(question, letter) for question in questions for letter in question.replies]
    items.sort(key=lambda item: len(item[0].prompt) + len(item[0].replies[item[1]]))
    vocabulary: int = model.get_input_embeddings().weight.shape[0]
    size: int = model.dtype.itemsize

    def most_bytes(batch: Sequence[tuple[Question, str]]) -> int:
        kept = max(_length(item) for item in batch) - min(len(question.prompt) for question, _ in batch) + 1
        return len(batch) * kept * vocabulary * size

    done = 0
    for batch in batches(items, batch_size, most_bytes):
        sequences = [question.prompt + question.replies[letter] for question, letter in batch]
        width = max(map(len, sequences))
        # Only the end of each row is needed, from the position that predicts the reply's first token.
        kept = width - min(len(question.prompt) for question, _ in batch) + 1
        logits = end_logits(model, sequences, width, kept)
        first = width - kept
        for row, (question, letter) in enumerate(batch):
            reply = torch.tensor(question.replies[letter], device=logits.device)
            start = len(question.prompt) - 1 - first
            log_probabilities = logits[row, start : start + len(reply)].float().log_softmax(-1)  # (reply, vocabulary)
            question.scores[letter] = log_probabilities.gather(1, reply[:, None]).sum().item()
        done += len(batch)
        progress(round(done / len(items) * len(questions)))
    for question in questions:  # in the order of the options, whatever the batches were
        question.scores = {letter: question.scores[letter] for letter in question.replies}


def _length(item: tuple[Question, str]) -> int:
    question, letter = item
    return len(question.prompt) + len(question.replies[letter])


def end_logits(model: Any, sequences: list[list[int]], width: int, kept: int) -> torch.Tensor:
    """What the model predicts at the last `kept` columns of the sequences, each padded on the right to `width`:
    (sequences, kept, vocabulary)."""
    ids, mask = padded(sequences, width, left=False)
    with torch.inference_mode():
        logits: torch.Tensor = model(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            use_cache=False,
            logits_to_keep=kept,
        ).logits
    check_shape(logits, len(sequences), kept)
    return logits


def check_shape(logits: torch.Tensor, rows: int, kept: int) -> None:
    """Raises RuntimeError where a model does not know `logits_to_keep`."""
    if logits.shape[:2] != (rows, kept):
        raise RuntimeError(f"the model gave logits of shape {tuple(logits.shape)}, not {(rows, kept)}")


def batches(items: list[T], size: int, most_bytes: Callable[[Sequence[T]], int]) -> Iterator[list[T]]:
    """Neighbours in length, `size` at a time, fewer where they would take more than LOGIT_BYTES."""
    start = 0
    while start < len(items):
        batch = items[start : start + size]
        while len(batch) > 1 and most_bytes(batch) > LOGIT_BYTES:
            batch = batch[: len(batch) // 2]
        yield batch
        start += len(batch)
