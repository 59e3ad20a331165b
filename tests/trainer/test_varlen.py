"""Rows end to end in one call of attention. The kernel needs a GPU: here something stands in for it that knows how it
is called; `varlen.works` compares the real one with attention of each row in every trainer that would use it.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpu_worker.trainer import varlen


def by_row(query: Any, key: Any, value: Any, ends: Any, scale: float | None, window: tuple[int, int]) -> torch.Tensor:
    """(tokens, heads, size), causal, `window[0]` tokens back at most (-1: all)."""
    outs = []
    for start, end in pairwise(ends.tolist()):
        q, k, v = (tensor[start:end].transpose(0, 1) for tensor in (query, key, value))
        place = torch.arange(end - start)
        sees = place[:, None] >= place
        if window[0] >= 0:
            sees &= place[:, None] - place <= window[0]
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, sees, scale=scale, enable_gqa=True)
        outs.append(out.transpose(0, 1))
    return torch.cat(outs)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Stands in for torch's. Returns, for each backward pass, whether it was to add in a fixed order."""
    fixed: list[bool] = []

    def forward(
        q: Any, k: Any, v: Any, ends: Any, same: Any, most: int, also: int, dropout: float, causal: bool, debug: bool,
        *, scale: float | None, window_size_left: int, window_size_right: int,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        assert ends is same
        assert most == also == max(end - start for start, end in pairwise(ends.tolist()))
        assert (dropout, causal, debug, window_size_right) == (0.0, False, False, 0)
        empty = torch.empty(0)
        return by_row(q, k, v, ends, scale, (window_size_left, 0)), empty, empty, empty, empty

    def backward(
        gradient: Any, q: Any, k: Any, v: Any, out: Any, logsumexp: Any, ends: Any, same: Any, most: int, also: int,
        dropout: float, causal: bool, rng_state: Any, unused: Any,
        *, scale: float | None, window_size_left: int, window_size_right: int,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        fixed.append(torch.are_deterministic_algorithms_enabled())
        inputs = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
        with torch.enable_grad():
            again = by_row(*inputs, ends, scale, (window_size_left, 0))
        return torch.autograd.grad(again, inputs, gradient)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)
    return fixed


def inputs() -> tuple[list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    heads = (4, 2, 2)
    tensors = [torch.randn(12, count, 8, requires_grad=True) for count in heads]
    return tensors, torch.tensor([0, 3, 4, 12], dtype=torch.int32)


@pytest.mark.parametrize("window", [(-1, 0), (2, 0)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_one_call_gives_the_numbers_and_gradients_of_each_row(
    kernel: list[bool], window: tuple[int, int], scale: float | None
) -> None:
    tensors, ends = inputs()
    ours = varlen.attend(*tensors, ends, ends, 8, 8, scale=scale, window_size=window)
    theirs = by_row(*tensors, ends, scale, window)
    assert torch.allclose(ours, theirs, atol=1e-6)
    weights = torch.randn_like(ours)
    for one, other in zip(
        torch.autograd.grad(ours, tensors, weights), torch.autograd.grad(theirs, tensors, weights), strict=True
    ):
        assert torch.allclose(one, other, atol=1e-6)
    assert kernel == [True]
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch._C._get_deterministic_fill_uninitialized_memory()


def unsloth_dispatch() -> ast.Module:
    """As text: on a CPU it cannot be imported."""
    package = importlib.util.find_spec("unsloth")
    assert package is not None
    assert package.submodule_search_locations is not None
    return ast.parse((Path(package.submodule_search_locations[0]) / "utils" / "attention_dispatch.py").read_text())


def test_unsloth_calls_what_stands_in_that_place_as_it_can_be_called() -> None:
    calls = [
        node
        for node in ast.walk(unsloth_dispatch())
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_TORCH_VARLEN_ATTN"
    ]
    assert calls
    for call in calls:
        assert all(keyword.arg for keyword in call.keywords)
        inspect.signature(varlen.attend).bind(*call.args, **{str(word.arg): None for word in call.keywords})
    names = {node.id for node in ast.walk(unsloth_dispatch()) if isinstance(node, ast.Name)}
    assert "_LEAN_VARLEN" in names


def test_it_is_offered_where_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    for works in (True, False):
        dispatch = SimpleNamespace(_TORCH_VARLEN_ATTN=None, _LEAN_VARLEN=True)
        monkeypatch.setattr(varlen, "works", lambda works=works: works)
        varlen.offer(dispatch)
        assert (dispatch._TORCH_VARLEN_ATTN is varlen.attend) is works
        assert dispatch._LEAN_VARLEN is not works


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel is there")
def test_without_a_gpu_it_does_not_work() -> None:
    varlen.works.cache_clear()
    assert not varlen.works()


def test_an_unsloth_without_that_place_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "works", lambda: True)
    another = SimpleNamespace(_TORCH_VARLEN_ATTN=None)
    varlen.offer(another)
    assert another._TORCH_VARLEN_ATTN is None


def test_a_kernel_that_gives_other_numbers_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = [torch.ones(3), torch.ones(3)]
    for ours, taken in (([theirs[0] * 1.001, theirs[1]], True), ([theirs[0], theirs[1] * 1.1], False)):
        found = {varlen._end_to_end: ours, varlen._row_by_row: theirs}
        monkeypatch.setattr(varlen, "_tried", found.__getitem__)
        varlen.works.cache_clear()
        assert varlen.works() is taken
    nothing = [torch.full((3,), torch.nan)]
    monkeypatch.setattr(varlen, "_tried", lambda way: nothing)
    varlen.works.cache_clear()
    assert varlen.works() is False
    varlen.works.cache_clear()


def test_a_trial_that_finds_no_memory_is_no_verdict_for_later_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would have got another layout, and a resume other losses."""

    def full(_: object) -> list[torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    varlen.works.cache_clear()
    monkeypatch.setattr(varlen, "_tried", full)
    with pytest.raises(torch.OutOfMemoryError):
        varlen.works()
    monkeypatch.setattr(varlen, "_tried", lambda way: [torch.ones(3)])
    assert varlen.works()
    varlen.works.cache_clear()
