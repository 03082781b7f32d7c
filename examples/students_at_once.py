"""How long students take that share a step, against students apart: one line of JSON. For `cohort.LARGEST_MAP` and `ALL_MAPS`.

python examples/students_at_once.py --dataset cifar10 --made --images 10 40 128 --at-once 1 2 5 10
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from ncfm_core.batches import Batches
from ncfm_core.bench.machine import device_name, synchronise
from ncfm_core.bench.work import prepare
from ncfm_core.cohort import Cohort
from ncfm_core.models import build_model
from ncfm_core.models.probing import largest_map
from ncfm_core.rng import generator

ROUNDS = 5


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--preset")
    parser.add_argument("--images", type=int, nargs="+", default=[10, 40, 128], help="in a batch")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 2, 5, 10])
    parser.add_argument("--steps", type=int, default=20, help="of a round; the median of five is told")
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--made", action="store_true")
    options = parser.parse_args(arguments)
    names = ("dataset", "preset", "changes", "data", "device", "made")
    work = prepare(ipc=1, **{name: getattr(options, name) for name in names})
    dataset, entry = work.dataset.to(work.device), work.spec.evaluate[0]
    rows = []
    for count in options.images:
        batches = Batches(dataset.train_images[:count], dataset.train_labels[:count], dataset, spec=entry.training)
        for at_once in options.at_once:
            networks = [
                build_model(
                    entry.model,
                    image_shape=dataset.image_shape,
                    num_classes=dataset.num_classes,
                    draw=generator(0, f"student/{index}"),
                ).to(work.device)
                for index in range(at_once)
            ]
            size = largest_map(networks[0], batches.example()) * count
            cohort = Cohort(networks, batches, seed=0, streams=[f"student/{index}" for index in range(at_once)])
            times = []
            for _ in range(ROUNDS + 1):
                synchronise(work.device)
                begun = time.perf_counter()
                cohort.advance(cohort.step + options.steps)
                synchronise(work.device)
                times.append(1e3 * (time.perf_counter() - begun) / options.steps / at_once)
            took = round(statistics.median(times[1:]), 4)
            rows.append({"images": count, "largest_map": size, "at_once": at_once, "ms_per_student_step": took})
    line = {
        "bench": "students",
        "rows": rows,
        "model": entry.model.model_dump(mode="json"),
        "device_name": device_name(work.device),
        "torch": torch.__version__,
    }
    print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
