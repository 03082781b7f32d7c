from __future__ import annotations

import pickle

import pytest

from ncfm_core import errors
from ncfm_core.errors import NcfmError, Problem

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, NcfmError)]


@pytest.mark.parametrize("kind", KINDS)
def test_errors_survive_pickling(kind: type[NcfmError]) -> None:
    error = kind(Problem("ipc", "0", "too small", "Choose 1."), Problem("seed", "", "required"))
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert copy.problems == error.problems
    assert str(copy) == "ipc: too small (got 0). Choose 1.\nseed: required."


def test_every_kind_has_a_code_of_its_own() -> None:
    assert len({kind.code for kind in KINDS}) == len(KINDS)


def test_long_values_are_shortened() -> None:
    assert len(NcfmError.of("x", "y" * 10_000, "too long").problems[0].value) == errors.MAX_VALUE_CHARS
