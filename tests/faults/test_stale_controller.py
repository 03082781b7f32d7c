"""A controller that is stopped for long and goes on while another is active: nothing of it is applied."""

from __future__ import annotations

import random
import re
import signal
import time
from pathlib import Path

import pytest

from service.leases import acquire
from tests.faults.controllers import Site
from tests.faults.ray_twin import succeeds, succeeds_at_the_second_attempt

pytestmark = pytest.mark.e2e

LEASE_S = 6.0
APPLIED = re.compile(r"job \w+ is |is handed to Ray|is asked to|waits: ")
"""What a controller says once it has done something."""


@pytest.mark.timeout(600)
def test_nothing_of_a_controller_is_applied_when_it_was_stopped_and_another_took_over(
    tmp_path: Path, is_long: bool
) -> None:
    pause_s = 60.0 if is_long else 8.0
    site = Site(tmp_path, lease_seconds=LEASE_S)
    try:
        stale = site.controller(log="stale.log")
        site.until(lambda: "active one (fence 1)" in site.said("stale.log"))
        other = site.controller(log="other.log")
        site.until(lambda: "stands by" in site.said("other.log"))

        def post_for(seconds: float) -> None:
            ends_at = time.monotonic() + seconds
            while time.monotonic() < ends_at:
                site.post(random.choice((succeeds, succeeds_at_the_second_attempt)))
                time.sleep(0.4)

        post_for(2 + random.random())
        site.stop_between_writes(stale)
        said_before = len(site.said("stale.log"))
        site.until(lambda: "active one (fence 2)" in site.said("other.log"), LEASE_S + 30)
        taken_over = {job_id: len(site.store.attempts(job_id)) for job_id in site.acknowledged}
        post_for(pause_s)
        stale.send_signal(signal.SIGCONT)
        post_for(3)
        # Runs are completed two at a time.
        site.until(site.has_ended, 300)

        said_after = site.said("stale.log")[said_before:]
        assert not APPLIED.search(said_after), said_after
        assert re.search("stands by|taken? over", said_after), said_after
        later = [
            row
            for job_id in site.acknowledged
            for row in site.store.attempts(job_id)
            if row.number > taken_over.get(job_id, 0)
        ]
        assert len(later) > pause_s
        # A busy machine may let the other's lease lapse as well; the stale one's token is never used again.
        assert 1 not in {row.fence for row in later}
        lease = acquire(site.store, "a third", seconds=LEASE_S)
        assert lease.token >= 2
        if lease.token == 2:
            assert f":{other.pid}:" in lease.holder
        assert site.check() == len(site.acknowledged)
    finally:
        site.close()
