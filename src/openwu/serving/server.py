"""Run the app under uvicorn, close slow connections, and shut down without losing admitted work."""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from openwu.errors import OpenwuError
from openwu.extras import library
from openwu.serving.access import LOCAL_HOSTS
from openwu.serving.app import create_app, metrics_app
from openwu.serving.engines import Engine
from openwu.serving.errors import Failure
from openwu.serving.middleware import LINGER_SECONDS
from openwu.serving.state import Service, Settings

SILENT_SECONDS = 8.0
"""A connection on which no whole request head arrives for so long gets 408 and is closed. Slow bodies: `BodyLimits`."""
UNREAD_SECONDS = 30.0
"""A connection whose client reads nothing of an answer for so long is closed."""
LOOK_SECONDS = 2.0
CONNECTIONS = 1000
"""At once; further ones are answered with 503."""


@dataclass(frozen=True)
class Address:
    """Where to listen."""

    host: str = "127.0.0.1"
    port: int = 8000
    certificate: Path | None = None
    """File of a TLS certificate; with `key`."""
    key: Path | None = None


def serve(
    engine: Engine,
    settings: Settings,
    address: Address,
    *,
    metrics: Address | None = None,
    drain_seconds: float = 60.0,
) -> None:
    """Serve until SIGTERM or SIGINT; then refuse new work, finish what was admitted, and return.

    `metrics`: where `/metrics` is served as well, without a key and without TLS; whoever reaches that address reads it.
    Raises OpenwuError for a service without keys on an address that others reach, for a port that is taken, and where
    the model cannot be loaded.
    """
    if settings.keys is None and address.host not in LOCAL_HOSTS:
        raise OpenwuError(
            f"host: expected one of {', '.join(LOCAL_HOSTS)} for a service without keys, got {address.host}; "
            "add --keys FILE (`openwu serve --keys FILE --new-key NAME` makes one)"
        )
    library("python_multipart", "serve")
    with _listener(address) as listener, nullcontext() if metrics is None else _listener(metrics, "metrics-") as other:
        asyncio.run(_serve(create_app(engine, settings), listener, other, address, drain_seconds))


def _listener(address: Address, prefix: str = "") -> socket.socket:
    """Take the port before anything is loaded. `prefix`: of the option that an error names."""
    try:
        return socket.create_server(
            (address.host, address.port), family=socket.AF_INET6 if ":" in address.host else socket.AF_INET, backlog=512
        )
    except OSError as error:
        words = error.strerror or error
        raise OpenwuError(
            f"{address.host}:{address.port}: cannot listen: {words}; choose another --{prefix}port"
        ) from error


async def _serve(
    app: FastAPI, listener: socket.socket, metrics: socket.socket | None, address: Address, drain_seconds: float
) -> None:
    service: Service = app.state.service
    await service.start()
    config = configured(app, ssl_certfile=address.certificate, ssl_keyfile=address.key)
    async with nullcontext() if metrics is None else measured(service, metrics):
        await _Server(config, service, drain_seconds).serve(sockets=[listener])


def configured(app: ASGIApp, **more: Any) -> uvicorn.Config:
    """Return uvicorn's configuration of an app. `more`: further arguments of `uvicorn.Config`."""
    return uvicorn.Config(
        app,
        http=ImpatientProtocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=5,
        **more,
    )


@asynccontextmanager
async def measured(service: Service, listener: socket.socket) -> AsyncIterator[None]:
    """Serve the figures on a port of their own, while the service starts, runs and drains."""
    server = _Unsignalled(configured(metrics_app(service), lifespan="off"))
    running = asyncio.ensure_future(server.serve(sockets=[listener]))
    try:
        yield
    finally:
        server.should_exit = server.force_exit = True
        await running


