"""Elastic weight consolidation: what the rows of an earlier training need is held while others are trained on.

Kirkpatrick et al. (2017), "Overcoming catastrophic forgetting in neural networks", equation 3. The loss gets

    ewc_lambda / 2 * sum_i F_i (theta_i - theta*_i)^2

theta* are the weights that the training begins with. F is the diagonal of the Fisher information there, estimated from
the rows that they were trained on: the mean over rows of the squared gradient of the log-likelihood of what is trained
in a row, the data's own answers taken (the empirical Fisher information).
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from gpu_worker.protocol import Progress
from gpu_worker.trainer.failures import JobFailure, bad_data
from jobqueue import rows
from jobqueue.chat import Chat
from jobqueue.data_spec import EwcSpec
from jobqueue.job import FailureReason
from jobqueue.tokens import Tokens, survey

log = logging.getLogger("loraq.trainer")
FILE = "ewc.safetensors"  # in a checkpoint: the same penalty for the attempt that goes on
SAID_EVERY = 16  # rows

Named = dict[str, torch.Tensor]


class Ewc(TrainerCallback):
    """The penalty of one training; of a spec without `ewc` there is none, and nothing is done."""

    def __init__(self, spec: EwcSpec | None, chat: Chat, max_seq_length: int) -> None:
        """Reads the rows. Raises DataError, JobFailure (bad_data)."""
        self._lambda = spec.ewc_lambda if spec else 0.0
        self._rows = _rows_before(spec, chat, max_seq_length) if spec else []
        self._fisher: Named = {}
        self._before: Named = {}
        self._loss_before = 0.0
        self._trainer: Any = None

    def prepare(self, trainer: Any, resume: str | None, report: Callable[[Progress], None]) -> None:
        """Estimate F, or take it from the checkpoint that training goes on from.

        Raises JobFailure where a gradient is no number.
        """
        if not self._rows:
            return
        self._trainer = trainer
        if resume:
            device = next(trainer.model.parameters()).device
            kept = load_file(Path(resume) / FILE, device=str(device))
            self._fisher, self._before = _part(kept, "fisher."), _part(kept, "before.")
            self._loss_before = float(kept["loss"])
        else:
            self._before = {name: p.detach().float().clone() for name, p in _trained(trainer.model)}
            self._fisher, self._loss_before = self._estimated(report)

    def add_penalty(self, step: Any, *arguments: Any) -> Any:
        """To the gradients of the last micro-batch before the optimizer's step, so before they are clipped."""
        loss = step(*arguments)
        if self._rows and self._trainer.accelerator.sync_gradients:
            self._add_gradient()
        return loss

    def save(self, checkpoint: Path) -> None:
        """All that the penalty is made of."""
        if self._rows:
            parts = {f"fisher.{name}": tensor for name, tensor in self._fisher.items()}
            parts |= {f"before.{name}": tensor for name, tensor in self._before.items()}
            save_file(parts | {"loss": torch.tensor(self._loss_before, dtype=torch.float64)}, checkpoint / FILE)

    def outcome(self) -> dict[str, Any] | None:
        """How far the weights went, and the loss on the rows of before: then and now. Mean over their tokens."""
        if not self._rows:
            return None
        model = self._trainer.model
        with torch.no_grad():
            terms = (
                (self._fisher[name] * (p.float() - self._before[name]).square()).sum().double()
                for name, p in _trained(model)
            )
            penalty = self._lambda / 2 * float(sum(terms))
            with _without_dropout(model):
                likelihoods = [float(self._log_likelihood(row)) for row in self._rows]
        found = {
            "ewc_lambda": self._lambda,
            "rows": len(self._rows),
            "penalty": penalty,
            "loss_before": self._loss_before,
            "loss_after": -sum(likelihoods) / sum(map(_predicted, self._rows)),
        }
        log.info("ewc: %s", found)
        return found

    def _estimated(self, report: Callable[[Progress], None]) -> tuple[Named, float]:
        """F in 32 bits, and the mean loss of a token."""
        model = self._trainer.model
        fisher = {name: torch.zeros_like(tensor) for name, tensor in self._before.items()}
        total = 0.0
        with _without_dropout(model):
            for done, row in enumerate(self._rows):
                if done % SAID_EVERY == 0:
                    report(Progress("data", step=done, steps=len(self._rows)))
                model.zero_grad(set_to_none=True)
                likelihood = self._log_likelihood(row)
                likelihood.backward()
                total += float(likelihood.detach())
                for name, p in _trained(model):
                    if p.grad is not None:
                        fisher[name] += p.grad.float().square() / len(self._rows)
        model.zero_grad(set_to_none=True)
        if not all(bool(torch.isfinite(part).all()) for part in fisher.values()):
            raise JobFailure(FailureReason.NAN_LOSS, "ewc: a gradient on the rows of from_adapter is NaN or infinite")
        return fisher, -total / sum(map(_predicted, self._rows))

    def _log_likelihood(self, row: Tokens) -> Any:
        """Of all that is trained in one row, given what stands before it; a scalar tensor."""
        model = self._trainer.model
        device = next(model.parameters()).device
        ids, labels = (torch.tensor([part], device=device) for part in (row.input_ids, row.labels))
        with self._trainer.accelerator.autocast():
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        return -loss.float() * _predicted(row)  # the model's own is the mean over tokens

    @torch.no_grad()
    def _add_gradient(self) -> None:
        """Of the penalty, to what the rows have given; in 32 bits, whatever the weights are in."""
        if not self._lambda:
            return
        scaler = self._trainer.accelerator.scaler  # gradients in fp16 are scaled until they are clipped
        factor = self._lambda * (scaler.get_scale() if scaler is not None else 1.0)
        for name, p in _trained(self._trainer.model):
            gradient = factor * self._fisher[name] * (p.float() - self._before[name])
            p.grad = (gradient if p.grad is None else p.grad.float() + gradient).to(p.dtype)


