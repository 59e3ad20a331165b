"""The weights of an earlier adapter as the start of a training."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

from gpu_worker.trainer.failures import bad_spec, one_line
from jobqueue.adapters import misfits
from jobqueue.job_spec import TrainSpec

log = logging.getLogger("loraq.trainer")


def start_from(model: Any, source: str, spec: TrainSpec) -> None:
    """Give the fresh adapter of `model` the weights of another one: a folder, or a hub id.

    Raises JobFailure: bad_spec where there is none, or it does not fit the spec or the base model.
    """
    what = f"from_adapter {spec.from_adapter}"
    try:
        config = PeftConfig.from_pretrained(source)
        weights = load_peft_weights(source, device="cpu")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise bad_spec(one_line(f"{what} cannot be read: {error}")) from error
    if not isinstance(config.init_lora_weights, bool):  # it belongs to a base model that was changed with it
        raise bad_spec(f"{what} began as {config.init_lora_weights}, which changes the base model; take a plain one")
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    wrong = misfits(spec.lora, vars(config))
    if weights.keys() != own.keys():
        wrong.append(f"target_modules: [{', '.join(sorted(set(map(_module, weights))))}]")
    if wrong:
        raise bad_spec(f"{what} does not fit; as it was trained, set under lora: {', '.join(wrong)}")
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            raise bad_spec(
                f"{what} is of another base model ({config.base_model_name_or_path}): {name} is "
                f"{list(tensor.shape)} there and {list(own[name].shape)} in {spec.base_model}"
            )
    if config.base_model_name_or_path != spec.base_model:
        log.warning("%s was trained on %s, and this is %s", what, config.base_model_name_or_path, spec.base_model)
    set_peft_model_state_dict(model, weights)
    log.info("training goes on from %s", spec.from_adapter)


@contextmanager
def kept_precise(model: Any) -> Iterator[None]:
    """TRL's trainer, made within the block, turns what is trained on a 4-bit model into bf16; afterwards it is what it
    was. Else an adapter that a training goes on from, and one that comes from a checkpoint, would be rounded.
    """
    before = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
    yield
    for parameter, data in before:
        if parameter.dtype != data.dtype:
            parameter.data = data


def _module(name: str) -> str:
    """`q_proj` of `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`."""
    return name.partition(".lora_")[0].rpartition(".")[2]
