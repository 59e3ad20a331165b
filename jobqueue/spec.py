"""The only schema of a sweep file, with the *_spec.py beside it; job_spec.py has what becomes of it.

Names are those of Hugging Face, PEFT, TRL and Unsloth, so that a notebook's settings can be copied; everything
left out has the default of Unsloth's notebook for Llama-3.2-1B on MedQA.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ByteSize,
    Field,
    NonNegativeInt,
    PlainSerializer,
    PositiveInt,
)

from jobqueue.data_spec import Clash, DataSpec, EwcSpec, Part, QuestionFormat, RowsSpec
from jobqueue.ensemble_spec import EnsembleSpec
from jobqueue.export_spec import ExportOptions
from jobqueue.judge_spec import JudgeSpec
from jobqueue.notification import WEBHOOK, may_be_named
from jobqueue.random_spec import RandomSpec

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=80)]
Revision = Annotated[str, Field(min_length=1)]
Device = Literal["auto", "gpu", "cpu"]
Metric = Literal["likelihood", "generated", "perplexity", "bleu"]
BY_QUESTION: tuple[Metric, ...] = ("likelihood", "generated")
"""Metrics of multiple-choice questions; the others take any row with an answer."""
WRITING: tuple[Metric, ...] = ("generated", "bleu")
"""Metrics for which a model writes answers."""
Method = Literal["qlora", "lora", "full"]
Dtype = Literal["bfloat16", "float16"]
Asked = Literal["base", "adapter"]
Optimizer = Literal[
    "adamw_8bit", "paged_adamw_8bit", "adamw_bnb_8bit", "paged_adamw_32bit", "adamw_torch", "adamw_torch_fused",
    "adafactor", "sgd", "lion_8bit", "lion_32bit", "paged_lion_8bit", "ademamix_8bit", "rmsprop", "adagrad",
]  # fmt: skip
Scheduler = Literal[
    "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "polynomial", "constant",
    "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay",
]  # fmt: skip
Tracker = Literal["none", "all", "tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "swanlab"]
Values = Annotated[list[Any], Field(min_length=1)]
Entries = list[dict[str, Any]]

SEVEN_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoftqSpec(Part):
    """How LoftQ quantises the base model and fits the adapter to what that lost, as PEFT's `LoftQConfig` takes it."""

    loftq_bits: Literal[4, 8] = 4
    loftq_iter: PositiveInt = 1


class LoraSpec(Part):
    """The adapter, as `FastLanguageModel.get_peft_model` takes it."""

    r: PositiveInt = 16
    lora_alpha: PositiveInt = 16
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] | Literal["all-linear"] = SEVEN_MODULES
    use_gradient_checkpointing: bool | Literal["unsloth", "auto"] = "auto"
    """auto: "unsloth", or none for all micro-batches, or for the shorter ones, where these fit as they are: the same
    gradients, a third fewer operations."""
    random_state: NonNegativeInt = 42
    use_rslora: bool = False
    loftq_config: LoftqSpec | None = None
    """Section, see below. An adapter that begins as what quantising the base model loses. It takes a base model in 16
    bits, so method lora, and a GPU. None: it begins as nothing."""


