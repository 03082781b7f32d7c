"""Fixed-seed results of the stages that compute, small enough to keep beside the tests.

    python -m tests.core.reference            how far this machine is from what is kept, tensor by tensor
    python -m tests.core.reference --bits     sha256 of each stage's results here
    python -m tests.core.reference --write    keep what changed, once the versions of those stages were raised

A stage starts from the kept results of the stages before it, so that a change shows in the stage that made it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from ncfm_core import evaluate as judging
from ncfm_core.coresets import coreset, random_real
from ncfm_core.datasets import Dataset, Images, load_dataset
from ncfm_core.distill import Distillation
from ncfm_core.pools import TeacherPool, TeacherTraining
from ncfm_core.progress import finish
from ncfm_core.spec import CoresetName, JobSpec, TrainingSpec
from ncfm_core.submission import resolve
from ncfm_core.training import accuracy, part
from worker.plan import STAGE_VERSIONS

TENSORS, RECORD = (Path(__file__).with_name(f"reference.{end}") for end in ("safetensors", "json"))
COMMAND = "python -m tests.core.reference --write"
CPU = torch.device("cpu")
PROCESSOR = frozenset({"vendor_id", "cpu family", "model", "model name", "stepping", "cache size", "flags"})
"""Lines of /proc/cpuinfo that may decide which code runs; the others change with load and place."""
IPC = 2
"""Of the real images that are chosen."""

Kept = dict[str, Tensor]
"""`<stage>.<name>`."""

SUBMISSION: dict[str, Any] = {
    "dataset": "digits",
    "ipc": 1,
    "model": {"width": 8},
    "teachers": {"count": 2, "training": {"epochs": 3}},
    "method": {"steps": 12, "reuse": 5, "num_frequencies": 64, "num_components": 8, "real_batch": 64},
    "evaluate": [{"students": 2, "tests": 2, "training": {"epochs": 10}}],
    "full_data": {"training": {"epochs": 2}},
}
OTHER_METHOD: dict[str, Any] = {
    "steps": 6,
    "reuse": 2,
    "factor": 2,
    "discrepancy": "mean",
    "schedule": "plateau",
    "real_sampling": "prefix",
    "labels": "soft",
}
"""What the first distillation has not."""


def submission(part: str = "method", **changes: Any) -> JobSpec:
    """The job whose stages are kept, with changes of its method, its `teachers`' or `evaluate`s recipe, or that of `full_data`."""
    document = json.loads(json.dumps(SUBMISSION))
    place = {
        "method": document["method"],
        "teachers": document["teachers"]["training"],
        "evaluate": document["evaluate"][0]["training"],
        "full_data": document["full_data"]["training"],
    }[part]
    place.update(changes)
    return resolve(document)


def teacher(digits: Dataset, kept: Kept, spec: JobSpec) -> Kept:
    """Both teachers' trained weights."""
    found: Kept = {}
    for index in range(spec.teachers.count):
        run = _teacher(digits, spec, index)
        _to_the_end(run)
        found |= {f"{index}.{name}": tensor for name, tensor in part(run.result(), "trained.").items()}
    return found


def distill(digits: Dataset, kept: Kept, spec: JobSpec) -> Kept:
    """Images, psi and all moments at the end; images and soft labels of a method that has all else."""
    run = Distillation(digits, _pool(digits, kept, spec), spec.method, ipc=spec.ipc, seed=0, device=CPU)
    _to_the_end(run)
    named = ("images", "optimizer.", "sampler.", "schedule.")
    found = {name: tensor for name, tensor in run.state().items() if name.startswith(named)}
    other = submission(**OTHER_METHOD).method
    run = Distillation(digits, _pool(digits, kept, spec), other, ipc=spec.ipc, seed=0, device=CPU)
    _to_the_end(run)
    result = run.result()
    assert result.soft_labels is not None
    return found | {"other.images": result.images, "other.soft_labels": result.soft_labels}


def evaluation(digits: Dataset, kept: Kept, spec: JobSpec) -> Kept:
    """Students of the kept images, which share a step."""
    return _students(digits, kept["distill.images"], torch.arange(10), spec, students=spec.evaluate[0].students)


def random_images(digits: Dataset, kept: Kept, spec: JobSpec) -> Kept:
    images, labels = random_real(digits, ipc=IPC, seed=0)
    return {"images": images} | _students(digits, images, labels, spec)


