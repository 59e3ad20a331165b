"""A base model as its makers published it: where it is, its tokenizer and its config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from gpu_worker.trainer import gguf
from gpu_worker.trainer.failures import JobFailure, bad_spec, one_line
from jobqueue.base_model import no_model
from jobqueue.job import FailureReason


def resolve(base_model: str) -> str:
    """An absolute folder, or a hub id. Raises JobFailure (bad_spec)."""
    path = Path(base_model).expanduser()
    if path.is_file():
        if not gguf.is_gguf(path):
            raise bad_spec(f"{base_model} is a file, but not a GGUF model; name a folder, a .gguf file or a hub id")
        return str(gguf.folder_of(path))
    if path.is_dir():
        _check_folder(path)
        return str(path.absolute())
    if base_model.startswith(("/", ".", "~")) or base_model.count("/") > 1 or base_model.endswith(".gguf"):
        raise bad_spec(f"base_model {base_model} does not exist on this worker")
    return base_model


def _check_folder(path: Path) -> None:
    if what := no_model(path):
        raise bad_spec(f"base_model {path} is {what}")
    indexes = [*path.glob("*.safetensors.index.json"), *path.glob("*.bin.index.json")]
    needed = {name for index in indexes for name in json.loads(index.read_text())["weight_map"].values()}
    missing = sorted(name for name in needed if not (path / name).is_file())
    if missing:
        raise bad_spec(f"base_model {path} lacks {', '.join(missing[:3])}; copy the folder again")
    if not needed and not any(path.glob("*.safetensors")) and not any(path.glob("pytorch_model*.bin")):
        raise bad_spec(f"base_model {path} has no weights (*.safetensors)")


def tokenizer_of(name: str, revision: str | None) -> Any:
    """As its makers published it. Raises JobFailure."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, revision=revision or "main")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(name, "tokenizer", error) from error
    if not tokenizer.is_fast:
        raise bad_spec(f"{name} has no fast tokenizer (tokenizer.json), which masking the prompt needs")
    return tokenizer


def config_of(name: str, revision: str | None) -> Any:
    """Of a causal language model. Raises JobFailure."""
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, revision=revision or "main")
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(name, "config", error) from error
    causal = any(str(a).endswith(("ForCausalLM", "LMHeadModel")) for a in config.architectures or ["ForCausalLM"])
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or not causal:
        kind = ", ".join(config.architectures or [config.model_type])
        raise bad_spec(f"{name} is no causal language model ({kind}); answers can only be trained into one")
    return config


def _unreadable(name: str, what: str, error: Exception) -> JobFailure:
    """A hub that cannot be reached may be there later; a model that is not there will not."""
    text = one_line(str(error))
    if "gated repo" in text.lower() or "401 client error" in text.lower():
        return bad_spec(
            f"{name} is gated or private, and this worker may not read it; ask for access on its page of the hub, "
            "and set HF_TOKEN in the worker's environment"
        )
    unreachable = ("couldn't connect", "offline mode is enabled")
    if any(words in text.lower() for words in unreachable) or "connection" in type(error).__name__.lower():
        return JobFailure(FailureReason.STORAGE, f"{name}: its {what} cannot be fetched: {text}")
    return bad_spec(one_line(f"{name}: its {what} cannot be read: {text}"))
