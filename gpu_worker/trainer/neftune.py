"""Noise on the embeddings of the rows that are trained on: NEFTune, Jain et al. (2023), arXiv:2310.05914.

Uniform in [-1, 1], times alpha / sqrt(tokens of the row * dimensions). transformers' own takes the width of the tensor
for the tokens of the row, which is no row's where they lie end to end, and the longest one's where they are padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from gpu_worker.trainer.failures import bad_spec


@contextmanager
def noise(alpha: float | None, trainer: Any) -> Iterator[None]:
    """Within the block, in training steps alone: validations, and whatever else asks the model, see none. None: none.

    It is drawn from torch's own generator, whose state is in a checkpoint, and outside of the layers, so that none is
    drawn again where activations are computed again. Raises JobFailure (bad_spec) where the model passes by its
    embeddings.
    """
    if alpha is None:
        yield
        return
    training_step = trainer.training_step
    lengths: torch.Tensor | None = None
    added = False

    def add(_module: Any, _inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
        nonlocal added
        if lengths is None:
            return embedded
        added = True
        most = alpha / (lengths.to(embedded.device).float() * embedded.shape[-1]).sqrt()
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * most[..., None].to(embedded.dtype)

    def with_noise(model: Any, inputs: dict[str, Any], *arguments: Any, **more: Any) -> Any:
        nonlocal lengths, added
        lengths, added = row_lengths(inputs), False
        try:
            loss = training_step(model, inputs, *arguments, **more)
        finally:
            lengths = None
        if not added:
            raise bad_spec("training.neftune_noise_alpha: this model does not call its embeddings; leave it out")
        return loss

    trainer.training_step = with_noise
    hook = trainer.model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()
        trainer.training_step = training_step


def row_lengths(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """For each token how many its row has: (1, tokens) of rows end to end, (rows, 1) of padded ones."""
    if "packed_seq_lengths" in batch:
        lengths = batch["packed_seq_lengths"]
        # With the size known nothing waits for the GPU.
        return lengths.repeat_interleave(lengths, output_size=batch["input_ids"].numel())[None]
    return batch["attention_mask"].sum(-1, keepdim=True)
