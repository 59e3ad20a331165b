"""Memory classes of the queue, and the estimate of a job's peak on the GPU; pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from jobqueue.job_spec import AskSpec, EvaluateSpec, ExportSpec, TrainSpec, WorkSpec
    from jobqueue.spec import LoraSpec

GIB = 2**30
Layout = Literal["padded", "flat", "masked"]
"""How rows lie in a micro-batch: each padded to the longest; end to end; end to end with a mask of who sees whom."""
CLASSES = (8, 16, 24, 48, 80, 141)  # upper bounds in GiB, as cards are sold
REAL_SHARE = 0.92  # what a card of that name really leaves to a program
NF4_BYTES = 0.5 + 0.127 / 8  # per weight: 4 bits, and the scales of double quantisation (arXiv:2305.14314, section 3)
# What follows was read off benchmarks/results/memory.json (H100, CUDA 13, torch 2.11, Unsloth 2026.10.9).
CONTEXT = int(0.81 * GIB)  # CUDA context and libraries, as the driver counts them
LOSS_CHUNK = int(0.3 * GIB)  # logits in 32 bits are never whole: the loss takes them in chunks
SCORED_LOGITS = int(3.5 * GIB)  # of an evaluation: what gpu_worker/trainer/evaluate.py lets them take, and copies
MASK_BYTES = 4  # not measured: of a mask while it is made, for each pair of tokens
COMPARED_TOKENS = 64  # of an answer, see gpu_worker/trainer/compare.py
MERGED_BYTES = 10  # per weight of a layer that is merged: the sum, what is added in 32 bits, and a product of the two
FRAGMENTS, ROUNDING = 1.03, int(0.1 * GIB)  # what the allocator holds over what is in tensors


PREVIEW = "preview"
"""The class of control workers that can read tokenizers and hub data sets."""


def all_classes() -> list[str]:
    """Every class that a job can wait in."""
    return [*(f"gpu{size}" for size in CLASSES), "gpu-large", "cpu", "control", PREVIEW]


def memory_class(need_bytes: int) -> str:
    """The smallest class whose cards hold `need_bytes`."""
    for size in CLASSES:
        if need_bytes <= size * REAL_SHARE * GIB:
            return f"gpu{size}"
    return "gpu-large"


def classes_for(usable_bytes: int) -> list[str]:
    """The classes of which a card with `usable_bytes` can hold at least the smallest job."""
    names = [*(f"gpu{size}" for size in CLASSES), "gpu-large"]
    lower = [0.0, *(size * REAL_SHARE * GIB for size in CLASSES)]
    return [name for name, bound in zip(names, lower, strict=True) if usable_bytes > bound]


@dataclass(frozen=True)
class Shape:
    """What of a model's config.json decides about memory."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    positions: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Shape:
        """Raises KeyError where the config is not that of a decoder with the usual names."""
        config = config.get("text_config", config)
        heads = config["num_attention_heads"]
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocab=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", False)),
            positions=config.get("max_position_embeddings", 0),
        )

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each linear module of a layer."""
        h, q, kv, i = (
            self.hidden,
            self.heads * self.head_dim,
            self.kv_heads * self.head_dim,
            self.intermediate,
        )
        return {
            "q_proj": (h, q),
            "k_proj": (h, kv),
            "v_proj": (h, kv),
            "o_proj": (q, h),
            "gate_proj": (h, i),
            "up_proj": (h, i),
            "down_proj": (i, h),
        }

    @property
    def linear_weights(self) -> int:
        return self.layers * sum(a * b for a, b in self.modules.values())

    @property
    def embedding_weights(self) -> int:
        return self.vocab * self.hidden * (1 if self.tied else 2)

    def weight_bytes(self, in_4bit: bool) -> float:
        return self.linear_weights * (NF4_BYTES if in_4bit else 2) + self.embedding_weights * 2

    def lora_weights(self, lora: LoraSpec) -> int:
        wanted = self.modules if lora.target_modules == "all-linear" else lora.target_modules
        pairs = [self.modules[name] for name in wanted if name in self.modules]
        return self.layers * lora.r * sum(a + b for a, b in pairs)

    def working_bytes(self, tokens: int) -> float:
        """What the backward pass of one layer needs at once, in 16 bits."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return tokens * 2.0 * (6 * self.hidden + 2 * q + 2 * kv + 7 * self.intermediate)

    def kept_bytes(self, tokens: int) -> float:
        """What one layer keeps from the forward for the backward pass, in 16 bits, where it is not recomputed."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return tokens * 2.0 * (2.6 * self.hidden + 2 * q + 2 * kv + 3 * self.intermediate)

    def generating_bytes(self, tokens: int) -> float:
        """Keys and values of so many tokens, and what reading them needs at once, in 16 bits."""
        return tokens * self.layers * 2 * self.kv_heads * self.head_dim * 2 + self.working_bytes(tokens) / 2


def training_peak(
    config: Mapping[str, Any], spec: TrainSpec, tokens: int | None = None, layout: Layout = "flat"
) -> int:
    """Peak bytes on the GPU of a train job, its CUDA context included.

    Weights, gradients and optimizer state of what is trained, and the activations of one micro-batch of `tokens`
    (None: of rows of `max_seq_length`): of all layers, or where checkpointing recomputes them of one; with
    `use_gradient_checkpointing` true each layer's input stays on the GPU, with "unsloth" it goes to main memory.
    "auto" is what must fit at least, "unsloth". `layout`: how rows lie; the default is the usual one on a GPU. Raises
    KeyError as `Shape.from_config`.
    """
    shape = Shape.from_config(config)
    if tokens is None:
        tokens = spec.training.per_device_train_batch_size * spec.training.max_seq_length
    state = 2 if "8bit" in spec.training.optim else 8  # Adam's two moments, bytes per weight
    if spec.method == "full":
        # Of a weight, and of its gradient. For float16 (not measured) Unsloth keeps both in 32 bits, as gradients that
        # are scaled must be, and autocast holds the weights in 16 bits beside them.
        size, cast = (4, 2) if spec.dtype == "float16" else (2, 0)
        weights = float((shape.linear_weights + shape.embedding_weights) * (size + size + cast + state))
        # transformers keeps the moments of embeddings in 32 bits; and their gradient comes from both ends
        weights += shape.embedding_weights * (8 - state + size)
    else:
        # LoRA weights are kept in 32 bits: weight, gradient, moments
        held = 8 if spec.ewc else 0  # its weights before and their Fisher information, in 32 bits too
        weights = shape.weight_bytes(spec.method == "qlora") + shape.lora_weights(spec.lora) * (8 + state + held)
    checkpointing = spec.lora.use_gradient_checkpointing
    if checkpointing is False:
        activations = max(shape.layers * shape.kept_bytes(tokens), shape.working_bytes(tokens))
    else:
        inputs = shape.layers * tokens * shape.hidden * 4 if checkpointing is True else 0
        activations = inputs + shape.working_bytes(tokens)
    if layout != "padded":  # given positions, Unsloth keeps the sines and cosines of all that the model knows
        weights += shape.positions * shape.head_dim * 2 * 2
    if layout == "masked":
        activations += MASK_BYTES * tokens**2
    loss = min(tokens * shape.vocab * 4, LOSS_CHUNK)
    return int((weights + max(activations, loss)) * FRAGMENTS + ROUNDING + CONTEXT)


def evaluation_peak(config: Mapping[str, Any], spec: EvaluateSpec, row_tokens: int | None = None) -> int:
    """Peak bytes on the GPU of an evaluation: weights, and scores or the keys and values of what is generated."""
    shape = Shape.from_config(config)
    length = min(row_tokens or spec.max_seq_length, spec.max_seq_length)
    tokens = spec.evaluation.per_device_eval_batch_size * (length + spec.evaluation.max_new_tokens)
    cache = shape.generating_bytes(tokens)
    scores = min(4 * tokens * shape.vocab * 4, SCORED_LOGITS)
    return int((shape.weight_bytes(spec.load_in_4bit) + max(cache, scores)) * FRAGMENTS + ROUNDING + CONTEXT)


def export_peak(config: Mapping[str, Any], spec: ExportSpec) -> int:
    """Peak bytes on the GPU of an export: the model in 16 bits, which is never there twice, and the adapter in 32;
    beside them the largest layer as it is merged (one after the other, in place), or what an answer takes."""
    shape = Shape.from_config(config)
    largest = max(a * b for a, b in shape.modules.values())
    adapter = 0 if spec.method == "full" else 4 * shape.lora_weights(spec.lora)
    answering = shape.working_bytes(spec.max_seq_length) / 2 + COMPARED_TOKENS * shape.vocab * 4 * 3
    weights = shape.weight_bytes(in_4bit=False) + adapter
    return int((weights + max(MERGED_BYTES * largest, answering)) * FRAGMENTS + ROUNDING + CONTEXT)


def asking_peak(config: Mapping[str, Any], spec: AskSpec) -> int:
    """Peak bytes on the GPU of answering prompts: of an evaluation that writes one answer at a time and scores none."""
    shape = Shape.from_config(config)
    generating = shape.generating_bytes(spec.max_seq_length + spec.max_new_tokens)
    return int((shape.weight_bytes(spec.load_in_4bit) + generating) * FRAGMENTS + ROUNDING + CONTEXT)


def kind_of(spec: Mapping[str, Any]) -> str:
    """Jobs of one kind are wrong by the same factor: what is done, with which model, in how many bits."""
    bits = spec["method"] if spec["kind"] == "train" else "4bit" if spec.get("load_in_4bit") else "16bit"
    return f"{spec['kind']}:{bits}:{spec['base_model']}"


def estimate(config: Mapping[str, Any], spec: WorkSpec) -> int:
    """Peak bytes of a job with rows of `max_seq_length`; what the user said in `resources.memory` goes first.

    Raises KeyError where the config, the base model's config.json, lacks what the estimate needs.
    """
    if spec.resources.memory is not None:
        return int(spec.resources.memory)
    if spec.kind == "train":
        return training_peak(config, spec)
    if spec.kind == "export":
        return export_peak(config, spec)
    if spec.kind == "ask":
        return asking_peak(config, spec)
    return evaluation_peak(config, spec)