class TrainingSpec(Part):
    """The optimizer's run, as `SFTConfig` takes it. Rows per step: batch size x accumulation."""

    per_device_train_batch_size: PositiveInt = 2
    gradient_accumulation_steps: PositiveInt = 4
    auto_find_batch_size: bool = True
    """Split the same rows per step into larger micro-batches where the memory allows it; false: only into smaller ones,
    after an attempt has run out of memory."""
    warmup_steps: NonNegativeInt = 5
    max_steps: Annotated[int, Field(ge=-1)] = -1
    """Optimizer steps; -1: as many as `num_train_epochs` needs."""
    num_train_epochs: Annotated[float, Field(gt=0)] | None = None
    """Where neither is set, 200 steps."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    logging_steps: PositiveInt = 10
    optim: Optimizer = "adamw_8bit"
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients of a step that are longer together are shortened to this; 0: none are."""
    lr_scheduler_type: Scheduler = "linear"
    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = None
    """Noise on the embeddings while training, which may keep answers from repeating the data's words (NEFTune; its
    authors took 5, 10 and 15): uniform, up to this / sqrt(tokens of the row x dimensions). None: no noise."""
    seed: NonNegativeInt = 3407
    max_seq_length: Annotated[int, Field(ge=16)] = 2048
    packing: bool = False
    """Rows share sequences of up to `max_seq_length`; none is cut, none sees another. Batch sizes count sequences."""
    padding_free: bool | Literal["auto"] = "auto"
    """Rows of a micro-batch end to end instead of padded to the longest: the same gradients without the padding. auto:
    on a GPU, where the model keeps rows apart and attention costs no more for it."""
    dataset_num_proc: PositiveInt | None = None
    report_to: Tracker | list[Tracker] = "none"
    eval_steps: PositiveInt | None = None
    """With data.validation_split: the loss on the rows kept back every so many steps; None: at the end alone."""
    early_stopping_patience: PositiveInt | None = None
    """Stop after so many validations in a row without a better loss (3 is usual); None: train to the end."""
    early_stopping_threshold: Annotated[float, Field(ge=0)] = 0.0
    """By how much a loss must be lower to count as better."""
    load_best_model_at_end: bool | None = None
    """Keep the weights of the step with the lowest validation loss, not the last ones; None: where
    early_stopping_patience is set."""
    metric_for_best_model: Literal["eval_loss"] = "eval_loss"
    """What decides which weights are best: the validation loss."""
    save_steps: PositiveInt | None = None
    """A checkpoint every so many steps, from which a lost or drained job goes on; None: by time alone."""
    save_minutes: Annotated[float, Field(gt=0)] = 10.0
    """A checkpoint at least so often."""
    save_total_limit: PositiveInt = 2
    """How many checkpoints of a running job are kept; a succeeded job keeps none."""

    def clashes(self) -> Iterator[Clash]:
        if self.packing and self.padding_free is False:
            yield "packing", "puts rows end to end, and padding_free is false; leave one of them out"
        if self.max_steps == 0:
            yield "max_steps", "of 0 trains nothing; leave it out, or write -1 for whole epochs"
        if self.max_steps > 0 and self.num_train_epochs is not None:
            yield "max_steps", "and num_train_epochs are both set; one of them says how long to train"

    @property
    def keeps_best(self) -> bool:
        """Whether the weights with the lowest validation loss are kept."""
        chosen = self.load_best_model_at_end
        return self.early_stopping_patience is not None if chosen is None else chosen

    @property
    def steps(self) -> int | None:
        """Optimizer steps where they are fixed, None where epochs count."""
        if self.max_steps > 0:
            return self.max_steps
        return None if self.num_train_epochs else 200

    @property
    def effective_batch(self) -> int:
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


class EvaluationSpec(RowsSpec):
    """What the base model and each adapter are asked."""

    split: str = "test"
    metrics: Annotated[tuple[Metric, ...], Field(min_length=1)] = ("likelihood", "generated")
    compare_with_base: bool = True
    load_in_4bit: bool | None = None
    """None: as it was trained (4 bits for qlora)."""
    per_device_eval_batch_size: PositiveInt = 16
    max_new_tokens: PositiveInt = 64
    judge: JudgeSpec | None = None
    """Section, see below. Without it no written answer is rated."""

    def clashes(self) -> Iterator[Clash]:
        if self.judge and not set(self.metrics) & set(WRITING):
            more = "add generated (questions with options) or bleu (any rows) to metrics"
            yield "judge", f"rates written answers, and no metric writes any: {more}"
        by_question = ", ".join(metric for metric in self.metrics if metric in BY_QUESTION)
        if by_question and self.format not in ("auto", *get_args(QuestionFormat)):
            others = "write metrics: [perplexity], or [perplexity, bleu]"
            yield "format", f"is {self.format}, and {by_question} need questions with options; {others}"


def _plain_number_is_gib(value: object) -> object:
    """`memory: 12` means 12 GiB, not 12 bytes."""
    if isinstance(value, str) and re.fullmatch(r"[0-9.]+", value.strip()):
        return f"{value.strip()}GiB"
    return f"{value}GiB" if isinstance(value, (int, float)) and not isinstance(value, bool) else value


# Written out with its unit, so that a spec reads back as it was.
Memory = Annotated[ByteSize, BeforeValidator(_plain_number_is_gib), PlainSerializer(lambda size: f"{int(size)}B")]


class ResourcesSpec(Part):
    """What a job may use, and how soon it should."""

    memory: Memory | None = None
    """Peak on the GPU, such as 12GiB; None: estimated."""
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    """Higher goes first."""
    timeout_minutes: Annotated[float, Field(gt=0)] | None = None
    """An attempt that takes longer has failed; None: it may take as long as it does."""
    device: Device = "auto"
    """auto: a GPU, or a CPU worker where no GPU worker is alive."""


