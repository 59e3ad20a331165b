"""One fine-tune, from base model to saved adapter; reads top to bottom."""

from __future__ import annotations

import contextlib
import logging
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from gpu_worker.trainer import model as models  # first: it imports Unsloth

# isort: split
import torch
from transformers import set_seed
from trl import SFTTrainer

from gpu_worker.protocol import Progress, Request
from gpu_worker.trainer import adapters, batches, published, trackers, usage
from gpu_worker.trainer.best import Best
from gpu_worker.trainer.checkpoint import Checkpoints, counts_of
from gpu_worker.trainer.clock import Clock
from gpu_worker.trainer.collator import Collator
from gpu_worker.trainer.config import config_of
from gpu_worker.trainer.data import chat_of
from gpu_worker.trainer.ewc import Ewc
from gpu_worker.trainer.failures import JobFailure, bad_spec, on_rung, one_line
from gpu_worker.trainer.finite import Finite, check_weights
from gpu_worker.trainer.neftune import Noise
from gpu_worker.trainer.padding_free import layout_of
from gpu_worker.trainer.recompute import recompute_above
from gpu_worker.trainer.watch import Report, Watch, mean_loss
from jobqueue import replay, rows
from jobqueue.chat import Chat
from jobqueue.data_spec import DataSpec
from jobqueue.job import FailureReason
from jobqueue.job_spec import TrainSpec
from jobqueue.memory import GIB, Layout
from jobqueue.microbatch import Choice, choose, limit
from jobqueue.tokens import Tokens, fingerprint, survey, tokenise

log = logging.getLogger("loraq.trainer")
SOME_ROWS = 100  # of which at least one can be used, where the file is right


def train(spec: TrainSpec, request: Request, report: Report) -> dict[str, Any]:
    """Train what `spec` says and save it into `request.output`/adapter. Returns the outcome.

    Raises JobFailure, DataError, and whatever torch raises.
    """
    training = spec.training
    clock = Clock()
    usage.reset_peak()
    set_seed(training.seed)

    report(Progress("load"))
    trackers.check(training.report_to)
    file = rows.load(spec.data)  # before the model: a bad file costs seconds, not minutes
    clock.lap("data_s")
    tokenizer = published.tokenizer_of(published.resolve(spec.base_model), spec.revision)
    chat = chat_of(tokenizer, spec.chat_template)
    clock.lap("load_s")
    trained, kept_back = rows.split(spec.data, [example for _, example in file.examples])
    ewc = Ewc(spec.ewc, chat, training.max_seq_length)
    mixed_in, replayed = _replay(spec.data, chat, len(trained), training.max_seq_length)
    some = survey(chat, trained[:SOME_ROWS], training.max_seq_length)[0]
    clock.lap("data_s")
    with ThreadPoolExecutor(1) as beside:  # while the model loads
        tokenising = beside.submit(tokenise, chat, trained, training.max_seq_length)
        if not some:
            tokenising.result()  # perhaps there is no use in loading it
        base = models.load(
            spec.base_model, spec.method, training.max_seq_length, spec.method == "qlora", spec.revision,
            computed_in=spec.dtype, tokenizer=tokenizer,
        )  # fmt: skip
        clock.lap("load_s")
        report(Progress("data"))
        tokens, data = tokenising.result()
    tokens += mixed_in
    validation = survey(chat, kept_back, training.max_seq_length)[0]
    models.check_tokens(base, [*tokens, *validation], spec.base_model)
    for reason, skipped in file.summary.skipped.items():
        log.warning("%d of %d rows cannot be used: %s", skipped.count, file.summary.rows, reason)
    log.info("the layout is %s", file.summary.reason)
    for note in data.notes:
        log.info("%s", note)
    log.info("data: %s", {key: value for key, value in asdict(data).items() if key != "preview"})
    log.info("the first row, trained on what stands in <<>>:\n%s", data.preview)
    if training.dataset_num_proc is not None:
        log.info("dataset_num_proc: not needed, rows are tokenised by threads of the tokenizers library")
    clock.lap("data_s")

    layout = layout_of(training, base.model, spec.dtype)
    dataset = batches.packed(tokens, training.max_seq_length) if training.packing else batches.for_training(tokens)
    choice = _choose(spec, request, batches.lengths(dataset), layout, base.model)
    most = limit(choice.estimated_bytes, request.budget_bytes, ran_out=request.ran_out)
    report(Progress("data", budget_bytes=usage.hold_to(most)))
    through = batches.Batches(dataset, batches.for_validation(validation), layout, choice.tokens, choice.spared_tokens)
    with (
        on_rung(choice.rung, last=choice.last),
        trackers.of(training.report_to, request.job_id, Path(request.output)) as report_to,
    ):
        outcome = _fit(choice.split.of(spec), base, through, ewc, request, report, clock, report_to)
    outcome["memory"]["estimated_bytes"] = choice.estimated_bytes
    outcome["training"] |= asdict(choice.split) | {"padding_free": layout != "padded"}
    outcome["training"]["spared_tokens"] = choice.spared_tokens
    outcome["training"]["from_adapter"] = spec.from_adapter
    of_data = {"replay": replayed, "sha256": fingerprint([*tokens, *validation])}
    outcome["data"] = file.summary.report() | asdict(data) | of_data
    return outcome | {"commit": models.commit_of(base.model), "versions": usage.versions()}


