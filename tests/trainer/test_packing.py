"""Rows end to end in one sequence: they do not see each other, and training is what it is with padded rows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trainer_child import DEMO, Child, Done, train_spec
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gpu_worker.trainer.apart import why_not
from gpu_worker.trainer.collator import KEPT_BACK, ROW_LENGTHS, Collator
from gpu_worker.trainer.data import chat_of
from gpu_worker.trainer.failures import JobFailure
from jobqueue.example import Example
from jobqueue.spec import TrainingSpec
from jobqueue.tokens import IGNORED, tokenise

VOCABULARY = 300
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": COMMON, "qwen3": COMMON, "gemma3_text": COMMON | {"sliding_window": 6},
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 32, "n_head": 4, "n_layer": 3},  # positions are learned
}  # fmt: skip
MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 3}
Row = dict[str, list[int]]


def make(kind: str, config: dict[str, Any]) -> Any:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config), dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def make_rows(*lengths: int, seed: int = 0) -> list[Row]:
    """The second half of each is trained on."""
    of = torch.Generator().manual_seed(seed)
    ids = [torch.randint(1, VOCABULARY, (length,), generator=of).tolist() for length in lengths]
    return [{"input_ids": row, "labels": [IGNORED] * (len(row) // 2) + row[len(row) // 2 :]} for row in ids]


def loss_and_gradients(model: Any, rows: list[Row], flat: bool) -> tuple[float, dict[str, torch.Tensor]]:
    trained = sum(label != IGNORED for row in rows for label in row["labels"])
    model.zero_grad()
    loss = model(**Collator(0, flat=flat)(rows), use_cache=False, num_items_in_batch=trained).loss
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# -- rows of a batch


@pytest.mark.parametrize("kind", FAMILIES)
def test_losses_and_gradients_are_those_of_padded_rows(kind: str) -> None:
    model, rows = make(kind, FAMILIES[kind]), make_rows(13, 7, 2, 20)

    padded, wanted = loss_and_gradients(model, rows, flat=False)
    flat, found = loss_and_gradients(model, rows, flat=True)

    assert flat == pytest.approx(padded, abs=1e-5)
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_row_s_loss_is_the_same_whatever_stands_before_it_and_as_if_it_stood_alone(kind: str) -> None:
    """trl#3067: packed rows saw each other."""
    model, collate = make(kind, FAMILIES[kind]), Collator(0, flat=True)
    (row,) = make_rows(12)

    def loss(rows: list[Row]) -> float:
        untrained = [{**before, "labels": [IGNORED] * len(before["labels"])} for before in rows[:-1]]
        with torch.no_grad():
            return float(model(**collate([*untrained, rows[-1]]), use_cache=False).loss)

    losses = [loss([*make_rows(9, 4, seed=seed), row]) for seed in (1, 2, 3)]

    assert losses == pytest.approx([loss([row])] * 3, abs=1e-5)
    in_one_row = {name: make_rows(9, seed=1)[0][name] + row[name] for name in row}
    in_one_row["labels"][:9] = [IGNORED] * 9
    assert abs(loss([in_one_row]) - losses[0]) > 1e-3, "what stands before a token in its own row counts"


def test_no_token_of_a_row_is_predicted_from_the_row_before_though_all_of_a_text_is_trained() -> None:
    chat = chat_of(AutoTokenizer.from_pretrained(DEMO / "model"))
    rows = tokenise(chat, [Example([], text=text) for text in ("one two three", "four", "five six")], 64)[0]
    collate = Collator(0, flat=True)

    batch = collate([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])

    labels, starts = batch["labels"][0].tolist(), [i for i, p in enumerate(batch["position_ids"][0]) if p == 0]
    assert len(starts) == 3
    assert [labels[start] for start in starts] == [IGNORED] * 3
    assert [label for i, label in enumerate(labels) if i not in starts] == [
        token for row in rows for token in row.input_ids[1:]
    ]
    ((counted, tokens, trained),) = collate.batches
    assert (counted, tokens, trained) == (3, len(labels), len(labels) - 3)


