"""Time the iterations of a distillation script that is not ours, as it stands, without changing a line of it.

    cd NCFM/condense && torchrun --nproc_per_node=1 .../examples/released_step.py --steps-an-iteration 20 -- \
        condense_script.py --gpu=0 --ipc=10 --config_path=../config/ipc10/cifar10.yaml

The script runs in this process. Torch calls back after every step of an optimiser; those of one that holds a single tensor, the
images, are counted (students' optimisers hold many). The released code takes two for each class and iteration: one that
matches, one that calibrates. After each iteration the device is waited for. When enough are timed, the script is ended and one
line of JSON printed.
"""

from __future__ import annotations

import argparse
import json
import math
import runpy
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


class Enough(BaseException):
    """All is timed; not an Exception, which a script may catch."""


class Stopwatch:
    """Notes the time after every so many steps of the images' optimiser."""

    def __init__(self, steps: int, iterations: int, until: float) -> None:
        """
        Args:
            steps: in an iteration.
            iterations: after which it is enough, one more than are between marks.
            until: on `time.perf_counter`: no iteration begins that would end later, by the longest so far.
        """
        self._steps, self._iterations, self._until, self._counted = steps, iterations, until, 0
        self.marks: list[float] = []

    def note(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if sum(len(group["params"]) for group in optimizer.param_groups) != 1:
            return
        self._counted += 1
        if self._counted % self._steps:
            return
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())
        longest = max((after - before for before, after in pairwise(self.marks)), default=0.0)
        if len(self.marks) > self._iterations or self.marks[-1] + longest > self._until:
            raise Enough


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps-an-iteration", type=int, required=True, help="optimiser steps: two for each class")
    parser.add_argument("--warmup", type=int, default=3, help="iterations before those that are timed (3)")
    parser.add_argument("--iterations", type=int, default=12, help="iterations that are timed (12)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no iteration that would end later")
    parser.add_argument("script", help="after --, with its own arguments")
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    until = time.perf_counter() + options.seconds
    watch = Stopwatch(options.steps_an_iteration, options.warmup + options.iterations, until)
    # As `python SCRIPT` would have it: its folder comes first, and what it prints is kept apart from the line of JSON.
    argv, out = sys.argv, sys.stdout
    sys.argv, sys.stdout = [options.script, *options.rest], sys.stderr
    sys.path.insert(0, str(Path(options.script).resolve().parent))
    hook = register_optimizer_step_post_hook(watch.note)
    try:
        runpy.run_path(options.script, run_name="__main__")
    except Enough:
        pass
    finally:
        hook.remove()
        sys.path.pop(0)
        sys.argv, sys.stdout = argv, out
    times = [1e3 * (after - before) for before, after in pairwise(watch.marks)]
    timed = times[options.warmup :]
    if not timed:
        sys.stderr.write(f"error: {len(watch.marks)} iterations were seen, more than {options.warmup} are needed\n")
        return 2
    peak = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_initialized() else None
    line = {
        "bench": "released",
        "ms_per_image_step": round(statistics.median(timed), 3),
        "ms_min": round(min(timed), 3),
        "ms_max": round(max(timed), 3),
        "image_steps": len(timed),
        "peak_mib": None if peak is None else round(peak, 1),
        "torch": torch.__version__,
    }
    print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
