"""Students on images from elsewhere, under a protocol of ours: one line of JSON.

    python examples/judge_images.py set.pt --dataset cifar10 --data data --factor 2 --students 5 --save judged.json --seconds 400

The file holds `[images, labels]` as torch saved them: float images in [0, 1], shape (N, channels, H, W), as the released code
writes them. With `--save`, accuracies are kept after every student, and the same command goes on; `--seconds` ends it early.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from ncfm_core.bench.work import prepare
from ncfm_core.evaluate import evaluate
from ncfm_core.synthetic import decode


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--factor", type=int, default=2, help="tiles a side of each image (2)")
    parser.add_argument("--students", type=int, default=5)
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--preset")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--made", action="store_true")
    parser.add_argument("--save", type=Path, help="go on from here, and save here")
    parser.add_argument("--seconds", type=float, help="begin no student that would end later, by the longest so far")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    stored, labels = torch.load(options.images, map_location="cpu", weights_only=True)
    work = prepare(
        dataset=options.dataset,
        ipc=len(labels) // len(labels.unique()),
        preset=options.preset,
        changes=options.changes,
        device=options.device,
        data=options.data,
        made=options.made,
    )
    entry, longest = work.spec.evaluate[0], 0.0
    accuracies: list[float] = []
    if options.save and options.save.exists():
        accuracies = json.loads(options.save.read_text())
    while len(accuracies) < options.students:
        begun = time.monotonic()
        if options.seconds and longest and begun - started + longest > options.seconds:
            break
        students = evaluate(
            decode(stored.detach().float(), options.factor),
            labels.repeat_interleave(options.factor**2),
            work.dataset,
            model=entry.model,
            training=entry.training,
            students=1,
            tests=1,
            seed=0,
            device=work.device,
            first=len(accuracies),
        )
        accuracies += [report.metrics["accuracy"] for report in students]
        longest = max(longest, time.monotonic() - begun)
        if options.save:
            options.save.write_text(json.dumps(accuracies))
    line = {
        "bench": "judge",
        "done": len(accuracies) >= options.students,
        "mean": round(statistics.mean(accuracies), 3),
        "std": round(statistics.stdev(accuracies), 3) if len(accuracies) > 1 else None,
        "n": len(accuracies),
        "protocol": entry.protocol,
    }
    print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
