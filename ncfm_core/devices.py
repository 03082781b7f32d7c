"""The compute device: whether it is there, and what happens when its memory is full.

What runs out of memory is tried once more with half as much at once, where it can be cut. What fails all the same is a
`OutOfMemoryError` that names the field to lower.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TypeVar

import torch

from ncfm_core.errors import NcfmError, OutOfMemoryError, ResourcesError

KINDS = ("cpu", "cuda")
FULL = (
    "out of memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "can't allocate memory",
    "not enough memory: you tried to allocate",
)
"""What is said of a full memory by errors that have no class of their own: CUDA's libraries, and the CPU's allocator."""

T = TypeVar("T")


def require_device(device: torch.device) -> torch.device:
    """The device, if it can be computed on here.

    Raises:
        ResourcesError: it is of another kind than CPU and CUDA, or there is none of that number.
    """
    if device.type not in KINDS:
        raise ResourcesError.of("device", str(device), "neither the CPU nor a CUDA device", "Choose cpu or cuda.")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        if torch.version.cuda is None:
            why = "this torch is built without CUDA"
        else:
            why = f"torch finds {count or 'no'} CUDA device{'s' if count > 1 else ''} here"
        raise ResourcesError.of("device", str(device), why, "Choose cpu, or a machine with such a GPU and its driver.")
    return device


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on whatever device, in this error or one that it was raised from.

    An error that is addressed to a person already is none.
    """
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        if isinstance(link, NcfmError):
            return False
        if isinstance(link, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(link, RuntimeError) and any(sign in str(link) for sign in FULL):
            return True
        seen.add(id(link))
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return False


@contextmanager
def told(full: Callable[[], OutOfMemoryError]) -> Generator[None, None, None]:
    """Inside it a full memory becomes an error that names the knob; may stand above a function too.

    Args:
        full: that error.

    Raises:
        OutOfMemoryError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise full() from error


def tried_again(
    compute: Callable[[], T], *, halve: Callable[[], bool], full: Callable[[], OutOfMemoryError], device: torch.device
) -> T:
    """The result of a computation, which is tried once more with half as much at once if memory runs out.

    Args:
        compute: what to do; a second call must be able to follow a first one that broke off anywhere.
        halve: makes it take less at once, and takes back what a first try may have done; False where it can not be cut.
        full: the error where it does not fit in halves either, or has none.
        device: whose cache is emptied in between.

    Raises:
        OutOfMemoryError: memory ran out in both tries, or in the only one.
    """
    try:
        return compute()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if not halve():
            raise full() from error
    # Out here the first error is forgotten, and with it all tensors of the calls that it came through.
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with told(full):
        return compute()


def in_halves(
    compute: Callable[[int], T], size: int, *, full: Callable[[int], OutOfMemoryError], device: torch.device
) -> T:
    """The result of a computation on batches of a size, tried once more with batches of half of it if memory runs out.

    Args:
        compute: what to do, from its start, with so many images at once.
        size: of the first try.
        full: the error, given the size that did not fit.
        device: whose cache is emptied in between.

    Raises:
        OutOfMemoryError: memory ran out in both tries.
    """
    sizes = [size]

    def halve() -> bool:
        sizes.append(size // 2)
        return size > 1

    return tried_again(lambda: compute(sizes[-1]), halve=halve, full=lambda: full(max(1, sizes[-1])), device=device)