class _Unsignalled(uvicorn.Server):
    """A server that ends with another one, which alone hears signals."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Server(uvicorn.Server):
    """A server that, before it closes, finishes what was admitted; a second signal ends that."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_seconds: float) -> None:
        super().__init__(config)
        self._service, self._drain_seconds = service, drain_seconds
        self._loop = asyncio.get_running_loop()
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        del frame
        if self._service.scheduler.draining:
            self.should_exit = True
            self.force_exit = sig == signal.SIGINT
        else:
            self._service.scheduler.draining = True
            self._loop.call_soon_threadsafe(self._begin_draining)

    def _begin_draining(self) -> None:
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        await drain(self._service, self._drain_seconds)
        self.should_exit = True


async def drain(service: Service, seconds: float) -> None:
    """Admit nothing more, and wait until all that was admitted is answered, at most so long."""
    service.scheduler.draining = True
    end = time.monotonic() + seconds
    while not service.scheduler.idle and time.monotonic() < end:
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.1)  # the last answers are still being written


class ImpatientProtocol(H11Protocol):
    """A connection that ends when its client is silent: before and between requests, or while it should read.

    Whoever still owes the head of a request gets an answer before the end; so does one that sends no HTTP, and one that
    comes while there are too many others. All of them are error objects.
    """

    _look: asyncio.TimerHandle | None = None
    _looked = 0.0
    _silent = 0.0
    """Seconds of silence, counted in looks. What a look comes late by does not count: neither this process nor,
    probably, its clients had the processor then."""
    _unread: tuple[int, float] = (0, 0.0)
    """Bytes of an answer that wait to be read, and for how many seconds they have been as many."""
    _over = False
    """Whether the last answer was given; what still comes is dropped."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app = self._unless_crowded(self.app)
        self._looked = time.monotonic()
        self._look = self.loop.call_later(LOOK_SECONDS, self._look_at)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._look is not None:
            self._look.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._over:
            super().data_received(data)

    def on_response_complete(self) -> None:
        self._silent = 0.0
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        self._end(Failure(400, "invalid_request", f"expected a request of HTTP/1.1; {msg}"))

    def _look_at(self) -> None:
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, LOOK_SECONDS), now
        busy = self.cycle is not None and not self.cycle.response_complete
        if busy:
            self._silent = 0.0
            size = self.transport.get_write_buffer_size()
            self._unread = size, self._unread[1] + passed if 0 < size == self._unread[0] else 0.0
            if self._unread[1] >= UNREAD_SECONDS:
                self.transport.abort()
                return
        else:
            self._silent += passed
            if self._silent >= SILENT_SECONDS:
                self._end_silence()
                return
        self._look = self.loop.call_later(LOOK_SECONDS, self._look_at)

    def _end_silence(self) -> None:
        """Answer a client that owes the head of its first request, or the rest of one; close an idle connection."""
        begun = bool(self.conn.trailing_data[0])
        if self.cycle is None or begun:
            seconds = f"{SILENT_SECONDS:g} s"
            self._end(Failure(408, "timeout", f"expected the whole head of a request within {seconds}; send it again"))
        else:
            self.transport.abort()

    def _end(self, failure: Failure) -> None:
        """Send an error object as the last answer, and leave its client a moment to read it."""
        if self._over or self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        self._over = True
        body = json.dumps(failure.body).encode()
        own = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        headers = [*own.items(), ("x-request-id", secrets.token_hex(12)), *failure.headers.items()]
        response = h11.Response(status_code=failure.status, headers=headers, reason=HTTPStatus(failure.status).phrase)
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def _unless_crowded(self, app: ASGIApp) -> ASGIApp:
        """Return an app that refuses requests while there are more than `CONNECTIONS` connections."""

        async def answered(scope: Scope, receive: Receive, send: Send) -> None:
            if len(self.connections) <= CONNECTIONS:
                await app(scope, receive, send)
                return
            failure = Failure(503, "not_ready", "too many connections; try again later", retry_after=5)
            headers = {**failure.headers, "connection": "close"}
            await JSONResponse(failure.body, failure.status, headers)(scope, receive, send)

        return answered