def test_a_packed_sequence_is_the_rows_that_it_is_made_of() -> None:
    one, two, three = make_rows(5, 3, 4)
    together = {name: [*one[name], *two[name]] for name in one} | {ROW_LENGTHS: [5, 3]}
    collate = Collator(0, flat=True)

    packed, apart = collate([together, three]), collate([one, two, three])

    assert {name: tensor.tolist() for name, tensor in packed.items()} == {
        name: tensor.tolist() for name, tensor in apart.items()
    }
    assert packed["packed_seq_lengths"].tolist() == [5, 3, 4]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]]
    assert collate.batches[0] == collate.batches[1] == (3, 12, 7)


def test_rows_that_validate_are_padded_all_the_same() -> None:
    batch = Collator(0, flat=True)([{**row, KEPT_BACK: True} for row in make_rows(5, 3)])

    assert batch["input_ids"].shape == (2, 5)


# -- whether a model can


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_model_that_keeps_rows_apart_passes(kind: str) -> None:
    assert why_not(make(kind, FAMILIES[kind]), torch.float32) == ""


def test_a_model_whose_rows_see_each_other_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not(make("mamba", MAMBA), torch.float32) == "a row sees the one before it"

    model = make("llama", COMMON).train()
    forward = model.forward

    def without(name: str) -> Callable[..., Any]:
        return lambda **batch: forward(**{key: value for key, value in batch.items() if key != name})

    monkeypatch.setattr(model, "forward", without("position_ids"))
    assert why_not(model, torch.float32) == "a row sees the one before it"
    monkeypatch.setattr(model, "forward", lambda input_ids: None)
    assert why_not(model, torch.float32).startswith("TypeError: ")
    assert model.training, "it is left as it was"


def test_a_model_that_counts_positions_through_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("gpt2", FAMILIES["gpt2"])
    positions = model.transformer.wpe.forward

    def shifted(ids: torch.Tensor) -> Any:
        return positions(torch.arange(ids.shape[-1])[None])

    monkeypatch.setattr(model.transformer.wpe, "forward", shifted)
    assert why_not(model, torch.float32) == "a row is read as if it stood further on"


@pytest.fixture
def layout_on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """`layout_of` as on a GPU, for a model whose attention is as said: Unsloth's own or not, calls by row, masked."""

    def layout(kind: str, by_unsloth: bool, calls: tuple[int, int], **training: Any) -> str:
        seen = iter([(7, 7), (7 + calls[0], 7 + calls[1])])
        fake = SimpleNamespace(
            ON_GPU=True, attends_by_row=lambda _: by_unsloth, packed_attention_calls=lambda: next(seen),
            dtype=lambda _: torch.float32,
        )  # fmt: skip
        monkeypatch.setitem(sys.modules, "gpu_worker.trainer.model", fake)
        monkeypatch.delitem(sys.modules, "gpu_worker.trainer.padding_free", raising=False)
        from gpu_worker.trainer.padding_free import layout_of

        return layout_of(TrainingSpec(**training), make(kind, MAMBA if kind == "mamba" else FAMILIES[kind]))

    yield layout
    sys.modules.pop("gpu_worker.trainer.padding_free", None)


def test_on_a_gpu_rows_lie_end_to_end_where_that_costs_attention_nothing(layout_on_gpu: Callable[..., str]) -> None:
    assert layout_on_gpu("llama", True, (0, 0)) == "flat"
    assert layout_on_gpu("llama", False, (6, 0)) == "masked"
    assert layout_on_gpu("llama", False, (3, 3)) == "padded", "some layers have a mask"
    assert layout_on_gpu("llama", False, (0, 0)) == "padded", "attention of another kind"
    assert layout_on_gpu("llama", True, (0, 0), padding_free=False) == "padded"
    assert layout_on_gpu("llama", False, (0, 0), packing=True) == "masked", "whoever asks for it pays"
    assert layout_on_gpu("mamba", True, (0, 0)) == "padded"
    with pytest.raises(JobFailure, match=r"training\.padding_free: .* a row sees the one before it"):
        layout_on_gpu("mamba", True, (0, 0), padding_free=True)


