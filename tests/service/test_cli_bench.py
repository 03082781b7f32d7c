"""`ncfm bench`: starts the engine's own command and passes everything through."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from service.cli import app as cli
from service.cli import bench


def ncfm(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "service.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_bench_passes_the_line_of_json_through() -> None:
    small = ["model.width=8", "method.num_frequencies=64", "method.num_components=8", "method.real_batch=16"]
    settings = [word for change in small for word in ("--set", change)]
    done = ncfm(
        "bench", "step", "--dataset", "digits", "--ipc", "1", "--teachers", "1", "--threads", "1", "--eager", *settings
    )

    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout)
    assert line["bench"] == "step" and line["ms_per_image_step"] > 0


def test_bench_passes_error_and_exit_code_through() -> None:
    done = ncfm("bench", "step", "--dataset", "digit", "--ipc", "1")

    assert done.returncode == cli.EXIT_BAD_INPUT
    assert done.stderr == "error: dataset.name: unknown data set (got 'digit'). Did you mean 'digits'?\n"


def test_bench_says_what_to_install_where_torch_is_not(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "NEEDED", ("torch_that_nobody_has",))
    monkeypatch.setattr(sys, "argv", ["ncfm", "bench", "step"])
    with pytest.raises(SystemExit) as left:
        cli.main()

    assert left.value.code == cli.EXIT_FAILED
    said = capfd.readouterr().err
    assert "torch_that_nobody_has not installed here" in said and "ncfm[worker]" in said and len(said.splitlines()) == 1
