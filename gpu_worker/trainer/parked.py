"""A base model that is kept between two evaluations, in the host's memory: then only the adapter is exchanged.

On the GPU nothing is kept, for its memory is promised to other jobs while a trainer rests (gpu_worker/admission.py). A
base model is parked as it was loaded or not at all: its tensors must be the very ones that it had before the adapter.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftConfig, PeftModel

from gpu_worker.trainer import model as models
from gpu_worker.trainer import published, stock
from gpu_worker.trainer.failures import JobFailure
from gpu_worker.trainer.merge import Merged
from jobqueue import base_model
from jobqueue.job import FailureReason
from jobqueue.job_spec import AskSpec, EvaluateSpec

log = logging.getLogger("loraq.trainer")
MOST_OF_FREE = 1 / 8  # of the host's free memory, what a parked model may take
Tensors = Mapping[str, int]  # name -> identity


@dataclass(frozen=True)
class Parked:
    """A model in the host's memory, and what it is."""

    key: tuple[Any, ...]
    model: Any


_parked: Parked | None = None


def forget() -> None:
    """Nothing stays parked."""
    global _parked
    _parked = None


@contextmanager
def loaded_for_asking(spec: EvaluateSpec | AskSpec, adapter: str | Merged | None) -> Iterator[models.Loaded]:
    """The base model, with the adapter on it, for the time of the block, run by transformers' own classes.

    Raises JobFailure: bad_spec where there is no such model, storage where there is no adapter.
    """
    whole = spec.method == "full" and isinstance(adapter, str)  # what was trained is a whole model
    name = published.resolve(adapter if whole and isinstance(adapter, str) else spec.base_model)
    revision = None if whole else spec.revision
    config = published.config_of(name, revision)
    version = base_model.fingerprint(name) if base_model.is_path(name) else getattr(config, "_commit_hash", None)
    with stock.classes(config), _loaded(spec, name, revision, version, None if whole else adapter) as base:
        yield base


@contextmanager
def _loaded(
    spec: EvaluateSpec | AskSpec, name: str, revision: str | None, version: str | None, adapter: str | Merged | None
) -> Iterator[models.Loaded]:
    """When the block is done, the base model is parked if it can be; `version` is another one when the model is."""
    global _parked
    key = (name, revision, spec.load_in_4bit, models.dtype(spec.dtype), version)
    parked, _parked = _parked, None  # one that is not wanted now is not kept either
    model = _unpark(parked.model) if parked and parked.key == key else None
    del parked
    if model is None:
        base = models.load_for_asking(name, spec.load_in_4bit, revision, spec.dtype)
    else:
        log.info("the base model is still loaded")
        base = models.Loaded(model, published.tokenizer_of(name, revision), name)
        del model
    if adapter is None:
        yield base
    else:
        before = _tensors(base.model)
        tuned = with_adapter(base.model, adapter)
        # PEFT puts the adapter into the base model's own layers. That model is asked, not the wrapper, whose
        # forward Unsloth replaces.
        yield models.Loaded(tuned.get_base_model().eval(), base.tokenizer, base.name, tuned.disable_adapter)
        if not _restored(tuned, before):
            return
    if name == published.resolve(spec.base_model) and _fits(base.model) and _move(base.model, "cpu"):
        _parked = Parked(key, base.model)


def with_adapter(model: Any, adapter: str | Merged) -> Any:
    """PEFT's wrapper of `model`, whose own layers get the adapter. Raises JobFailure (storage) where there is none."""
    if isinstance(adapter, Merged):
        return adapter.on(model)
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise JobFailure(FailureReason.STORAGE, f"there is no adapter in {adapter}")
    return PeftModel.from_pretrained(model, str(Path(adapter).absolute()))


def _tensors(model: Any) -> Tensors:
    return {name: tensor.data_ptr() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def _restored(tuned: Any, before: Tensors) -> bool:
    """Take the adapter off. False where the base model is not known to be what it was."""
    if not comes_off(next(iter(tuned.peft_config.values()))):
        return False
    base = tuned.unload()
    if hasattr(base, "peft_config"):
        del base.peft_config
    return _tensors(base) == before


def comes_off(config: PeftConfig) -> bool:
    """Whether the base model is what it was once such an adapter is off it: it has no trained biases, say."""
    biased = getattr(config, "bias", "none") != "none" or getattr(config, "modules_to_save", None)
    return not biased and isinstance(getattr(config, "init_lora_weights", True), bool)  # loftq changes the base model


def _fits(model: Any) -> bool:
    if models.ON_GPU and getattr(model, "is_quantized", False):
        return False  # its quantisation state would have to move with it
    size: int = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    return size <= MOST_OF_FREE * int(psutil.virtual_memory().available)


def _unpark(model: Any) -> Any | None:
    return model if _move(model, "cuda:0" if models.ON_GPU else "cpu") else None


def _move(model: Any, device: str) -> bool:
    """False where this kind of model stays where it was loaded."""
    if not models.ON_GPU:
        return True
    try:
        model.to(device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, NotImplementedError) as error:
        log.info("the base model is not kept: %s", error)
        return False
    return all(tensor.device == torch.device(device) for tensor in [*model.parameters(), *model.buffers()])
