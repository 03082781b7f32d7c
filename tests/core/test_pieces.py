"""What a draw holds at once: one chunk of images, and the features."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ncfm_core.augment import OPERATIONS, Augmentation, draw
from ncfm_core.datasets import Dataset
from ncfm_core.distill import Distillation
from ncfm_core.execution import even_chunks
from ncfm_core.pieces import decoded_pieces, gathered
from ncfm_core.pools import TeacherPool, TeacherTraining
from ncfm_core.rng import generator
from ncfm_core.spec import AugmentSpec, JobSpec
from ncfm_core.submission import resolve
from ncfm_core.synthetic import decode

CPU = torch.device("cpu")
MIB = 2**20


class Held(TorchDispatchMode):
    """Counts the bytes of the storages that are made inside it, and of those that are left: `peak` is the most at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage._cdata, size)

    def _forget(self, known: int, size: int) -> None:
        self._known.discard(known)
        self.now -= size


def test_count_of_held_bytes_is_right() -> None:
    with Held() as held:
        one = torch.zeros(MIB, dtype=torch.uint8)
        view = one[10:]
        other = one + 1
        del one, other
        assert (held.now, held.peak) == (MIB, 2 * MIB)
        del view
        torch.ones(10, dtype=torch.uint8)
    assert (held.now, held.peak) == (0, 2 * MIB)


AUGMENTATIONS = {
    **{name: AugmentSpec(policy="single", ops=(name,)) for name in OPERATIONS},  # type: ignore[arg-type]
    "stack": AugmentSpec(policy="stack", ops=("color", "crop", "cutout", "flip", "scale", "rotate")),
    "none": AugmentSpec(policy="none", ops=()),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 28), (3, 128)])
def test_pieces_have_the_bits_of_the_whole(name: str, channels: int, size: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        stored = torch.rand((7, channels, size, size), generator=generator(0, "images"))
        for step in range(2):
            augmentation: Augmentation = draw(AUGMENTATIONS[name], generator(step, "augment"))
            for factor, chunk in ((1, 1), (1, 3), (1, 100), (2, 1), (2, 5), (2, 8), (2, 28)):
                pieces = list(decoded_pieces(stored, factor, chunk, augmentation))
                whole = augmentation(decode(stored, factor))
                expected = even_chunks(whole, chunk)
                assert [len(piece) for piece in pieces] == [len(piece) for piece in expected]
                for piece, wanted in zip(pieces, expected, strict=True):
                    assert torch.equal(piece, wanted)
                    assert piece[0].stride() == wanted[0].stride()
                assert torch.equal(gathered(iter(pieces), len(whole)), whole)
    finally:
        torch.set_num_threads(before)


def made(size: int, per_class: int) -> Dataset:
    def part(count: int) -> tuple[Tensor, Tensor]:
        images = torch.randint(0, 256, (10 * count, 3, size, size), dtype=torch.uint8, generator=generator(0, "made"))
        return images, torch.arange(10).repeat_interleave(count)

    return Dataset.from_tensors("made", train=part(per_class), test=part(1), class_names=[str(i) for i in range(10)])


def spec(size: int, width: int = 32, **method: Any) -> JobSpec:
    return resolve(
        {
            "dataset": {"name": "imagefolder", "uri": "/made", "image_size": size},
            "ipc": 1,
            "preset": "quick",
            "model": {"width": width},
            "teachers": {"count": 1, "training": {"epochs": 1}},
            "method": {"steps": 2, "reuse": 2, "num_frequencies": 16, "num_components": 4, "factor": 2} | method,
        }
    )


def distillation(dataset: Dataset, job: JobSpec, *, ipc: int, memory_limit: int | None) -> Distillation:
    teacher = TeacherTraining(dataset, job.model, job.teachers.training, seed=0, index=0, device=CPU, compiled=False)
    pool = TeacherPool(job.model, dataset, [teacher.result()], CPU)
    return Distillation(
        dataset, pool, job.method, ipc=ipc, seed=0, device=CPU, memory_limit=memory_limit, compiled=False
    )


def test_ascent_of_psi_never_decodes_all_images_at_once() -> None:
    run = distillation(made(32, 50), spec(32, real_batch=4), ipc=50, memory_limit=16 * MIB)
    decoded = 10 * 50 * 4 * 3 * 32 * 32 * 4
    with Held() as held:
        run._open_draw()
    # Features of 2000 and of 40 images, and what a chunk needs: its largest map is a sixteenth of the limit.
    features = (2000 + 40) * run._pool.network.num_features * 4
    assert decoded > 20 * MIB
    assert held.peak < features + 10 * MIB < decoded


def test_real_features_are_held_once() -> None:
    run = distillation(made(16, 300), spec(16, width=128, real_batch=300), ipc=1, memory_limit=4 * MIB)
    extractors = run._pool.draw(generator(0, "draw"))
    with Held() as held:
        features = run._real_features(extractors, draw(AUGMENTATIONS["none"], generator(0, "augment")), 0)
    size = features.numel() * 4
    assert size > 5 * MIB
    assert held.peak < size + 2 * MIB


def test_halved_execution_holds_less() -> None:
    peaks = []
    for chunk in (256, 64):
        run = distillation(made(32, 20), spec(32, real_batch=4), ipc=20, memory_limit=None)
        run._carry_out(replace(run.execution, chunk=chunk))
        with Held() as held:
            run._open_draw()
        peaks.append(held.peak)
    assert peaks[1] < 0.5 * peaks[0]