def chosen_images(name: CoresetName) -> Callable[[Dataset, Kept, JobSpec], Kept]:
    def found(digits: Dataset, kept: Kept, spec: JobSpec) -> Kept:
        images, labels = coreset(name, digits, _pool(digits, kept, spec), ipc=IPC, device=CPU)
        return {"images": images} | _students(digits, images, labels, spec)

    return found


def full_data(digits: Dataset, kept: Kept, spec: JobSpec) -> Kept:
    """One network on all images, apart and in pieces of a batch."""
    return _students(digits, digits.train, digits.train_labels, spec, recipe=spec.full_data.training)


STAGES: dict[str, Callable[[Dataset, Kept, JobSpec], Kept]] = {
    "teacher": teacher,
    "distill": distill,
    "evaluation": evaluation,
    "random_real": random_images,
    "herding": chosen_images("herding"),
    "k_center": chosen_images("k_center"),
    "full_data": full_data,
}
"""In an order in which each finds what it starts from."""
TOLERANCES = {"distill.sampler.": 2e-5, "distill.optimizer.": 1e-5, "distill.": 2e-6, "teacher.": 3e-6, "": 5e-7}
"""By the first beginning of a name that fits: ten times what another processor moves. ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA and no
oneDNN at all move psi by 1.8e-6, the images' moments by 1.0e-6, images by 2.2e-7, teachers by 3.1e-7, students by 4.2e-8 at most."""


def _to_the_end(run: TeacherTraining | Distillation) -> None:
    for _ in run.run():
        pass


def _teacher(digits: Dataset, spec: JobSpec, index: int) -> TeacherTraining:
    return TeacherTraining(digits, spec.model, spec.teachers.training, seed=0, index=index, device=CPU)


def _pool(digits: Dataset, kept: Kept, spec: JobSpec) -> TeacherPool:
    teachers = []
    for index in range(spec.teachers.count):
        initial = {name: each for name, each in _teacher(digits, spec, index).result().items() if "initial" in name}
        trained = {f"trained.{name}": each for name, each in part(kept, f"teacher.{index}.").items()}
        teachers.append(initial | trained)
    return TeacherPool(spec.model, digits, teachers, CPU)


def _students(
    digits: Dataset,
    images: Tensor | Images,
    labels: Tensor,
    spec: JobSpec,
    *,
    recipe: TrainingSpec | None = None,
    students: int = 1,
) -> Kept:
    """Weights of each student whenever it is tested: an accuracy moves in steps of 0.2, and hides what is smaller.

    Without the biases of convolutions: the norm behind takes them out again, so their gradients are rounding errors, which AdamW
    blows up to whole steps.
    """
    seen: Kept = {}

    def tested(model: nn.Module, dataset: Dataset) -> float:
        named = model.named_parameters()
        weights = [weight.detach().flatten() for name, weight in named if not re.fullmatch(r"convs\.\d+\.bias", name)]
        seen[f"student.{len(seen)}"] = torch.cat(weights).clone()
        return accuracy(model, dataset)

    entry = spec.evaluate[0]
    with patch.object(judging, "accuracy", tested):
        finish(
            judging.evaluate(
                images,
                labels,
                digits,
                model=entry.model,
                training=recipe or entry.training,
                students=students,
                tests=entry.tests if students > 1 else 1,
                seed=0,
                device=CPU,
            )
        )
    return seen


@contextmanager
def one_thread() -> Iterator[None]:
    """More threads cut sums elsewhere, and so have other last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def digits_data() -> Dataset:
    return load_dataset("digits", data_dir=Path("unused"))


def compute(stage: str, digits: Dataset, kept: Kept, spec: JobSpec | None = None) -> Kept:
    """A stage's results in one thread, by name."""
    with one_thread():
        found = STAGES[stage](digits, kept, spec or submission())
    return {name: tensor.detach().contiguous() for name, tensor in found.items()}


def compute_all(digits: Dataset, kept: Kept) -> dict[str, Kept]:
    """Every stage's results, from the kept ones of those before."""
    return {stage: compute(stage, digits, kept) for stage in STAGES}


def distances(found: Kept, kept: Kept) -> dict[str, float]:
    """How far each tensor is from the kept one: Euclidean, in units of that one's length; infinite where they cannot be compared."""

    def apart(ours: Tensor | None, theirs: Tensor | None) -> float:
        if ours is None or theirs is None or ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return math.inf
        if not ours.is_floating_point():
            return 0.0 if torch.equal(ours, theirs) else math.inf
        apart, length = ((ours.double() - theirs.double()).norm().item(), theirs.double().norm().item())
        return 0.0 if apart == 0 else apart / length if length and math.isfinite(apart) else math.inf

    return {name: apart(found.get(name), kept.get(name)) for name in sorted({*found, *kept})}


