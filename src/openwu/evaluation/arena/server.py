"""The voting page on this machine: unnamed pictures, keys to vote, zoom and flip in sync.

No system's name is in the page, an address, a header or a picture: pictures are encoded anew, without metadata, at the
source's size, under addresses made of the shuffle's secret salt.
"""

from __future__ import annotations

import datetime
import io
import json
import threading
import urllib.parse
from functools import lru_cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image

from openwu.errors import OpenwuError
from openwu.evaluation.arena.plan import IDENTICAL, LEFT, RIGHT, SPOILED, Arena, Comparison, Vote, check_rater
from openwu.evaluation.stages.judge import latest_outputs
from openwu.files.hashing import of_bytes

DATA_FILES = ("page.html",)
PAGE = Path(__file__).parent / DATA_FILES[0]
MAX_BODY = 4096
SOURCE, REFERENCE = "source", "reference"
SIDES = (SOURCE, REFERENCE, LEFT, RIGHT)


class ArenaServer(ThreadingHTTPServer):
    """Serves one arena; `serve_forever` and `shutdown` as usual."""

    daemon_threads = True

    def __init__(self, arena: Arena, *, host: str = "127.0.0.1", port: int = 0) -> None:
        """`port`: 0 for a free one. Raises OpenwuError where the port is taken."""
        self.arena = arena
        self.lock = threading.Lock()
        self.cases = {case.key: case for case in arena.run.cases()}
        self.outputs = latest_outputs(arena.run)
        self.tokens = {self.token(each, side): (each, side) for each in arena.comparisons for side in self.sides(each)}
        self.given: dict[str, set[str]] = {}
        for vote in arena.votes():
            self.given.setdefault(vote.rater, set()).add(vote.id)
        self.encoded = lru_cache(maxsize=64)(self._encoded)
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            raise OpenwuError(f"arena: cannot listen on {host}:{port} ({error.strerror or error})") from error

    @property
    def url(self) -> str:
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}/"

    def sides(self, comparison: Comparison) -> tuple[str, ...]:
        """Return the pictures that a comparison shows; a second picture of the request only where there is one."""
        several = len(self.cases[comparison.case].pictures) > 1
        return tuple(side for side in SIDES if several or side != REFERENCE)

    def token(self, comparison: Comparison, side: str) -> str:
        """Return the address of a picture: different for every comparison, and for both sides of one picture."""
        return of_bytes([f"{self.arena.salt}/{comparison.id}/{side}".encode()]).hexdigest()[:24]

    def picture(self, token: str) -> bytes | None:
        """Return a picture as PNG; None for an unknown address. Raises PictureError for one that is gone."""
        return self.encoded(token) if token in self.tokens else None

    def _encoded(self, token: str) -> bytes:
        comparison, side = self.tokens[token]
        case = self.cases[comparison.case]
        source = self.arena.run.picture(case.pictures[0])
        image = source if side != REFERENCE else self.arena.run.picture(case.pictures[1])
        if side in (LEFT, RIGHT):
            system = comparison.left if side == LEFT else comparison.right
            whole = comparison.right if side == LEFT else comparison.left
            made = self.outputs[whole if system == SPOILED else system, case.key]
            image = self.arena.run.picture(made.picture)
            if image.size != source.size:
                image = image.resize(source.size, Image.Resampling.BICUBIC)
            if system == SPOILED:
                image = spoiled(image)
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    def next(self, rater: str) -> dict[str, Any]:
        """Return the rater's next comparison, or only how many are done. Raises OpenwuError for a bad name."""
        check_rater(rater)
        with self.lock:
            given = self.given.get(rater, set())
            order = self.arena.order(rater)
            each = next((each for each in order if each.id not in given), None)
        state = {"done": len(given), "total": len(order), "shuffle": self.arena.digest}
        if each is None:
            return state
        pictures = {side: f"picture/{self.token(each, side)}.png" for side in self.sides(each)}
        return {**state, "id": each.id, "instruction": self.cases[each.case].instruction, "pictures": pictures}

    def vote(self, values: dict[str, Any]) -> None:
        """Record a vote. Raises OpenwuError for one that is not valid or was given before."""
        rater, seconds = values.get("rater"), values.get("seconds", 0)
        if not isinstance(rater, str) or isinstance(seconds, bool) or not isinstance(seconds, int | float):
            raise OpenwuError("vote: expected a rater and the seconds it took")
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        vote = Vote(rater, str(values.get("id")), str(values.get("vote")), min(1e6, max(0.0, float(seconds))), now)
        with self.lock:
            self.arena.add(vote)
            self.given.setdefault(rater, set()).add(vote.id)


