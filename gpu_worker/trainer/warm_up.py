"""A tiny training that a trainer does while it has no job yet: its first job then begins sooner.

The first training of a process loads libraries of the GPU and their kernels, imports modules that are imported late,
and fills caches. That goes for any model, so it is done with one of random weights.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_worker.trainer import model as models  # first: it imports Unsloth

# isort: split
from transformers import LlamaConfig, LlamaForCausalLM

from gpu_worker.protocol import Request
from gpu_worker.trainer.byte_tokenizer import byte_tokenizer
from gpu_worker.trainer.failures import one_line
from gpu_worker.trainer.train import train
from jobqueue.job_spec import TrainSpec
from jobqueue.spec import RunSpec

log = logging.getLogger("loraq.trainer")
# Of the kinds of layers that most models have, heads of a usual size.
SHAPE: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": True,
}  # fmt: skip
ROWS = 16
TRAINING: dict[str, Any] = {
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 2, "logging_steps": 1,
    "max_seq_length": 256,
}  # fmt: skip


def warm_up() -> str:
    """Train it, and free what it took. Returns a line about what went wrong: the first job will tell if it matters."""
    began, problem = time.monotonic(), ""
    try:
        with tempfile.TemporaryDirectory() as folder, _silence():
            _train(Path(folder))
    except Exception as error:
        problem = one_line(f"warming up failed: {type(error).__name__}: {error}")
    else:
        log.info("the trainer has warmed up in %.1f s", time.monotonic() - began)
    models.free()
    return problem


def _train(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    config = LlamaConfig(**SHAPE, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": f"What is {number} and {number}? " * 4, "completion": str(2 * number)} for number in range(ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = RunSpec.model_validate(
        {
            "name": "warm-up", "base_model": str(folder / "model"), "chat_template": "chatml",
            "data": {"source": str(folder / "rows.jsonl")}, "training": TRAINING,
            "lora": {"use_gradient_checkpointing": False},
        }
    )  # fmt: skip
    train(TrainSpec.of(run), Request("warm-up", {}, str(folder)), lambda _: None)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """What libraries print would be in the log of the first job."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    with open(os.devnull, "w") as nowhere:
        for descriptor in (1, 2):
            os.dup2(nowhere.fileno(), descriptor)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, before in zip((1, 2), kept, strict=True):
            os.dup2(before, descriptor)
            os.close(before)
