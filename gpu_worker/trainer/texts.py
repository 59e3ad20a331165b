"""Reference answers and what a model makes of them: perplexity, and BLEU of the answers that it writes itself."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gpu_worker.trainer.failures import bad_data
from gpu_worker.trainer.likelihood import Progress, batches, end_logits
from jobqueue.chat import BadTurn, Chat
from jobqueue.example import Example, Message
from jobqueue.tokens import IGNORED, Tokens, label

POSITIONS = 512  # whose log-probabilities are computed at a time, in 32 bits


@dataclass
class Text:
    """One row and what became of it."""

    index: int  # row of the file, from 0
    prompt: list[int]  # token ids of everything before the last answer
    question: str  # what it answers, as people read it
    reference: str  # the last answer
    row: Tokens  # the conversation; its labels are the answers, with the tokens that end them, as in training
    loss: float | None = None  # summed over the labels, in nats
    text: str | None = None  # the answer that the model wrote

    def line(self) -> dict[str, Any]:
        loss = None if self.loss is None else round(self.loss, 6)
        tokens = None if self.loss is None else self.row.trained
        return {
            "index": self.index, "question": self.question, "reference": self.reference, "text": self.text,
            "loss": loss, "tokens": tokens,
        }  # fmt: skip


def to_texts(
    chat: Chat, examples: Sequence[tuple[int, Example]], limit: int, new_tokens: int
) -> tuple[list[Text], dict[str, int]]:
    """The rows as token ids, and how many were left out by reason; `new_tokens`: 0 where nothing is to be written.

    Raises JobFailure where no row is left.
    """
    texts: list[Text] = []
    left_out = Counter[str]()
    rows = label(chat, [example for _, example in examples])
    for (index, example), row in zip(examples, rows, strict=True):
        if isinstance(row, str) or not row.trained:
            left_out[row if isinstance(row, str) else "an empty answer"] += 1
            continue
        turns = example.conversation
        last = max((turn for turn, message in enumerate(turns) if message["role"] == "assistant"), default=0)
        reference = str(turns[last].get("content") or "").strip() if turns else example.text or ""
        try:
            prompt = chat.prompt_ids(turns[:last]) if new_tokens and last else []
        except BadTurn as error:
            left_out[str(error)] += 1
            continue
        if new_tokens and not prompt:
            left_out["plain text has no answer to write"] += 1
        elif max(len(row.input_ids), len(prompt) + new_tokens) > limit:
            left_out[f"longer than {limit} tokens"] += 1
        else:
            texts.append(Text(index, prompt, _question(turns[:last]), reference, row))
    if not texts:
        reasons = "; ".join(f"{count} rows: {why}" for why, count in left_out.items())
        raise bad_data(f"no row is left to evaluate: {reasons}")
    return texts, dict(left_out)


def _question(turns: list[Message]) -> str:
    """What the user said; where there was more before, everything, each turn with its role."""
    said = [turn for turn in turns if turn["role"] != "system"]
    if len(said) == 1:
        return str(said[0].get("content") or "")
    return "\n\n".join(f"{turn['role']}: {turn.get('content') or ''}" for turn in said)


def add_losses(model: Any, texts: list[Text], batch_size: int, progress: Progress) -> None:
    """Fill in the loss of every text."""
    vocabulary: int = model.get_input_embeddings().weight.shape[0]
    size: int = model.dtype.itemsize

    def kept_of(batch: Sequence[Text]) -> int:
        """Columns from the first that predicts a label on."""
        return max(len(text.row.labels) for text in batch) - min(_first(text) for text in batch) + 1

    done = 0
    ordered = sorted(texts, key=lambda text: len(text.row.labels))
    for batch in batches(ordered, batch_size, lambda batch: len(batch) * kept_of(batch) * vocabulary * size):
        width, kept = max(len(text.row.labels) for text in batch), kept_of(batch)
        logits = end_logits(model, [text.row.input_ids for text in batch], width, kept)
        for text, row in zip(batch, logits, strict=True):
            text.loss = _loss(row, text.row.labels, width - kept)
        done += len(batch)
        progress(done)


def _first(text: Text) -> int:
    return next(place for place, token in enumerate(text.row.labels) if token != IGNORED)


def _loss(logits: torch.Tensor, labels: list[int], first: int) -> float:
    """Summed over the labels; `logits`: (columns from `first` on, vocabulary), each of which predicts the next."""
    places = [place for place, token in enumerate(labels) if token != IGNORED and place > 0]
    total = 0.0
    for start in range(0, len(places), POSITIONS):
        some = places[start : start + POSITIONS]
        rows = logits[torch.tensor(some, device=logits.device) - 1 - first].float()
        wanted = torch.tensor([labels[place] for place in some], device=logits.device)
        total += torch.nn.functional.cross_entropy(rows, wanted, reduction="sum").item()
    return total


def perplexity(texts: list[Text]) -> dict[str, Any]:
    """exp of the mean loss over all tokens of all reference answers: a long answer counts for more than a short one."""
    tokens = sum(text.row.trained for text in texts)
    loss = math.fsum(text.loss or 0.0 for text in texts) / tokens
    value = math.exp(loss) if loss < 700 else None  # beyond what a float holds
    return {"perplexity": value, "loss": loss, "tokens": tokens, "rows": len(texts)}


def bleu(texts: list[Text]) -> dict[str, Any]:
    """Of the whole corpus, 0 to 100, with sacrebleu's own settings (Post 2018), which its signature names."""
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU()
    found = metric.corpus_score([text.text or "" for text in texts], [[text.reference for text in texts]])
    return {"bleu": found.score, "signature": str(metric.get_signature()), "rows": len(texts)}
