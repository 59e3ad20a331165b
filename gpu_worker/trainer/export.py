"""A trained adapter as a model of its own, in 16 bits or as GGUF; reads top to bottom.

The adapter is merged into the base model's own 16-bit weights, also where it was trained on 4-bit ones: what those were
rounded to is no part of the model. What was written is loaded anew, as anybody would, and must answer as the base model
with the adapter does.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gpu_worker.trainer import model as models  # first: it imports Unsloth

# isort: split
import torch

from gpu_worker.protocol import Progress, Request
from gpu_worker.trainer import gguf, parked, published, stock, usage
from gpu_worker.trainer.clock import Clock
from gpu_worker.trainer.compare import EIGHT_BITS, TOLERANCE, Answer, answer, closeness
from gpu_worker.trainer.data import chat_of, end_ids
from gpu_worker.trainer.failures import JobFailure, bad_data, bad_spec, one_line
from gpu_worker.trainer.watch import Report
from jobqueue import rows
from jobqueue.chat import BadTurn, Chat
from jobqueue.example import Message
from jobqueue.job import FailureReason
from jobqueue.job_spec import ExportSpec
from jobqueue.memory import COMPARED_TOKENS, export_peak
from jobqueue.spec import Dtype

log = logging.getLogger("loraq.trainer")
MERGED = "merged_16bit"
PROMPTS, LOOKED_AT = 4, 64  # rows that are asked, of the first so many
SIXTEEN_BITS = (torch.bfloat16, torch.float16)

Prompt = list[Message] | str
"""A conversation that waits for its answer, or the beginning of a text."""


@dataclass(frozen=True)
class Reference:
    """The answers of what was trained."""

    prompts: list[Prompt]
    answers: list[Answer]
    base_difference: float | None
    """Of the base model without the adapter; None: method full has no adapter."""


def export(spec: ExportSpec, request: Request, report: Report) -> dict[str, Any]:
    """Write what `spec` says below `request.output`. Returns the outcome.

    Raises JobFailure (wrong_export where what was written answers otherwise), DataError, and whatever torch raises.
    """
    clock, output, options = Clock(), Path(request.output), spec.export
    converter = gguf.converter(request.gguf_converter) if "gguf" in options.formats else None
    prompts = _prompts(spec)
    clock.lap("data_s")

    report(Progress("load"))
    merged = output / MERGED
    reference, memory = _merge(spec, request, prompts, merged)
    models.free()
    clock.lap("merge_s")

    report(Progress("evaluate"))
    made = [_checked(MERGED, merged, reference, spec.dtype) | {"path": MERGED}]
    models.free()
    clock.lap("check_s")

    if converter is not None:
        report(Progress("save"))
        outtype = options.outtype
        file = output / "gguf" / f"{spec.adapter_job}-{outtype.upper()}.gguf"
        file.parent.mkdir()
        gguf.write(merged, file, outtype, converter)
        clock.lap("gguf_s")
        report(Progress("evaluate"))
        with TemporaryDirectory(dir=output) as folder:
            gguf.read(file, Path(folder))
            checked = _checked(f"gguf {outtype}", Path(folder), reference, spec.dtype)
        made.append(checked | {"path": f"gguf/{file.name}"})
        clock.lap("check_s")
    if MERGED not in options.formats:
        shutil.rmtree(merged)
        del made[0]
    return {"exports": made, "memory": memory, "time": clock.report(), "versions": usage.versions()}


def _merge(spec: ExportSpec, request: Request, prompts: list[Prompt], folder: Path) -> tuple[Reference, dict[str, Any]]:
    """Write the model in 16 bits into `folder`. Returns what it was to answer, and the memory that this took."""
    assert request.adapter is not None
    parked.forget()
    usage.reset_peak()
    whole = spec.method == "full"  # what was trained is a model already
    name = published.resolve(request.adapter if whole else spec.base_model)
    revision = None if whole else spec.revision
    config = published.config_of(name, revision)
    if getattr(config, "quantization_config", None):
        raise bad_spec(
            f"{spec.base_model} is quantised, and an adapter is merged into 16-bit weights: "
            "train it on the model that this was made from (method qlora loads that in 4 bits)"
        )
    with stock.classes(config):
        base = models.load_for_asking(name, False, revision, spec.dtype)
        model, tokenizer = base.model, base.tokenizer
        reserved_at_start = usage.reserved()
        chat = chat_of(tokenizer, spec.chat_template)
        ends = end_ids(chat, model)
        most = len(prompts) if spec.export.prompts else PROMPTS
        asked = _askable(chat, prompts, spec.max_seq_length, most)
        tuned = None if whole else parked.with_adapter(model, request.adapter)  # it puts the adapter into `model`
        answers = answer(model, [ids for _, ids in asked], ends, tokenizer.pad_token_id)
        for one in answers:
            log.info("asked: %s\nanswer: %s", chat.decode(one.prompt), chat.decode(one.written))
        base_difference = None
        if tuned is not None:
            with tuned.disable_adapter():
                base_difference = closeness(model, answers).difference
            try:
                model = tuned.merge_and_unload(safe_merge=True)
            except ValueError as error:  # NaN
                raise _wrong(f"the adapter cannot be merged: {error}") from error
        model.generation_config.eos_token_id = ends  # the chat template's end of turn may not be the model's own
        # Method full saves what float16 was computed with in 32 bits.
        stored = config.dtype if config.dtype in SIXTEEN_BITS else getattr(torch, spec.dtype or "bfloat16")
        model.to(stored).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    memory = usage.memory(reserved_at_start) | {"estimated_bytes": _estimated(spec, config, request.correction)}
    return Reference([prompt for prompt, _ in asked], answers, base_difference), memory


def _checked(what: str, folder: Path, reference: Reference, computed_in: Dtype | None) -> dict[str, Any]:
    """The outcome's word of a model that was written. Raises JobFailure (wrong_export)."""
    name = str(folder)
    with stock.classes(published.config_of(name, None)):
        written = models.load_for_asking(name, False, computed_in=computed_in)
        chat = chat_of(written.tokenizer)
        read = [_ids(chat, prompt) for prompt in reference.prompts]
        if read != [one.prompt for one in reference.answers]:
            raise _wrong(f"{what}: its tokenizer and chat template make other tokens of a prompt than the adapter's")
        try:
            found = closeness(written.model, reference.answers)
        except ValueError as error:
            raise _wrong(f"{what}: {error}") from error
    tolerance = round(TOLERANCE[written.model.dtype] + (EIGHT_BITS if what.endswith("q8_0") else 0.0), 2)
    if not found.difference <= tolerance:  # also where it is NaN
        raise _wrong(
            f"{what} does not answer as the adapter does: log-probabilities differ by {found.difference:.3g} on "
            f"average, and rounding explains {tolerance:g}; of {found.tokens} tokens {found.same_tokens} are the same"
        )
    return {"format": what, **asdict(found), "tolerance": tolerance, "base_difference": reference.base_difference}


