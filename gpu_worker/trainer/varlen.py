"""Attention of rows that lie end to end, by the flash kernel that comes with torch: one call for all rows of a layer.

Unsloth calls attention row by row where neither flash-attn nor xformers is there and torch's `varlen_attn` takes no
grouped heads, as in torch 2.11: on an H200 most of the kernels of a step, and a third of its time on the GPU. The
kernel below `varlen_attn` takes them in 2.11 too. Its backward pass adds in no fixed order, unless it is told to: then
equal trainings stay equal.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

log = logging.getLogger("loraq.trainer")
LENGTHS = (9, 200, 64)  # of the rows that are tried: more than one block of keys, and less
HEADS, GROUPS, SIZE = 4, 2, 64
AGREEMENT = 0.02  # of the largest number; two ways of rounding to bf16 differ by less than half of that


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = True,
) -> torch.Tensor:
    """As `torch.nn.attention.varlen.varlen_attn`: (tokens, heads, size); heads of keys and values may be fewer."""
    out: torch.Tensor = _Attention.apply(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seq_q: torch.Tensor,
        cu_seq_k: torch.Tensor,
        max_q: int,
        max_k: int,
        scale: float | None,
        window_size: tuple[int, int],
    ) -> torch.Tensor:
        ctx.rows = (cu_seq_q, cu_seq_k, max_q, max_k, 0.0, False)  # no dropout; causal by the window
        ctx.options = {"scale": scale, "window_size_left": window_size[0], "window_size_right": window_size[1]}
        flash = torch.ops.aten._flash_attention_forward
        out, logsumexp, rng_state, unused, _ = flash(query, key, value, *ctx.rows, False, **ctx.options)
        ctx.save_for_backward(query, key, value, out, logsumexp, rng_state, unused)
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, logsumexp, rng_state, unused = ctx.saved_tensors
        flash = torch.ops.aten._flash_attention_backward
        gradient = gradients[0].contiguous()
        with _in_fixed_order():
            of_inputs = flash(gradient, query, key, value, out, logsumexp, *ctx.rows, rng_state, unused, **ctx.options)
        return *of_inputs, *[None] * 6


@contextmanager
def _in_fixed_order() -> Iterator[None]:
    """Within the block kernels that can add in a fixed order do. Not for a whole training: others would refuse."""
    # Not the public functions: these also set Inductor's, which compiles anew then.
    enabled, fills = torch._C._get_deterministic_algorithms(), torch._C._get_deterministic_fill_uninitialized_memory()
    torch._C._set_deterministic_fill_uninitialized_memory(False)  # else each new tensor is filled first
    torch._C._set_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(enabled)
        torch._C._set_deterministic_fill_uninitialized_memory(fills)


@cache
def works() -> bool:
    """Whether the kernel is there and gives what attention of each row gives, with its gradients.

    Raises torch.OutOfMemoryError where the trial itself finds no memory: then it has told nothing.
    """
    try:
        ours, theirs = _tried(_end_to_end), _tried(_row_by_row)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError):  # no GPU, an old one, another torch
        return False
    return all(bool((a - b).abs().max() <= AGREEMENT * b.abs().max()) for a, b in zip(ours, theirs, strict=True))


def _tried(attention: Any) -> list[torch.Tensor]:
    """What comes out, and the gradients of queries, keys and values; all in 32 bits."""
    source = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(sum(LENGTHS), heads, SIZE, generator=source).to("cuda", torch.bfloat16).requires_grad_()
        for heads in (HEADS, GROUPS, GROUPS)
    ]
    with torch.enable_grad():
        out = attention(*inputs)
        gradients = torch.autograd.grad(out.float().square().sum(), inputs)
    return [tensor.detach().float() for tensor in (out, *gradients)]


def _end_to_end(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    ends = torch.tensor([0, *LENGTHS], device=query.device).cumsum(0).int()
    return attend(query, key, value, ends, ends, max(LENGTHS), max(LENGTHS), window_size=(-1, 0))


def _row_by_row(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    rows = zip(*(tensor.transpose(0, 1).split(LENGTHS, dim=1) for tensor in (query, key, value)), strict=True)
    outs = [
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) for q, k, v in rows
    ]
    return torch.cat(outs, dim=1).transpose(0, 1)


def offer(dispatch: Any) -> None:
    """Have Unsloth's attention, whose module `dispatch` is, take it where it would take torch's."""
    if not (hasattr(dispatch, "_TORCH_VARLEN_ATTN") and hasattr(dispatch, "_LEAN_VARLEN") and works()):
        log.info("torch's flash kernel for rows of any length is not to be had here")
        return
    dispatch._TORCH_VARLEN_ATTN = attend
    dispatch._LEAN_VARLEN = False  # its own call of the same kernel, in no fixed order
