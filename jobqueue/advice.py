"""What is unusual about a configuration and its data, in the words of somebody who has fine-tuned before; pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from jobqueue.spec import RunSpec

if TYPE_CHECKING:
    from jobqueue.tokens import DataReport

# Where a learning rate is in its usual range, by what is trained: Unsloth's and TRL's guides.
ADAPTER_RATES = (5e-6, 5e-4)
FULL_RATES = (1e-6, 5e-5)
MOST_EPOCHS = 3.0  # from then on answers are learned by heart
FEW_ROWS = 100
CUT_SHARE = 0.05
DOUBLED_SHARE = 0.01
MOST_LINES = 8  # for a whole batch


def of_batch(said: Mapping[str, Sequence[str]], trials: int) -> list[str]:
    """A line for each thing that is said of any of the `trials`; `said`: what, and of which by their labels."""
    lines = []
    for text, labels in said.items():
        which = labels[0] if len(labels) == 1 else f"{len(labels)} of {trials} trials"
        lines.append(text if len(labels) == trials else f"{text} ({which})")
    more = len(lines) - MOST_LINES
    return lines if more <= 0 else [*lines[:MOST_LINES], f"and {more} more of that kind"]


def on_training(run: RunSpec, rows: int | None) -> Iterator[str]:
    """Learning rate, length of training, whether anything tells when it gets worse, and what may be forgotten.

    `rows` are trained on; None where they cannot be counted here.
    """
    training = run.training
    low, high = FULL_RATES if run.method == "full" else ADAPTER_RATES
    if not low <= training.learning_rate <= high:
        side = "above" if training.learning_rate > high else "below"
        yield (
            f"learning_rate {training.learning_rate:g} is {side} the usual range for method {run.method} "
            f"({low:g} to {high:g})"
        )
    epochs = training.num_train_epochs or 1.0
    seen = 0 if training.packing else (training.steps or 0) * training.effective_batch  # packed: nobody knows yet
    if seen and rows:
        epochs = seen / rows
    if epochs > MOST_EPOCHS:
        remedy = "" if training.early_stopping_patience else "; early_stopping_patience stops when it does"
        yield f"{round(epochs, 1):g} epochs: after {MOST_EPOCHS:g} a model mostly learns its rows by heart{remedy}"
    elif epochs < 1 and seen and rows:
        yield f"{training.steps} steps of {training.effective_batch} see {seen:,} of {rows:,} rows"
    if rows is not None and rows < FEW_ROWS:
        yield f"{rows} rows are few: some hundreds are usual"
    if run.evaluation is None and run.data is not None and run.data.validation_split is None:
        yield "nothing will tell whether it helps: set evaluation, or data.validation_split"
    elif run.data is not None and run.data.validation_split and not training.eval_steps:
        yield "the validation loss is known at the end alone: training.eval_steps shows from where on it rises"
    if run.from_adapter and run.data is not None and not (run.ewc or run.data.replay):
        seen_by = "" if run.original_task else "; original_task shows it"
        yield f"from_adapter may forget what it was trained on: ewc or data.replay hold on to that{seen_by}"


def on_data(report: DataReport, max_seq_length: int) -> Iterator[str]:
    """Rows that are dropped, cut or doubled."""
    if report.used < report.rows:
        yield f"{report.rows - report.used} of {report.rows} rows are dropped: {'; '.join(report.dropped)}"
    if report.truncated > CUT_SHARE * report.rows:
        yield (
            f"{report.truncated} of {report.rows} rows are cut at max_seq_length {max_seq_length}, "
            f"the longest has {report.longest} tokens"
        )
    yield from on_duplicates(report.duplicates, report.rows)


def on_duplicates(duplicates: int, rows: int) -> Iterator[str]:
    """Rows that weigh more than the others."""
    if duplicates > DOUBLED_SHARE * rows:
        yield f"{duplicates} of {rows} rows read the same as an earlier one"
