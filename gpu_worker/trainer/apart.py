"""Whether a model keeps rows apart that lie end to end in one sequence, found out by trying."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from gpu_worker.trainer.collator import Collator
from gpu_worker.trainer.failures import one_line

FIRST, SECOND = 24, 16  # tokens of the rows that are tried
# Of the spread of the scores. After another row they are the same numbers; alone, they are rounded otherwise in 16
# bits. A row that is seen, or positions that go on counting, change them by about their spread.
SEEN, MISPLACED = 0.01, 0.1


def why_not(model: Any, dtype: torch.dtype) -> str:
    """Why the model cannot take rows end to end; "" where it can. `dtype`: what training computes in on a GPU."""
    of = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    one, other, row = (torch.randint(vocabulary, (size,), generator=of).tolist() for size in (FIRST, FIRST, SECOND))
    trains = model.training
    model.eval()  # without dropout
    try:
        after_one, after_other, alone = (_scores(model, dtype, rows) for rows in ([one, row], [other, row], [row]))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever it is: padded rows may do
        return one_line(f"{type(error).__name__}: {error}")
    finally:
        model.train(trains)
    spread = float(alone.std())
    if not (after_one - after_other).abs().max() <= SEEN * spread:  # also where one is NaN
        return "a row sees the one before it"
    if not (after_one - alone).abs().mean() <= MISPLACED * spread:
        return "a row is read as if it stood further on"
    return ""


def _scores(model: Any, dtype: torch.dtype, rows: list[list[int]]) -> torch.Tensor:
    """The logits at the last row, (SECOND, vocabulary), in 32 bits."""
    batch = Collator(0, flat=True)([{"input_ids": row, "labels": row} for row in rows])
    del batch["labels"]
    on_gpu = model.device.type == "cuda"
    with torch.no_grad(), torch.autocast("cuda", dtype) if on_gpu else nullcontext():
        # A cache of keys and values would make transformers forget where rows begin.
        logits = model(**{name: value.to(model.device) for name, value in batch.items()}, use_cache=False).logits
    scores: torch.Tensor = logits[0, -SECOND:].float()
    return scores
