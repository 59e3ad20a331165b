"""Ask a base model, or a trained adapter, what the metrics need; reads top to bottom.

Likelihood: each option's score is the exact log-probability of "The correct answer is X." after the question's
prompt, the highest one is the pick; normalised, the score per character of the option's text. Generated: the
greedy answer, from which the option is extracted. Perplexity and BLEU need no options, only reference answers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpu_worker.trainer import model as models  # first: it imports Unsloth

# isort: split
from scipy.stats import binomtest

from gpu_worker.protocol import Progress, Request
from gpu_worker.trainer import usage
from gpu_worker.trainer.clock import Clock
from gpu_worker.trainer.data import chat_of, end_ids
from gpu_worker.trainer.failures import bad_data
from gpu_worker.trainer.greedy import greedy
from gpu_worker.trainer.likelihood import TIES, score
from gpu_worker.trainer.merge import Merged
from gpu_worker.trainer.parked import loaded_for_asking
from gpu_worker.trainer.questions import Question, to_questions
from gpu_worker.trainer.texts import Text, add_losses, bleu, perplexity, to_texts
from jobqueue import answers, rows
from jobqueue import written as written_answers
from jobqueue.chat import Chat
from jobqueue.example import MultipleChoice
from jobqueue.extraction import extract, has_asked_form
from jobqueue.job_spec import EvaluateSpec
from jobqueue.memory import evaluation_peak
from jobqueue.spec import BY_QUESTION

log = logging.getLogger("loraq.trainer")
Report = Callable[[Progress], None]
# Scoring keeps no cache and has no decoding loop, so more sequences fit than when answers are generated. What is
# in a batch with a row changes its rounding: only equal batches give equal scores in 16 bits.
SCORED_PER_GENERATED = 4
MOST_SCORED = 64  # in 16 bits the batch decides how numbers are rounded: from 16 answers on it is always the same
INTERVAL = 0.95


def evaluate(spec: EvaluateSpec, request: Request, report: Report) -> dict[str, Any]:
    """Ask what `spec` says; one line per question goes into `request.output`/questions.jsonl, one per reference answer
    into answers.jsonl.

    Returns the outcome. Raises JobFailure, DataError, and whatever torch raises.
    """
    asked, metrics = spec.evaluation, spec.evaluation.metrics
    clock = Clock()
    usage.reset_peak()

    report(Progress("load"))
    file = rows.load(asked)
    choices = [(index, example.choice) for index, example in file.examples if example.choice is not None]
    by_question = [metric for metric in metrics if metric in BY_QUESTION]
    if by_question and not choices:
        raise bad_data(
            f"the metrics {', '.join(by_question)} need multiple-choice rows (question, options, answer); "
            f"{asked.source} has the format {file.summary.format}"
        )
    clock.lap("data_s")
    merged = Merged(spec.members, request.members, Path(request.output) / "adapter") if spec.members else None
    with loaded_for_asking(spec, merged or request.adapter) as base:
        outcome = _ask(spec, request, report, clock, file, choices, base)
    clock.lap("save_s")
    return outcome | {"time": clock.report(), "versions": usage.versions()}


def _ask(
    spec: EvaluateSpec,
    request: Request,
    report: Report,
    clock: Clock,
    file: rows.Rows,
    choices: list[tuple[int, MultipleChoice]],
    base: models.Loaded,
) -> dict[str, Any]:
    """Everything that needs the model."""
    asked, metrics = spec.evaluation, spec.evaluation.metrics
    by_question = [metric for metric in metrics if metric in BY_QUESTION]
    model, tokenizer = base.model, base.tokenizer
    chat = chat_of(tokenizer, spec.chat_template)
    reserved_at_start = usage.reserved()
    clock.lap("load_s")

    report(Progress("data"))
    limit = min(spec.max_seq_length, getattr(model.config, "max_position_embeddings", spec.max_seq_length))
    new_tokens = asked.max_new_tokens if "generated" in metrics or "bleu" in metrics else 0
    questions, texts = list[Question](), list[Text]()
    refused, dropped = dict[str, int](), dict[str, int]()
    too_long = 0
    if by_question:
        questions, too_long, refused = to_questions(chat, choices, limit, new_tokens)
    if len(by_question) < len(metrics):
        texts, dropped = to_texts(chat, file.examples, limit, new_tokens)
    clock.lap("data_s")

    longest = max([question.longest for question in questions] + [len(text.row.input_ids) for text in texts], default=0)
    estimated = _estimated(spec, model.config, longest, request.correction)
    batch = asked.per_device_eval_batch_size
    scored = min(batch * SCORED_PER_GENERATED, MOST_SCORED)
    steps = sum(len(questions if metric in BY_QUESTION else texts) for metric in metrics)
    before = 0

    def progress(done: int) -> None:
        report(Progress("evaluate", step=before + done, steps=steps, reserved_bytes=usage.reserved()))

    outcome: dict[str, Any] = {"questions": len(questions)}
    if "likelihood" in metrics:
        plain_because = score(model, questions, scored, progress)
        outcome |= _likelihood(questions, TIES[model.dtype], plain_because)
        before += len(questions)
        clock.lap("likelihood_s")
    if "generated" in metrics:
        generate(model, tokenizer, chat, questions, batch, new_tokens, progress)
        outcome["generated"] = _generated(questions)
        before += len(questions)
        clock.lap("generated_s")
    if "perplexity" in metrics:
        add_losses(model, texts, batch, progress)
        outcome["perplexity"] = perplexity(texts)
        before += len(texts)
        clock.lap("perplexity_s")
    if "bleu" in metrics:
        written = {question.index: question.text for question in questions if question.text is not None}
        for text in texts:
            text.text = written.get(text.index)
        unwritten = [text for text in texts if text.text is None]
        generate(model, tokenizer, chat, unwritten, batch, new_tokens, progress)
        outcome["bleu"] = bleu(texts)
        clock.lap("bleu_s")

    memory = usage.memory(reserved_at_start)
    _write(request, answers.FILE, questions)
    if texts:
        _write(request, written_answers.FILE, texts)
    clock.lap("save_s")
    if spec.members:
        outcome["members"] = list(request.members)
    return outcome | {
        "commit": models.commit_of(model),
        "memory": memory | {"estimated_bytes": estimated},
        "data": file.summary.report() | {"too_long": too_long, "dropped": refused | dropped},
    }


def _estimated(spec: EvaluateSpec, config: Any, row_tokens: int, correction: float) -> int:
    """Peak bytes on the GPU; 0 where there is none, or the estimate does not know such a model."""
    if not models.ON_GPU:
        return 0
    try:
        return int(evaluation_peak(config.to_dict(), spec, row_tokens) * correction)
    except (KeyError, TypeError):
        return 0


def _likelihood(questions: list[Question], tie: float, plain_because: str | None) -> dict[str, Any]:
    for question in questions:
        question.choose(tie)
    part = {metric: _accuracy(questions, metric) for metric in ("likelihood", "likelihood_normalised")}
    for metric in part:
        part[metric]["ties"] = sum(metric in question.ties for question in questions)
    part["likelihood"]["plain_because"] = plain_because
    return part


def _generated(questions: list[Question]) -> dict[str, Any]:
    for question in questions:
        question.picks["generated"] = extract(question.text or "", question.choice.options)
    unparsed = sum(question.picks["generated"] is None for question in questions)
    return _accuracy(questions, "generated") | {
        "answer_form": sum(has_asked_form(question.text or "") for question in questions) / len(questions),
        "parsed": 1 - unparsed / len(questions),
        "unparsed": unparsed,
    }


def _write(request: Request, name: str, items: Sequence[Question | Text]) -> None:
    with (Path(request.output) / name).open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(item.line(), ensure_ascii=False) + "\n" for item in items)


def generate(
    model: Any,
    tokenizer: Any,
    chat: Chat,
    questions: Sequence[Question | Text],
    batch_size: int,
    new_tokens: int,
    progress: Callable[[int], None],
) -> None:
    """Fill in every question's greedy answer, without its end token."""
    ends = end_ids(chat, model)
    ordered = sorted(questions, key=lambda question: len(question.prompt))
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        prompts = [question.prompt for question in batch]
        answers = greedy(model, prompts, ends, tokenizer.pad_token_id, new_tokens)
        for question, answer in zip(batch, answers, strict=True):
            question.text = tokenizer.decode(answer, skip_special_tokens=True)
        progress(start + len(batch))


def _accuracy(questions: list[Question], metric: str) -> dict[str, Any]:
    """How many picks are right, with the 95% Wilson interval."""
    correct = sum(question.right(metric) for question in questions)
    interval = binomtest(correct, len(questions)).proportion_ci(INTERVAL, method="wilson")
    return {
        "correct": correct,
        "accuracy": correct / len(questions),
        "interval": [float(interval.low), float(interval.high)],
    }
