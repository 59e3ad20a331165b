"""Score the replies to questions: sums of the log-probabilities of their tokens, given the prompt.

Shared: the model runs over each prompt once (shared_prompts.py). The scores are those of the plain way, which runs the
model over each reply with its whole prompt. Some models cannot do that: a few questions are scored in both ways first,
and where these disagree, all are scored in the plain way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from statistics import fmean
from typing import Any, TypeVar

import torch

from gpu_worker.trainer.failures import one_line
from gpu_worker.trainer.questions import Question, padded
from gpu_worker.trainer.shared_prompts import Row, Tree, check_shape, edge_log_probabilities

log = logging.getLogger("loraq.trainer")
Progress = Callable[[int], None]
T = TypeVar("T")
LOGIT_BYTES = 2 * 2**30  # at most so much of logits per batch, whatever the vocabulary; and of masks
CHECKED = 4  # questions that are scored in both ways first
# By how much the two ways may differ on average, as a share of a score (of 1 at least). Batches of other sizes change a
# score by 1% in bf16, 0.0005% in 32 bits; a model that ignores the mask or the positions is far beyond.
AGREEMENT = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}
# Two scores that differ by a smaller share are a tie: what is in the batch, or the GPU, may turn the pick.
TIES = {torch.float32: 1e-5, torch.float16: 4 * 2**-10, torch.bfloat16: 4 * 2**-7}


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
    """Each prompt is computed once, and what all prompts of a batch begin with once for the batch."""
    rows = sorted((Row(question.prompt, Tree.of(question.replies), question) for question in questions), key=len)
    vocabulary: int = model.get_input_embeddings().weight.shape[0]
    size: int = model.dtype.itemsize

    def most_bytes(batch: Sequence[Row]) -> int:
        nodes, width = sum(len(row.tree.tokens) for row in batch), max(map(len, batch))
        return size * max(nodes * vocabulary, 2 * len(batch) * width * width)

    done = 0
    waiting: tuple[list[Row], torch.Tensor] | None = None
    for batch in batches(rows, batch_size, most_bytes):
        found = edge_log_probabilities(model, batch)
        if waiting:  # read while the GPU is at the next batch
            _sum(*waiting)
        waiting = batch, found
        done += len(batch)
        progress(done)
    if waiting:
        _sum(*waiting)


def _sum(batch: list[Row], found: torch.Tensor) -> None:
    values = iter(found.tolist())
    for row in batch:
        edges = list(islice(values, len(row.tree.edges)))
        row.question.scores = {letter: sum(edges[edge] for edge in path) for letter, path in row.tree.replies.items()}


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


def batches(items: list[T], size: int, most_bytes: Callable[[Sequence[T]], int]) -> Iterator[list[T]]:
    """Neighbours in length, `size` at a time, fewer where they would take more than LOGIT_BYTES."""
    start = 0
    while start < len(items):
        batch = items[start : start + size]
        while len(batch) > 1 and most_bytes(batch) > LOGIT_BYTES:
            batch = batch[: len(batch) // 2]
        yield batch
        start += len(batch)
