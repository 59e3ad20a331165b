"""A .gguf file as an ordinary Hugging Face folder: converted once per file, then taken from a cache. And the other way.

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
TOLD = ("HOME", "LANG", "LD_LIBRARY_PATH", "PATH", "PYTHONPATH", "TMPDIR", "VIRTUAL_ENV")  # a converter of others
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
        read(path, scratch)
        try:
            scratch.rename(done)
        except OSError:  # another job was faster
            if not done.is_dir():
                raise
        return done
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read(path: Path, folder: Path) -> None:
    """Makes an ordinary folder of a .gguf file, in a process of its own. Raises JobFailure (bad_spec)."""
    command = [sys.executable, "-P", "-m", "gpu_worker.trainer.gguf", str(path.absolute()), str(folder)]
    _run(command, dict(os.environ), f"{path} cannot be read as a GGUF model")


def converter(path: str | None) -> Path:
    """llama.cpp's script, which writes GGUF files. Raises JobFailure (bad_spec) where this worker has none."""
    if path is None or not Path(path).is_file():
        gone = f"its LORAQ_GGUF_CONVERTER, {path}, is not there" if path else "it has no LORAQ_GGUF_CONVERTER"
        raise bad_spec(
            f"this worker cannot write GGUF files: {gone}; name llama.cpp's convert_hf_to_gguf.py there, "
            "start the worker again, and retry the job"
        )
    return Path(path)


def write(model: Path, file: Path, outtype: str, script: Path) -> None:
    """Makes a .gguf file of a model's folder. Raises JobFailure (bad_spec)."""
    # The script is the operator's, and needs none of the worker's secrets, and no network.
    environment = {name: value for name, value in os.environ.items() if name in TOLD} | {"HF_HUB_OFFLINE": "1"}
    # Without -P: it imports what lies beside it.
    command = [sys.executable, str(script), str(model), "--outfile", str(file), "--outtype", outtype]
    what = f"{script} cannot write this model as GGUF"
    _run(command, environment, what)
    if not is_gguf(file):
        raise bad_spec(f"{what}: it left no GGUF file behind")


def _run(command: list[str], environment: dict[str, str], what: str) -> None:
    """Its words go into the log. Raises JobFailure (bad_spec): `what`, and its last line."""
    # CUDA hidden: it must not take memory that admission has not counted.
    environment = environment | {"CUDA_VISIBLE_DEVICES": ""}
    last = ""
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stderr.write(line)
            last = line.strip() or last
    if process.returncode:
        raise bad_spec(one_line(f"{what}: {last or f'exit code {process.returncode}'}"))


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
