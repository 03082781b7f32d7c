"""Draw what `ablation.py --at` wrote: gap, gain of psi and accuracy of the images over the steps of a distillation.

    python examples/curves.py curves.jsonl --out curves.png

Needs matplotlib, which MLflow brings. One line a variant, the mean over its seeds; the bars of the accuracy are the standard
deviation over all students.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

NAMES = {
    "discrepancy": "",
    "sampler": "",
    "sampler_objective": "",
    "sampler_lr": "rate ",
    "frequency_scale": "s ",
    "calibration_weight": "c ",
}


def label(variant: dict[str, Any]) -> str:
    return ", ".join(f"{short}{variant[name]}" for name, short in NAMES.items() if name in variant)


def mean_by_step(runs: list[dict[str, Any]], metric: str) -> tuple[list[float], list[float]]:
    """Steps and means over runs of one metric of the reports."""
    found: dict[float, list[float]] = defaultdict(list)
    for run in runs:
        for report in run["reports"]:
            if metric in report:
                found[report["step"]].append(report[metric])
    steps = sorted(found)
    return steps, [statistics.fmean(found[step]) for step in steps]


def draw_accuracy(axes: Axes, runs: list[dict[str, Any]], name: str) -> None:
    students: dict[int, list[float]] = defaultdict(list)
    for run in runs:
        for judgement in run["judgements"]:
            students[judgement["step"]] += judgement["students"]
    steps = sorted(students)
    means = [statistics.fmean(students[step]) for step in steps]
    spreads = [statistics.stdev(students[step]) if len(students[step]) > 1 else 0.0 for step in steps]
    axes.errorbar(steps, means, spreads, label=name, marker="o", markersize=3, capsize=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    variants: dict[str, list[dict[str, Any]]] = defaultdict(list)
    lines = [json.loads(line) for line in asked.file.read_text().splitlines()]
    for run in lines:
        variants[label(run["variant"])].append(run)
    figure, (accuracy, discrepancy, gain) = pyplot.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for name, runs in variants.items():
        draw_accuracy(accuracy, runs, name)
        discrepancy.plot(*mean_by_step(runs, "discrepancy"), label=name)
        steps, gains = mean_by_step(runs, "psi_gain")
        # A Gaussian has nothing to gain; its line only keeps the colours in step.
        gain.plot(steps, gains if any(gains) else [math.nan] * len(steps), label=name)
    judged = "held-out training images" if lines[0]["held_out"] else "test images"
    accuracy.set_title(f"accuracy on {judged}, %")
    discrepancy.set_title("gap under the sampler's own frequencies, class mean")
    gain.set_title("what psi's ascent adds to its objective, each draw")
    gain.set_yscale("log")
    for axes in (accuracy, discrepancy, gain):
        axes.set_xlabel("image updates")
        axes.grid(alpha=0.3)
    accuracy.legend(fontsize=8)
    figure.suptitle(f"{lines[0]['dataset']}, IPC {lines[0]['ipc']}")
    figure.savefig(asked.out, dpi=110)


if __name__ == "__main__":
    main()
