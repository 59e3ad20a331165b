"""The greedy answers of a model, as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gpu_worker.trainer.questions import padded


def greedy(
    model: Any, prompts: Sequence[list[int]], ends: Sequence[int], pad: int | None, new_tokens: int
) -> list[list[int]]:
    """What the model writes after each prompt: at most `new_tokens`, without the token of `ends` that ends it."""
    pad = pad_of(model, pad, ends)
    width = max(map(len, prompts))
    ids, mask = padded(list(prompts), width, left=True, pad=pad)
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,  # some models' own settings have another
            eos_token_id=list(ends) or None,
            pad_token_id=pad,
        )  # (prompts, width + at most new_tokens)
    return [_before_end(row, ends) for row in output[:, width:].tolist()]


def pad_of(model: Any, pad: int | None, ends: Sequence[int]) -> int:
    """What to pad with: any token where a model has none, or its tokenizer one that no embedding stands for."""
    known: int = model.get_input_embeddings().weight.shape[0]
    return pad if pad is not None and pad < known else next(iter(ends), 0)


def _before_end(row: list[int], ends: Sequence[int]) -> list[int]:
    return row[: next((place for place, token in enumerate(row) if token in ends), len(row))]
