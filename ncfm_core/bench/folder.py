"""A run that leaves the machine between two calls: a folder of a few files of bounded size, safetensors and one JSON.

`run.json` is the commit. It names the files that belong to it, with their sha256; files are written under new names first and
replaced ones are deleted last, so that a process killed at any moment leaves the run of one save or of the next.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors.torch
import torch
from pydantic import JsonValue
from torch import Tensor

from ncfm_core.errors import CheckpointError

MIB = 1 << 20
FILE_BYTES = 16 * MIB
"""Largest file."""
HEADER_BYTES = 64 << 10
"""Of it, kept for safetensors' header."""
FORMAT = 1
_RECORD = "run.json"
_OURS = re.compile(r"(\w+)-\d+-\d+\.safetensors(\.partial)?|run\.json\.partial")
_PIECE = "@"
"""Between a tensor's name and the first row of a piece of it."""

Record = dict[str, JsonValue]


class Folder:
    """Named groups of tensors beside one JSON document."""

    def __init__(self, path: Path) -> None:
        """
        Args:
            path: of the folder; made when something is saved.

        Raises:
            CheckpointError: it holds something else, or what it holds is damaged.
        """
        self.path = path
        self._generation = 0
        self._files: dict[str, dict[str, str]] = {}
        self.record: Record | None = None
        """As it was saved last; None in a new folder."""
        if (path / _RECORD).exists():
            self.record = self._read()

    def _read(self) -> Record:
        try:
            document = json.loads((self.path / _RECORD).read_bytes())
            record, files, generation = document["record"], document["files"], document["generation"]
            known = document["format"] == FORMAT
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _unusable(self.path / _RECORD, f"cannot be read: {error}") from error
        if not known:
            raise _unusable(self.path / _RECORD, "is of another version of this program")
        self._files, self._generation = files, generation
        return dict(record)

    def load(self, group: str) -> dict[str, Tensor]:
        """The tensors of a group, on the CPU; empty for one that was never saved.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        pieces: dict[str, Tensor] = {}
        for name, digest in self._files.get(group, {}).items():
            try:
                data = (self.path / name).read_bytes()
            except OSError as error:
                raise _unusable(self.path / name, f"cannot be read: {error.strerror}") from error
            if _digest(data) != digest:
                raise _unusable(self.path / name, "is damaged: its sha256 is not the one in run.json")
            pieces |= safetensors.torch.load(data)
        return _joined(pieces)

    def save(self, record: Record, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Commit a document and these groups; all other groups stay, an empty one goes.

        Args:
            record: plain JSON values.
            groups: tensors by group and name.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        self._generation += 1
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for group, tensors in groups.items():
                self._files[group] = {}
                for number, shard in enumerate(shards(tensors)):
                    name = f"{group}-{self._generation}-{number}.safetensors"
                    data = safetensors.torch.save(shard)
                    self._put(name, data)
                    self._files[group][name] = _digest(data)
            document = {"format": FORMAT, "generation": self._generation, "files": self._files, "record": record}
            self._put(_RECORD, json.dumps(document, indent=1, allow_nan=False).encode())
            self._sweep()
        except OSError as error:
            raise _unusable(self.path, f"cannot be written: {error.strerror}") from error
        self.record = record

    def sizes(self) -> dict[str, int]:
        """Bytes of each file of the run."""
        names = [_RECORD, *(name for files in self._files.values() for name in files)]
        return {name: (self.path / name).stat().st_size for name in names}

    def _put(self, name: str, data: bytes) -> None:
        partial = self.path / f"{name}.partial"
        partial.write_bytes(data)
        os.replace(partial, self.path / name)

    def _sweep(self) -> None:
        """Delete what earlier saves left."""
        current = {name for files in self._files.values() for name in files}
        for path in self.path.iterdir():
            if _OURS.fullmatch(path.name) and path.name not in current:
                path.unlink()


def shards(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Tensors cut and packed so that each shard fits a file, in order.

    Args:
        tensors: by name; one that is larger than a file is cut along its first dimension.
    """
    room = FILE_BYTES - HEADER_BYTES
    shard: dict[str, Tensor] = {}
    taken = 0
    for name, piece in _pieces(tensors, room):
        if shard and taken + piece.nbytes > room:
            yield shard
            shard, taken = {}, 0
        shard[name] = piece.contiguous()
        taken += piece.nbytes
    if shard:
        yield shard


def _pieces(tensors: Mapping[str, Tensor], room: int) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        if tensor.nbytes <= room:
            yield name, tensor
            continue
        rows = max(1, room // (tensor.nbytes // len(tensor)))
        for first in range(0, len(tensor), rows):
            # A clone: safetensors would take the piece for a view that shares memory.
            yield f"{name}{_PIECE}{first}", tensor[first : first + rows].clone()


def _joined(pieces: Mapping[str, Tensor]) -> dict[str, Tensor]:
    whole: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in pieces.items():
        name, cut, first = name.rpartition(_PIECE) if _PIECE in name else (name, "", "")
        if cut:
            parts.setdefault(name, {})[int(first)] = tensor
        else:
            whole[name] = tensor
    return whole | {name: torch.cat([rows[first] for first in sorted(rows)]) for name, rows in parts.items()}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _unusable(path: Path, message: str) -> CheckpointError:
    return CheckpointError.of(
        "--folder", str(path), message, "Bring back all files of the folder, or start anew in an empty one."
    )
