"""All that is to be measured on a GPU, in named parts of at most 8 minutes a call (docs/benchmarks.md has the bars).

    python examples/gpu_bars.py --list
    python examples/gpu_bars.py step-cifar10 pipeline-cifar10 --data data --out bars

Every measurement is a process of its own and one line in `bars/results.jsonl`. What is there is not measured again; a pipeline
goes on from its folder below `bars/`. A call ends when its seconds are over; exit code 3 means: bring `bars/` along and call
again. Needed are torch, torchvision, numpy, pydantic, safetensors and this checkout.
`--made` does for parts without accuracy, where the data are absent; `--small` tries every command in seconds on a CPU, on digits
(scikit-learn), and its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
AGAIN = 3
"""Exit code of a call that left something to do."""
SECONDS = 400.0
"""Of a call, after which nothing begins."""
LEEWAY = 60.0
"""Seconds after those in which what is under way may end: together they leave a few of eight minutes."""
CACHE = "TORCHINDUCTOR_CACHE_DIR"
"""Variable of the environment that names the folder of Inductor's cache, and of Triton's inside."""
ROUNDS = 3
"""Of ours and the released code in turns."""

Line = dict[str, Any]
Call = Callable[[Sequence[str]], Line | None]
"""Runs a command; its line of JSON, or None where it failed."""


@dataclass(frozen=True, slots=True)
class Measurement:
    name: str
    tool: str
    """`step` or `pipeline` of `ncfm_core.bench`, or a file beside this one."""
    arguments: tuple[str, ...]
    released: str = ""
    """Which command of the reader's it takes: one that times the released code, or a set that it made."""
    compiles_afresh: bool = False
    """Whether the compiler finds nothing on disk of what it made before."""


@dataclass(frozen=True, slots=True)
class Part:
    about: str
    measurements: tuple[Measurement, ...]


def parts() -> dict[str, Part]:
    """Every part by its name, those first that need no accuracy."""
    return {
        **{f"step-{name}": _beside(name) for name in ("cifar10", "cifar100")},
        "memory-cifar100": _memory(),
        "choices": _choices(),
        "compile": _compile(),
        "students": _students(),
        "pipeline-cifar10": Part("20 teachers, a set, 10 students: at most 10 minutes on an H200", (_whole("all"),)),
        **{f"equal-steps-{name}": _equal_steps(name) for name in ("cifar10", "cifar100")},
        **{
            f"accuracy-{dataset}-{ipc}-{tier}": _accuracy(dataset, ipc, tier)
            for dataset, ipc in (("cifar10", 1), ("cifar10", 10), ("cifar10", 50), ("cifar100", 10))
            for tier in TIERS
        },
    }


def _of(dataset: str, ipc: int, *more: str) -> tuple[str, ...]:
    return ("--dataset", dataset, "--ipc", str(ipc), *more)


def _beside(dataset: str) -> Part:
    """The released code and ours in turns, the same order in every round, and the defaults once."""
    rounds = []
    for number in range(1, ROUNDS + 1):
        rounds.append(Measurement(f"released {number}", "released", (), released=f"step-{dataset}"))
        rounds.append(Measurement(f"ours {number}", "step", _of(dataset, 10, "--equal-work")))
    defaults = Measurement("defaults", "step", _of(dataset, 10))
    return Part("equal work beside the released code: at least 10 times faster", (*rounds, defaults))


def _memory() -> Part:
    limits = [
        Measurement(f"limit {limit}", "step", _of("cifar100", 50, "--equal-work", "--memory-limit", str(limit), *_FEW))
        for limit in (256, 512, 1024)
    ]
    plain = Measurement("no limit", "step", _of("cifar100", 50, "--equal-work", *_FEW))
    released = Measurement("released", "released", (), released="memory-cifar100")
    return Part(
        "peak_mib: at most 1812 (1.9 GB) with a limit, without one at most the released code's",
        (*limits, plain, released),
    )


