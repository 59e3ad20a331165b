"""A trainer on a card that seems to compute in fp16 alone, as a T4 does; for benchmarks/training.py."""

from __future__ import annotations

from gpu_worker.trainer import child


def main() -> None:
    child._environment()
    import unsloth  # it sets the function that is replaced below  # noqa: F401

    # isort: split
    import torch

    torch.cuda.is_bf16_supported = lambda *_, **__: False
    child.main()


if __name__ == "__main__":
    main()
