"""What a job is asked to do: the spec in its record, one kind each."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from jobqueue.data_spec import DataSpec, EwcSpec, Part
from jobqueue.ensemble_spec import Members
from jobqueue.export_spec import ExportOptions
from jobqueue.judge_spec import JudgeSpec
from jobqueue.spec import Asked, Dtype, EvaluationSpec, LoraSpec, Method, ResourcesSpec, RunSpec, TrainingSpec


class _OfModel(Part):
    """A job that loads a model."""

    base_model: str
    revision: str | None = None
    method: Method
    dtype: Dtype | None = None
    chat_template: str | None = None


class TrainSpec(_OfModel):
    """A job that trains one configuration."""

    kind: Literal["train"] = "train"
    data: DataSpec
    from_adapter: str | None = None
    ewc: EwcSpec | None = None
    lora: LoraSpec
    training: TrainingSpec
    resources: ResourcesSpec

    @classmethod
    def of(cls, run: RunSpec) -> TrainSpec:
        """Of a configuration that names files and models as a worker finds them."""
        return cls(**{name: getattr(run, name) for name in cls.model_fields if name != "kind"})


class EvaluateSpec(_OfModel):
    """A job that asks a base model, or an adapter of it, the questions."""

    kind: Literal["evaluate"] = "evaluate"
    adapter_job: str | None
    """The train job whose adapter (or, for method full, whose model) is asked; None: the base model."""
    members: Members | None = None
    """Instead: the adapters that are merged, and asked as one."""
    from_adapter: str | None = None
    """Not the base model, but this earlier adapter of it."""
    original_task: bool = False
    """It is not what was trained for that an adapter is asked, but what could be done before."""
    load_in_4bit: bool
    max_seq_length: int
    evaluation: EvaluationSpec
    resources: ResourcesSpec


class ExportSpec(_OfModel):
    """A job that writes a trained model as others read it, and compares its answers with the adapter's."""

    kind: Literal["export"] = "export"
    adapter_job: str
    """The train job whose adapter (or, for method full, whose model) is written."""
    data: DataSpec | None
    """The rows whose prompts are asked; None: `export.prompts` are."""
    lora: LoraSpec
    max_seq_length: int
    export: ExportOptions
    resources: ResourcesSpec

    @classmethod
    def of(cls, train: TrainSpec, adapter_job: str, export: ExportOptions) -> ExportSpec:
        """The export of what `train` trains."""
        return cls(
            base_model=train.base_model,
            revision=train.revision,
            method=train.method,
            dtype=train.dtype,
            chat_template=train.chat_template,
            adapter_job=adapter_job,
            data=None if export.prompts else train.data.model_copy(update={"validation_split": None, "replay": None}),
            lora=train.lora,
            max_seq_length=train.training.max_seq_length,
            export=export,
            resources=train.resources,
        )


class AskSpec(_OfModel):
    """A job that answers prompts, as the base model and as a trial's adapter answer them."""

    kind: Literal["ask"] = "ask"
    adapter_job: str
    load_in_4bit: bool
    max_seq_length: int
    prompts: Annotated[tuple[str, ...], Field(min_length=1)]
    asked: Annotated[tuple[Asked, ...], Field(min_length=1)] = ("base", "adapter")
    system_prompt: str | None = None
    max_new_tokens: PositiveInt = 256
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0: the most likely token each time."""
    seed: NonNegativeInt = 3407
    """Of what is drawn where the temperature is above 0."""
    resources: ResourcesSpec = ResourcesSpec()


class ReportSpec(Part):
    """A job that aggregates a batch."""

    kind: Literal["report"] = "report"
    batch: str
    votes: tuple[Members, ...] = ()
    """Ensembles whose answers are a vote."""
    notify: tuple[str, ...] = ()
    """Who is told that the batch has ended."""


class RateSpec(Part):
    """A job in which a judge rates what the models of a batch have written."""

    kind: Literal["judge"] = "judge"
    batch: str
    judge: JudgeSpec


WorkSpec = TrainSpec | EvaluateSpec | ExportSpec | AskSpec
"""What a trainer does."""
ControlSpec = ReportSpec | RateSpec
"""What a control worker does: no GPU, no memory to speak of."""
JobSpec = Annotated[WorkSpec | ControlSpec, Field(discriminator="kind")]