_FEW = ("--steps", "10", "--warmup", "3")


def _choices() -> Part:
    """One thing changed at a time, against the preset; the reference stands at both ends to show the drift."""
    changes = {
        "reference": (),
        "bfloat16": ("--set", "method.precision=bfloat16"),
        "reuse 5": ("--set", "method.reuse=5"),
        "compiled": ("--compiled",),
        "eager": ("--eager",),
        "matmul tf32": ("--matmul-tf32",),
        "channels last": ("--channels-last",),
        "reference again": (),
    }
    rows = [Measurement(name, "step", _of("cifar10", 10, *more)) for name, more in changes.items()]
    return Part("what the defaults on a GPU should be, by the time of a step", tuple(rows))


def _compile() -> Part:
    """Two lengths each give the time of an epoch and what the compiler takes: where both are equal is the bound."""
    rows = [
        Measurement(
            f"{how} {epochs} epochs",
            "pipeline",
            _of(
                "cifar10",
                10,
                "--teachers",
                "1",
                f"--{how}",
                *_set("teachers.training.epochs", epochs),
                *_set("method.steps", 1),
                *_set("evaluate", [{"students": 1, "tests": 1, "training": {"epochs": 1}}]),
            ),
            compiles_afresh=True,
        )
        for how in ("eager", "compiled")
        for epochs in (2, 12)
    ]
    return Part("execution.COMPILE_OPERATIONS['cuda']: seconds.teachers, eager and compiled", tuple(rows))


def _students() -> Part:
    tool, sizes = "students_at_once.py", ("--images", "10", "40", "128", "--at-once", "1", "2", "5", "10")
    return Part(
        "cohort.LARGEST_MAP and ALL_MAPS: students that share a step",
        (Measurement("all", tool, ("--dataset", "cifar10", *sizes)),),
    )


def _whole(name: str, *more: str) -> Measurement:
    return Measurement(name, "pipeline", _of("cifar10", 10, "--seed", "0", *more))


def _equal_steps(dataset: str) -> Part:
    """Both sets after 2000 iterations, judged by our students."""
    ours = _of(dataset, 10, "--equal-work", *_set("method.steps", 2000), *_set("evaluate", [{"students": 5}]))
    theirs = ("--dataset", dataset, "--students", "5")
    judged = Measurement("released", "judge_images.py", theirs, released=f"set-{dataset}")
    about = "accuracy after equal image steps: no less than the released code's"
    return Part(about, (Measurement("ours", "pipeline", ours), judged))


TIERS: dict[str, tuple[str, ...]] = {}
"""What is changed in the preset for each tier."""


def _set(name: str, value: Any) -> tuple[str, str]:
    return "--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"


BARS = {
    ("cifar10", 1): (43.0, 44.6, 49.5),
    ("cifar10", 10): (65.6, 68.9, 71.8),
    ("cifar10", 50): (74.2, 77.4, 77.4),
    ("cifar100", 10): (45.9, 48.7, 48.7),
}
"""At least these: without psi, with psi, with soft labels."""

TIERS["plain"] = _set("method.sampler", "gaussian")
TIERS["psi"] = ()
TIERS["soft"] = (
    *_set("method.labels", "soft"),
    *_set("evaluate", [{"students": 10, "training": {"loss": "soft_cross_entropy"}}]),
)


def _accuracy(dataset: str, ipc: int, tier: str) -> Part:
    bar = {"plain": BARS[dataset, ipc][0], "psi": BARS[dataset, ipc][1], "soft": BARS[dataset, ipc][2]}[tier]
    return Part(
        f"accuracy of 10 students at the last epoch: {bar}",
        (Measurement("all", "pipeline", _of(dataset, ipc, "--seed", "0", *TIERS[tier])),),
    )