def _replay(data: DataSpec, chat: Chat, own: int, max_seq_length: int) -> tuple[list[Tokens], dict[str, Any] | None]:
    """The general rows that are mixed in, and the outcome's word of them."""
    drawn = replay.draw(data.replay, own)
    if drawn is None:
        return [], None
    tokens, said = drawn.tokens(chat, max_seq_length)
    log.info("replay: %s", said)
    if drawn.shortage:
        log.warning("replay: %s", drawn.shortage)
    return tokens, said


def _choose(spec: TrainSpec, request: Request, lengths: list[int], layout: Layout, model: Any) -> Choice:
    """How each step is split. Raises JobFailure (out_of_memory) where nothing smaller is left."""
    known: dict[str, Any] = {}
    if torch.cuda.is_available():  # the estimate is of GPU memory
        known = {"config": model.config.to_dict(), "budget_bytes": request.budget_bytes}
    choice = choose(spec, lengths, request.rung, layout=layout, correction=request.correction, **known)
    if choice is None:
        raise JobFailure(FailureReason.OUT_OF_MEMORY, "memory ran out with one row at a time")
    split = choice.split
    log.info(
        "each step: %d x %d %s, gradient checkpointing %s%s; about %.1f GiB",
        split.gradient_accumulation_steps,
        split.per_device_train_batch_size,
        "packed sequences" if spec.training.packing else "rows",
        split.use_gradient_checkpointing or "off",
        f" above {choice.spared_tokens:,} tokens" if choice.spared_tokens else "",
        choice.estimated_bytes / GIB,
    )
    return choice


def _fit(
    spec: TrainSpec,
    base: models.Loaded,
    through: batches.Batches,
    ewc: Ewc,
    request: Request,
    report: Report,
    clock: Clock,
    report_to: list[str],
) -> dict[str, Any]:
    """Adapter, training, saving. Returns the outcome's parts of it."""
    training = spec.training
    model, tokenizer = base.model, base.tokenizer
    if spec.method != "full":
        model = models.add_lora(model, spec.lora, training.max_seq_length)
        if request.adapter and not request.resume:
            adapters.start_from(model, request.adapter, spec)
    parameters = [(p.requires_grad, _size(p)) for p in model.parameters()]
    clock.lap("load_s")

    validates = through.validation_rows > 0
    config = config_of(spec, request, through.validation_rows, report_to)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    collator = Collator(pad, flat=through.layout != "padded")
    watch = Watch(report, collator)
    best = Best(training, model, Path(config.output_dir or ""), validates=validates)
    checkpoints = Checkpoints(training, watch.counts, (best.save, ewc.save), report)
    checkpoints.remember_dtypes(model)
    finite = Finite(model.device)
    try:
        with adapters.kept_precise(model):
            trainer = SFTTrainer(
                model=model,
                args=config,
                processing_class=tokenizer,
                train_dataset=through.training,
                eval_dataset=through.validation if validates else None,
                data_collator=collator,
                callbacks=[watch, finite, best, ewc, checkpoints],
            )
    except (ValueError, NotImplementedError) as error:
        raise bad_spec(one_line(f"the trainer refuses these settings: {error}")) from error
    if through.layout == "padded":
        batches.LongestFirst(batches.lengths(through.training), training.effective_batch, training.seed).apply_to(
            trainer
        )
    trainer.prediction_step = partial(  # type: ignore[method-assign]
        batches.mean_over_tokens(through.validation), trainer.prediction_step
    )
    models.for_training(model)
    ewc.prepare(trainer, request.resume, report)
    noise = Noise(training.neftune_noise_alpha, model)
    recompute = recompute_above(through.spared_tokens)
    # What each micro-batch goes through, from the inside out: each calls the step that it is put around.
    for wrapper in (finite.look_at_loss, recompute, ewc.add_penalty, noise.on_embeddings):
        trainer.training_step = partial(wrapper, trainer.training_step)  # type: ignore[method-assign]
    reserved_at_start = usage.reserved()
    clock.lap("setup_s")

    if request.resume:
        watch.go_on(counts_of(request.resume))
        best.go_on(Path(request.resume))
        log.info("going on from %s", request.resume)
    result = trainer.train(resume_from_checkpoint=request.resume)
    clock.lap("train_s")
    clock.move("train_s", "validation_s", best.seconds)
    if best.stopped:
        log.info("stopped early: %s", best.stopped)
    kept_step = best.step if best.restore() else trainer.state.global_step
    if kept_step != trainer.state.global_step:
        log.info("the weights of step %d are kept, with the validation loss %.4f", best.step, best.loss)
    check_weights(model, trainer.state.global_step)
    memory = usage.memory(reserved_at_start)
    held = ewc.outcome()
    clock.lap("setup_s")

    report(Progress("save", step=trainer.state.global_step, steps=trainer.state.max_steps))
    _save(model, tokenizer, Path(request.output) / "adapter", spec.base_model)
    with contextlib.suppress(OSError):  # the trainer's own folder, empty as nothing is checkpointed
        Path(config.output_dir or "").rmdir()
    clock.lap("save_s")

    resumed_from = int(Path(request.resume).name.rpartition("-")[2]) if request.resume else None
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses = [[entry["step"], entry["loss"], entry["learning_rate"]] for entry in history]
    train_s = clock.laps["train_s"] + watch.seconds_before
    return {
        "memory": memory,
        "time": clock.report() | {"train_minutes": round(train_s / 60, 2)},
        "training": {
            "steps": trainer.state.global_step,
            "epochs": round(trainer.state.epoch or 0.0, 4),
            "rows": watch.rows,
            "tokens": watch.tokens,
            "trained_tokens": watch.trained_tokens,
            "tokens_per_s": round(watch.tokens / train_s, 1),
            "final_loss": losses[-1][1] if losses else result.training_loss,
            "mean_loss": mean_loss(losses) if losses else result.training_loss,
            "parameters": sum(size for _, size in parameters),
            "trained_parameters": sum(size for trained, size in parameters if trained),
            "seed": training.seed,
            "resumed_from_step": resumed_from,
            "stopped_early": best.stopped or None,
        },
        "losses": losses,
        "ewc": held,
        "validation": {
            "rows": len(through.validation),
            "losses": [[entry["step"], entry["eval_loss"]] for entry in _validations(trainer)],
            "best_step": best.step or None,
            "best_loss": best.loss if best.step else None,
            "kept_step": kept_step,
        },
    }


def _validations(trainer: SFTTrainer) -> list[dict[str, Any]]:
    """Every loss on the rows that were kept back, oldest first."""
    return [entry for entry in trainer.state.log_history if "eval_loss" in entry]


def _size(parameter: Any) -> int:
    """Numbers in a parameter; a 4-bit one holds two per byte and knows its true shape."""
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state is not None else int(parameter.numel())


def _save(model: Any, tokenizer: Any, folder: Path, base_model: str) -> None:
    """The adapter (method full: the whole model) and the tokenizer."""
    if hasattr(model, "peft_config"):
        for config in model.peft_config.values():
            config.base_model_name_or_path = base_model  # as the user named it, not a path in this worker's cache
        # Vocabularies are never extended, so embeddings need not come along; PEFT would ask the hub about that.
        model.save_pretrained(str(folder), save_embedding_layers=False)
    else:
        model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
