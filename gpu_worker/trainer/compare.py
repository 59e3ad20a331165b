"""Whether a model that was written in another form answers as the one that it was made from, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gpu_worker.trainer.greedy import greedy
from gpu_worker.trainer.likelihood import end_logits
from jobqueue.memory import COMPARED_TOKENS

TOP = 10  # tokens whose log-probabilities are compared at each place: of a sure answer the first alone hardly moves
# Nats by which rounding may move these on average, where this is computed in. bf16 keeps logits between 16 and 32 to an
# eighth: four such roundings (of a logit and of the highest one, in both models) are 0.06 on average.
TOLERANCE = {torch.float32: 0.05, torch.float16: 0.05, torch.bfloat16: 0.15}
EIGHT_BITS = 0.1  # more, where weights were rounded to 8 bits


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
    difference: float  # of a log-probability, in nats: the mean over the TOP tokens at each place


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
    differences = []
    for one in answers:
        theirs = _log_probs(model, one.prompt, one.written)
        if theirs.shape != one.log_probs.shape:
            raise ValueError(f"it knows {theirs.shape[1]} tokens, not {one.log_probs.shape[1]}")
        tops = one.log_probs.topk(TOP, dim=1)  # (places, TOP)
        differences.append((theirs.gather(1, tops.indices) - tops.values).abs())
        tokens += len(theirs)
        same += int((theirs.argmax(dim=1) == tops.indices[:, 0]).sum())
    return Closeness(tokens, same, float(torch.cat(differences).mean()))


def _log_probs(model: Any, prompt: list[int], written: list[int]) -> torch.Tensor:
    """Of every token at each place of an answer, and after it: (written + 1, vocabulary)."""
    sequence = prompt + written
    logits = end_logits(model, [sequence], len(sequence), len(written) + 1)[0]
    return logits.float().log_softmax(dim=1).cpu()
