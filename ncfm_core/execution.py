"""How a distillation is carried out: how much goes through a network at once, in what pieces, compiled or not.

Whether compiling pays is decided here for supervised training too. None of it is part of a result's key. It may move the last
bits, so a state records it and a resumed run keeps it.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from subprocess import SubprocessError
from typing import ParamSpec

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ncfm_core.cost import CPU_RATE, GPU_RATE
from ncfm_core.errors import NcfmError, OutOfMemoryError, ResourcesError

CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
"""Largest activation of a chunk. A core's caches hold 8 MiB: chunks of that size run twice as fast there as large ones, whose
activations are fetched from memory, and paged in, for every operation."""
BLOCK_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
"""Activations kept for one backward pass."""
BLOCK_SHARE, CHUNK_SHARE = 0.5, 1 / 16
"""Of a memory limit, where one is set."""
COMPILE_OPERATIONS = {"cpu": 2e12, "cuda": 1e15}
"""Below this many floating-point operations compiling is not earned back. On a CPU, at width 32, they are 45 (training) to 95
seconds (distilling) of eager work on one core, of which compiled code saves 12 to 40; compiling takes 10 to 20, and 2 where
Inductor finds the code on disk (docs/performance.md)."""
COMPILE_SECONDS = 50.0
"""What compiling takes at worst, on a machine that has other work (docs/performance.md)."""
COMPILE_SHARE = 1 / 4
"""Most of the time that is left which may go into the compiler."""
BACKWARD_FORWARDS = 2
"""A backward pass in units of a forward one."""
COMPILED_FORMS = 128
"""Forms of one function (network, number of images, with gradients or without) that a process may compile. Dynamo's own limit of
8 is soon reached where a process judges a set on several networks, and what goes beyond it runs eager without a word."""

COMPILER = ("torch._dynamo", "torch._inductor", "triton")
"""Modules whose errors are the compiler's."""

LAYOUT_FROM = 28
"""Pixels a side from which the memory layout matters."""

