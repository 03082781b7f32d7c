"""PostgreSQL is killed in mid-run and comes back: nothing acknowledged is lost, and every job ends right."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from service.database import StoreError
from tests.faults.controllers import Site
from tests.faults.ray_twin import succeeds, succeeds_at_the_second_attempt
from tests.postgres import Postgres

pytestmark = pytest.mark.e2e


def test_jobs_end_right_when_the_database_is_killed_in_mid_run(tmp_path: Path, server: Postgres, is_long: bool) -> None:
    site = Site(tmp_path, database_url=server.create_database(), lease_seconds=2.0)
    try:
        controllers = [site.controller(log=f"{name}.log") for name in ("first", "second")]
        site.until(
            lambda: all(re.search("active one|stands by", site.said(f"{name}.log")) for name in ("first", "second"))
        )
        for _ in range(10 if is_long else 2):
            for behaviour in (succeeds, succeeds_at_the_second_attempt):
                site.post(behaviour)
            time.sleep(0.5)
            server.kill()
            with pytest.raises(StoreError):
                site.post()
            time.sleep(3)
            server.start()
            site.until(site.has_ended)
        assert site.check() == len(site.acknowledged)
        assert [controller.poll() for controller in controllers] == [None, None], "a controller has died of it"
    finally:
        site.close()
