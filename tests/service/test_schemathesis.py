"""The API held against its own OpenAPI document: thousands of requests, legal and not, and every check that schemathesis has."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

CONFIG = """
color = false
request-timeout = 20

[parameters]
# A long poll is one, but no reason for a long test.
"query.wait" = 0.05

[checks]
# What no schema can say is answered 422 (a cursor of another list, an ipc beyond the smallest class, an attempt that was not made)
# or 412 (an ETag that does not hold), with the field and the way out.
positive_data_acceptance.expected-statuses = ["2XX", "3XX", 401, 403, 404, 409, 412, 422, 429, 503]
"""


@pytest.mark.timeout(1500)
def test_api_keeps_to_its_document(client: httpx.Client, tmp_path: Path, is_long: bool) -> None:
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    phases, examples = ("examples,coverage,fuzzing,stateful", 60) if is_long else ("examples,fuzzing", 20)
    command = [
        *(sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run"),
        f"{client.base_url}/openapi.json",
        *("--phases", phases, "--max-examples", str(examples), "--checks", "all", "--seed", "1"),
        *("--generation-database", "none", "--continue-on-failure", "--no-shrink", "--warnings", "off"),
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "NO_PROXY": "*"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    counted = re.search(r"(\d+) generated", done.stdout)
    assert counted is not None and int(counted[1]) >= (2000 if is_long else 200), done.stdout[-3000:]
    sys.stdout.write(done.stdout[-1500:])
