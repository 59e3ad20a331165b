"""Ask a base model, or a trained adapter, multiple-choice questions; reads top to bottom.

Likelihood: each option's score is the exact log-probability of "The correct answer is X." after the question's
prompt, the highest one is the pick; normalised, the score per character of the option's text. Generated: the
greedy answer, from which the option is extracted.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_worker.trainer import model as models  # first: it imports Unsloth

# isort: split
import torch
from scipy.stats import binomtest

from gpu_worker.protocol import Progress, Request
from gpu_worker.trainer import usage
from gpu_worker.trainer.clock import Clock
from gpu_worker.trainer.data import chat_of, end_ids
from gpu_worker.trainer.failures import bad_data
from jobqueue import rows
from jobqueue.chat import BadTurn, Chat
from jobqueue.example import MultipleChoice
from jobqueue.extraction import extract, has_asked_form
from jobqueue.spec import EvaluateSpec

log = logging.getLogger("loraq.trainer")
Report = Callable[[Progress], None]
# Scoring keeps no cache and has no decoding loop, so more sequences fit than when answers are generated. What is
# in a batch with a row changes its rounding: only equal batches give equal scores in 16 bits.
SCORED_PER_GENERATED = 4
MOST_SCORED = 64  # in 16 bits the batch decides how numbers are rounded: from 16 answers on it is always the same
LOGIT_BYTES = 2 * 2**30  # at most so much of logits per batch, whatever the vocabulary
INTERVAL = 0.95


@dataclass
class Question:
    """One question and what became of it."""

    index: int  # row of the file, from 0
    choice: MultipleChoice
    prompt: list[int]  # token ids, the generation prompt included
    replies: dict[str, list[int]]  # letter -> token ids of the answer that names it
    scores: dict[str, float] = field(default_factory=dict)  # letter -> natural log-probability
    text: str | None = None
    picks: dict[str, str | None] = field(default_factory=dict)  # metric -> letter

    def right(self, metric: str) -> bool:
        """By the option's text: rows exist in which two letters have the same."""
        pick, options = self.picks[metric], self.choice.options
        return pick is not None and options[pick].strip() == options[self.choice.answer].strip()

    def line(self) -> dict[str, Any]:
        scores = {letter: round(score, 6) for letter, score in self.scores.items()}
        return {
            "index": self.index, "answer": self.choice.answer, "picks": self.picks, "scores": scores, "text": self.text,
            "right": [metric for metric in self.picks if self.right(metric)],
            "question": self.choice.question, "options": self.choice.options,
        }  # fmt: skip


def evaluate(spec: EvaluateSpec, request: Request, report: Report) -> dict[str, Any]:
    """Ask what `spec` says; one line per question goes into `request.output`/questions.jsonl.

    Returns the outcome. Raises JobFailure, DataError, and whatever torch raises.
    """
    asked = spec.evaluation
    clock = Clock()
    usage.reset_peak()

    report(Progress("load"))
    file = rows.load(asked)
    choices = [(index, example.choice) for index, example in file.examples if example.choice is not None]
    if not choices:
        raise bad_data(
            f"the metrics {', '.join(asked.metrics)} need multiple-choice rows (question, options, answer); "
            f"{asked.source} has the format {file.summary.format}"
        )
    clock.lap("data_s")
    if spec.method == "full" and request.adapter:  # what it trained is a whole model
        base = models.load_for_asking(request.adapter, spec.load_in_4bit, None)
    else:
        base = models.load_for_asking(spec.base_model, spec.load_in_4bit, request.adapter)
    model, chat = base.model, chat_of(base.tokenizer, spec.chat_template)
    reserved_at_start = usage.reserved()
    clock.lap("load_s")

    report(Progress("data"))
    limit = min(spec.max_seq_length, getattr(model.config, "max_position_embeddings", spec.max_seq_length))
    new_tokens = asked.max_new_tokens if "generated" in asked.metrics else 0
    questions, too_long = _questions(chat, choices, limit, new_tokens)
    clock.lap("data_s")

    steps = len(questions) * len(asked.metrics)

    def progress(done: int) -> None:
        report(Progress("evaluate", step=done, steps=steps, reserved_bytes=usage.reserved()))

    batch = asked.per_device_eval_batch_size
    outcome: dict[str, Any] = {"questions": len(questions)}
    if "likelihood" in asked.metrics:
        score(model, questions, min(batch * SCORED_PER_GENERATED, MOST_SCORED), progress)
        for question in questions:
            scores, options = question.scores, question.choice.options
            question.picks["likelihood"] = max(scores, key=scores.__getitem__)
            # Per character of the option, as lm-evaluation-harness's acc_norm.
            normalised = {letter: value / len(options[letter]) for letter, value in scores.items()}
            question.picks["likelihood_normalised"] = max(normalised, key=normalised.__getitem__)
        outcome["likelihood"] = _accuracy(questions, "likelihood")
        outcome["likelihood_normalised"] = _accuracy(questions, "likelihood_normalised")
        clock.lap("likelihood_s")
    if "generated" in asked.metrics:
        done = len(questions) if "likelihood" in asked.metrics else 0
        generate(model, base.tokenizer, chat, questions, batch, new_tokens, lambda count: progress(done + count))
        for question in questions:
            question.picks["generated"] = extract(question.text or "", question.choice.options)
        outcome["generated"] = _accuracy(questions, "generated") | {
            "answer_form": sum(has_asked_form(q.text or "") for q in questions) / len(questions),
            "parsed": sum(q.picks["generated"] is not None for q in questions) / len(questions),
        }
        clock.lap("generated_s")

    memory = usage.memory(reserved_at_start)
    with (Path(request.output) / "questions.jsonl").open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(question.line(), ensure_ascii=False) + "\n" for question in questions)
    clock.lap("save_s")
    return outcome | {
        "memory": memory,
        "time": clock.report(),
        "data": file.summary.report() | {"too_long": too_long},
        "versions": usage.versions(),
    }