def small(measurement: Measurement) -> Measurement:
    """The same command on digits, with few and small of everything."""
    if measurement.tool == "released":
        return measurement
    given = list(measurement.arguments)
    given[given.index("--dataset") + 1] = "digits"
    if "--ipc" in given:
        given[given.index("--ipc") + 1] = "1"
    given = [word for word in given if word not in ("--compiled", "--eager", "--matmul-tf32", "--channels-last")]
    changes = [*_set("model.width", 4), *_set("evaluate", [{"students": 2, "tests": 1, "training": {"epochs": 2}}])]
    if measurement.tool == "students_at_once.py":
        return Measurement(
            measurement.name,
            measurement.tool,
            (*given, "--preset", "quick", "--device", "cpu", "--steps", "2", *changes),
        )
    if measurement.tool == "judge_images.py":
        more = ("--preset", "quick", "--device", "cpu", "--factor", "1", *changes)
        return Measurement(measurement.name, measurement.tool, (*given, *more), measurement.released)
    soft = any("soft_cross_entropy" in word for word in given)
    if soft:
        changes += _set("model.width", 4)
        changes += _set(
            "evaluate", [{"students": 2, "tests": 1, "training": {"epochs": 2, "loss": "soft_cross_entropy"}}]
        )
    for name, value in {"steps": 2, "num_frequencies": 16, "num_components": 4, "real_batch": 16, "factor": 1}.items():
        changes += _set(f"method.{name}", value)
    changes += _set("teachers.training.epochs", 1)
    small = ["--preset", "quick", "--device", "cpu", "--threads", "1", "--eager", "--teachers", "2", *changes]
    if measurement.tool == "step":
        small += ["--steps", "2", "--warmup", "1"]
    return Measurement(measurement.name, measurement.tool, (*given, *small), measurement.released)


@dataclass(frozen=True, slots=True)
class Options:
    out: Path
    data: Path
    device: str
    seconds: float
    made: bool
    small: bool
    released: dict[str, str]
    """Commands that time the released code, and files that it made, by name."""


def command(part: str, measurement: Measurement, options: Options, left: float) -> list[str]:
    """What to run, as words after `python`; for the released code, the reader's own words, `{seconds}` filled in."""
    if measurement.tool == "released":
        words = shlex.split(options.released[measurement.released])
        return [word.replace("{seconds}", f"{left:.0f}") for word in words]
    given = list((small(measurement) if options.small else measurement).arguments)
    if measurement.tool == "judge_images.py":
        given.insert(0, options.released[measurement.released])
    given += ["--data", str(options.data)]
    if not options.small:
        given += ["--device", options.device]
    if options.made:
        given.append("--made")
    place = options.out / f"{part}-{measurement.name}".replace(" ", "-")
    if measurement.tool == "pipeline":
        given += ["--folder", str(place), "--seconds", f"{left:.0f}"]
    if measurement.tool == "judge_images.py":
        given += ["--save", f"{place}.json", "--seconds", f"{left:.0f}"]
    first = (
        [str(HERE / measurement.tool)]
        if measurement.tool.endswith(".py")
        else ["-m", "ncfm_core.bench", measurement.tool]
    )
    return [*first, *given]


def run(names: Sequence[str], options: Options, call: Call) -> int:
    """Measure what is missing of these parts; 0 when all is there, 1 after a failure, 3 when time is over."""
    options.out.mkdir(parents=True, exist_ok=True)
    results, known, started = options.out / "results.jsonl", parts(), time.monotonic()
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    there = {(line["part"], line["name"], line["small"]) for line in lines if line.get("done", True)}
    failed = began = False
    for part, measurement in _wanted(names, known, options):
        if (part, measurement.name, options.small) in there:
            continue
        left = options.seconds - (time.monotonic() - started)
        # A call does at least something, however long that takes.
        if left <= 0 or (began and _expected(part, measurement, lines, options) > left + LEEWAY):
            return AGAIN
        began, begun = True, time.monotonic()
        with _compiler_cache(measurement):
            line = call(command(part, measurement, options, max(1.0, left)))
        if line is None:
            failed = True
            continue
        line = {"part": part, "name": measurement.name, "about": known[part].about, "small": options.small} | line
        line["wall_seconds"] = round(time.monotonic() - begun, 1)
        lines.append(line)
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if not line.get("done", True):
            return AGAIN
    return 1 if failed else 0


