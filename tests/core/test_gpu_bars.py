"""The script that measures on a GPU: what it would run is legal at full size, and runs, cut and gone on with, when scaled down."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import JsonValue

from examples import gpu_bars, judge_images, released_step, students_at_once
from examples.gpu_bars import AGAIN, Measurement, Options, command, parts, run, small
from ncfm_core.bench import __main__ as bench
from ncfm_core.bench import work as bench_work
from ncfm_core.datasets import Dataset

RELEASED = {"step-cifar10", "step-cifar100", "memory-cifar100", "set-cifar10", "set-cifar100"}
SCRIPT = """
import sys, torch
images, other = torch.nn.Parameter(torch.rand(4, 1, 8, 8)), torch.nn.Linear(2, 2)
adam, students = torch.optim.AdamW([images]), torch.optim.SGD(other.parameters(), lr=0.1)
assert sys.argv == [__file__, "--ipc=1"]
for _ in range(1000):
    for optimizer in (adam, adam, students):
        (images.sum() + sum(each.sum() for each in other.parameters())).backward()
        optimizer.step()
print("never reached")
"""


def options(folder: Path, **changes: Any) -> Options:
    plain: dict[str, Any] = {
        "data": Path("data"),
        "device": "cuda",
        "seconds": 1e6,
        "made": False,
        "small": False,
        "released": {},
    }
    return Options(out=folder / "bars", **(plain | changes))


@pytest.fixture
def reader(tmp_path: Path, digits: Dataset) -> dict[str, str]:
    """What a reader brings: here a script that is no distillation, and images that are real."""
    script, images = tmp_path / "condense.py", tmp_path / "set.pt"
    script.write_text(SCRIPT)
    torch.save([digits.train_images[digits.members[:, 0]] / 255, torch.arange(10)], images)
    timed = f"released_step.py --steps-an-iteration 2 --iterations 3 --warmup 1 -- {script} --ipc=1"
    return {name: str(images) if name.startswith("set") else timed for name in RELEASED}


def here(words: Sequence[str]) -> dict[str, Any] | None:
    """Run a command in this process."""
    tools = {
        each.__name__.rpartition(".")[2] + ".py": each.main for each in (judge_images, released_step, students_at_once)
    }
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        if words[0] == "-m":
            assert bench.main(words[2:]) == 0
        else:
            assert tools[Path(words[0]).name](list(words[1:])) == 0
    line: dict[str, Any] = json.loads(out.getvalue().splitlines()[-1])
    return line


def test_every_command_is_legal_at_full_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, digits: Dataset) -> None:
    monkeypatch.setattr(bench_work, "_load", lambda spec, folder, *, made: (digits, "made"))
    monkeypatch.setattr(bench_work, "choose_device", lambda name: torch.device("cpu"))
    seen: list[dict[str, Any]] = []

    def noted(work: bench_work.Work, **_: Any) -> dict[str, JsonValue]:
        seen.append(work.describe())
        return {}

    for name in bench.COMMANDS:
        monkeypatch.setitem(bench.COMMANDS, name, noted)
    given = options(tmp_path, released={name: "set.pt" for name in RELEASED})
    for name, part in parts().items():
        for measurement in part.measurements:
            words = command(name, measurement, given, 400)
            if words[0] == "-m":
                assert bench.main(words[2:]) == 0
                assert "--device" in words and words[words.index("--device") + 1] == "cuda"
    configs = [described["config"] for described in seen]
    assert {(each["dataset"], each["ipc"]) for each in configs} >= {("cifar10", 50), ("cifar100", 50), ("cifar100", 10)}
    assert {each["preset"] for each in configs} == {"paper"}
    assert sum(described["equal_work"] for described in seen) == 2 * gpu_bars.ROUNDS + 4
    assert len({json.dumps(each, sort_keys=True) for each in configs}) > 15


def test_every_bar_has_its_part() -> None:
    about = {name: part.about for name, part in parts().items()}
    for dataset, ipc, tier, bar in [
        ("cifar10", 1, "plain", 43),
        ("cifar10", 50, "psi", 77.4),
        ("cifar100", 10, "soft", 48.7),
    ]:
        assert str(bar) in about[f"accuracy-{dataset}-{ipc}-{tier}"]
    assert {
        "step-cifar10",
        "step-cifar100",
        "memory-cifar100",
        "pipeline-cifar10",
        "choices",
        "compile",
        "students",
    } <= about.keys()


def test_every_part_runs_scaled_down(
    tmp_path: Path, reader: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    seen: set[tuple[str, ...]] = set()

    def once(words: Sequence[str]) -> dict[str, Any] | None:
        """What differs in the folder alone is run once."""
        ends = words.index("--data") if "--data" in words else len(words)
        if tuple(words[:ends]) in seen:
            return {"bench": "seen"}
        seen.add(tuple(words[:ends]))
        return here(words)

    given = options(tmp_path, small=True, released=reader)
    assert run(list(parts()), given, once) == 0
    lines = [json.loads(line) for line in (given.out / "results.jsonl").read_text().splitlines()]
    assert {line["part"] for line in lines} == parts().keys()
    assert {line["bench"] for line in lines} == {"step", "pipeline", "students", "judge", "released", "seen"}
    assert all(line.get("done", True) and line["small"] for line in lines)
    timed = next(line for line in lines if line["bench"] == "released")
    assert timed["image_steps"] == 3 and timed["ms_min"] <= timed["ms_per_image_step"] <= timed["ms_max"]
    assert "never reached" not in capsys.readouterr().err and not sys.argv[0].endswith("condense.py")

    assert run(list(parts()), given, here) == 0, "all is there: nothing is measured again"
    assert len((given.out / "results.jsonl").read_text().splitlines()) == len(lines)


def test_script_runs_where_the_package_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    monkeypatch.setenv("PYTHONPATH", sysconfig.get_paths()["purelib"])
    monkeypatch.chdir(tmp_path)
    assert subprocess.run([bare, "-c", "import torch"]).returncode == 0
    assert subprocess.run([bare, "-c", "import ncfm_core"], stderr=subprocess.DEVNULL).returncode == 1
    (measurement,) = parts()["students"].measurements
    line = gpu_bars.in_a_process(command("students", measurement, options(tmp_path, small=True), 400))
    assert line is not None and line["bench"] == "students"


def test_each_compiled_run_finds_an_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one cache the longer run would compile nothing, and both together tell neither epoch nor compiler."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    seen: list[str] = []

    def noted(words: Sequence[str]) -> dict[str, Any]:
        seen.append(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        if seen[-1] != "mine":
            assert not list(Path(seen[-1]).iterdir())
        return {}

    assert run(["compile"], options(tmp_path), noted) == 0
    assert len(set(seen)) == len(seen) == 4 and "mine" not in seen and not any(Path(each).exists() for each in seen)
    assert run(["students"], options(tmp_path), noted) == 0 and seen[-1] == "mine"


def test_nothing_begins_that_would_outlast_its_call(
    tmp_path: Path, reader: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, took, seen = 0.0, {"released": 190.0, "ours": 20.0}, []
    monkeypatch.setattr("examples.gpu_bars.time.monotonic", lambda: now)

    def slow(words: Sequence[str]) -> dict[str, Any]:
        nonlocal now
        seen.append("ours" if words[0] == "-m" else "released")
        now += took[seen[-1]]
        return {}

    given, calls = options(tmp_path, seconds=400, released=reader), []
    while (code := run(["step-cifar10"], given, slow)) == AGAIN:
        calls.append(now)
        now = 0.0
    assert code == 0 and len(seen) == 2 * gpu_bars.ROUNDS + 1, "each once"
    assert max(calls) <= 400 + gpu_bars.LEEWAY
    lines = [json.loads(line) for line in (given.out / "results.jsonl").read_text().splitlines()]
    assert {line["wall_seconds"] for line in lines} == set(took.values())

    took["released"], seen[:], now = 1000.0, [], 0.0
    long = options(tmp_path / "long", seconds=400, released=reader)
    assert run(["step-cifar10"], long, slow) == AGAIN and seen == ["released"], "a call does at least something"


def test_released_code_begins_no_iteration_that_would_end_too_late(
    tmp_path: Path, reader: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert here(["released_step.py", "--seconds", "3600", *reader["step-cifar10"].split()[1:]])
    now = 0.0
    monkeypatch.setattr("examples.released_step.time.perf_counter", lambda: now)
    watch = released_step.Stopwatch(1, 100, until=10)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(released_step.Enough):
        for _ in range(100):
            now += 3
            watch.note(optimizer)
    assert watch.marks == [3, 6, 9]
    filled = command(
        "step-cifar10",
        Measurement("a", "released", (), released="a"),
        options(tmp_path, released={"a": "sh -c 'x --seconds {seconds} -- y'"}),
        123.4,
    )
    assert filled == ["sh", "-c", "x --seconds 123 -- y"]


def test_part_that_runs_out_of_time_goes_on(tmp_path: Path, reader: dict[str, str]) -> None:
    calls = 0

    def hurried(words: Sequence[str]) -> dict[str, Any] | None:
        assert words[-2] == "--seconds"
        return here([*words[:-1], "0.01"])

    while run(["pipeline-cifar10"], options(tmp_path, small=True), hurried) == AGAIN:
        calls += 1
        assert calls < 60
    assert calls > 3
    judged = options(tmp_path, small=True, seconds=0.01, released=reader)
    assert run(["equal-steps-cifar10"], judged, lambda words: {"done": False}) == AGAIN


def test_what_the_reader_has_to_bring_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[list[str]] = []

    def noted(words: Sequence[str]) -> dict[str, Any]:
        seen.append(list(words))
        return {}

    assert run(["step-cifar10"], options(tmp_path), noted) == 0
    assert len(seen) == gpu_bars.ROUNDS + 1 and all(words[:3] == ["-m", "ncfm_core.bench", "step"] for words in seen)
    assert "released 1 is left out, for there is no --released step-cifar10=" in capsys.readouterr().err


def test_failure_does_not_end_the_others(tmp_path: Path) -> None:
    seen: list[Sequence[str]] = []

    def failing(words: Sequence[str]) -> None:
        seen.append(words)

    assert run(["choices"], options(tmp_path), failing) == 1
    assert len(seen) == len(parts()["choices"].measurements)


def test_command_line_names_its_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_bars.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("  ")[0] for line in lines] == list(parts()), "two spaces or more behind every name"
    with pytest.raises(SystemExit):
        gpu_bars.main(["step"])
    assert small(Measurement("a", "released", ())).tool == "released"
