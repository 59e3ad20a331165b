"""A .gguf file as an ordinary Hugging Face folder: converted once per file, then taken from a cache.

Run as a module it converts (`python -m gpu_worker.trainer.gguf FILE FOLDER`): in a process of its own, without a
GPU and without Unsloth's patches, whose memory is gone afterwards.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gpu_worker.trainer.failures import bad_spec, one_line

CACHE_DIR = "LORAQ_CACHE_DIR"
MAGIC = b"GGUF"
LAYOUT = "1"  # grows with every change of what a converted folder holds


def is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def folder_of(path: Path) -> Path:
    """The converted model of a .gguf file, keyed by the file's content. Raises JobFailure (bad_spec)."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loraq"
    cache = Path(os.environ.get(CACHE_DIR) or default).absolute() / "gguf"
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    done = cache / f"{digest}-{LAYOUT}"
    if done.is_dir():
        return done
    cache.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{digest[:12]}-", dir=cache))
    try:
        # CUDA hidden: the conversion must not take memory that admission has not counted.
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-P", "-m", "gpu_worker.trainer.gguf", str(path.absolute()), str(scratch)]
        ended = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, errors="replace")
        sys.stderr.write(ended.stderr)
        if ended.returncode:
            lines = ended.stderr.strip().splitlines()
            why = lines[-1] if lines else f"exit code {ended.returncode}"
            raise bad_spec(one_line(f"{path} cannot be read as a GGUF model: {why}"))
        try:
            scratch.rename(done)
        except OSError:  # another job was faster
            if not done.is_dir():
                raise
        return done
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def convert(file: Path, out: Path) -> None:
    """Dequantise a GGUF model to a bf16 folder with its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    fields = _metadata(file)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if fields.get("tokenizer.ggml.pre") == "smollm":
        _split_digits(tokenizer)
    architecture = fields.get("general.architecture", "")
    tokenizer.clean_up_tokenization_spaces = False  # it would eat spaces before punctuation
    length = fields.get(f"{architecture}.context_length")
    if length:
        tokenizer.model_max_length = int(length)

    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # transformers leaves the description of the quantisation, though the weights are plain now.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    # The file holds the epsilon as a 32-bit float: 1e-5 reads 9.99999974e-06.
    if getattr(model.config, "rms_norm_eps", None):
        model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.4g}")
    model.config.dtype = torch.bfloat16
    # The file's special tokens: transformers takes the model type's default ones for the tokenizer.
    for name, ours in (("bos", "bos"), ("eos", "eos"), ("padding", "pad"), ("unknown", "unk")):
        number = fields.get(f"tokenizer.ggml.{name}_token_id")
        if number is not None:
            setattr(tokenizer, f"{ours}_token", tokenizer.convert_ids_to_tokens(int(number)))
            setattr(model.config, f"{ours}_token_id", int(number))
            if ours != "unk":
                setattr(model.generation_config, f"{ours}_token_id", int(number))
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def _metadata(file: Path) -> dict[str, Any]:
    """The scalar fields of the file's header."""
    from gguf import GGUFReader

    wanted = ("general.architecture", "tokenizer.ggml.pre")
    fields: dict[str, Any] = {}
    for name, field in GGUFReader(file).fields.items():
        if name in wanted or name.endswith((".context_length", "_token_id")):
            fields[name] = field.contents()
    return fields


def _split_digits(tokenizer: Any) -> None:
    """GGUF's "smollm" pre-tokenizer takes digits one by one, which transformers does not restore."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
