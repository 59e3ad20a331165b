"""An evaluation after a training runs transformers' own methods, and the training finds Unsloth's again."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama

from gpu_worker.trainer import stock


def test_what_was_replaced_is_stock_within_the_block_and_replaced_again_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stock, "_before", {})
    config = LlamaConfig()
    stock.remember(config)
    forward, rotary = modeling_llama.LlamaAttention.forward, modeling_llama.LlamaRotaryEmbedding

    def fast(*_: Any) -> None:
        raise AssertionError("this is not transformers' own")

    class Fast:
        pass

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", fast)
    monkeypatch.setattr(modeling_llama, "LlamaRotaryEmbedding", Fast)
    stock.remember(config)  # of the second training; what counts is what was before the first
    with stock.classes(config):
        assert modeling_llama.LlamaAttention.forward is forward
        assert modeling_llama.LlamaRotaryEmbedding is rotary
    assert modeling_llama.LlamaAttention.forward is fast
    assert modeling_llama.LlamaRotaryEmbedding is Fast


def test_without_a_training_nothing_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock, "_before", {})
    forward = modeling_llama.LlamaAttention.forward
    with stock.classes(LlamaConfig()):
        assert modeling_llama.LlamaAttention.forward is forward
