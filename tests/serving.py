"""The API as a process of its own, to be killed, restarted and measured."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil

from service.local import ports

ROOT = Path(__file__).resolve().parents[1]
BOOT_LIMIT_S = 60.0
POLL_S = 0.01


class ApiProcess:
    """`ncfm api` on a home of its own; it keeps its port over restarts."""

    def __init__(self, home: Path, *, database_url: str = "") -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.home, self.port = home, ports.choose(())
        self.url = f"http://127.0.0.1:{self.port}"
        self._env = {name: value for name, value in os.environ.items() if not name.startswith("NCFM_")} | {
            "NCFM_HOME": str(home),
            "NCFM_PORT": str(self.port),
            "NCFM_DATABASE_URL": database_url,
            "NCFM_RAY_URL": "http://127.0.0.1:9",
            # One client stands for many.
            "NCFM_RATE_LIMIT_PER_MINUTE": "1000000",
            "PYTHONPATH": str(ROOT),
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, path: str = "/livez") -> float:
        """Run it; the seconds until it first answers a path with 200."""
        began = time.perf_counter()
        with (self.home / "api.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "service.cli", "api"], cwd=ROOT, env=self._env, stdout=log, stderr=log
            )
        while not self._answers(path):
            assert self._process.poll() is None, self.log
            assert time.perf_counter() - began < BOOT_LIMIT_S, self.log
            time.sleep(POLL_S)
        return time.perf_counter() - began

    @property
    def log(self) -> str:
        return (self.home / "api.log").read_text()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def memory_mib(self) -> float:
        """Resident memory, with that of its children."""
        process = psutil.Process(self.pid)
        return sum(each.memory_info().rss for each in (process, *process.children(recursive=True))) / 2**20

    def kill(self) -> None:
        """SIGKILL, in the middle of whatever it does."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """SIGTERM; its exit code."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(30)

    def __enter__(self) -> ApiProcess:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _answers(self, path: str) -> bool:
        try:
            return httpx.get(self.url + path, timeout=5, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False
