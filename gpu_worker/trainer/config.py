"""A job's options as TRL's trainer takes them."""

from __future__ import annotations

import logging
from pathlib import Path

from gpu_worker.trainer import model as models  # first: it imports Unsloth

# isort: split
import torch
from trl import SFTConfig

from gpu_worker.protocol import Request
from gpu_worker.trainer.failures import bad_spec, one_line
from jobqueue.job_spec import TrainSpec

log = logging.getLogger("loraq.trainer")


def config_of(spec: TrainSpec, request: Request, validation_rows: int, report_to: list[str]) -> SFTConfig:
    """Every field that matters is written out: Unsloth and TRL change the defaults of transformers.

    `validation_rows`: of a micro-batch of a validation; 0: there is none. Raises JobFailure (bad_spec) where an option
    is refused.
    """
    training = spec.training
    on_gpu, computed_in = models.ON_GPU, models.dtype(spec.dtype)
    optim = training.optim
    if not on_gpu and ("8bit" in optim or "paged" in optim):
        optim = "adamw_torch_fused"
        log.info("optim: %s needs a GPU, taking %s", training.optim, optim)
    try:
        return SFTConfig(
            output_dir=str(Path(request.output) / "trainer"),
            # how long
            max_steps=training.steps or -1,
            num_train_epochs=training.num_train_epochs or 1.0,
            per_device_train_batch_size=training.per_device_train_batch_size,
            gradient_accumulation_steps=training.gradient_accumulation_steps,
            # optimizer
            learning_rate=training.learning_rate,
            lr_scheduler_type=training.lr_scheduler_type,
            warmup_steps=training.warmup_steps,
            optim=optim,
            weight_decay=training.weight_decay,
            adam_beta1=0.9,
            adam_beta2=0.999,
            adam_epsilon=1e-8,
            max_grad_norm=training.max_grad_norm,
            label_smoothing_factor=0.0,
            neftune_noise_alpha=None,  # neftune.py adds it
            # numbers
            bf16=computed_in is torch.bfloat16,
            fp16=computed_in is torch.float16,
            use_cpu=not on_gpu,
            gradient_checkpointing=bool(spec.lora.use_gradient_checkpointing),
            loss_type="nll",
            seed=training.seed,
            data_seed=training.seed,
            full_determinism=False,
            # data: tokenised, cut and packed already
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=training.max_seq_length,
            packing=False,
            padding_free=False,
            remove_unused_columns=False,
            label_names=["labels"],
            train_sampling_strategy="random",
            dataloader_num_workers=0,
            dataloader_drop_last=False,
            # what is said and kept
            logging_strategy="steps",
            logging_steps=training.logging_steps,
            logging_first_step=True,
            logging_nan_inf_filter=False,  # else a NaN loss is logged as a fine one
            disable_tqdm=True,
            report_to=report_to or "none",
            run_name=request.job_id,
            project=request.job_id,
            eval_strategy="steps" if validation_rows and training.eval_steps else "no",
            eval_steps=training.eval_steps,
            per_device_eval_batch_size=validation_rows or 1,
            prediction_loss_only=True,
            save_strategy="no",
            push_to_hub=False,
        )
    except (ValueError, NotImplementedError, ImportError) as error:
        raise bad_spec(one_line(f"training: {error}")) from error