def _questions(
    chat: Chat, choices: list[tuple[int, MultipleChoice]], limit: int, new_tokens: int
) -> tuple[list[Question], int]:
    """The questions as token ids, and how many were left out because they exceed `limit` tokens."""
    questions: list[Question] = []
    too_long = 0
    lead = None
    for index, choice in choices:
        try:
            if lead is None:
                # Some templates put a space between the prompt and the answer; the same for every question.
                reply = choice.reply(choice.answer)
                lead = chat.answer_text(choice.conversation()).removesuffix(reply)
            prompt = chat.prompt_ids(choice.conversation()[:-1])
        except BadTurn as error:
            raise bad_data(str(error)) from error
        replies = {letter: chat.ids(lead + choice.reply(letter)) for letter in choice.options}
        if len(prompt) + max(new_tokens, *map(len, replies.values())) > limit:
            too_long += 1
            continue
        questions.append(Question(index, choice, prompt, replies))
    if too_long:
        log.warning("%d questions are longer than %d tokens and are left out", too_long, limit)
    if not questions:
        raise bad_data(f"every question is longer than {limit} tokens; raise max_seq_length if the model allows it")
    return questions, too_long


def score(model: Any, questions: list[Question], batch_size: int, progress: Callable[[int], None]) -> None:
    """Fill in every question's scores: sums of log-probabilities over the tokens of each reply."""
    items = [(question, letter) for question in questions for letter in question.replies]
    items.sort(key=lambda item: len(item[0].prompt) + len(item[0].replies[item[1]]))
    vocabulary = model.get_input_embeddings().weight.shape[0]
    done = 0
    for batch in _batches(items, batch_size, vocabulary):
        sequences = [question.prompt + question.replies[letter] for question, letter in batch]
        width = max(map(len, sequences))
        # Only the end of each row is needed, from the position that predicts the reply's first token.
        kept = width - min(len(question.prompt) for question, _ in batch) + 1
        ids, mask = _padded(sequences, width, left=False)
        with torch.inference_mode():
            logits = model(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                use_cache=False,
                logits_to_keep=kept,
            ).logits  # (batch, kept, vocabulary)
        if logits.shape[:2] != (len(batch), kept):
            raise RuntimeError(f"the model gave logits of shape {tuple(logits.shape)}, not {(len(batch), kept)}")
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


def _batches(items: list[tuple[Question, str]], size: int, vocabulary: int) -> Iterator[list[tuple[Question, str]]]:
    """Neighbours in length, `size` at a time, fewer where their logits would be too large."""
    start = 0
    while start < len(items):
        batch = items[start : start + size]
        longest = max(len(question.replies[letter]) for question, letter in batch)
        batch = batch[: max(1, LOGIT_BYTES // (2 * longest * vocabulary * 2))]
        yield batch
        start += len(batch)


def generate(
    model: Any,
    tokenizer: Any,
    chat: Chat,
    questions: list[Question],
    batch_size: int,
    new_tokens: int,
    progress: Callable[[int], None],
) -> None:
    """Fill in every question's greedy answer, without its end token."""
    ends = end_ids(chat, model)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    ordered = sorted(questions, key=lambda question: len(question.prompt))
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        width = max(len(question.prompt) for question in batch)
        ids, mask = _padded([question.prompt for question in batch], width, left=True, pad=pad)
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=new_tokens,
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,  # some models' own settings have another
                eos_token_id=ends,
                pad_token_id=pad,
            )  # (batch, width + at most new_tokens)
        for question, row in zip(batch, output[:, width:].tolist(), strict=True):
            stop = next((place for place, token in enumerate(row) if token in ends), len(row))
            question.text = tokenizer.decode(row[:stop], skip_special_tokens=True)
        progress(start + len(batch))


def _padded(sequences: list[list[int]], width: int, left: bool, pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, each (sequences, width)."""
    ids = torch.full((len(sequences), width), pad)
    mask = torch.zeros((len(sequences), width), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        place = slice(width - len(sequence), width) if left else slice(0, len(sequence))
        ids[row, place] = torch.tensor(sequence)
        mask[row, place] = 1
    return ids, mask


def _accuracy(questions: list[Question], metric: str) -> dict[str, Any]:
    """How many picks are right, with the 95% Wilson interval."""
    correct = sum(question.right(metric) for question in questions)
    interval = binomtest(correct, len(questions)).proportion_ci(INTERVAL, method="wilson")
    return {
        "correct": correct,
        "accuracy": correct / len(questions),
        "interval": [float(interval.low), float(interval.high)],
    }