P = ParamSpec("P")
Forward = Callable[[dict[str, Tensor], Tensor], Tensor]
"""From weights and images to features or logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How much of a step goes through a network at once, and in which form."""

    chunk: int
    """Images that go through a network at once."""
    block: int
    """Classes whose gradient is computed at once."""
    recompute: bool
    """Whether a chunk's activations are computed a second time in the backward pass instead of kept."""
    compiled: bool
    """Whether networks go through `torch.compile`."""

    def __str__(self) -> str:
        kept = "recomputed in the backward pass" if self.recompute else "kept"
        how = "compiled" if self.compiled else "eager"
        return f"{how}, {self.chunk} images a forward, {self.block} classes a gradient, activations {kept}"

    def halved(self) -> Execution:
        """Half as much at once."""
        if self.block > 1:
            return replace(self, block=self.block // 2, chunk=max(1, self.chunk // 2))
        return replace(self, chunk=max(1, self.chunk // 2), recompute=True)

    def too_large(self, device: torch.device) -> OutOfMemoryError:
        """The error where a step does not fit even so."""
        message = f"a step does not fit the memory of {device}, even with {self}"
        hint = (
            "Set resources.memory_limit (MiB) lower, or lower method.real_batch, method.num_frequencies or model.width."
        )
        return OutOfMemoryError.of("resources.memory_limit", None, message, hint)

    def encode(self) -> Tensor:
        """As int64 of shape (4,), for a state."""
        return torch.tensor([self.chunk, self.block, int(self.recompute), int(self.compiled)])

    @classmethod
    def decode(cls, encoded: Tensor) -> Execution:
        """What `encode` gave."""
        chunk, block, recompute, compiled = encoded.tolist()
        return cls(chunk=chunk, block=block, recompute=bool(recompute), compiled=bool(compiled))


def choose(
    features: Forward,
    weights: dict[str, Tensor],
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    images_per_class: int,
    device: torch.device,
    forwards: float,
    memory_limit: int | None,
    together: bool,
    compiled: bool | None,
    seconds: float | None = None,
) -> Execution:
    """The execution for a network, found by sending two images through it.

    Args:
        features: what will be run.
        weights: of one network.
        image_shape: (channels, H, W).
        num_classes: C.
        images_per_class: decoded synthetic images of a class.
        device: where it will run.
        forwards: images that will go forward in all, for the choice to compile.
        memory_limit: bytes that a step's activations may take; None for what is fast on the device.
        together: whether images influence each other (batch statistics), so that nothing may be cut.
        compiled: None to compile where it pays.
        seconds: that are left for all of it; None for as many as it takes.
    """
    kept, largest, operations = probe(features, weights, image_shape, device)
    chunk_bytes, block_bytes = CHUNK_BYTES[device.type], BLOCK_BYTES[device.type]
    if memory_limit is not None:
        chunk_bytes = min(chunk_bytes, int(memory_limit * CHUNK_SHARE))
        block_bytes = int(memory_limit * BLOCK_SHARE)
    if compiled is None:
        compiled = compiling_pays(operations * forwards, device, seconds)
    if together:
        return Execution(chunk=1 << 30, block=num_classes, recompute=False, compiled=compiled)
    return Execution(
        chunk=max(1, chunk_bytes // largest),
        block=min(num_classes, max(1, block_bytes // (kept * images_per_class))),
        recompute=kept * images_per_class > block_bytes,
        compiled=compiled,
    )


def compiling_pays(operations: float, device: torch.device, seconds: float | None = None) -> bool:
    """Whether so many floating-point operations in all are worth a call of the compiler, and one is there that works.

    Args:
        operations: that are to be done.
        device: where.
        seconds: that are left; what does not fit them is never done. None for as many as it takes.
    """
    if seconds is not None:
        if COMPILE_SECONDS > COMPILE_SHARE * seconds:
            return False
        rate = CPU_RATE * torch.get_num_threads() if device.type == "cpu" else GPU_RATE
        operations = min(operations, rate * seconds)
    # The trial comes last, as it takes seconds itself.
    return operations >= COMPILE_OPERATIONS[device.type] and compiler_works(device.type)


@cache
def compiler_works(kind: str) -> bool:
    """Whether `torch.compile` can make code for a kind of device here, and run it: tried on a few numbers, once in a process.

    A compiler that is there may lack Python's or OpenMP's headers, or a place to write to. The trial takes 3 to 15 seconds, of
    which the first compilation is spared most.
    """
    if kind == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++")):
        return False
    if kind == "cuda" and find_spec("triton") is None:
        return False
    try:
        numbers = torch.ones(8, device=kind, requires_grad=True)
        with torch.enable_grad():
            torch.autograd.backward(compiled_form(lambda given: given.relu().sum())(numbers))
    except (RuntimeError, OSError, ImportError, SubprocessError):
        return False
    return True


def compiled_form(forward: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """A forward pass through `torch.compile`: one compilation for each form of its arguments.

    What is compiled serves every function of the same code in this process: a second network of the same layers finds it there.
    A form that can not be compiled whole is an error, never a silent return to eager code, which has other last bits.
    """
    fast = torch.compile(forward, dynamic=False, fullgraph=True)

    def run(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        with torch.compiler.config.patch(recompile_limit=COMPILED_FORMS):  # type: ignore[attr-defined]
            return fast(*args, **kwargs)

    return run


def fallen_back(error: Exception, *, may: bool) -> str:
    """Why a compiled step failed, in one line, for a run that goes on eager.

    Args:
        error: what the step ended with.
        may: whether the run may: compiling was the engine's own choice, and no step is made yet, so that no bit depends on it.

    Raises:
        ResourcesError: it may not, and the compiler is to blame.
        Exception: the error itself in all other cases.
    """
    told = str(error).strip()
    line = f"{type(error).__name__}: {told.splitlines()[0]}" if told else type(error).__name__
    if may and not isinstance(error, NcfmError):
        return line
    if any(kind.__module__.startswith(COMPILER) for kind in type(error).__mro__):
        raise ResourcesError.of(
            "torch.compile",
            None,
            f"failed ({line})",
            "A run that was asked to compile, or that goes on from a compiled one, cannot go on eager: "
            "mend the compiler here, or start afresh and leave the choice to the engine (or ask for eager).",
        ) from error
    raise error


def probe(
    features: Forward, weights: dict[str, Tensor], image_shape: tuple[int, int, int], device: torch.device
) -> tuple[int, int, float]:
    """Bytes that an image keeps for the backward pass, those of its largest activation, and operations of its forward pass."""
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.ndim == 4 and len(tensor) == 2:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    images = torch.zeros((2, *image_shape), device=device, requires_grad=True)
    counter = FlopCounterMode(display=False)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), counter:
        # Held, so that no storage is freed and its address given to the next.
        held = features(weights, images)
    least = 4 * math.prod(image_shape)
    kept = max(least, sum(seen.values()) // 2)
    largest = max(least, max(seen.values(), default=0) // 2)
    del held
    return kept, largest, counter.get_total_flops() / 2


def in_chunks(forward: Forward, weights: dict[str, Tensor], images: Tensor, execution: Execution) -> Tensor:
    """A network's output for images of any number, chunk by chunk, with or without gradient.

    Args:
        forward: of the network.
        weights: of the network.
        images: shape (N, channels, H, W).
        execution: chunk size, and whether activations are recomputed.
    """
    pieces = even_chunks(images, execution.chunk)
    if execution.recompute and torch.is_grad_enabled():
        # Nothing is drawn in a forward pass, so no generator's state has to be put aside, which a GPU would be waited for.
        outputs = [
            checkpoint(forward, weights, piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces
        ]
    else:
        outputs = [forward(weights, piece) for piece in pieces]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def even_chunks(images: Tensor, chunk: int) -> tuple[Tensor, ...]:
    """Cut along the first dimension into pieces of at most `chunk`, as equal as they can be.

    Pieces of one size where the number allows: each other size would be compiled apart.
    """
    number = len(images)
    if number <= chunk:
        return (images,)
    exact = next((size for size in range(chunk, chunk // 2, -1) if number % size == 0), None)
    return torch.split(images, exact or math.ceil(number / math.ceil(number / chunk)))


def for_inference(images: Tensor, execution: Execution, *, channels_last: bool = False) -> Tensor:
    """The images in the memory layout that is fastest where no gradient is asked for.

    Channels last takes a third off an uncompiled ConvNet on the CPU; small or grey images, and compiled networks, gain nothing.

    Args:
        images: shape (N, channels, H, W).
        execution: compiled or not.
        channels_last: whether a GPU gets it too, where it is not measured yet.
    """
    _, channels, height, _ = images.shape
    if images.is_cuda:
        return images.contiguous(memory_format=torch.channels_last) if channels_last else images
    if execution.compiled or channels < 3 or height < LAYOUT_FROM:
        return images
    return images.contiguous(memory_format=torch.channels_last)