def tolerance(name: str) -> float:
    """What a tensor, by its full name, may be away from the kept one."""
    return next(allowed for beginning, allowed in TOLERANCES.items() if name.startswith(beginning))


def bits(found: Kept) -> str:
    """sha256 over names, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(found.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def machine() -> str:
    """What decides the last bits: torch and what it was built with, the processor and what torch makes of it."""
    cpuinfo = Path("/proc/cpuinfo")
    first = cpuinfo.read_text().split("\n\n")[0] if cpuinfo.exists() else platform.processor()
    facts = [line for line in first.splitlines() if line.partition("\t")[0].strip() in PROCESSOR]
    told = hashlib.sha256("\n".join([torch.__config__.show(), *facts]).encode()).hexdigest()[:8]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {platform.machine()} {capability}, processor {told}"


def load() -> tuple[Kept, dict[str, Any]]:
    """The kept tensors, and the record: `versions` of the stages, and `bits` by machine and stage."""
    return load_file(TENSORS), json.loads(RECORD.read_text())


def save(kept: Kept, record: Mapping[str, Any]) -> None:
    TENSORS.write_bytes(to_bytes(dict(sorted(kept.items()))))
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


def problems(stage: str, found: Kept, kept: Kept, record: Mapping[str, Any]) -> str:
    """What is wrong with a stage's results, and what to do; empty where nothing is."""
    current, recorded = STAGE_VERSIONS[stage], record["versions"].get(stage)  # type: ignore[index]
    if recorded != current:
        return (
            f"reference values of stage {stage} are of version {recorded}, it has {current}: refresh with `{COMMAND}`"
        )
    far = distances(found, part(kept, f"{stage}."))
    worst = max(far, key=lambda name: far[name] / tolerance(f"{stage}.{name}"))
    if far[worst] > (allowed := tolerance(f"{stage}.{worst}")):
        how = f"{worst} is {far[worst]:.1e} away, {allowed:.0e} is allowed"
    elif record["bits"].get(machine(), {}).get(stage, bits(found)) != bits(found):
        how = f"in their last bits, on a machine whose bits are known; {worst} is {far[worst]:.1e} away"
    else:
        return ""
    return (
        f"results of stage {stage} changed ({how}): raise its code version (STAGE_VERSIONS[{stage!r}] in worker/plan.py), "
        f"or stored results would be taken for these, and refresh with `{COMMAND}`"
    )


def write(*, anew: bool) -> int:
    """Keep the results of stages whose version was raised, and this machine's bits of all; 1 where a version should have been."""
    kept, record = load() if RECORD.exists() and TENSORS.exists() else ({}, {"versions": {}, "bits": {}})
    digits = digits_data()
    for stage in STAGES:
        # Computed after the stages before were kept: this one starts from them.
        found = compute(stage, digits, kept)
        raised = anew or record["versions"].get(stage) != STAGE_VERSIONS[stage]  # type: ignore[index]
        if raised:
            kept = {name: tensor for name, tensor in kept.items() if not name.startswith(f"{stage}.")}
            kept |= {f"{stage}.{name}": tensor for name, tensor in found.items()}
            for known in record["bits"].values():
                known.pop(stage, None)
            record["versions"][stage] = STAGE_VERSIONS[stage]  # type: ignore[index]
        elif problem := problems(stage, found, kept, record):
            sys.stderr.write(problem + "\n")
            return 1
        record["bits"].setdefault(machine(), {})[stage] = bits(found)
    record["versions"] = dict(STAGE_VERSIONS)
    record["bits"] = {name: known for name, known in record["bits"].items() if known}
    save(kept, record)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.core.reference", description=__doc__.splitlines()[0])
    parser.add_argument("--bits", action="store_true", help="print sha256 of each stage's results")
    parser.add_argument("--write", action="store_true", help="keep what changed")
    parser.add_argument(
        "--anew", action="store_true", help="with --write: whatever the versions say, after a change of this file"
    )
    options = parser.parse_args()
    if options.write:
        return write(anew=options.anew)
    kept, _ = load()
    results = compute_all(digits_data(), kept)
    if options.bits:
        sys.stdout.write(json.dumps({stage: bits(found) for stage, found in results.items()}) + "\n")
        return 0
    sys.stdout.write(machine() + "\n")
    for stage, found in results.items():
        for name, far in distances(found, part(kept, f"{stage}.")).items():
            sys.stdout.write(f"{far:.1e}  {stage}.{name}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
