"""Connections as unusual clients make them: silent, slow, not HTTP, too many; each gets an answer that can be read."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

import httpx
import pytest
from serving_clients import SleepingEngine, listening

from openwu.serving import server
from openwu.serving.app import create_app
from openwu.serving.middleware import BodyLimits
from openwu.serving.state import Settings

HEAD = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /v1/images/edits HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    settings = Settings(body=BodyLimits(bytes=200_000, seconds=0.5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "SILENT_SECONDS", 1.0)
        patch.setattr(server, "LOOK_SECONDS", 0.3)
        with listening(create_app(SleepingEngine(), settings)) as url:
            yield url


@contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    """A connection to the service."""
    found = urlsplit(url)
    with socket.create_connection((found.hostname, found.port), timeout=30) as connection:
        yield connection


def read(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Read until the server ends the connection; return status, headers and body of the one answer."""
    data = b""
    while piece := connection.recv(65536):
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(first.split()[1]), headers, body


@pytest.mark.parametrize("sent", [b"", HEAD], ids=["nothing", "half a head"])
def test_whoever_owes_a_head_is_told_to_send_it_again(url: str, sent: bytes) -> None:
    with connected(url) as connection:
        connection.sendall(sent)
        connection.settimeout(5)
        first = connection.recv(1, socket.MSG_PEEK)
        connection.sendall(HEAD + b"\r\n" + bytes(100_000))  # too late: dropped, and the answer can still be read
        status, headers, body = read(connection)
    assert first
    assert (status, json.loads(body)["error"]["code"]) == (408, "timeout")
    assert headers["x-should-retry"] == "true"
    assert headers["connection"] == "close"
    assert headers["x-request-id"]


def test_a_connection_that_is_used_is_kept_and_one_that_idles_is_closed_without_words(url: str) -> None:
    with connected(url) as connection:
        for _ in range(10):  # longer than silence may last, though each request is done before anything looks
            connection.sendall(HEAD + b"\r\n")
            answer = b""
            while not answer.endswith(b'{"status":"live"}'):
                answer += (piece := connection.recv(65536))
                assert piece, answer
            time.sleep(0.2)
        with suppress(ConnectionResetError):  # the end may come as an end, or as a reset
            assert connection.recv(65536) == b""


def test_a_late_server_does_not_count_its_own_lateness(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic
    with connected(url) as connection:
        connection.sendall(HEAD)
        time.sleep(0.2)
        monkeypatch.setattr(server.time, "monotonic", lambda: now() + 3600)  # an hour in which nothing ran
        time.sleep(0.5)
        connection.sendall(b"\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00" + bytes(300), 400, "invalid_request"),
        (b"hello\r\n\r\n", 400, "invalid_request"),
        (HEAD + b"X: " + b"a" * 200_000 + b"\r\n\r\n", 400, "invalid_request"),
        (POST + b"Content-Length: 10\r\nContent-Length: 11\r\n\r\n{}", 400, "invalid_request"),
        (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400, "invalid_request"),
        (POST + b"Content-Length: 300000\r\n\r\n" + bytes(300_000), 413, "body_too_large"),
        (
            POST + b"Transfer-Encoding: chunked\r\n\r\n" + (b"8000\r\n" + bytes(0x8000) + b"\r\n") * 20,
            413,
            "body_too_large",
        ),
        (POST + b"Content-Length: 1000\r\n\r\n{", 408, "timeout"),
    ],
    ids=["TLS", "words", "head", "lengths", "chunks", "declared", "undeclared", "slow"],
)
def test_what_ends_a_connection_is_an_error_object(url: str, sent: bytes, status: int, code: str) -> None:
    with connected(url) as connection:
        connection.sendall(sent)
        found, headers, body = read(connection)
    assert (found, json.loads(body)["error"]["code"]) == (status, code)
    assert headers["connection"] == "close"
    assert httpx.get(f"{url}/health/live").status_code == 200


def test_too_many_connections_get_an_answer(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CONNECTIONS", 2)
    with connected(url), connected(url):
        answer = httpx.get(f"{url}/health/live")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
        assert answer.headers["retry-after"] == "5"


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=XX"])
def test_a_client_that_leaves_within_its_body_is_no_fault(
    url: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    def left() -> float:
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if 'status="499"' in line)

    before = left()
    with connected(url) as connection:
        head = (
            f"POST /v1/images/edits HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\nContent-Type: {kind}\r\n\r\n"
        )
        connection.sendall(head.encode() + b"--XX\r\n")
        time.sleep(0.1)
    until = time.monotonic() + 20
    while left() == before and time.monotonic() < until:
        time.sleep(0.05)
    assert left() == before + 1
    assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []
