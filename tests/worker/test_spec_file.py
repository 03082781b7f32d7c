"""Specs from files and from the storage root."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import JsonValue

from ncfm_core.errors import SpecError
from ncfm_core.spec import JobSpec
from ncfm_core.submission import resolve
from worker.spec_file import load_spec, read_document, with_changes
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


@pytest.mark.parametrize("example", ["digits.yaml", "digits-search.yaml", "cifar10-search.yaml"])
def test_examples_are_legal(example: str) -> None:
    assert load(ROOT / "examples" / example).dataset.name == example.partition("-")[0].removesuffix(".yaml")


def test_changes_are_laid_over(smallest: Path) -> None:
    spec = load(smallest, "method.steps=100", "evaluate.0.students=4", "seed=7", "search.space={image_lr: [0.1, 0.2]}")
    assert spec.method.steps == 100
    assert spec.evaluate[0].students == 4
    assert spec.seed == 7
    assert spec.search is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("method.steps", "key=value"),
        ("=3", "key=value"),
        ("method.stesp=3", "Did you mean 'steps'"),
        ("method.steps=many", "method.steps"),
        ("method.steps=.nan", r"^method\.steps: input should be a finite number \(got nan\)"),
        ("ipc.deep=1", "cannot be set there"),
        ("ipc.very.deep=1", "not inside an object"),
        ("evaluate.5.students=1", "not inside an object"),
        ("ipc=[1", "not YAML"),
    ],
)
def test_bad_change_is_told(smallest: Path, change: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        load(smallest, change)


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


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "spec.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_document_is_read_when_it_is_yaml(tmp_path: Path) -> None:
    text = "dataset: digits\nipc: 1\nsearch: {space: {image_lr: {loguniform: [1e-3, 1.5E+1]}}}\n"

    assert read_document(write(tmp_path, text)) == {
        "dataset": "digits",
        "ipc": 1,
        "search": {"space": {"image_lr": {"loguniform": [0.001, 15.0]}}},
    }


def test_document_is_read_when_it_is_json(tmp_path: Path) -> None:
    assert read_document(write(tmp_path, '{"dataset": "digits", "ipc": 1}')) == {"dataset": "digits", "ipc": 1}


@pytest.mark.parametrize(
    ("text", "value"),
    [("on", "on"), ("yes", "yes"), ("true", True), ("null", None), ("1e-3", 0.001), ("2020-01-01", "2020-01-01")],
)
def test_plain_values_are_those_of_json(tmp_path: Path, text: str, value: JsonValue) -> None:
    assert read_document(write(tmp_path, f"a: {text}")) == {"a": value}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: [1, 2", "not YAML.*line 1"),
        ("a: b: c", "not YAML.*line 1"),
        ("a: !!python/object:os.system x", "not YAML"),
        ("- 1\n- 2", "is an object"),
        ("", "is an object"),
        ("just text", "is an object"),
        ("a: .nan", r"^a: input should be a finite number \(got nan\)\. Choose a finite number\.$"),
        ("a: {b: [1, {c: -.inf}]}\nd: .inf", r"^a\.b\.1\.c: .*got -inf.*\nd: .*got inf"),
        ("a: &x [*x]", "cannot be sent as JSON"),
        ("? [1, 2]\n: 3", "not YAML|cannot be sent"),
        ("a: " + "[" * 5000, "nested too deeply"),
        (b"\xff\xfe", "UTF-8"),
        (b"a: \x00", "not YAML"),
        ("a: 1\n" * 300_000, "larger than 1 MiB"),
    ],
)
def test_document_is_refused_in_words_when_it_is_broken(tmp_path: Path, text: str | bytes, complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        read_document(write(tmp_path, text))


def test_document_is_refused_when_there_is_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="No such file"):
        read_document(tmp_path / "nothing.yaml")


def test_document_is_refused_when_it_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="directory"):
        read_document(tmp_path)


def test_settings_are_laid_over_the_document() -> None:
    document: dict[str, JsonValue] = {"dataset": "digits", "ipc": 1, "method": "ncfm"}

    changed = with_changes(
        document, ["ipc=10", "method.steps=500", "model.width=32", "method.image_lr=1e-2", "a=[1, x]"]
    )

    assert changed == {
        "dataset": "digits",
        "ipc": 10,
        "method": {"name": "ncfm", "steps": 500, "image_lr": 0.01},
        "model": {"width": 32},
        "a": [1, "x"],
    }
    assert document == {"dataset": "digits", "ipc": 1, "method": "ncfm"}


@pytest.mark.parametrize("setting", ["steps", "=5", "a..b=1", ".a=1", "ipc.x=1", "a=[1", "a=.inf"])
def test_setting_is_refused_when_it_is_broken(setting: str) -> None:
    with pytest.raises(SpecError):
        with_changes({"ipc": 1}, [setting])