def _expected(part: str, measurement: Measurement, lines: Sequence[Line], options: Options) -> float:
    """Seconds that it takes, by the longest of its kind in its part; 0 where the command itself ends in time.

    What nobody has timed begins in the first half of a call alone.
    """
    if measurement.tool in ("pipeline", "judge_images.py"):
        return 0.0
    alike = {each.name for each in parts()[part].measurements if each.tool == measurement.tool}
    kin = [each for each in lines if each["part"] == part and each["name"] in alike and each["small"] == options.small]
    return max((each.get("wall_seconds", 0.0) for each in kin), default=options.seconds / 2 + LEEWAY)


@contextmanager
def _compiler_cache(measurement: Measurement) -> Iterator[None]:
    """Where asked for, an empty folder for what Inductor keeps on disk: else the second of two runs compiles nothing."""
    if not measurement.compiles_afresh:
        yield
        return
    before = os.environ.get(CACHE)
    with tempfile.TemporaryDirectory(prefix="ncfm-compiled-") as folder:
        os.environ[CACHE] = folder
        try:
            yield
        finally:
            del os.environ[CACHE]
            if before is not None:
                os.environ[CACHE] = before


def _wanted(names: Sequence[str], known: dict[str, Part], options: Options) -> Iterator[tuple[str, Measurement]]:
    for name in names:
        for measurement in known[name].measurements:
            if measurement.released and measurement.released not in options.released:
                _say(f"{name}: {measurement.name} is left out, for there is no --released {measurement.released}=...")
                continue
            yield name, measurement


def in_a_process(words: Sequence[str]) -> Line | None:
    """Run a command as a process of its own; the last line that it prints."""
    program = [] if Path(words[0]).name in ("torchrun", "sh", "bash", "python") else [sys.executable]
    _say("$ " + shlex.join([*program, *words]))
    environment = dict(os.environ)
    if program:
        # A script finds what lies beside it, and not the packages of the checkout.
        paths = [str(HERE.parent), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    ended = subprocess.run([*program, *words], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        line: Line = json.loads(ended.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        _say(f"no line of JSON came back (exit code {ended.returncode})")
        return None
    return line if ended.returncode == 0 else None


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    known = parts()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help="what to measure; see --list")
    parser.add_argument("--list", action="store_true", help="name all parts")
    parser.add_argument("--out", type=Path, default=Path("bars"), help="where results are kept (bars)")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"of a call, after which nothing begins ({SECONDS:.0f})"
    )
    parser.add_argument("--made", action="store_true", help="random pixels where the data are absent")
    parser.add_argument("--small", action="store_true", help="try every command in seconds on a CPU")
    parser.add_argument(
        "--released",
        action="append",
        default=[],
        metavar="NAME=WORDS",
        help="step-cifar10, step-cifar100, memory-cifar100: a command; set-cifar10, set-cifar100: a file",
    )
    options = parser.parse_args(arguments)
    if options.list:
        width = max(map(len, known))
        print("\n".join(f"{name:{width}}  {part.about}" for name, part in known.items()))
        return 0
    unknown = [name for name in options.parts if name not in known]
    if unknown or not options.parts:
        parser.error(f"no part is called {', '.join(unknown)}; see --list" if unknown else "name a part; see --list")
    released = dict(words.partition("=")[::2] for words in options.released)
    settings = {name: getattr(options, name) for name in ("out", "data", "device", "seconds", "made", "small")}
    return run(options.parts, Options(released=released, **settings), in_a_process)


if __name__ == "__main__":
    sys.exit(main())