def _rows_before(spec: EwcSpec, chat: Chat, max_seq_length: int) -> list[Tokens]:
    """A sample of what the earlier adapter was trained on, without what was kept back or mixed in then."""
    assert spec.data is not None, "submit has looked it up"
    trained = rows.split(spec.data, [example for _, example in rows.load(spec.data).examples])[0]
    drawn = random.Random(spec.seed).sample(trained, min(spec.samples, len(trained)))
    found, report = survey(chat, drawn, max_seq_length)
    found = [row for row in found if _predicted(row)]
    if not found:
        why = "; ".join(f"{count}: {reason}" for reason, count in report.dropped.items())
        raise bad_data(f"ewc: none of the rows of {spec.data.source} has an answer to hold on to ({why})")
    return found


def _predicted(row: Tokens) -> int:
    """How many tokens have a likelihood: nothing stands before the first."""
    return Tokens(row.input_ids[1:], row.labels[1:]).trained


def _part(tensors: Named, prefix: str) -> Named:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _trained(model: Any) -> list[tuple[str, Any]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


@contextlib.contextmanager
def _without_dropout(model: Any) -> Iterator[None]:
    """The model stays in training, where Unsloth keeps what a gradient needs; and no random number is drawn.

    Attention drops out by a function, with a rate that its module, or the model's config, has as an attribute.
    """
    dropouts = [module for module in model.modules() if isinstance(module, torch.nn.Dropout) and module.training]
    holders = {id(holder): holder for module in model.modules() for holder in (module, getattr(module, "config", None))}
    rates = [
        (holder, name, rate)
        for holder in holders.values()
        for name, rate in getattr(holder, "__dict__", {}).items()
        if "drop" in name and isinstance(rate, float)
    ]
    for module in dropouts:
        module.eval()
    for holder, name, _ in rates:
        setattr(holder, name, 0.0)
    yield
    for module in dropouts:
        module.train()
    for holder, name, rate in rates:
        setattr(holder, name, rate)
