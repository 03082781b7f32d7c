"""The real API on a free port, over its real database and storage root."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn

from service.api import create_app
from service.api.server import bind
from service.settings import Settings
from service.store import Store
from worker.storage import Storage


@pytest.fixture(scope="module")
def api_settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    home: Path = tmp_path_factory.mktemp("api")
    # No test shall wait for its allowance.
    return Settings(home=home, port=0, rate_limit_per_minute=1_000_000)


@pytest.fixture(scope="module")
def api_store(api_settings: Settings) -> Iterator[Store]:
    store = Store(api_settings.database)
    yield store
    store.close()


@pytest.fixture(scope="module")
def api_storage(api_settings: Settings) -> Storage:
    return Storage(api_settings.storage_url)


@pytest.fixture(scope="module")
def client(api_settings: Settings, api_store: Store) -> Iterator[httpx.Client]:
    with bind(api_settings) as listener:
        server = uvicorn.Server(uvicorn.Config(create_app(api_settings), log_level="critical"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        deadline = time.monotonic() + 20
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        host, port = listener.getsockname()[:2]
        with httpx.Client(base_url=f"http://{host}:{port}", timeout=30, trust_env=False) as opened:
            yield opened
        server.should_exit = True
        thread.join()