class Handler(BaseHTTPRequestHandler):
    """Answers pages, pictures and votes, to this machine's own browser alone."""

    server: ArenaServer
    protocol_version = "HTTP/1.1"
    server_version = "arena"
    sys_version = ""

    def do_GET(self) -> None:
        if not self._local():
            return
        parts = urllib.parse.urlsplit(self.path)
        if parts.path == "/":
            self._send(HTTPStatus.OK, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif parts.path == "/next":
            rater = urllib.parse.parse_qs(parts.query).get("rater", [""])[0]
            self._answer(lambda: self.server.next(rater))
        elif parts.path.startswith("/picture/"):
            self._picture(parts.path.removeprefix("/picture/").removesuffix(".png"))
        else:
            self._error(HTTPStatus.NOT_FOUND, "nothing here")

    def do_POST(self) -> None:
        if not self._local():
            return
        origin = self.headers.get("origin")
        length = self.headers.get("content-length", "")
        if self.path != "/vote" or self.headers.get("content-type") != "application/json":
            self._error(HTTPStatus.BAD_REQUEST, "expected JSON for /vote")
        elif origin is not None and urllib.parse.urlsplit(origin).netloc != self.headers.get("host"):
            self._error(HTTPStatus.FORBIDDEN, "votes come from this page alone")
        elif not length.isdigit() or int(length) > MAX_BODY:
            self._error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"expected at most {MAX_BODY} bytes")
        else:
            body = self.rfile.read(int(length))
            self._answer(lambda: self._voted(body))

    def _voted(self, body: bytes) -> dict[str, Any]:
        try:
            values = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise OpenwuError("vote: expected JSON") from error
        if not isinstance(values, dict):
            raise OpenwuError("vote: expected an object")
        self.server.vote(values)
        return self.server.next(values["rater"])

    def _answer(self, make: Any) -> None:
        try:
            self._send(HTTPStatus.OK, json.dumps(make()).encode(), "application/json")
        except OpenwuError as error:
            self._error(HTTPStatus.BAD_REQUEST, str(error))

    def _picture(self, token: str) -> None:
        try:
            data = self.server.picture(token)
        except OpenwuError:
            data = None
        if data is None:
            self._error(HTTPStatus.NOT_FOUND, "no such picture")
        else:
            self._send(HTTPStatus.OK, data, "image/png")

    def _local(self) -> bool:
        """Whether the address that was asked for is ours, and not a foreign page's name for this machine."""
        host = urllib.parse.urlsplit(f"//{self.headers.get('host', '')}").hostname
        if host in ("localhost", "127.0.0.1", "::1", str(self.server.server_address[0])):
            return True
        self._error(HTTPStatus.FORBIDDEN, "ask for this machine by its own address")
        return False

    def _error(self, status: HTTPStatus, text: str) -> None:
        self.close_connection = True
        self._send(status, json.dumps({"error": text}).encode(), "application/json")

    def _send(self, status: HTTPStatus, data: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header(
            "Content-Security-Policy",
            "default-src 'none'; img-src 'self' data:; connect-src 'self'; style-src 'unsafe-inline'; "
            "script-src 'unsafe-inline'; frame-ancestors 'none'",
        )
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Log nothing: who voted when is in the votes."""
        return


def spoiled(image: Image.Image) -> Image.Image:
    """Return a visibly broken picture: 16 x 16 blocks, and a band moved sideways."""
    small = image.resize((max(1, image.width // 16), max(1, image.height // 16)), Image.Resampling.BOX)
    found = small.resize(image.size, Image.Resampling.NEAREST)
    band = found.crop((0, 0, image.width, max(1, image.height // 3)))
    found.paste(band, (image.width // 3, image.height // 3))
    return found


__all__ = ["IDENTICAL", "ArenaServer", "spoiled"]
