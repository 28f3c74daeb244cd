"""Limits and headers around every request: body size and time, hosts, origins, request ids, a log without prompts."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openwu.serving.access import check_local
from openwu.serving.errors import ServiceError, refused
from openwu.serving.metrics import Metrics

log = logging.getLogger("openwu.serving")
POLICY = "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"


LINGER_SECONDS = 2.0
"""How long a connection is read from after a refusal that ends it: closed at once on what was not read, it would be
reset, and its client could lose the answer."""


@dataclass(frozen=True)
class BodyLimits:
    """How large and how slow a body may be."""

    bytes: int = 64 * 2**20
    """Of one request."""
    in_flight: int = 512 * 2**20
    """Of all requests that are being read or served."""
    seconds: float = 10.0
    """Longest silence while a body is read."""
    total_seconds: float = 60.0
    """Longest time for a whole body."""


class Guard:
    """The outermost layer of the app."""

    def __init__(self, app: ASGIApp, *, limits: BodyLimits, hosts: Sequence[str], metrics: Metrics) -> None:
        self.app, self.limits, self.hosts, self.metrics = app, limits, hosts, metrics
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        request = _Guarded(self, scope, receive, send)
        try:
            await request.run()
        finally:
            self._in_flight -= request.received

    def take(self, count: int) -> None:
        """Count bytes of a body. Raises ServiceError (429) where all bodies together would take too much memory."""
        if self._in_flight + count > self.limits.in_flight:
            self.metrics.rejected.labels("bytes_in_flight").inc()
            raise refused(429, "queue_full", "too many bytes are being received; try again later", retry_after=2)
        self._in_flight += count


class _Guarded:
    """One request with its limits."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send) -> None:
        self.guard = guard
        self._head = scope["method"] == "HEAD" and scope["path"] != "/mcp"
        # The routes know GET; of its answer, HEAD gets the headers.
        self.scope = {**scope, "method": "GET"} if self._head else scope
        self._receive, self._send = receive, send
        self.id = secrets.token_hex(12)
        self.received, self.status, self.complete = 0, 0, False
        self.ending = False
        """Whether the connection ends with the answer, before its body was read."""
        self.began = time.monotonic()
        self.scope.setdefault("state", {})["request_id"] = self.id

    async def run(self) -> None:
        headers = Headers(scope=self.scope)
        try:
            check_local(headers.get("host"), headers.get("origin"), self.guard.hosts)
            self._check_length(headers.get("content-length"))
            await self.guard.app(self.scope, self.receive, self.send)
        except ServiceError as error:
            if self.status:
                raise
            await JSONResponse(error.failure.body, error.failure.status, error.failure.headers)(
                self.scope, self._receive, self.send
            )
        finally:
            self._log()

    def _check_length(self, declared: str | None) -> None:
        """Refuse a body that is too large before a byte of it is read."""
        numeric = declared is not None and declared.isascii() and declared.isdigit()
        if declared is not None and numeric and int(declared[:20]) > self.guard.limits.bytes:
            self._too_large()

    def _too_large(self) -> None:
        raise refused(
            413, "body_too_large", f"body: expected at most {self.guard.limits.bytes / 2**20:g} MiB, got more"
        )

    async def receive(self) -> Message:
        """Receive, with limits while the body is not complete."""
        if self.complete:
            return await self._receive()
        limits = self.guard.limits
        left = min(limits.seconds, self.began + limits.total_seconds - time.monotonic())
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, left))
        except TimeoutError:
            raise refused(408, "timeout", "body: expected it sooner; the connection is too slow") from None
        if message["type"] == "http.request":
            count = len(message.get("body", b""))
            if self.received + count > limits.bytes:
                self._too_large()
            self.guard.take(count)
            self.received += count
            self.complete = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.id
            headers["x-content-type-options"] = "nosniff"
            headers["referrer-policy"] = "no-referrer"
            headers["content-security-policy"] = POLICY
            headers.setdefault("cache-control", "no-store")
            if not self.complete and self.status in (408, 413, 429):
                headers["connection"] = "close"  # nobody needs the rest of the body
                self.ending = True
        elif self._head:
            message = {**message, "body": b""}
        if self.ending and message["type"] == "http.response.body" and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await self._linger()
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    async def _linger(self) -> None:
        """Read and drop what a client goes on to send, until it has seen that it is refused."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while (await self._receive()).get("more_body", False):
                    pass

    def _log(self) -> None:
        route = self.scope.get("route")
        endpoint = getattr(route, "path", "other") if route is not None else "other"  # never the path as sent
        self.guard.metrics.requests.labels(endpoint, str(self.status)).inc()
        line: dict[str, Any] = {
            "request_id": self.id,
            "endpoint": endpoint,
            "status": self.status,
            "seconds": round(time.monotonic() - self.began, 3),
            "bytes": self.received,
            "key": self.scope["state"].get("tenant"),
        }
        log.info(json.dumps(line))
