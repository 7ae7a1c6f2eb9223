"""The FastAPI app of a corpus and its model: what OpenAI's clients know, search, documents, health and metrics.

`create_app` puts the parts together; each is a file of its own.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Security
from fastapi.security import HTTPBearer
from sse_starlette.sse import AppStatus
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse, Response

from ..version import __version__
from . import chat, documents, embeddings, responses
from .asking import Service
from .auth import Keys, RequireKey
from .engine import Engine, Stopping
from .errors import Json, add_handlers
from .limits import BodyLimit, Limits
from .logs import RequestLog, logger
from .metrics import Metrics

REFRESH_SECONDS = 5.0  # after which everybody sees what another process has changed
ERROR = {
    "description": "An error in OpenAI's shape.",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {
                        "type": "object",
                        "required": ["message", "type", "param", "code"],
                        "properties": {
                            "message": {"type": "string"},
                            "type": {"type": "string"},
                            "param": {"type": ["string", "null"]},
                            "code": {"type": ["string", "null"]},
                        },
                    }
                },
            }
        }
    },
}


def create_app(
    engine: Engine,
    *,
    api_keys: Iterable[str] = (),
    read_keys: Iterable[str] = (),
    read_only: bool = False,
    limits: Limits | None = None,
    model_id: str | None = None,
    cors_origins: Collection[str] = (),
    hosts: Collection[str] | None = None,
) -> FastAPI:
    """The app of an engine, which it starts and closes.

    Args:
        engine: that answers.
        api_keys: of clients that may do everything; without any key, everybody may.
        read_keys: of clients that may not change documents.
        read_only: nobody may change documents.
        limits: of one request; default `Limits()`.
        model_id: what clients call the model; default its name.
        cors_origins: pages of other origins that browsers may let ask; default none.
        hosts: that the Host header may name; default any.
    """
    limits, metrics = limits or Limits(), Metrics(engine)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        refreshing = asyncio.create_task(_keep_fresh(engine))
        app.state.is_ready = True
        yield
        app.state.is_ready = False
        refreshing.cancel()
        await asyncio.gather(refreshing, return_exceptions=True)
        await engine.close()

    app = FastAPI(
        title="CLaRa",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses={"4XX": ERROR, "5XX": ERROR},
        dependencies=[Security(HTTPBearer(auto_error=False))],  # for the document; `RequireKey` checks it
    )
    AppStatus.disable_automatic_graceful_drain()  # streams end by themselves, and are finished when we are stopped
    app.state.service = Service(engine, model_id or model_name(engine.model), limits, metrics, int(time.time()))
    app.state.is_ready = False
    add_handlers(app)
    _document_model(app)
    for part in (chat, responses, embeddings, documents):
        app.include_router(part.router)
    _add_small_routes(app)
    app.add_middleware(BodyLimit, limits=limits)  # the last one that is added runs first
    app.add_middleware(RequireKey, keys=Keys(api_keys, read_keys), read_only=read_only, hosts=hosts)
    if cors_origins:
        # OpenAI's client for browsers sends headers of its own, and reads these of a response.
        headers = {"allow_headers": ["*"], "expose_headers": ["X-Request-ID", "Retry-After"]}
        options = {"allow_methods": ["GET", "POST", "PUT", "DELETE"], **headers}
        app.add_middleware(CORSMiddleware, allow_origins=list(cors_origins), **options)
    app.add_middleware(RequestLog, metrics=metrics)
    return app


async def _keep_fresh(engine: Engine) -> None:
    """Show, every few seconds, what other processes have written to the corpus."""
    problem = None
    while True:
        await asyncio.sleep(REFRESH_SECONDS)
        try:
            await engine.refresh()
            problem = None
        except Stopping:
            return
        except Exception as error:  # of the folder; what is open is served meanwhile, and the next look may succeed
            if problem != (problem := str(error)):
                logger.warning("refresh", extra={"fields": {"problem": problem}})


def model_name(model) -> str:
    """A model's id for clients: that of the Hub, or the name of its folder; no path."""
    name = str(model.name_or_path or "").rstrip("/")
    return os.path.basename(name) if os.path.isabs(name) or os.path.isdir(name) else name or "clara"


def _document_model(app: FastAPI) -> None:
    """Let the OpenAPI document name the one model that `model` may be."""
    build, name = app.openapi, app.state.service.model_id

    def openapi() -> dict:
        document = build()
        for schema in document["components"]["schemas"].values():
            if "model" in schema.get("properties", {}):
                schema["properties"]["model"] = {"type": "string", "enum": [name]}
        return document

    app.openapi = openapi


def _add_small_routes(app: FastAPI) -> None:
    service: Service = app.state.service
    model = {"id": service.model_id, "object": "model", "created": service.created, "owned_by": "clara"}

    @app.get("/v1/models", summary="The one model")
    async def models():
        return Json({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}", summary="The model by its id")
    async def model_by_id(name: str):
        service.check_model(name)
        return Json(model)

    @app.head("/health", include_in_schema=False)
    @app.head("/health/ready", include_in_schema=False)
    @app.get("/health", summary="Whether questions are answered")
    @app.get("/health/ready", summary="Whether questions are answered")
    async def ready(request: Request):
        """503 before it is ready and while it stops."""
        is_ready = request.app.state.is_ready
        counts = {"documents": len(service.engine.corpus), "model": service.model_id, "version": __version__}
        return Json({"status": "ready" if is_ready else "stopping", **counts}, 200 if is_ready else 503)

    @app.head("/health/live", include_in_schema=False)
    @app.get("/health/live", summary="Whether the process runs")
    async def live():
        return Json({"status": "live"})

    @app.get("/metrics", summary="For Prometheus", response_class=PlainTextResponse)
    async def metrics():
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")