# -- whole trainings


STEPS = {"max_steps": 8, "logging_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
SOME = {"limit": 40, "validation_split": 0.2}


@pytest.fixture(scope="module")
def padded(child: Child) -> Done:
    return child.run(train_spec(training=STEPS, data=SOME))


def losses(done: Done) -> list[float]:
    return [loss for _, loss, _ in done.outcome["losses"]]


def test_a_training_without_padding_has_the_losses_and_counts_of_one_with_it(child: Child, padded: Done) -> None:
    flat = child.run(train_spec(training=STEPS | {"padding_free": True}, data=SOME))

    assert losses(flat) == pytest.approx(losses(padded), abs=2e-4)
    validated, wanted = flat.outcome["validation"], padded.outcome["validation"]
    assert validated["losses"][0][1] == pytest.approx(wanted["losses"][0][1], abs=2e-3)
    a, b = flat.outcome["training"], padded.outcome["training"]
    assert (a["padding_free"], b["padding_free"]) == (True, False)
    same = ("steps", "epochs", "rows", "tokens", "trained_tokens")
    assert [a[name] for name in same] == [b[name] for name in same]


def test_packing_goes_through_every_row_once_an_epoch_and_goes_on_where_it_was(child: Child) -> None:
    packing = {
        "packing": True, "max_seq_length": 256, "num_train_epochs": 2.0, "max_steps": -1, "save_steps": 3,
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "logging_steps": 1,
    }  # fmt: skip
    spec = train_spec(training=packing, data={"limit": 60, "validation_split": 0.2})
    whole = child.run(spec)
    training, data = whole.outcome["training"], whole.outcome["data"]
    sequences = -(-data["tokens"] // 256)

    assert (training["rows"], training["tokens"]) == (2 * data["used"], 2 * data["tokens"])
    assert training["trained_tokens"] == 2 * data["trained_tokens"]
    assert training["epochs"] == 2.0
    assert whole.outcome["validation"]["rows"] == 60 - data["used"] > 0, "they are not packed"
    assert len(whole.outcome["validation"]["losses"]) == 1
    assert sequences <= training["steps"] <= sequences + 2, "a step has two sequences, and they are nearly full"
    later = child.run(spec, resume=whole.checkpoints[-1])
    assert losses(later) == pytest.approx(losses(whole), abs=1e-3)
    assert later.outcome["training"]["resumed_from_step"] == 3 * (training["steps"] // 3 - (training["steps"] % 3 == 0))
    assert [later.outcome["training"][name] for name in ("rows", "tokens")] == [training["rows"], training["tokens"]]


def test_rows_of_a_step_come_sorted_by_length_and_are_those_that_came_unsorted() -> None:
    from accelerate.data_loader import SeedableRandomSampler

    from gpu_worker.trainer.batches import LongestFirst

    lengths = [(7 * n) % 31 for n in range(43)]
    sampler, plain = LongestFirst(lengths, 8, seed=5), SeedableRandomSampler(range(43), data_seed=5)
    for epoch in (0, 3):
        sampler.set_epoch(epoch)
        plain.set_epoch(epoch)
        order, unsorted = list(sampler), list(plain)
        assert len(sampler) == len(order) == 43
        for start in range(0, 43, 8):
            step = order[start : start + 8]
            assert set(step) == set(unsorted[start : start + 8])
            assert all(lengths[a] >= lengths[b] for a, b in pairwise(step))


def test_a_model_that_cannot_is_refused_packing_with_its_reason(child: Child, tmp_path: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    model = make("mamba", MAMBA | {"vocab_size": max(tokenizer.get_vocab().values()) + 1})
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    failure = child.run(train_spec(base_model=str(tmp_path), training={"packing": True})).failure

    assert failure.reason == "bad_spec"
    assert "training.packing: this model cannot take rows end to end: a row sees the one before it" in failure.message
