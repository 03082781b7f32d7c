"""Which checkpoint a successor takes, and what it never touches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ncfm_core.progress import Progress
from ncfm_core.spec import CheckpointSpec
from worker.checkpoints import Checkpoints
from worker.history import History, Kept, Picture
from worker.storage import Storage

KEY = "sha256:" + "c" * 64
EVERY = CheckpointSpec(every_steps=10, every_seconds=3600.0)


def checkpoints(
    storage: Storage, attempt: int = 1, key: str = KEY, every: CheckpointSpec = EVERY, job_id: str = "J", **here: Any
) -> Checkpoints:
    environment = {"threads": 2} | here
    return Checkpoints(storage, job_id=job_id, attempt=attempt, key=key, every=every, environment=environment)


def state(value: float) -> dict[str, torch.Tensor]:
    return {"images": torch.full((2, 3), value), "step": torch.tensor(int(value))}


def history(*steps: int) -> History:
    made = History()
    for step in steps:
        made.add(Progress(step, 100, "step", {"loss": 1.0 / step}))
    return made


def test_checkpoint_comes_back_whole() -> None:
    storage = Storage("memory://")
    pictures = (Picture(0, b"\x89PNG zero"), Picture(5, b"\x89PNG five"))
    kept = history(5, 10)
    checkpoints(storage).save(10, state(10), kept, pictures)
    saved = checkpoints(storage, attempt=2).newest()
    assert saved is not None
    assert saved.step == 10
    assert torch.equal(saved.state["images"], state(10)["images"])
    assert saved.state["step"].shape == ()
    assert saved.history.rows == kept.rows
    assert saved.pictures == pictures
    assert saved.environment == {"threads": 2}


def test_there_is_none_at_first() -> None:
    assert checkpoints(Storage("memory://")).newest() is None


def test_only_the_newest_two_are_kept() -> None:
    storage = Storage("memory://")
    own = checkpoints(storage)
    for step in (10, 20, 30):
        own.save(step, state(step), history(step))
    names = {path.rsplit("/", 1)[1] for path in storage.list("checkpoints")}
    assert names == {f"{step:010d}.{end}" for step in (20, 30) for end in ("json", "safetensors")}


def test_damaged_one_is_passed_over() -> None:
    storage = Storage("memory://")
    own = checkpoints(storage)
    own.save(10, state(10), history(10))
    own.save(20, state(20), history(20))
    newest = next(path for path in storage.list("checkpoints") if path.endswith("20.safetensors"))
    data = storage.get(newest)
    assert data is not None
    storage.put(newest, data[:-1] + bytes([data[-1] ^ 1]))
    saved = checkpoints(storage, attempt=2).newest()
    assert saved is not None
    assert saved.step == 10


def test_file_without_its_record_does_not_exist() -> None:
    storage = Storage("memory://")
    checkpoints(storage).save(10, state(10), history(10))
    storage.delete([path for path in storage.list("checkpoints") if path.endswith(".json")])
    assert checkpoints(storage, attempt=2).newest() is None


def test_newest_of_all_attempts_counts() -> None:
    storage = Storage("memory://")
    checkpoints(storage, attempt=1).save(30, state(30), history(30))
    checkpoints(storage, attempt=2).save(20, state(20), history(20))
    saved = checkpoints(storage, attempt=3).newest()
    assert saved is not None
    assert saved.step == 30


def test_successor_never_touches_what_an_attempt_wrote() -> None:
    storage = Storage("memory://")
    checkpoints(storage, attempt=1).save(10, state(10), history(10))
    before = {path: storage.get(path) for path in storage.list("checkpoints")}
    successor = checkpoints(storage, attempt=2)
    successor.newest()
    for step in (20, 30, 40):
        successor.save(step, state(step), history(step))
    successor.clear()
    assert {path: storage.get(path) for path in storage.list("checkpoints")} == before


def test_only_what_is_further_than_all_before_is_told_as_kept() -> None:
    storage = Storage("memory://")
    own = checkpoints(storage)
    assert [list(own.keep(step, state(step), history(step))) for step in (10, 20)] == [[Kept(10)], [Kept(20)]]
    newest = next(path for path in storage.list("checkpoints") if path.endswith("20.safetensors"))
    storage.put(newest, b"damaged")
    successor = checkpoints(storage, attempt=2)
    saved = successor.newest()
    assert saved is not None and saved.step == 10
    # It only catches up with the one that was damaged.
    told = [list(successor.keep(step, state(step), history(step))) for step in (20, 30)]
    assert told == [[], [Kept(30)]]


def test_checkpoint_of_another_key_is_not_taken() -> None:
    storage = Storage("memory://")
    checkpoints(storage).save(10, state(10), history(10))
    assert checkpoints(storage, key="sha256:" + "d" * 64).newest() is None


def test_where_a_job_has_none_it_takes_the_newest_of_another_and_leaves_it_alone() -> None:
    storage = Storage("memory://")
    checkpoints(storage, job_id="A").save(10, state(10), history(10))
    checkpoints(storage, job_id="B").save(30, state(30), history(30))
    before = {path: storage.get(path) for path in storage.list("checkpoints")}
    own = checkpoints(storage, job_id="C")
    saved = own.newest()
    assert saved is not None
    assert (saved.step, saved.job_id, str(saved)) == (30, "B", "step 30 of job B")
    assert own.next_step == 40
    own.save(40, state(40), history(40))
    own.clear()
    assert {path: storage.get(path) for path in storage.list("checkpoints")} == before
    assert storage.list("resumable") == [f"resumable/{'c' * 64}/{job}" for job in "AB"]


def test_own_one_goes_before_that_of_another_job() -> None:
    storage = Storage("memory://")
    checkpoints(storage, job_id="A").save(30, state(30), history(30))
    checkpoints(storage).save(10, state(10), history(10))
    saved = checkpoints(storage, attempt=2).newest()
    assert saved is not None
    assert (saved.step, saved.job_id, str(saved)) == (10, None, "step 10")


def test_damaged_or_half_written_ones_of_other_jobs_are_passed_over() -> None:
    storage = Storage("memory://")
    for number, job_id in enumerate("ABC"):
        checkpoints(storage, job_id=job_id).save(10 + number, state(10 + number), history(10 + number))
    path = {path.split("/")[1]: path for path in storage.list("checkpoints")}
    storage.put(path["C"], b"half")
    storage.delete([path["B"].replace(".safetensors", ".json")])
    saved = checkpoints(storage).newest()
    assert saved is not None
    assert (saved.step, saved.job_id) == (10, "A")
    # A mark whose checkpoints are gone leads nowhere.
    storage.delete(storage.list("checkpoints"))
    assert checkpoints(storage).newest() is None


def test_one_of_another_job_counts_on_the_same_kind_of_device_alone() -> None:
    storage = Storage("memory://")
    checkpoints(storage, job_id="A", device="cuda:1").save(10, state(10), history(10))
    assert checkpoints(storage, device="cpu").newest() is None
    assert checkpoints(storage, device="cuda").newest() is not None
    # What a job left itself it takes as before.
    assert checkpoints(storage, job_id="A", attempt=2, device="cpu").newest() is not None


@pytest.mark.parametrize("changes", [{"threads": 1}, {"memory_limit": 64}, {"memory_limit": None}])
def test_one_of_another_job_counts_under_the_same_threads_and_memory_limit_alone(changes: dict[str, Any]) -> None:
    storage = Storage("memory://")
    here: dict[str, Any] = {"device": "cpu", "threads": 2, "memory_limit": 128}
    checkpoints(storage, job_id="A", **here).save(10, state(10), history(10))
    checkpoints(storage, job_id="B", **here | changes).save(30, state(30), history(30))
    found = checkpoints(storage, **here).newest()
    assert found is not None and str(found) == "step 10 of job A"
    # What a job left itself it takes as before.
    own = checkpoints(storage, job_id="A", attempt=2, **here | changes).newest()
    assert own is not None and str(own) == "step 10"


def test_search_for_one_reads_the_folders_of_jobs_with_the_key_alone() -> None:
    storage, listed = Storage("memory://"), list[str]()
    for number in range(5):
        checkpoints(storage, key=f"sha256:{number}", job_id=f"other-{number}").save(10, state(10), history(10))
    checkpoints(storage, job_id="A").save(10, state(10), history(10))
    sizes = storage.sizes

    def noted(prefix: str = "") -> dict[str, int]:
        listed.append(prefix)
        return sizes(prefix)

    storage.sizes = noted  # type: ignore[method-assign]
    assert checkpoints(storage).newest() is not None
    assert listed == [f"checkpoints/J/{'c' * 64}", f"resumable/{'c' * 64}", f"checkpoints/A/{'c' * 64}"]


def test_due_by_steps_at_multiples() -> None:
    own = checkpoints(Storage("memory://"))
    assert not own.due(9)
    assert own.due(10)
    own.save(13, state(13), history(13))
    assert own.next_step == 20
    assert not own.due(19)


def test_due_by_time() -> None:
    own = checkpoints(Storage("memory://"), every=CheckpointSpec(every_steps=1000, every_seconds=1e-9))
    assert own.due(1)
    assert not own.due(0)
