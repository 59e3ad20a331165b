"""Elastic weight consolidation: a training that goes on from an adapter holds on to what its rows need."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_from_adapter import NAME
from trainer_child import DEMO, Child, Done, train_spec

from gpu_worker.trainer.ewc import Ewc, _trained
from jobqueue.data_spec import DataSpec, EwcSpec
from jobqueue.tokenizer_files import chat_of

BEFORE = {"source": str(DEMO / "train.jsonl"), "limit": 64}
STEPS = {"max_steps": 8, "logging_steps": 1, "learning_rate": 5e-3, "save_steps": 4}


class Tiny(torch.nn.Module):
    """The next token from the one before it; the loss is the mean over what is trained, as transformers has it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Embedding(2000, 4, dtype=dtype)
        self.second = torch.nn.Linear(4, 2000, dtype=dtype)
        self.dropout = torch.nn.Dropout(0.5)
        self.frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any) -> SimpleNamespace:
        logits = self.second(self.dropout(self.first(input_ids)))
        shifted = torch.nn.functional.cross_entropy(logits[0, :-1].float(), labels[0, 1:], reduction="mean")
        return SimpleNamespace(loss=shifted)


class Trainer:
    """What of transformers' trainer the penalty meets: `steps` micro-batches, gradients scaled as in fp16."""

    def __init__(self, model: Tiny, scale: float | None) -> None:
        self.model = model
        scaler = None if scale is None else SimpleNamespace(get_scale=lambda: scale)
        self.accelerator = SimpleNamespace(scaler=scaler, sync_gradients=False, autocast=contextlib.nullcontext)
        self.training_step: Callable[[], torch.Tensor] = lambda: torch.zeros(())

    def step(self, micro_batches: int) -> None:
        for place in range(micro_batches):
            self.accelerator.sync_gradients = place == micro_batches - 1
            self.training_step()


def of_tiny(tmp_path: Path, dtype: torch.dtype = torch.float32, scale: float | None = None) -> tuple[Ewc, Trainer]:
    rows = [{"text": "a bee is an insect"}, {"text": "an oak"}, {"text": "no trout is a bird, it is a fish"}]
    file = tmp_path / "before.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    spec = EwcSpec(ewc_lambda=7.0, data=DataSpec(source=str(file)))
    ewc, trainer = Ewc(spec, chat_of(str(DEMO / "model")), 64), Trainer(Tiny(dtype), scale)
    ewc.prepare(trainer, None, lambda _: None)
    trainer.training_step = partial(ewc.add_penalty, trainer.training_step)
    return ewc, trainer


def moved(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights as they were before they are moved."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, p in trainer.model.named_parameters():
            if name in before:
                p += torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(p.dtype)
    return before


def test_the_weight_of_a_parameter_is_the_mean_square_of_its_gradient_of_a_rows_log_likelihood(tmp_path: Path) -> None:
    ewc, trainer = of_tiny(tmp_path)
    model = trainer.model.eval()
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
    for row in ewc._rows:
        model.zero_grad()
        ids = torch.tensor(row.input_ids)
        logits = model.second(model.first(ids))
        likelihood = sum(logits[i - 1].log_softmax(0)[ids[i]] for i in range(1, len(ids)) if row.labels[i] != -100)
        likelihood.backward()
        for name in expected:
            expected[name] += model.get_parameter(name).grad ** 2 / len(ewc._rows)
    assert ewc._fisher.keys() == expected.keys()
    for name, fisher in expected.items():
        assert fisher.abs().max() > 0
        torch.testing.assert_close(ewc._fisher[name], fisher, msg=name)


def test_attention_that_drops_out_by_a_function_does_not_while_the_rows_are_asked(tmp_path: Path) -> None:
    class Attention(Tiny):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__(dtype)
            self.attention_dropout, self.config = 0.5, SimpleNamespace(attn_pdrop=0.5)

        def forward(self, input_ids: Any, attention_mask: Any, labels: Any) -> SimpleNamespace:
            assert self.training
            hidden = self.first(input_ids)
            for rate in (self.attention_dropout, self.config.attn_pdrop):
                hidden = torch.nn.functional.dropout(hidden, rate, self.training)
            logits = self.second(hidden)
            return SimpleNamespace(loss=torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:]))

    fishers = []
    for model in (Attention(torch.float32), Tiny(torch.float32)):
        ewc, trainer = of_tiny(tmp_path)
        trainer.model = model.train()
        ewc.prepare(trainer, None, lambda _: None)
        fishers.append(ewc._fisher)
        if isinstance(model, Attention):
            assert (model.attention_dropout, model.config.attn_pdrop) == (0.5, 0.5)

    for name, fisher in fishers[1].items():
        torch.testing.assert_close(fishers[0][name], fisher, msg=name)


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, None), (torch.bfloat16, None), (torch.float32, 1024.0)])
def test_each_step_has_the_gradient_of_the_penalty_once(
    tmp_path: Path, micro_batches: int, dtype: torch.dtype, scale: float | None
) -> None:
    ewc, trainer = of_tiny(tmp_path, dtype, scale)
    before = moved(trainer)
    weights = {name: trainer.model.get_parameter(name) for name in before}
    for p in weights.values():
        p.grad = torch.full_like(p, 0.5)  # of the rows
    exact = {name: p.detach().float().requires_grad_() for name, p in weights.items()}
    penalty = sum(7.0 / 2 * (ewc._fisher[name] * (exact[name] - before[name].float()) ** 2).sum() for name in before)
    penalty.backward()

    trainer.step(micro_batches)

    for name, p in weights.items():
        expected = 0.5 + (scale or 1.0) * exact[name].grad
        torch.testing.assert_close(p.grad, expected.to(dtype), msg=name)
    outcome = ewc.outcome()
    assert outcome is not None
    assert outcome["penalty"] == pytest.approx(float(penalty.detach()), rel=1e-4)


