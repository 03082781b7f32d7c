"""What jobs share, and data that came over HTTP."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from typing import Any

import httpx
import numpy
import pytest
from PIL import Image

from service.client import Client
from service.local.state import StackState
from service.replies import Job
from worker.records import StageResult
from worker.storage import Storage

pytestmark = pytest.mark.e2e

Document = dict[str, Any]


@pytest.mark.timeout(1800)
def test_teachers_are_trained_once_when_many_jobs_need_them_at_once(
    stack_client: Client, stack_storage: Storage, small_job: Document, is_long: bool
) -> None:
    """Each with a seed of its own, all submitted together, with a pool that nobody has trained before."""
    teachers = small_job["teachers"] | {"seed": 77}
    before = set(stack_storage.list("results"))
    method = small_job["method"] | {"steps": 20}
    jobs = [
        stack_client.submit(small_job | {"seed": 200 + number, "teachers": teachers, "method": method})
        for number in range(20 if is_long else 4)
    ]
    ended = [stack_client.wait(job.id, on_change=lambda _: None) for job in jobs]
    assert [job.state for job in ended] == ["succeeded"] * len(jobs), [job.complaint for job in ended]
    new = [stack_storage.get_record(path, StageResult) for path in set(stack_storage.list("results")) - before]
    trained = [result for result in new if result is not None and result.stage == "teachers"]
    assert len(trained) == teachers["count"]
    # No file of a teacher was written in vain.
    mine = [
        path for path in stack_storage.list("objects") if path.split("/")[1].rpartition("-")[0] in {j.id for j in jobs}
    ]
    assert {path for path in mine if "/teachers-" in path} == {file.path for result in trained for file in result.files}


def birds(classes: int = 3, images: int = 12) -> bytes:
    """A small ImageFolder in a zip: each class has a brightness of its own."""
    out, draw = io.BytesIO(), numpy.random.default_rng(0)
    with zipfile.ZipFile(out, "w") as archive:
        for label in range(classes):
            for number in range(images):
                pixels = draw.integers(0, 80, (16, 16, 3), dtype=numpy.uint8) + numpy.uint8(60 * label)
                picture = io.BytesIO()
                Image.fromarray(pixels.astype(numpy.uint8)).save(picture, "png")
                archive.writestr(f"train/class{label}/{number}.png", picture.getvalue())
                archive.writestr(f"test/class{label}/{number}.png", picture.getvalue())
    return out.getvalue()


def test_job_succeeds_when_its_images_were_uploaded(
    stack: StackState, stack_client: Client, small_job: Document, images_of: Callable[[str], bytes]
) -> None:
    made = httpx.post(
        f"{stack.api}/datasets",
        params={"name": "birds"},
        content=birds(),
        headers={"Content-Type": "application/zip"},
        timeout=60,
    )
    assert made.status_code == 201, made.text
    again = httpx.post(
        f"{stack.api}/datasets", params={"name": "birds"}, content=birds(), headers={"Content-Type": "application/zip"}
    )
    assert (again.status_code, again.json()["id"]) == (200, made.json()["id"])
    document = small_job | {
        "dataset": {"name": "imagefolder", "uri": made.json()["uri"], "image_size": 16},
        "preset": "quick",
        "method": {"steps": 20, "real_batch": 8, "num_frequencies": 64, "num_components": 8},
    }
    job: Job = stack_client.wait(stack_client.submit(document).id, on_change=lambda _: None)
    assert job.state == "succeeded", job.complaint
    assert images_of(job.id)
    assert httpx.delete(f"{stack.api}/datasets/{made.json()['id']}").status_code == 204
