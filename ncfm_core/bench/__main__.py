"""`python -m ncfm_core.bench step|pipeline`: one line of JSON on standard output, what happens meanwhile on standard error."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ncfm_core.bench.folder import MIB, Folder
from ncfm_core.bench.pipeline import Deadline, Pipeline
from ncfm_core.bench.step import bench_step
from ncfm_core.bench.work import Work, prepare
from ncfm_core.errors import NcfmError, SpecError
from ncfm_core.protocols import Document

EXIT_BAD_INPUT = 2
FOLDER_MIB = 64

_COMMON = (
    "dataset",
    "ipc",
    "preset",
    "equal_work",
    "changes",
    "teachers",
    "device",
    "threads",
    "memory_limit",
    "compiled",
    "data",
    "made",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code: 0, or 2 for what cannot be done as asked, said in one line for each problem."""
    options = vars(_parser().parse_args(arguments))
    command = COMMANDS[options.pop("command")]
    common = {name: options.pop(name) for name in _COMMON}
    try:
        document = command(prepare(**common), **options)
    except NcfmError as error:
        for problem in error.problems:
            _say(f"error: {problem}")
        return EXIT_BAD_INPUT
    sys.stdout.write(json.dumps(document, allow_nan=False) + "\n")
    sys.stdout.flush()
    return 0


def _pipeline(
    work: Work,
    *,
    seeds: list[int] | None,
    folder: Path | None,
    folder_mib: int,
    seconds: float | None,
    group: int | None,
) -> Document:
    if seconds is not None and folder is None:
        raise SpecError.of("--seconds", seconds, "needs a folder to go on from", "Name one with --folder.")
    pipeline = Pipeline(
        work,
        seeds=list(dict.fromkeys(seeds or [work.spec.seed])),
        clock=Deadline(seconds, started=work.started),
        say=_say,
        group=group,
        folder=Folder(folder) if folder is not None else None,
        folder_bytes=folder_mib * MIB,
    )
    pipeline.run()
    return pipeline.document()


COMMANDS: dict[str, Callable[..., Document]] = {"step": bench_step, "pipeline": _pipeline}


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ncfm bench",
        description="Measure the engine; one line of JSON (docs/benchmarks.md says what its keys mean).",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="step|pipeline")
    common = _common_options()
    step = commands.add_parser("step", parents=[common], help="one update of the images: time, memory, parts")
    step.add_argument("--steps", type=_count, help="image steps to measure (3 windows on a CPU, 5 x 20 steps on a GPU)")
    step.add_argument("--warmup", type=_count, help="image steps before those (1 window, 5 on a GPU)")
    step.add_argument(
        "--matmul-tf32", action="store_true", help="TF32 for products on a GPU too, not for convolutions alone"
    )
    step.add_argument("--channels-last", action="store_true", help="that memory layout for real images on a GPU")
    pipeline = commands.add_parser(
        "pipeline", parents=[common], help="teachers, distillation and students: wall times and accuracy"
    )
    pipeline.add_argument("--seed", dest="seeds", type=_seed, nargs="+", help="one set for each; they share teachers")
    pipeline.add_argument("--folder", type=Path, help="go on from here, and save here")
    pipeline.add_argument(
        "--seconds", type=_seconds, help="stop after so many, to be called again with the same folder"
    )
    pipeline.add_argument(
        "--folder-mib", type=_count, default=FOLDER_MIB, help=f"most that the folder holds ({FOLDER_MIB})"
    )
    pipeline.add_argument("--group", type=_count, help="students between two stops (1 with a folder, else all)")
    return parser


def _common_options() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--dataset", required=True, help="such as cifar10")
    common.add_argument("--ipc", required=True, type=_count, help="stored images per class")
    common.add_argument("--preset", help="paper or quick; the data set's own by default")
    common.add_argument(
        "--equal-work", action="store_true", help="the released configuration: reuse 1, 4096 frequencies, float32"
    )
    common.add_argument(
        "--set", dest="changes", action="append", default=[], metavar="KEY=VALUE", help="any field, as method.reuse=5"
    )
    common.add_argument("--teachers", type=_count, help="networks in the pool")
    common.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    common.add_argument("--threads", type=_count, help="of torch on the CPU")
    common.add_argument("--memory-limit", type=_count, metavar="MIB", help="for a step's activations")
    compiled = common.add_mutually_exclusive_group()
    compiled.add_argument(
        "--compiled", action="store_true", default=None, help="torch.compile; by default where it pays"
    )
    compiled.add_argument("--eager", dest="compiled", action="store_false", help="no torch.compile")
    common.add_argument("--data", type=Path, default=Path("data"), help="folder of data sets (data)")
    common.add_argument("--made", action="store_true", help="random pixels of the same shape where the data are absent")
    return common


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def _seed(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**31:
        raise argparse.ArgumentTypeError("must be from 0 to 2147483647")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError("must be positive")
    return number


if __name__ == "__main__":
    sys.exit(main())
