"""kill -9 of the controller at each named point between its side effects: every job ends right."""

from __future__ import annotations

import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from service.controller.crash_points import EXIT_KILLED, POINTS, CrashPoint
from service.jobs import CancelRequest, Job, State
from tests.faults.controllers import Site, state_is
from tests.faults.ray_twin import ends_when_asked, ends_when_stopped, succeeds_at_the_second_attempt
from worker.records import now

pytestmark = pytest.mark.e2e

AT_ONCE = 4
"""Points that are tried side by side: each mostly waits."""
EXIT_LIMIT_S = 30.0


def live(site: Site, point: CrashPoint) -> dict[str, Job]:
    """The lives of four jobs, in which a controller passes every point; it dies at one of them, and another goes on."""
    jobs = {
        "lost once": site.post(succeeds_at_the_second_attempt),
        "asked": site.post(ends_when_asked),
        "stopped": site.post(ends_when_stopped),
        "waiting": site.post(cpus=1024),
    }
    controllers = [site.controller(crash_at=point)]

    def tend() -> bool:
        """Start another controller where one has died; cancel whoever runs."""
        if controllers[-1].poll() is not None:
            assert controllers[-1].returncode == EXIT_KILLED, site.said()
            assert len(controllers) == 1, "it died twice"
            controllers.append(site.controller())
        for name, mode in (("asked", "graceful"), ("stopped", "force")):
            if site.job(jobs[name]).state is State.RUNNING:
                site.cancel(jobs[name], CancelRequest.model_validate({"mode": mode, "requested_at": now()}))
        if site.job(jobs["waiting"]).reason == "exceeds_cluster":
            site.cancel(jobs["waiting"], CancelRequest(requested_at=now()))
        return site.has_ended()

    site.until(tend, 90)
    end(controllers[-1], site)
    if len(controllers) == 1:
        # The point comes after all else.
        assert controllers[0].returncode == EXIT_KILLED, f"{point} is never reached"
        last = site.controller()
        site.until(lambda: "the active one" in site.said().rpartition("controller ends")[2], EXIT_LIMIT_S)
        end(last, site)
        controllers.append(last)
    assert controllers[-1].returncode == 0, site.said()
    return jobs


def end(controller: subprocess.Popen[bytes], site: Site) -> None:
    controller.send_signal(signal.SIGTERM)
    controller.wait(EXIT_LIMIT_S)


def try_point(site: Site, point: CrashPoint) -> None:
    try:
        jobs = live(site, point)
        ended = {name: site.job(job) for name, job in jobs.items()}
        states = {name: str(job.state) for name, job in ended.items()}
        assert states == dict.fromkeys(ended, "cancelled") | {"lost once": "succeeded"}
        assert (ended["lost once"].attempt, ended["lost once"].losses) == (2, 1)
        assert ended["lost once"].publication == ended["stopped"].publication == "done"
        for name in ("asked", "stopped"):
            assert [event.data.get("cleanup") for event in site.store.events(ended[name].id, after=0, limit=99)][
                -1 if name == "asked" else -2
            ] == "verified"
        assert site.check() == len(jobs)
    except AssertionError as error:
        raise AssertionError(f"{point}: {error}\n{site.said()[-3000:]}") from error
    finally:
        site.close()


@pytest.mark.timeout(900)
def test_jobs_end_right_when_the_controller_is_killed_at_any_point(tmp_path: Path, is_long: bool) -> None:
    points = POINTS if is_long else POINTS[::2]
    assert len(points) >= 15
    # Alembic keeps what it works on in globals: new databases are made one by one.
    sites = {point: Site(tmp_path / point) for point in points}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        tried = {point: pool.submit(try_point, site, point) for point, site in sites.items()}
    wrong = [str(future.exception()) for future in tried.values() if future.exception() is not None]
    assert not wrong, "\n\n".join(wrong)


def test_controller_when_stopped_lets_another_take_over_at_once(tmp_path: Path) -> None:
    """An orderly end releases the lease: nobody waits until it is over."""
    site = Site(tmp_path, lease_seconds=60)
    try:
        first = site.controller(log="first.log")
        site.until(lambda: "active one" in site.said("first.log"))
        second = site.controller(log="second.log")
        site.until(lambda: "stands by" in site.said("second.log"))
        end(first, site)
        assert first.returncode == 0
        job = site.post()
        site.until(state_is(site, job, State.SUCCEEDED), 10)
        assert "active one (fence 2)" in site.said("second.log")
        site.until(site.has_ended)
        end(second, site)
        site.check()
    finally:
        site.close()
