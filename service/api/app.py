"""The application: routes, guard and errors put together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import Depends, FastAPI
from starlette.responses import RedirectResponse

from service.api import (
    artifacts,
    audit,
    capabilities,
    changes,
    cluster_view,
    errors,
    following,
    forecast,
    health,
    job_logs,
    jobs,
    listing,
    metrics_series,
    openapi,
    prometheus,
    reference,
    reruns,
    uploads,
)
from service.api.auth import Access
from service.api.draining import Draining
from service.api.guard import Guard
from service.api.parameters import refuse_unknown
from service.api.prometheus import Figures
from service.api.sources import Sources
from service.api.streams import Streams
from service.api.watch import Watch
from service.auditing import Recorder
from service.keys import KeyRing, Keys
from service.settings import STORAGE_PATIENCE_S, Settings
from service.store import Store
from service.uploads import Uploads
from worker.storage import Storage


def create_app(settings: Settings) -> FastAPI:
    """The API on the database and the storage root of the settings.

    Raises:
        StoreError: the database cannot be opened.
        StorageError: the storage root cannot be opened.
    """
    store, storage = Store(settings.database), Storage(settings.storage_url, patience=STORAGE_PATIENCE_S)

    recorder, figures, draining = Recorder(store), Figures(store), Draining()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(figures.watch_loop())
        yield
        app.state.streams.shut()
        watching.cancel()
        recorder.close()
        store.close()

    app = FastAPI(
        title="NCFM distillation service",
        version=version("ncfm"),
        lifespan=lifespan,
        redirect_slashes=False,
        # The framework's own pages take their script from elsewhere: without a way out they stay blank.
        docs_url=None,
        redoc_url=None,
        # A route of ours serves it, which is held to the same rules as the others.
        openapi_url=None,
        dependencies=[Depends(refuse_unknown)],
    )
    app.state.store, app.state.storage, app.state.settings = store, storage, settings
    app.state.streams = Streams(store, storage)
    draining.on_begin(app.state.streams.close_all)
    app.state.figures, app.state.draining = figures, draining
    app.state.taking = uploads.Taking(settings.max_upload_bytes)
    app.state.sources = Sources(settings, Uploads(store, storage))
    app.state.routes = []
    for routes in (jobs, forecast, listing, following, job_logs, changes, reruns, metrics_series):
        app.include_router(routes.router)
        app.state.routes.extend(routes.router.routes)
    for routes in (artifacts, capabilities, cluster_view, audit, uploads, health, prometheus, reference):
        app.include_router(routes.router)
        app.state.routes.extend(routes.router.routes)
    app.add_api_route("/", _to_docs, include_in_schema=False)
    app.add_middleware(
        Access,
        ring=KeyRing(Keys(store)),
        mode=settings.auth,
        host=settings.host,
        per_minute=settings.rate_limit_per_minute,
        recorder=recorder,
        is_draining=draining.has_begun,
    )
    app.add_middleware(Guard, host=settings.host, public_hosts=settings.public_hosts)
    app.add_middleware(Watch, figures=figures, is_draining=draining.has_begun)
    errors.install(app)
    openapi.install(app)
    return app


async def _to_docs() -> RedirectResponse:
    return RedirectResponse("/docs")