class RunSpec(Part):
    """One configuration, from base model to evaluation."""

    name: Name
    base_model: Annotated[str, Field(min_length=1)]
    """A hub id, a local folder, or a .gguf file."""
    revision: Revision | None = None
    """Branch, tag or commit of a hub model; None: its main branch."""
    method: Method = "qlora"
    dtype: Dtype | None = None
    """What is computed in; None: bfloat16 where the GPU has it, else float16. A CPU computes in 32 bits."""
    chat_template: Annotated[str, Field(min_length=1)] | None = None
    """Instead of the base model's own: alpaca, chatml, gemma, llama-3, mistral, a .jinja file, or Jinja itself."""
    data: DataSpec | None = None
    """Without it nothing is trained: the base model itself is evaluated."""
    from_adapter: Annotated[str, Field(min_length=1)] | None = None
    """Go on from an adapter instead of a fresh one: a trial (BATCH/NUMBER), or a folder, URL or hub id."""
    ewc: EwcSpec | None = None
    """Section, see below. Without it from_adapter may forget what it was trained on."""
    lora: LoraSpec = LoraSpec()
    training: TrainingSpec = TrainingSpec()
    evaluation: EvaluationSpec | None = None
    original_task: EvaluationSpec | None = None
    """Section like evaluation: what the base model (from_adapter: the earlier adapter) could do before. It and each
    adapter are asked this too, so that what was forgotten is seen."""
    export: ExportOptions | None = None
    resources: ResourcesSpec = ResourcesSpec()

    def clashes(self) -> Iterator[Clash]:
        untrained = "without data nothing is trained"
        if self.data is None and self.evaluation is None:
            yield "", "neither data nor evaluation is set; there is nothing to do"
        if self.data is None:
            if self.export:
                yield "export", f"writes what was trained, and {untrained}"
            if self.original_task:
                yield "original_task", f"shows what a training has made forgotten, and {untrained}"
            if self.from_adapter:
                yield "from_adapter", f"goes on from an adapter, and {untrained}"
        if self.from_adapter and self.method == "full":
            yield "from_adapter", "goes on from an adapter, and method full trains none"
        if self.from_adapter and self.lora.loftq_config:
            yield "from_adapter", "goes on from an adapter, and lora.loftq_config initialises a fresh one"
        asked = filter(None, (self.evaluation, self.original_task))
        if self.lora.loftq_config and (self.method != "lora" or any(map(self.loads_in_4bit, asked))):
            yield "lora.loftq_config", "quantises the base model itself: set method: lora, and leave load_in_4bit out"
        if self.original_task and self.original_task.judge:
            yield "original_task.judge", "rates nothing here: a judge belongs to evaluation"
        if self.ewc and not self.from_adapter:
            yield "ewc", "holds on to the weights of an earlier adapter: set from_adapter"
        if self.training.eval_steps and not (self.data and self.data.validation_split):
            yield "training.eval_steps", "needs rows to validate on: set data.validation_split"
        if not self.training.eval_steps and self.data is not None:
            for option in ("early_stopping_patience", "load_best_model_at_end"):
                if getattr(self.training, option):
                    yield f"training.{option}", "needs validations to compare: set training.eval_steps"

    def loads_in_4bit(self, evaluation: EvaluationSpec) -> bool:
        """Whether that evaluation loads the base model in 4 bits."""
        chosen = evaluation.load_in_4bit
        return self.method == "qlora" if chosen is None else chosen


class SweepSpec(Part):
    """Configurations of a sweep: every combination of `grid`, for each entry of `list` or each of `random`."""

    grid: dict[str, Values] = Field({})
    """Dotted key -> values, e.g. `lora.r: [8, 16]`."""
    list: Entries = Field([])
    """Sets of dotted keys, e.g. `- {lora.r: 8, lora.lora_alpha: 16}`."""
    random: RandomSpec | None = None
    """Section, see below."""

    def clashes(self) -> Iterator[Clash]:
        if self.random and self.list:
            yield "random", "does not go with list, which names its configurations"


def _one_or_several(value: object) -> object:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value  # strictness takes no list for a tuple behind a function


def _receiver(value: str) -> str:
    if not (WEBHOOK.fullmatch(value) or may_be_named(value)):
        raise ValueError("is neither the name of a webhook nor an http(s) URL without user, password and spaces")
    return value


Receiver = Annotated[str, AfterValidator(_receiver)]


class SweepFile(RunSpec):
    """The whole file."""

    sweep: SweepSpec = SweepSpec()
    notify: Annotated[tuple[Receiver, ...], BeforeValidator(_one_or_several), Field(max_length=5)] = ()
    """Webhooks that are told when the batch has ended, one or a list: names of `LORAQ_WEBHOOKS` of the control workers,
    or URLs whose hosts `LORAQ_WEBHOOK_HOSTS` allows. See docs/operations.md."""
    ensembles: tuple[EnsembleSpec, ...] = ()
    """List of sections, see below: trials that are scored together as one."""