def _wrong(message: str) -> JobFailure:
    return JobFailure(FailureReason.WRONG_EXPORT, one_line(message))


def _prompts(spec: ExportSpec) -> list[Prompt]:
    """What is asked: the user's prompts, or those of the first rows. Raises DataError."""
    if spec.export.prompts:
        return [[{"role": "user", "content": text}] for text in spec.export.prompts]
    assert spec.data is not None
    limit = min(spec.data.limit or LOOKED_AT, LOOKED_AT)
    found: dict[str, Prompt] = {}
    for _, example in rows.load(spec.data.model_copy(update={"limit": limit})).examples:
        turns, text = example.conversation, example.text or ""
        last = max((turn for turn, message in enumerate(turns) if message["role"] == "assistant"), default=0)
        prompt = turns[:last] or text[: len(text) // 2]
        if prompt:
            found.setdefault(repr(prompt), prompt)
    return list(found.values())


def _askable(chat: Chat, prompts: list[Prompt], limit: int, most: int) -> list[tuple[Prompt, list[int]]]:
    """The first `most` that the template renders and that leave room for an answer, with their token ids."""
    found: list[tuple[Prompt, list[int]]] = []
    for prompt in prompts:
        with contextlib.suppress(BadTurn):
            ids = _ids(chat, prompt)
            if ids and len(ids) + COMPARED_TOKENS <= limit:
                found.append((prompt, ids))
        if len(found) == most:
            break
    if not found:
        raise bad_data(f"no prompt is short enough to compare answers to it within {limit} tokens: set export.prompts")
    return found


def _ids(chat: Chat, prompt: Prompt) -> list[int]:
    if isinstance(prompt, list) and not chat.chat_template:
        prompt = str(prompt[-1]["content"])  # the user's own, of a model that goes on with a text
    return chat.prompt_ids(prompt) if isinstance(prompt, list) else chat.with_bos(chat.ids(prompt))


def _estimated(spec: ExportSpec, config: Any, correction: float) -> int:
    """Peak bytes on the GPU; 0 where there is none, or the estimate does not know such a model."""
    if not models.ON_GPU:
        return 0
    try:
        return int(export_peak(config.to_dict(), spec) * correction)
    except (KeyError, TypeError):
        return 0
