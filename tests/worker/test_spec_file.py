"""Specs from files and from the storage root."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ncfm_core.errors import SpecError
from ncfm_core.presets import resolve
from ncfm_core.spec import JobSpec
from worker.spec_file import load_spec
from worker.storage import Storage

ROOT = Path(__file__).resolve().parents[2]


def load(path: Path, *changes: str) -> JobSpec:
    return load_spec(str(path), changes, lambda: Storage("memory://"))


@pytest.fixture
def smallest(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text("dataset: digits\nipc: 1\nmethod: ncfm\nevaluate: [{students: 3}]\n")
    return path


def test_yaml_and_json_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("dataset: digits\nipc: 2\n")
    (tmp_path / "a.json").write_text('{"dataset": "digits", "ipc": 2}')
    assert load(tmp_path / "a.yaml") == load(tmp_path / "a.json")


def test_stored_spec_is_read_as_it_was_resolved() -> None:
    storage, spec = Storage("memory://"), resolve({"dataset": "digits", "ipc": 1})
    storage.put("jobs/J/spec.json", spec.model_dump_json().encode())
    assert load_spec("storage:jobs/J/spec.json", (), lambda: storage) == spec


@pytest.mark.parametrize("example", ["digits.yaml", "digits-search.yaml"])
def test_examples_are_legal(example: str) -> None:
    assert load(ROOT / "examples" / example).dataset.name == "digits"


def test_changes_are_laid_over(smallest: Path) -> None:
    spec = load(smallest, "method.steps=100", "evaluate.0.students=4", "seed=7", "search.space={image_lr: [0.1, 0.2]}")
    assert spec.method.steps == 100
    assert spec.evaluate[0].students == 4
    assert spec.seed == 7
    assert spec.search is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("method.steps", "name=value"),
        ("=3", "name=value"),
        ("method.stesp=3", "Did you mean 'steps'"),
        ("method.steps=many", "method.steps"),
        ("ipc.deep=1", "cannot be set there"),
        ("ipc.very.deep=1", "not inside an object"),
        ("evaluate.5.students=1", "not inside an object"),
        ("ipc=[1", "not a value"),
    ],
)
def test_bad_change_is_told(smallest: Path, change: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        load(smallest, change)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no spec"),
        ("just words", "holds no spec"),
        ("[1, 2]", "holds no spec"),
        ("dataset: [digits", "neither YAML nor JSON"),
        ("dataset: digits\n\tipc: 1", "in line 2"),
        ("\x00", "neither YAML nor JSON"),
        ("dataset: !!python/object:os.system {}", "neither YAML nor JSON"),
        ("[" * 100_000, "neither YAML nor JSON"),
        ("ipc: 1", "dataset: required"),
        ("{dataset: digits, ipc: 1.5}", "ipc"),
        ("{dataset: digits, ipc: .nan}", "ipc"),
        ("{dataset: digits, ipc: 1, method: {image_lr: 1e400}}", "method.image_lr"),
        ("a" * 2_000_000, "larger than"),
    ],
)
def test_bad_file_is_told(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=message):
        load(path)


def test_binary_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(SpecError, match="neither YAML nor JSON"):
        load(tmp_path / "x")


def test_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="No such file"):
        load(tmp_path / "nothing.yaml")
    with pytest.raises(SpecError, match="directory"):
        load(tmp_path)
    with pytest.raises(SpecError, match="no such object"):
        load_spec("storage:jobs/none/spec.json", (), lambda: Storage("memory://"))


def test_nan_written_by_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_text(json.dumps({"dataset": "digits", "ipc": 1, "method": {"image_lr": float("nan")}}))
    with pytest.raises(SpecError, match=r"method\.image_lr"):
        load(path)
