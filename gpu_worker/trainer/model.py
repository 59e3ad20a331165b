"""Base models and adapters. The only file that imports Unsloth, which must come before trl, transformers and peft."""

from __future__ import annotations

import unsloth

# isort: split
import gc
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from gpu_worker.trainer import published, stock, varlen
from gpu_worker.trainer.byte_tokenizer import byte_tokenizer
from gpu_worker.trainer.failures import JobFailure, bad_spec, one_line
from gpu_worker.trainer.generation import make_savable
from jobqueue.job import FailureReason
from jobqueue.spec import Dtype, LoraSpec, Method
from jobqueue.tokens import Tokens

log = logging.getLogger("loraq.trainer")
ON_GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Loaded:
    """A model as Unsloth gives it, and its tokenizer as its makers published it."""

    model: Any
    tokenizer: Any
    name: str
    """The folder (absolute) or hub id that it came from."""
    without_adapter: Callable[[], AbstractContextManager[None]] = nullcontext
    """For the time of its block the model is the base model, where its adapter `comes_off` (parked.py)."""


def load(
    base_model: str,
    method: Method,
    max_seq_length: int,
    load_in_4bit: bool,
    revision: str | None = None,
    computed_in: Dtype | None = None,
    tokenizer: Any = None,
) -> Loaded:
    """Load a base model: 4 bits, 16 bits, or all weights trainable (`method` full, whose weights Unsloth keeps in 32
    bits where float16 is computed in). `revision`: of a hub model. `tokenizer`: its own, where it is loaded already.

    Raises JobFailure: bad_spec where there is no such model or it cannot be trained here.
    """
    name = published.resolve(base_model)
    tokenizer = tokenizer or published.tokenizer_of(name, revision)
    stock.remember(published.config_of(name, revision))
    with tempfile.TemporaryDirectory() as stand_in, _refusals(f"{base_model} cannot be loaded"):
        # Unsloth's own tokenizer is not used, so it gets a tiny one. It would load the model's twice, a second on a
        # GPU, and exchange a pad token that equals eos, or refuse the model where it finds no other. Padding is masked
        # by the attention mask here, so the tokenizer can stay as it was published.
        byte_tokenizer().save_pretrained(stand_in)
        model, _ = unsloth.FastLanguageModel.from_pretrained(
            model_name=name,
            max_seq_length=max_seq_length,
            dtype=dtype(computed_in),
            load_in_4bit=load_in_4bit and method != "full",
            load_in_8bit=False,
            full_finetuning=method == "full",
            use_exact_model_name=True,  # else known names become their -bnb-4bit repositories
            trust_remote_code=False,
            revision=revision,
            tokenizer_name=stand_in,
            fix_tokenizer=False,
        )
    make_savable(model)
    return Loaded(model, tokenizer, name)


def check_tokens(base: Loaded, rows: Iterable[Tokens], base_model: str) -> None:
    """Raises JobFailure (bad_spec) where rows have tokens that the model does not know, which no embedding stands for.

    That its tokenizer has some is no mistake: Gemma 3 was published with a token of images also for text alone.
    """
    known = base.model.get_input_embeddings().weight.shape[0]
    if max(base.tokenizer.get_vocab().values()) < known:
        return
    highest = max(base.tokenizer.pad_token_id or 0, max(max(row.input_ids) for row in rows))
    if highest >= known:
        raise bad_spec(
            f"{base_model}: its tokenizer has a token {highest}, its embeddings only {known} rows; take the tokenizer "
            "that was published with it, or a model whose embeddings were extended"
        )


def add_lora(model: Any, lora: LoraSpec, max_seq_length: int) -> Any:
    """Put a fresh adapter on a base model. Raises JobFailure (bad_spec) where the model refuses an option."""
    if lora.loftq_config and not ON_GPU:
        raise bad_spec("lora.loftq_config needs a GPU: PEFT computes it there; leave it out on this worker")
    modules = lora.target_modules
    with _refusals("this base model refuses the adapter"):
        adapted = unsloth.FastLanguageModel.get_peft_model(
            model,
            r=lora.r,
            target_modules=modules if isinstance(modules, str) else list(modules),
            lora_alpha=lora.lora_alpha,
            lora_dropout=lora.lora_dropout,
            bias=lora.bias,
            use_gradient_checkpointing=lora.use_gradient_checkpointing,
            random_state=lora.random_state,
            max_seq_length=max_seq_length,
            use_rslora=lora.use_rslora,
            init_lora_weights="loftq" if lora.loftq_config else True,
            loftq_config=lora.loftq_config.model_dump() if lora.loftq_config else {},
        )
    if not isinstance(adapted, PeftModel):  # all weights would be trained, and nobody told
        raise RuntimeError("Unsloth has put no adapter on the model")
    return adapted


