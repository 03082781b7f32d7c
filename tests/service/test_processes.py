"""Command lines and environments of the four processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from service.local.stack import lay_out
from service.processes import PROCESSES, STOP_ORDER, Layout, commands, environments
from service.settings import Settings, SettingsError, load_settings

PORTS = {"api": 1, "mlflow": 2, "ray": 3, "gcs": 4, "client": 5}


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    settings = Settings(home=tmp_path, data_dir=tmp_path / "data", storage="")
    return lay_out(settings, PORTS, token=tmp_path / "token", ray_tmpdir=Path("/tmp/r"), num_cpus=2)


def option(command: tuple[str, ...], name: str) -> str:
    return command[command.index(name) + 1]


def test_every_process_has_a_command_and_an_environment(layout: Layout) -> None:
    assert set(commands(layout)) == set(environments(layout)) == set(PROCESSES) == set(STOP_ORDER)


def test_ports_reach_the_commands_when_laid_out(layout: Layout) -> None:
    assert option(commands(layout)["mlflow"], "--port") == "2"
    assert option(commands(layout)["ray"], "--dashboard-port") == "3"
    assert option(commands(layout)["ray"], "--port") == "4"
    assert environments(layout)["api"]["NCFM_PORT"] == "1"
    assert environments(layout)["controller"]["NCFM_RAY_URL"] == "http://127.0.0.1:3"


def test_everything_stays_on_loopback_when_laid_out(layout: Layout) -> None:
    assert layout.bind == "127.0.0.1"
    # Both are needed: without the variable Ray rewrites 127.0.0.1, and with another address it listens everywhere.
    assert option(commands(layout)["ray"], "--node-ip-address") == "127.0.0.1"
    assert environments(layout)["ray"]["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in environments(replace(layout, ray_ports=None))["ray"]
    assert "NCFM_PUBLIC_HOSTS" not in environments(layout)["api"]


def test_mlflow_answers_to_this_machine_alone_when_laid_out(layout: Layout) -> None:
    command = commands(layout)["mlflow"]

    assert option(command, "--host") == "127.0.0.1"
    assert option(command, "--allowed-hosts") == "localhost:*,127.0.0.1:*"


def test_roots_of_data_reach_service_and_drivers_when_set(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, data_roots=(Path("/a"), Path("/b")))

    layout = lay_out(settings, PORTS, token=tmp_path, ray_tmpdir=tmp_path, num_cpus=None)

    assert {environments(layout)[name].get("NCFM_DATA_ROOTS") for name in ("api", "ray", "controller")} == {"/a,/b"}
    assert "NCFM_DATA_ROOTS" not in environments(replace(layout, data_roots=()))["ray"]


def test_buckets_of_data_reach_service_and_drivers_when_set(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, data_buckets=("s3://birds/b", "gs://fish"))

    layout = lay_out(settings, PORTS, token=tmp_path, ray_tmpdir=tmp_path, num_cpus=None)

    told = {environments(layout)[name].get("NCFM_DATA_BUCKETS") for name in ("api", "ray", "controller")}
    assert told == {"s3://birds/b,gs://fish"}
    assert "NCFM_DATA_BUCKETS" not in environments(replace(layout, data_buckets=()))["ray"]


def test_bucket_with_credentials_in_the_settings_is_refused_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCFM_DATA_BUCKETS", "s3://me:hunter2@birds")

    with pytest.raises(SettingsError, match=r"NCFM_DATA_BUCKETS.*holds credentials") as caught:
        load_settings()

    assert "hunter2" not in str(caught.value)


def test_ray_takes_all_cpus_when_no_number_is_given(layout: Layout) -> None:
    assert "--num-cpus" not in commands(replace(layout, num_cpus=None))["ray"]


def test_drivers_find_storage_and_mlflow_when_started_by_ray(layout: Layout, tmp_path: Path) -> None:
    ray = environments(layout)["ray"]

    assert ray["NCFM_STORAGE"] == str(tmp_path / "storage")
    assert ray["NCFM_MLFLOW_URL"] == "http://127.0.0.1:2"


def test_token_is_asked_for_and_given_when_laid_out(layout: Layout, tmp_path: Path) -> None:
    token = str(tmp_path / "token")

    assert environments(layout)["ray"]["RAY_AUTH_MODE"] == "token"
    assert environments(layout)["ray"]["RAY_AUTH_TOKEN_PATH"] == token
    assert environments(layout)["controller"]["NCFM_RAY_TOKEN_PATH"] == token


def test_storage_becomes_absolute_when_it_is_a_relative_folder(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, storage="sets")

    layout = lay_out(settings, PORTS, token=tmp_path, ray_tmpdir=tmp_path, num_cpus=None)

    assert layout.storage == str(Path.cwd() / "sets")


def test_storage_stays_when_it_is_a_url(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, storage="s3://bucket/sets")

    assert lay_out(settings, PORTS, token=tmp_path, ray_tmpdir=tmp_path, num_cpus=None).storage == "s3://bucket/sets"
