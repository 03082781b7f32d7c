"""Submissions as people write them."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import JsonValue

from service.documents import DocumentError, read_document, with_settings


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
        ("a: .nan", "cannot be sent as JSON"),
        ("a: &x [*x]", "cannot be sent as JSON"),
        ("? [1, 2]\n: 3", "not YAML|cannot be sent"),
        ("a: " + "[" * 5000, "nested too deeply"),
        (b"\xff\xfe", "UTF-8"),
        (b"a: \x00", "not YAML"),
        ("a: 1\n" * 300_000, "larger than 1 MiB"),
    ],
)
def test_document_is_refused_in_words_when_it_is_broken(tmp_path: Path, text: str | bytes, complaint: str) -> None:
    with pytest.raises(DocumentError, match=complaint):
        read_document(write(tmp_path, text))


def test_document_is_refused_when_there_is_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="No such file"):
        read_document(tmp_path / "nothing.yaml")


def test_document_is_refused_when_it_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="directory"):
        read_document(tmp_path)


def test_settings_are_laid_over_the_document() -> None:
    document: dict[str, JsonValue] = {"dataset": "digits", "ipc": 1, "method": "ncfm"}

    changed = with_settings(
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
    with pytest.raises(DocumentError):
        with_settings({"ipc": 1}, [setting])