def load_for_asking(
    base_model: str, load_in_4bit: bool, revision: str | None = None, computed_in: Dtype | None = None
) -> Loaded:
    """Load a model as transformers itself runs it.

    Without Unsloth's kernels: they round differently in 16 bits, which turns the pick of one question in a
    hundred, and a score should be what anybody gets who loads the adapter. Raises JobFailure: bad_spec where
    there is no such model.
    """
    name = published.resolve(base_model)
    tokenizer = published.tokenizer_of(name, revision)
    config = published.config_of(name, revision)
    options: dict[str, Any] = {
        "revision": revision or "main",
        "dtype": dtype(computed_in),
        "device_map": {"": 0 if ON_GPU else "cpu"},
    }
    if load_in_4bit and not getattr(config, "quantization_config", None):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype(computed_in),
        )
    with _refusals(f"{base_model} cannot be loaded"):
        model: Any = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, **options)
    make_savable(model)
    _compute_as_loaded(model)
    return Loaded(model.eval(), tokenizer, name)


def _compute_as_loaded(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights where a CPU has AVX512-BF16: it would then compute in bf16, and
    round the weights when an adapter is put on, so that answers would depend on what was asked before.
    """
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def commit_of(model: Any) -> str | None:
    """Of a hub model, which version of it was loaded."""
    return getattr(model.config, "_commit_hash", None)


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """Turn the exceptions with which libraries refuse a model or an option into bad_spec; let others pass."""
    try:
        yield
    except Exception as error:
        text = str(error)
        if isinstance(error, ValueError) and "dispatched on the CPU or the disk" in text:
            raise JobFailure(FailureReason.OUT_OF_MEMORY, one_line(f"{what}: the GPU is too full for it")) from error
        # RuntimeError is also what a broken GPU raises, which is no fault of the spec.
        refused = isinstance(error, (ValueError, TypeError, KeyError, NotImplementedError))
        unsloth_refused = isinstance(error, RuntimeError) and text.startswith("Unsloth")
        if refused or unsloth_refused or type(error).__name__ == "SafetensorError":
            raise bad_spec(one_line(f"{what}: {text}")) from error
        raise


def dtype(asked: Dtype | None) -> torch.dtype:
    """What a job computes in: as asked, else bf16 where the card has it, else fp16; a CPU computes in 32 bits.

    Raises JobFailure (bad_spec) where the card has no bf16 and it is asked for.
    """
    if not ON_GPU:
        return torch.float32
    has_bf16 = torch.cuda.is_bf16_supported()
    if asked == "bfloat16" and not has_bf16:
        # Unsloth would take float16 instead, with a warning.
        raise bad_spec(
            f"dtype: {torch.cuda.get_device_name()} does not compute in bfloat16; set dtype: float16, or leave it out"
        )
    return torch.bfloat16 if has_bf16 and asked != "float16" else torch.float16


def check_dtype(asked: Dtype | None) -> None:
    """Before anything is loaded: raises as `dtype`, and says once in a job's log what a CPU makes of it."""
    if asked and dtype(asked) is torch.float32:
        log.info("dtype: a CPU computes in 32 bits, not in %s", asked)


def attends_by_row(model: Any) -> bool:
    """Whether the model has Unsloth's own attention, which takes rows that lie end to end one by one on any GPU: with
    flash-attn, xformers, torch's flash kernel, or SDPA for each row.

    From now on transformers' attention does the same where one of the first three takes the model's heads.
    """
    if not ON_GPU:
        return False
    from unsloth.utils import attention_dispatch
    from unsloth.utils.hf_packed_attention import enable_hf_packed_attention

    varlen.offer(attention_dispatch)
    enable_hf_packed_attention()
    attention = [type(module) for module in model.modules() if type(module).__name__.endswith("Attention")]
    return any(kind.forward.__module__.startswith("unsloth.models.") for kind in attention)


def packed_attention_calls() -> tuple[int, int]:
    """How often transformers' attention took rows end to end: one by one, and with a mask of all their tokens."""
    if not ON_GPU:
        return 0, 0
    from unsloth.utils.hf_packed_attention import HF_PACKED_ATTENTION_STATS as CALLS

    return CALLS["fast"], CALLS["fallback"]


def for_training(model: Any) -> None:
    """Unsloth hangs the right function for its kind of model on the model itself."""
    if hasattr(model, "for_training"):
        model.for_training()
    else:
        unsloth.FastLanguageModel.for_training(model)


def free() -> None:
    """Give memory back after a job: what its objects held must be unreferenced by now."""
    for _ in range(3):  # a model sits in cycles of bound methods and hooks
        gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
