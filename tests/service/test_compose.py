"""The containers run what `ncfm up` runs, and the files that describe them are legal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.processes import PROCESSES, Layout, ProcessName, commands, environments

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker-compose.yml"
SECRETS = {"RAY_AUTH_TOKEN", "NCFM_RAY_TOKEN"}
"""Given at run time; the embedded stack hands over files instead."""

CONTAINERS = Layout(
    python="python",
    bind="0.0.0.0",
    api_port=8000,
    mlflow_port=5000,
    ray_port=8265,
    mlflow_url="http://mlflow:5000",
    mlflow_public_url="http://localhost:5000",
    ray_url="http://ray:8265",
    mlflow_hosts=("mlflow:5000", "localhost:*", "127.0.0.1:*"),
    home="/var/lib/ncfm",
    storage="/var/lib/ncfm/storage",
    data_dir="/var/lib/ncfm/data",
    data_roots=("/var/lib/ncfm/data",),
    mlflow_dir="/var/lib/mlflow",
    public_hosts=("api",),
)


@pytest.fixture
def services() -> dict[str, Any]:
    document = yaml.safe_load(COMPOSE.read_text())
    found: dict[str, Any] = document["services"]
    return found


def test_compose_has_the_four_processes(services: dict[str, Any]) -> None:
    assert set(services) == set(PROCESSES)


@pytest.mark.parametrize("name", PROCESSES)
def test_compose_runs_the_command_of_the_embedded_stack(services: dict[str, Any], name: ProcessName) -> None:
    assert tuple(services[name]["command"]) == commands(CONTAINERS)[name]


@pytest.mark.parametrize("name", PROCESSES)
def test_compose_gives_the_environment_of_the_embedded_stack(services: dict[str, Any], name: ProcessName) -> None:
    given = {key: value for key, value in services[name]["environment"].items() if key not in SECRETS}

    assert given == environments(CONTAINERS)[name]


def test_compose_demands_a_ray_token_when_none_is_set(services: dict[str, Any]) -> None:
    for name, variable in (("ray", "RAY_AUTH_TOKEN"), ("api", "NCFM_RAY_TOKEN"), ("controller", "NCFM_RAY_TOKEN")):
        assert services[name]["environment"][variable].startswith("${RAY_AUTH_TOKEN:?")


def test_compose_has_ray_ask_for_its_token(services: dict[str, Any]) -> None:
    assert services["ray"]["environment"]["RAY_AUTH_MODE"] == "token"
    # Whoever starts a head in these images by hand is not left open either.
    text = (ROOT / "deploy" / "Dockerfile.worker").read_text()
    assert "RAY_AUTH_MODE=token" in text


def test_compose_lets_mlflow_answer_to_its_names_alone(services: dict[str, Any]) -> None:
    command = services["mlflow"]["command"]
    hosts = command[command.index("--allowed-hosts") + 1].split(",")

    assert set(hosts) == {"mlflow:5000", "localhost:*", "127.0.0.1:*"}


def test_compose_reaches_the_api_with_a_key_alone(services: dict[str, Any]) -> None:
    environment = services["api"]["environment"]

    assert "NCFM_AUTH" not in environment and environment["NCFM_PUBLIC_HOSTS"] == "api"
    assert environment["NCFM_DATA_ROOTS"] == services["ray"]["environment"]["NCFM_DATA_ROOTS"]


def test_compose_publishes_on_this_machine_only(services: dict[str, Any]) -> None:
    published = [port for service in services.values() for port in service.get("ports", ())]

    assert published and all(port.startswith("127.0.0.1:") for port in published)


def test_compose_checks_the_health_of_every_process(services: dict[str, Any]) -> None:
    assert all("healthcheck" in service for service in services.values())


def test_compose_follows_the_schema() -> None:
    tool = Path(sys.executable).parent / "check-jsonschema"
    done = subprocess.run(
        [tool, "--builtin-schema", "vendor.compose-spec", COMPOSE], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["Dockerfile.service", "Dockerfile.worker"])
def test_dockerfile_passes_the_linter(name: str) -> None:
    tool = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([tool, ROOT / "deploy" / name], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout


def test_service_image_installs_the_package_without_its_extras() -> None:
    lines = (ROOT / "deploy" / "Dockerfile.service").read_text().splitlines()

    assert [line for line in lines if "pip install" in line] == ["RUN pip install --no-cache-dir . \\"]
