"""Noise on the embeddings of the rows that are trained on: NEFTune, Jain et al. (2023), arXiv:2310.05914.

Uniform in [-1, 1], times alpha / sqrt(tokens of the row * dimensions). transformers' own takes the width of the tensor
for the tokens of the row, which is no row's where they lie end to end, and the longest one's where they are padded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from gpu_worker.trainer.failures import bad_spec


class Noise:
    """In training steps alone: validations, and whatever else asks the model, see none. alpha None: none.

    It is drawn from torch's own generator, whose state is in a checkpoint, and outside of the layers, so that none is
    drawn again where activations are computed again.
    """

    def __init__(self, alpha: float | None, model: Any) -> None:
        self._alpha = alpha
        self._lengths: torch.Tensor | None = None  # None: no training step
        self._added = False
        if alpha is not None:  # for good: compiled code may not see a hook that comes later
            model.get_input_embeddings().register_forward_hook(self._add)

    def on_embeddings(self, step: Any, model: Any, inputs: dict[str, Any], *more: Any) -> Any:
        """Raises JobFailure (bad_spec) where the model passes by its embeddings."""
        if self._alpha is None:
            return step(model, inputs, *more)
        self._lengths, self._added = row_lengths(inputs), False
        try:
            loss = step(model, inputs, *more)
        finally:
            self._lengths = None
        if not self._added:
            raise bad_spec("training.neftune_noise_alpha: this model does not call its embeddings; leave it out")
        return loss

    def _add(self, _module: Any, _inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
        if self._alpha is None or self._lengths is None:
            return embedded
        self._added = True
        most = self._alpha / (self._lengths.to(embedded.device).float() * embedded.shape[-1]).sqrt()
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * most[..., None].to(embedded.dtype)


def row_lengths(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """For each token how many its row has: (1, tokens) of rows end to end, (rows, 1) of padded ones."""
    if "packed_seq_lengths" in batch:
        lengths = batch["packed_seq_lengths"]
        # With the size known nothing waits for the GPU.
        return lengths.repeat_interleave(lengths, output_size=batch["input_ids"].numel())[None]
    return batch["attention_mask"].sum(-1, keepdim=True)
