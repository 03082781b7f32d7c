"""The application: routes, guard and errors put together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from starlette.responses import RedirectResponse

from service.api import (
    artifacts,
    capabilities,
    changes,
    cluster_view,
    errors,
    following,
    forecast,
    health,
    jobs,
    listing,
    metrics_series,
    openapi,
    reruns,
)
from service.api.guard import Guard
from service.api.streams import Streams
from service.settings import Settings
from service.store import Store
from worker.storage import Storage


def create_app(settings: Settings) -> FastAPI:
    """The API on the database and the storage root of the settings.

    Raises:
        StoreError: the database cannot be opened.
        StorageError: the storage root cannot be opened.
    """
    store, storage = Store(settings.database), Storage(settings.storage_url)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        app.state.streams.shut()
        store.close()

    app = FastAPI(title="NCFM distillation service", version=version("ncfm"), lifespan=lifespan, redirect_slashes=False)
    app.state.store, app.state.storage = store, storage
    app.state.streams = Streams(store, storage)
    for routes in (jobs, forecast, listing, following, changes, reruns, metrics_series):
        app.include_router(routes.router)
    for routes in (artifacts, capabilities, cluster_view, health):
        app.include_router(routes.router)
    app.add_api_route("/", _to_docs, include_in_schema=False)
    app.add_middleware(Guard, host=settings.host, allow_remote=settings.allow_remote)
    errors.install(app)
    openapi.install(app)
    return app


async def _to_docs() -> RedirectResponse:
    return RedirectResponse("/docs")
