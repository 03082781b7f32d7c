"""The `ncfm` command: what it says when something is wrong, and that it stays light."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from service.cli import app as cli


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NCFM_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NCFM_URL", raising=False)
    return tmp_path / "home"


def ncfm(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["ncfm", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    code = left.value.code
    return code if isinstance(code, int) else 0


@pytest.fixture
def nobody() -> str:
    """An address where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


COMMANDS = [
    ("submit", "--dataset", "digits", "--ipc", "1"),
    ("ls",),
    ("show", "x"),
    ("logs", "x"),
    ("cancel", "x"),
    ("pull", "x"),
    ("validate", "--dataset", "digits", "--ipc", "1"),
    ("rerun", "x"),
    ("watch", "x"),
    ("logs", "-f", "x"),
    ("rm", "x"),
    ("edit", "x", "--priority", "60"),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_command_says_how_to_start_a_stack_when_none_runs(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    assert ncfm(monkeypatch, *command) == cli.EXIT_AWAY

    said = capfd.readouterr().err
    assert "no stack runs here" in said and "ncfm up" in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_command_names_the_address_when_the_service_is_away(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], nobody: str, command: tuple[str, ...]
) -> None:
    assert ncfm(monkeypatch, *command, "--url", nobody) == cli.EXIT_AWAY

    said = capfd.readouterr().err
    assert said.startswith("error: url: no service answers") and nobody in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("submit", "nothing.yaml"), "cannot be read: No such file"),
        (("edit", "x"), "Give --priority N or --label key=value"),
        (("submit", "--ipc", "many"), "Invalid value for '--ipc'"),
        (("submit", "--dataset", "digits", "--set", "steps"), "not of the form key=value"),
        (("ls", "--limit", "0"), "Invalid value for '--limit'"),
        (("ls", "--label", "paper"), "--label: not of the form key=value"),
        (("submit", "--dataset", "digits", "--label", "x"), "--label: not of the form key=value"),
        (("ls", "--url", "nonsense"), "no service answers"),
        (("show",), "Missing argument"),
        (("shw",), "No such command"),
        (("up", "--port", "70000"), "Invalid value for '--port'"),
    ],
)
def test_bad_input_is_told_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], complaint: str
) -> None:
    assert ncfm(monkeypatch, *arguments) in (cli.EXIT_BAD_INPUT, cli.EXIT_AWAY)

    said = capfd.readouterr().err
    assert complaint in said
    assert "Traceback" not in said


def test_broken_yaml_is_told_with_its_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "spec.yaml").write_text("dataset: digits\nipc: [1\n")

    assert ncfm(monkeypatch, "submit", str(tmp_path / "spec.yaml")) == cli.EXIT_BAD_INPUT
    assert "line 3" in capfd.readouterr().err


def test_variable_is_named_when_its_value_is_not_legal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NCFM_PORT", "many")

    for command in ("status", "api", "controller", "up", "ls", "demo"):
        assert ncfm(monkeypatch, command) == cli.EXIT_BAD_INPUT
        said = capfd.readouterr().err
        assert "NCFM_PORT" in said and "'many'" in said and "Traceback" not in said


def test_status_has_nulls_when_nothing_runs(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert ncfm(monkeypatch, "status", "--json") == cli.EXIT_FAILED

    assert json.loads(capfd.readouterr().out) == {
        "state": "down",
        "api": None,
        "mlflow": None,
        "ray": None,
        "processes": {"api": None, "controller": None, "mlflow": None, "ray": None},
    }


def test_status_says_the_way_out_when_nothing_runs(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert ncfm(monkeypatch, "status") == cli.EXIT_FAILED
    assert "start one with `ncfm up`" in capfd.readouterr().out


def test_status_makes_nothing_when_there_is_no_home(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    ncfm(monkeypatch, "status")

    assert not home.exists()


def test_demo_looks_at_its_folder_before_it_works(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()

    assert ncfm(monkeypatch, "demo", "--dest", str(tmp_path / "file" / "set")) == cli.EXIT_FAILED
    assert "--dest: the folder cannot be written" in capfd.readouterr().err


def test_help_documents_the_exit_codes(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert ncfm(monkeypatch, "--help") == 0
    assert "Exit codes" in capfd.readouterr().out


def test_command_loads_nothing_heavy() -> None:
    program = (
        "import sys, service.cli; heavy = {'torch', 'ray', 'mlflow', 'numpy', 'sqlalchemy', 'fastapi'} & set(sys.modules); "
        "sys.exit(' '.join(heavy) or None)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


def test_demo_refuses_at_once_when_the_job_is_not_legal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert ncfm(monkeypatch, "demo", "--set", "method.stesp=1", "--dest", str(tmp_path / "set")) == cli.EXIT_BAD_INPUT

    said = capfd.readouterr().err
    assert "method.stesp: unknown key (got 1). Did you mean 'steps'?" in said and len(said.splitlines()) == 1
    assert not (tmp_path / "set").exists()
