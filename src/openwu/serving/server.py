"""Run the app under uvicorn, close slow connections, and shut down without losing admitted work."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from openwu.errors import OpenwuError
from openwu.extras import library
from openwu.serving.access import LOCAL_HOSTS
from openwu.serving.app import create_app, metrics_app
from openwu.serving.engines import Engine
from openwu.serving.state import Service, Settings

SILENT_SECONDS = 8.0
"""A connection on which no whole request head arrives for so long is closed. Slow bodies: `BodyLimits`."""
UNREAD_SECONDS = 30.0
"""A connection whose client reads nothing of an answer for so long is closed."""
LOOK_SECONDS = 2.0
CONNECTIONS = 1000


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
    config = uvicorn.Config(
        app,
        http=ImpatientProtocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=5,
        limit_concurrency=CONNECTIONS,
        ssl_certfile=address.certificate,
        ssl_keyfile=address.key,
    )
    async with nullcontext() if metrics is None else measured(service, metrics):
        await _Server(config, service, drain_seconds).serve(sockets=[listener])


@asynccontextmanager
async def measured(service: Service, listener: socket.socket) -> AsyncIterator[None]:
    """Serve the figures on a port of their own, while the service starts, runs and drains."""
    config = uvicorn.Config(
        metrics_app(service),
        http=ImpatientProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
    )
    server = _Unsignalled(config)
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
    """A connection that is closed when its client is silent: before and between requests, or while it should read."""

    _look: asyncio.TimerHandle | None = None
    _waiting_since: float | None = None
    _unread: tuple[int, float] = (0, 0.0)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._waiting_since = time.monotonic()
        self._look = self.loop.call_later(LOOK_SECONDS, self._look_at)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._look is not None:
            self._look.cancel()
        super().connection_lost(exc)

    def _look_at(self) -> None:
        now = time.monotonic()
        busy = self.cycle is not None and not self.cycle.response_complete
        if busy:
            self._waiting_since = None
            size = self.transport.get_write_buffer_size()
            if size == 0 or size != self._unread[0]:
                self._unread = size, now
            elif now - self._unread[1] > UNREAD_SECONDS:
                self.transport.abort()
                return
        elif self._waiting_since is None:
            self._waiting_since = now
        elif now - self._waiting_since > SILENT_SECONDS:
            self.transport.abort()
            return
        self._look = self.loop.call_later(LOOK_SECONDS, self._look_at)
