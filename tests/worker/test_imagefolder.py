"""A job on a user's own images: what is checked once the data are counted, and its stages from inspection to publication."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ncfm_core.errors import DatasetError, SpecError
from ncfm_core.spec import JobSpec
from ncfm_core.submission import resolve
from worker import stages
from worker.evidence import Evidence
from worker.history import Event, Stage
from worker.plan import plan
from worker.planning import describe_plan
from worker.records import StageResult
from worker.settings import Surroundings
from worker.site import Site
from worker.storage import Storage
from worker.tracking import _Data

SiteOf = Callable[[int], Site]
Finish = Callable[[Stage], tuple[StageResult, list[Event]]]

CLASSES = {"zebra": 9, "cat": 12, "tree": 15}


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Surroundings:
    """A data folder with `animals.zip`: stripes of three directions, in sizes of their own, and a file that is no image."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    with zipfile.ZipFile(root / "animals.zip", "w") as archive:
        archive.writestr("animals/LICENSE", "none")
        for label, (name, count) in enumerate(CLASSES.items()):
            for index in range(count):
                pixels = rng.integers(0, 100, (20 + index, 24, 3), dtype=np.uint8)
                pixels[:: label + 2, :: 4 - label] += 150
                out = io.BytesIO()
                Image.fromarray(pixels).save(out, "PNG")
                archive.writestr(f"animals/{name}/{index}.png", out.getvalue())
    return Surroundings(data_dir=root, storage=str(root / "storage"), cache_dir=None, data_memory_gib=4.0)


def job(**parts: Any) -> JobSpec:
    submission: dict[str, Any] = {
        "dataset": {"name": "imagefolder", "uri": "animals.zip", "image_size": 20},
        "ipc": 2,
        "preset": "quick",
        "model": {"width": 8},
        "method": {"steps": 6, "reuse": 3, "num_frequencies": 16, "num_components": 4, "real_batch": 8},
        "teachers": {"count": 1, "training": {"epochs": 2}},
        "evaluate": [{"students": 1, "tests": 1, "training": {"epochs": 2}}],
        "full_data": {"students": 1, "training": {"epochs": 2}},
    }
    return resolve(submission | parts)


# The second one lets no image stay in memory.
@pytest.mark.parametrize("gib", [4.0, 1e-9])
def test_stages_of_a_job_on_a_users_images(
    gib: float, surroundings: Surroundings, site_of: SiteOf, storage: Storage, finish: Finish, tmp_path: Path
) -> None:
    surroundings = surroundings.model_copy(update={"data_memory_gib": gib, "cache_dir": tmp_path / "cache"})
    spec = job()
    facts, inspected = stages.inspect(spec.dataset, surroundings.data_access, held_out=(0.2, 0))
    assert facts.class_counts == (10, 12, 8)
    assert (facts.num_train, facts.num_test, facts.image_shape, facts.ignored_files) == (30, 6, (3, 20, 20), 1)
    assert facts.split.startswith("one image in 5") and facts.held_out_digest is not None
    assert (inspected.train_file is None) == (gib > 1)
    dataset = pickle.loads(pickle.dumps(inspected))  # as every task gets it
    planned, site, entry = plan(spec, facts.digest), site_of(1), spec.evaluate[0]
    common: Any = (site, storage, dataset)
    teacher, _ = finish(
        stages.teacher(
            *common,
            key=str(planned.teachers[0].key),
            model=spec.model,
            training=spec.teachers.training,
            seed=0,
            index=0,
            held_out=None,
        )
    )
    distilled, _ = finish(
        stages.distill(
            *common,
            key=str(planned.distill.key),
            teachers=[teacher],
            model=spec.model,
            method=spec.method,
            ipc=2,
            seed=0,
        )
    )
    evaluated, _ = finish(
        stages.evaluation(*common, key=str(planned.evaluations[0].key), distilled=distilled, entry=entry, seed=0)
    )
    random_real, _ = finish(
        stages.random_real(*common, key=str(planned.random_real[0].key), ipc=2, entry=entry, seed=0, model=spec.model)
    )
    full, _ = finish(
        stages.full_data(*common, key=str(planned.full_data.key), model=spec.model, recipe=spec.full_data, seed=0)
    )
    evidence = Evidence(distilled=distilled, evaluations=[evaluated], random_real=[random_real], full_data=full)
    published, _ = finish(stages.publish(*common, key=str(planned.publish.key), evidence=evidence, spec=spec))
    files = {file.name: storage.read_file(file) for file in published.files}
    manifest = json.loads(files["distilled/manifest.json"])
    assert manifest["classes"] == ["cat", "tree", "zebra"]
    assert manifest["normalise"]["mean"] == pytest.approx(dataset.mean.tolist(), abs=1e-6)
    assert b"# animals, 20x20 colour, distilled to 2 images per class" in files["distilled/README.md"]
    names = zipfile.ZipFile(io.BytesIO(files["distilled/imagefolder.zip"])).namelist()
    assert {name.split("/")[1] for name in names} == {"cat", "tree", "zebra"}
    assert "distilled-imagefolder-ipc2.zip" in files


def test_ipc_above_the_smallest_class_fails_once_the_data_are_counted(surroundings: Surroundings) -> None:
    assert describe_plan(job(ipc=8), surroundings, inspect=True)["data_digest"].startswith("sha256:")
    spec = job(ipc=9)
    assert describe_plan(spec, surroundings, inspect=False)["data_digest"] == "unknown until inspected"
    with pytest.raises(SpecError) as caught:
        describe_plan(spec, surroundings, inspect=True)
    (problem,) = caught.value.problems
    assert (problem.field, problem.value, problem.hint) == ("ipc", "9", "Choose 1 to 8.")


def test_data_that_are_not_there_are_told_by_the_inspection(surroundings: Surroundings) -> None:
    spec = job(dataset={"name": "imagefolder", "uri": "elsewhere.tar", "image_size": 20})
    with pytest.raises(DatasetError, match="nothing at that path"):
        stages.inspect(spec.dataset, surroundings.data_access, held_out=None)


def test_data_set_that_mlflow_shows_can_be_loaded_again(
    surroundings: Surroundings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCFM_DATA_DIR", str(surroundings.data_dir))
    source = _Data(job().dataset, "sha256:0", {}).source
    again = type(source).from_dict(json.loads(json.dumps(source.to_dict())))
    assert again.load().class_names == ("cat", "tree", "zebra")


def test_converted_images_lie_below_the_data_unless_a_folder_is_named(tmp_path: Path) -> None:
    assert Surroundings(data_dir=tmp_path).data_access["cache_dir"] == tmp_path / "converted"
    assert Surroundings(data_dir=tmp_path, cache_dir=tmp_path / "x").data_access["cache_dir"] == tmp_path / "x"
    assert Surroundings(data_memory_gib=0.5).data_access["memory_bytes"] == 2**29
