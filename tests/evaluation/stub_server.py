"""A local server that answers as judges and editors do, well and badly."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

Reply = tuple[int, dict[str, str], bytes]
Handler = Callable[[str, dict[str, str], bytes], Reply]


class Stub:
    """What the server was sent, and what it answers."""

    def __init__(self, answer: Handler) -> None:
        self.answer = answer
        self.calls: list[tuple[str, dict[str, str], bytes]] = []
        self.url = ""


@contextmanager
def serving(answer: Handler) -> Iterator[Stub]:
    """Serve on a free port of this machine until the block ends."""
    stub = Stub(answer)

    class Handling(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {key.lower(): value for key, value in self.headers.items()}
            stub.calls.append((self.path, headers, body))
            status, extra, data = stub.answer(self.path, headers, body)
            if status == 0:  # hang up
                self.connection.close()
                return
            self.send_response(status)
            for key, value in extra.items():
                self.send_header(key, value)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handling)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def ok(value: Any) -> Reply:
    return 200, {"content-type": "application/json"}, json.dumps(value).encode()


def error(status: int, message: str, **headers: str) -> Reply:
    return status, headers, json.dumps({"error": {"message": message}}).encode()


def chat(content: str | None, *, reason: str = "stop", refusal: str | None = None) -> Reply:
    message = {"role": "assistant", "content": content, "refusal": refusal}
    return ok({"choices": [{"index": 0, "message": message, "finish_reason": reason}]})


def picture(width: int = 8, height: int = 6, colour: tuple[int, int, int] = (200, 30, 40), mode: str = "RGB") -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).convert(mode).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def slow(seconds: float, reply: Reply) -> Reply:
    time.sleep(seconds)
    return reply
