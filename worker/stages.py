"""What each stage computes: plain generators of events that return the committed result. No Ray in here.

Those that save themselves on the way are in `learning`.

All take the site (where and for whom), the storage and the data; what changes the numbers is in the other arguments.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from typing import Any

import torch

from ncfm_core.coresets import coreset
from ncfm_core.coresets import random_real as draw_random_real
from ncfm_core.datasets import Dataset
from ncfm_core.evaluate import evaluate
from ncfm_core.progress import Progress
from ncfm_core.spec import (
    CoresetName,
    DatasetSpec,
    EvaluationSpec,
    FullDataSpec,
    JobSpec,
    ModelSpec,
)
from worker.building import Building, read_pool, read_synthetic
from worker.data import load
from worker.evidence import Evidence, shortened_in_words
from worker.export import ZIP_DATE, data_card, export_files
from worker.history import Stage
from worker.judging import baseline_source, commit, judge
from worker.learning import distill as distill
from worker.learning import teacher as teacher
from worker.recipe import training_script
from worker.records import StageResult
from worker.settings import DataAccess
from worker.site import DataFacts, Site
from worker.storage import Storage

EVALUATION_FILE = "evaluation.json"
FULL_DATA_TESTS = 5
"""Looks at the test set along a full-data training."""


def inspect(spec: DatasetSpec, access: DataAccess, *, held_out: tuple[float, int] | None) -> tuple[DataFacts, Dataset]:
    """Load the data and say what it is.

    Args:
        spec: which data.
        access: where they are.
        held_out: fraction and seed of the search's split.
    """
    dataset = load(spec, access)
    facts = DataFacts(
        digest=dataset.digest,
        held_out_digest=dataset.hold_out(held_out[0], seed=held_out[1]).digest if held_out else None,
        class_counts=dataset.class_counts,
        num_train=len(dataset.train_labels),
        num_test=len(dataset.test_labels),
        image_shape=dataset.image_shape,
        split=dataset.split,
        ignored_files=dataset.ignored_files,
    )
    return facts, dataset


def evaluation(
    site: Site,
    storage: Storage,
    dataset: Dataset,
    *,
    key: str,
    distilled: StageResult,
    entry: EvaluationSpec,
    seed: int,
) -> Stage:
    """Fresh students on the synthetic set."""
    building = Building(site, storage, "evaluation", key)
    synthetic = read_synthetic(storage, distilled)
    images, labels = synthetic.decode()
    judged = judge(
        building,
        site,
        dataset,
        images=images,
        labels=labels,
        entry=entry,
        seed=seed,
        targets=synthetic.soft_labels if entry.training.needs_soft_labels else None,
    )
    return (yield from judged)


def random_real(
    site: Site,
    storage: Storage,
    dataset: Dataset,
    *,
    key: str,
    ipc: int,
    entry: EvaluationSpec,
    seed: int,
    model: ModelSpec,
    labellers: Sequence[StageResult] = (),
) -> Stage:
    """The same students on random real images, labelled by the same teachers where the protocol trains on their logits."""
    building = Building(site, storage, "random_real", key)
    images, labels = draw_random_real(baseline_source(dataset, entry, seed), ipc=ipc, seed=seed)
    targets = _soft_labels(site, storage, dataset, images=images, model=model, labellers=labellers)
    judged = judge(building, site, dataset, images=images, labels=labels, entry=entry, seed=seed, targets=targets)
    return (yield from judged)


def _soft_labels(
    site: Site,
    storage: Storage,
    dataset: Dataset,
    *,
    images: torch.Tensor,
    model: ModelSpec,
    labellers: Sequence[StageResult],
) -> torch.Tensor | None:
    """What the teachers, networks of `model`, say of real images; None without teachers."""
    if not labellers:
        return None
    device = torch.device(site.device)
    pool = read_pool(storage, labellers, model=model, dataset=dataset, device=device)
    return pool.label(dataset.normalise(images.to(device)))


def herding(site: Site, storage: Storage, dataset: Dataset, **arguments: Any) -> Stage:
    """The same students on real images whose mean is the class's."""
    return _coreset("herding", site, storage, dataset, **arguments)


def k_center(site: Site, storage: Storage, dataset: Dataset, **arguments: Any) -> Stage:
    """The same students on real images that cover the class."""
    return _coreset("k_center", site, storage, dataset, **arguments)


def _coreset(
    name: CoresetName,
    site: Site,
    storage: Storage,
    dataset: Dataset,
    *,
    key: str,
    teacher: StageResult,
    model: ModelSpec,
    ipc: int,
    entry: EvaluationSpec,
    seed: int,
    labellers: Sequence[StageResult] = (),
) -> Stage:
    """Students on real images chosen by the features of a teacher, whose network `model` is."""
    building, device = Building(site, storage, name, key), torch.device(site.device)
    pool = read_pool(storage, [teacher], model=model, dataset=dataset, device=device)
    images, labels = coreset(name, baseline_source(dataset, entry, seed), pool, ipc=ipc, device=device)
    targets = _soft_labels(site, storage, dataset, images=images, model=model, labellers=labellers)
    judged = judge(building, site, dataset, images=images, labels=labels, entry=entry, seed=seed, targets=targets)
    return (yield from judged)


def full_data(
    site: Site, storage: Storage, dataset: Dataset, *, key: str, model: ModelSpec, recipe: FullDataSpec, seed: int
) -> Stage:
    """The ceiling: fresh networks on the whole training set."""
    building = Building(site, storage, "full_data", key)
    students = evaluate(
        dataset.train,
        dataset.train_labels,
        dataset,
        model=model,
        training=recipe.training,
        students=recipe.students,
        tests=min(FULL_DATA_TESTS, recipe.training.epochs),
        seed=seed,
        device=torch.device(site.device),
        field="full_data.training",
    )
    return (yield from commit(building, students, {}))


def publish(site: Site, storage: Storage, dataset: Dataset, *, key: str, evidence: Evidence, spec: JobSpec) -> Stage:
    """The files of the published set below `distilled/`, `evaluation.json`, and all of it in one zip."""
    building = Building(site, storage, "publish", key)
    yield Progress(0, 1, "set")
    synthetic, facts = read_synthetic(storage, evidence.distilled), dataset.describe(spec.dataset.facts)
    recipe = training_script(facts, evidence.as_trained(spec.evaluate[0]))
    note = shortened_in_words(evidence.shortened) if evidence.shortened else ""
    rows = evidence.card_rows(spec)
    card = data_card(synthetic, facts, seed=spec.seed, rows=rows, recipe=recipe, note=note)
    exported = export_files(synthetic, facts, evidence.provenance(spec), card)
    files = {f"distilled/{name}": data for name, data in exported.items()}
    files[EVALUATION_FILE] = evidence.document(spec)
    files[f"distilled-{spec.dataset.name}-ipc{spec.ipc}.zip"] = _zip(files)
    result = yield from building.commit(files, {})
    yield Progress(1, 1, "set")
    return result


def _zip(files: dict[str, bytes]) -> bytes:
    """One archive, the same bytes for the same files; what is large in it is compressed already."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in sorted(files.items()):
            archive.writestr(zipfile.ZipInfo(name, ZIP_DATE), data)
    return out.getvalue()
