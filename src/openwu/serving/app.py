"""The ASGI app: routes, errors in the shape that clients expect, and the engine's life."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from openwu.extras import library
from openwu.serving.engines import Engine
from openwu.serving.errors import Failure, ServiceError, refused
from openwu.serving.middleware import Guard, log
from openwu.serving.requests.openapi import EDIT_OPERATION, ERRORS
from openwu.serving.routes.adapters import adapter_routes
from openwu.serving.routes.edits import check_headers, serve_edit
from openwu.serving.routes.results import CANCELLED, nearest_edits
from openwu.serving.state import Known, Service, Settings
from openwu.version import __version__

if TYPE_CHECKING:
    from openwu.serving.mcp.remote import AgentEndpoint

_CODES = {400: "invalid_request", 404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}


def create_app(engine: Engine, settings: Settings | None = None) -> FastAPI:
    """Make the app over an engine, which starts and stops with it. `app.state.service` is what its routes share."""
    service = Service(engine, settings or Settings())

    agents = _agents(service)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            async with agents.running() if agents is not None else nullcontext():
                yield
        finally:
            await engine.stop()

    app = FastAPI(
        title="openwu",
        version=__version__,
        description="Edit pictures with an adapter generated for each request; OpenAI's image edits API.",
        lifespan=life,
        docs_url=None,
        redoc_url=None,
        responses=ERRORS,
    )
    app.state.service = service
    app.add_middleware(Guard, limits=service.settings.body, hosts=service.settings.hosts, metrics=service.metrics)
    _errors(app)
    _routes(app, service)
    app.include_router(adapter_routes(service))
    if agents is not None:
        app.router.routes.append(Route("/mcp", agents))
        _uploads(app, service)
    _page(app)
    return app


def _agents(service: Service) -> AgentEndpoint | None:
    """Make what `/mcp` serves. Raises OpenwuError where the extra is not installed."""
    if not service.settings.agents:
        return None
    library("mcp", "mcp")
    from openwu.serving.mcp.remote import AgentEndpoint

    return AgentEndpoint(service)


def _uploads(app: FastAPI, service: Service) -> None:
    @app.put("/v1/uploads/{id}", summary="Send a picture ahead, to a link of the tool upload_link", status_code=201)
    async def upload(request: Request, id: str) -> dict[str, Any]:
        service.uploads.check(id)  # before anything is read
        data = await request.body()
        await asyncio.to_thread(check_headers, [data], service.max_pixels)
        service.uploads.put(id, data)
        return {"id": id, "object": "upload", "bytes": len(data)}


def _routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/images/edits", openapi_extra=EDIT_OPERATION, summary="Edit a picture")
    async def edit(request: Request, caller: Known) -> Response:
        return await serve_edit(service, caller, request)

    @app.get("/v1/models", summary="List the model under its names")
    async def models(caller: Known) -> dict[str, Any]:
        del caller
        return {"object": "list", "data": [_model(service, name) for name in service.models]}

    @app.get("/v1/models/{name}", summary="Describe the model")
    async def model(name: str, caller: Known) -> dict[str, Any]:
        del caller
        service.check_model(name)
        return _model(service, name)

    @app.get("/v1/edits", summary="List the known edits, those nearest to q first")
    async def edits(caller: Known, q: str = "", lang: str = "") -> dict[str, Any]:
        del caller
        if len(q) > 500 or lang not in ("", "en", "zh"):
            raise refused(400, "invalid_value", "expected q of at most 500 characters, and lang en or zh", "q")
        found = nearest_edits(service, q)
        if lang:
            found = [{**each, "example": each["examples"].get(lang)} for each in found]
        return {"object": "list", "data": found}

    @app.get("/v1/images/edits", include_in_schema=False)
    async def no_edit() -> None:
        raise HTTPException(405, "expected POST", {"allow": "POST"})

    @app.post("/v1/images/{kind}", include_in_schema=False)
    async def not_here(kind: str) -> None:
        raise refused(404, "not_found", f"/v1/images/{kind[:40]}: not served here; edits are, at /v1/images/edits")

    @app.get("/v1/images/{id}", summary="A picture behind a signed link")
    async def image(id: str, expires: str = "", signature: str = "") -> Response:
        data, media_type = service.pictures.get(id, expires, signature)
        return Response(data, media_type=media_type, headers={"cache-control": "private, max-age=3600"})

    @app.get("/health/live", summary="Whether the process answers")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @app.get("/health/ready", summary="Whether edits are served")
    async def ready() -> dict[str, Any]:
        health = service.engine.health()
        if service.scheduler.draining or not health.ready:
            reason = "shutting down" if service.scheduler.draining else health.reason
            raise refused(503, "not_ready", f"not ready: {reason}", retry_after=5)
        return {"status": "ready", "workers": health.workers, "restarts": health.restarts}

    @app.get("/metrics", summary="Figures for Prometheus; needs an admin key", response_class=Response)
    async def metrics(caller: Known) -> Response:
        if not caller.admin:
            raise refused(403, "admin_only", "expected an admin key")
        return _figures(service)


def metrics_app(service: Service) -> Starlette:
    """Create the ASGI app of a port for operators: `/metrics` alone, without a key."""

    async def metrics(_: Request) -> Response:
        return _figures(service)

    return Starlette(routes=[Route("/metrics", metrics)])


def _figures(service: Service) -> Response:
    service.metrics.restarts.set(service.engine.health().restarts)
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _page(app: FastAPI) -> None:
    """Serve the page at `/`, its files under `/page/`."""
    folder = Path(__file__).parent / "page"

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(folder / "index.html")

    app.mount("/page", StaticFiles(directory=folder))


def _model(service: Service, name: str) -> dict[str, Any]:
    reads = service.engine.info.reads_examples
    return {"id": name, "object": "model", "created": 0, "owned_by": "openwu", "reads_examples": reads}


def _errors(app: FastAPI) -> None:
    """Answer every error with an error object."""

    def answered(failure: Failure, headers: dict[str, str] | None = None) -> JSONResponse:
        return JSONResponse(failure.body, failure.status, {**failure.headers, **(headers or {})})

    @app.exception_handler(ServiceError)
    async def on_service_error(_: Request, error: ServiceError) -> JSONResponse:
        return answered(error.failure)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return answered(Failure(400, "invalid_value", f"{name}: {first['msg']}", name))

    @app.exception_handler(HTTPException)
    async def on_http_error(_: Request, error: HTTPException) -> JSONResponse:
        code = _CODES.get(error.status_code, "invalid_request")
        return answered(Failure(error.status_code, code, str(error.detail)), dict(error.headers or {}))

    @app.exception_handler(ClientDisconnect)
    async def on_leave(_: Request, __: ClientDisconnect) -> JSONResponse:
        return answered(Failure(CANCELLED, "cancelled", "the client left"))

    @app.exception_handler(Exception)
    async def on_fault(request: Request, error: Exception) -> JSONResponse:
        incident = secrets.token_hex(6)
        log.error("fault %s in %s: %s", incident, request.url.path[:80], type(error).__name__, exc_info=error)
        return answered(Failure(500, "server_error", f"the service failed; the operator's log has {incident}"))
