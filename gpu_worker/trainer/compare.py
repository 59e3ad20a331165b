"""Whether a model that was written in another form answers as the one that it was made from, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gpu_worker.trainer.greedy import greedy
from gpu_worker.trainer.likelihood import end_logits
from jobqueue.memory import COMPARED_TOKENS

# Nats that rounding may move a log-probability by: of the weights to 16 or 8 bits, and of the computation.
TOLERANCE, TOLERANCE_8BIT = 0.25, 0.5


@dataclass(frozen=True)
class Answer:
    """What the model to compare with wrote after a prompt."""

    prompt: list[int]  # token ids
    written: list[int]  # token ids, greedy, without one that ends it
    log_probs: torch.Tensor  # (written + 1, vocabulary), in 32 bits, in the host's memory; the last: of what comes next


@dataclass(frozen=True)
class Closeness:
    """How near another model's answers are."""

    tokens: int  # compared, of all answers
    same_tokens: int  # that the other would have written too, after the same words
    difference: float
    """The largest difference of a log-probability, in nats, of the tokens that one of the two would write. Where it is
    at most d, the other writes another token only where the first had one within 2 d of its own."""


def answer(model: Any, prompts: Sequence[list[int]], ends: Sequence[int], pad: int | None) -> list[Answer]:
    """The model's greedy answers, fewer than COMPARED_TOKENS each."""
    answers = []
    for prompt in prompts:
        [written] = greedy(model, [prompt], ends, pad, COMPARED_TOKENS - 1)
        answers.append(Answer(prompt, written, _log_probs(model, prompt, written)))
    return answers


def closeness(model: Any, answers: Sequence[Answer]) -> Closeness:
    """Compare `model` with the one that gave the answers. Raises ValueError where it has another vocabulary."""
    tokens = same = 0
    worst = torch.tensor(0.0)
    for one in answers:
        theirs = _log_probs(model, one.prompt, one.written)
        if theirs.shape != one.log_probs.shape:
            raise ValueError(f"it knows {theirs.shape[1]} tokens, not {one.log_probs.shape[1]}")
        chosen = torch.stack([one.log_probs.argmax(dim=1), theirs.argmax(dim=1)], dim=1)  # (places, 2)
        differences = theirs.gather(1, chosen) - one.log_probs.gather(1, chosen)
        worst = torch.maximum(worst, differences.abs().max())  # a NaN stays one
        tokens += len(chosen)
        same += int((chosen[:, 0] == chosen[:, 1]).sum())
    return Closeness(tokens, same, float(worst))


def _log_probs(model: Any, prompt: list[int], written: list[int]) -> torch.Tensor:
    """Of every token at each place of an answer, and after it: (written + 1, vocabulary)."""
    sequence = prompt + written
    logits = end_logits(model, [sequence], len(sequence), len(written) + 1)[0]
    return logits.float().log_softmax(dim=1).cpu()
