"""Draw what makespan.py and gpus.py have measured.

    python benchmarks/plot.py curve results/makespan.json results/makespan.svg
    python benchmarks/plot.py gpus results/gpus.json results/gpus.svg

Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from makespan import PARAMETERS
from matplotlib import pyplot


def curve(found: dict[str, Any], axes: Any) -> None:
    """Milliseconds of the GPU for a step of a job, over how many jobs ran at once, and their limits.

    A pass forward takes 2 operations for each parameter and token, one back 4, or 2 where weights get no gradients.
    """
    draw({int(jobs): ms for jobs, ms in found["curve"]["at_once"].items()}, "one job's, divided", axes)
    steps, trained = found["curve"]["steps"], found["curve"]["jobs"]
    tokens = sum(job["outcome"]["training"]["tokens"] for job in trained) / len(trained) / steps
    flop = PARAMETERS["1b"] * tokens
    for factor, trained_weights, style in ((6, "all weights", "solid"), (4, "an adapter alone", "dashed")):
        ms = factor * flop / found["limit"]["tflops"] / 1e9
        label = f"{factor} x parameters x tokens at the matrix rate: {trained_weights}"
        axes.axhline(ms, color="grey", linestyle=style, label=label)
    axes.set_xlabel("jobs at once")
    axes.set_ylabel("ms of the GPU per step of a job")
    axes.set_title(f"{found['limit']['gpu']}, 1B shape, steps of 8 rows")


def gpus(found: dict[str, Any], axes: Any) -> None:
    """The sweep's makespan over the number of GPUs, beside the first one's divided by it."""
    draw({int(count): run["makespan_s"] for count, run in found["runs"].items()}, "in proportion", axes)
    axes.set_xlabel("GPUs")
    axes.set_ylabel("makespan, s")


def draw(measured: dict[int, float], proportion: str, axes: Any) -> None:
    """What was measured with each number, beside what the least of them would give in proportion, so called."""
    numbers = sorted(measured)
    least = numbers[0]
    axes.plot(numbers, [measured[n] for n in numbers], marker="o", label="measured")
    axes.plot(numbers, [measured[least] * least / n for n in numbers], linestyle=":", label=proportion)
    for n in numbers:
        axes.annotate(f"{measured[n]:g}", (n, measured[n]), textcoords="offset points", xytext=(6, 6))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(numbers, [str(n) for n in numbers])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("curve", "gpus"))
    parser.add_argument("results", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    pyplot.rcParams |= {"svg.hashsalt": "loraq"}  # the same figures give the same file
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    {"curve": curve, "gpus": gpus}[options.what](json.loads(options.results.read_text()), axes)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    figure.savefig(options.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