def test_a_large_lambda_holds_the_weights_that_the_rows_need_and_no_other(tmp_path: Path) -> None:
    ewc, trainer = of_tiny(tmp_path)
    ewc._lambda = 1e12
    weights = [(p, p.detach().clone(), ewc._fisher[name]) for name, p in _trained(trainer.model)]
    optimizer = torch.optim.Adam((p for p, _, _ in weights), lr=1e-2)
    for _ in range(50):
        for p, _, _ in weights:
            p.grad = torch.ones_like(p)  # the rows always pull one way
        trainer.step(1)
        optimizer.step()
    for p, before, fisher in weights:
        far = (p.detach() - before).abs()
        assert far[fisher > 1e-8].max() < 0.1, "some steps of the rate, not 50"
        assert far[fisher == 0].numel() == 0 or far[fisher == 0].min() > 0.4


@pytest.fixture(scope="module")
def earlier(child: Child) -> Done:
    """Knows the demo's questions."""
    return child.run(train_spec(training={"max_steps": 16, "learning_rate": 5e-3}))


@pytest.fixture(scope="module")
def other(child: Child) -> dict[str, Any]:
    """Another task, which turns every answer of the first."""
    rows = [json.loads(line) for line in (DEMO / "train.jsonl").read_text().splitlines()[:64]]
    file = child.folder / "other.jsonl"
    with file.open("w") as out:
        for row in rows:
            letters = list(row["options"])
            turned = letters[(letters.index(row["answer_idx"]) + 1) % len(letters)]
            out.write(json.dumps({**row, "answer": row["options"][turned], "answer_idx": turned}) + "\n")
    return {"source": str(file)}


def go_on(child: Child, earlier: Done, data: dict[str, Any], ewc_lambda: float | None, **more: Any) -> Done:
    ewc = None if ewc_lambda is None else {"ewc_lambda": ewc_lambda, "samples": 24, "data": BEFORE}
    spec = train_spec(from_adapter=NAME, ewc=ewc, data=data, training=STEPS, lora={"lora_dropout": 0.1})
    return child.run(spec, adapter=earlier.folder / "adapter", **more)


@pytest.fixture(scope="module")
def held(child: Child, earlier: Done, other: dict[str, Any]) -> Done:
    return go_on(child, earlier, other, 1000.0)


def test_what_was_learned_before_is_forgotten_less(
    child: Child, earlier: Done, other: dict[str, Any], held: Done
) -> None:
    free, plain = (go_on(child, earlier, other, ewc_lambda) for ewc_lambda in (0.0, None))
    without, with_penalty = free.outcome["ewc"], held.outcome["ewc"]
    assert without["rows"] == with_penalty["rows"] == 24
    before = with_penalty["loss_before"]
    assert before == without["loss_before"]
    assert without["loss_after"] - before > 2 * (with_penalty["loss_after"] - before) > 0, (without, with_penalty)
    assert without["penalty"] == 0 < with_penalty["penalty"]
    assert held.outcome["losses"][-1][1] < held.outcome["losses"][0][1], "the new task is learned all the same"

    assert plain.outcome["ewc"] is None
    assert plain.outcome["losses"] == free.outcome["losses"]
    ours, theirs = (load_file(done.folder / "adapter" / "adapter_model.safetensors") for done in (plain, free))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_an_attempt_that_goes_on_has_the_same_penalty(
    child: Child, earlier: Done, other: dict[str, Any], held: Done
) -> None:
    resumed = go_on(child, earlier, other, 1000.0, resume=held.checkpoints[0])
    assert resumed.outcome["training"]["resumed_from_step"] == 4
    ours, theirs = resumed.outcome["ewc"], held.outcome["ewc"]
    assert ours["loss_before"] == theirs["loss_before"]
    assert ours["penalty"] == pytest.approx(theirs["penalty"], rel=1e-2)
    assert ours["loss_after"] == pytest.approx(theirs["loss_after"], abs=1e-3)


def test_rows_without_an_answer_are_refused(child: Child, earlier: Done, tmp_path: Path) -> None:
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps({"prompt": "word " * 500, "completion": "yes"}))
    ewc = {"ewc_lambda": 1.0, "data": {"source": str(file)}}
    failure = child.run(train_spec(from_adapter=NAME, ewc=ewc), adapter=earlier.folder / "adapter").failure
    assert failure.reason == "bad_data"
    assert "ewc: none of the rows of" in failure.message
    assert "no answer within max_seq_length" in failure.message
