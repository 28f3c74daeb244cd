"""No body whatever makes the app answer 5xx: 2,000 multipart and JSON bodies drawn by hypothesis."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_clients import SleepingEngine, mask_png, png
from starlette.testclient import TestClient

from openwu.serving.app import create_app
from openwu.serving.requests.schema import FIELDS

EXAMPLES = int(os.environ.get("OPENWU_FUZZ_EXAMPLES", "2000"))
pytestmark = [
    pytest.mark.slow,
    # The parser leaves a part that was cut short to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
PICTURES = st.sampled_from(
    [png(), png(format="JPEG"), png(format="GIF"), mask_png(), b"", b"x", png()[:99]]
) | st.binary(max_size=300)
NAMES = st.sampled_from([*FIELDS, "image", "image[]", "mask", "then[]", "svg", "frame_count"]) | st.text(max_size=10)
VALUES = st.text(max_size=30) | st.sampled_from(["true", "1", "-1", "1e400", "auto", "64x64", "png", "jpeg", "url"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | NAMES, inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(create_app(SleepingEngine(0.0)), base_url="http://localhost", raise_server_exceptions=False) as one:
        yield one


def multipart(parts: list[tuple[str, str | bytes]]) -> bytes:
    body = b""
    for name, value in parts:
        head = f'--edge\r\nContent-Disposition: form-data; name="{name}"'.encode("utf-8", "surrogatepass")
        if isinstance(value, bytes):
            head += b'; filename="upload"\r\nContent-Type: application/octet-stream'
        data = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
        body += head + b"\r\n\r\n" + data + b"\r\n"
    return body + b"--edge--\r\n"


@settings(max_examples=EXAMPLES // 2, deadline=None, suppress_health_check=list(HealthCheck))
@given(parts=st.lists(st.tuples(NAMES, VALUES | PICTURES), max_size=8), cut=st.integers(0, 60), picture=PICTURES)
def test_multipart(client: TestClient, parts: list[tuple[str, str | bytes]], cut: int, picture: bytes) -> None:
    body = multipart([("image", picture), ("prompt", "brighter"), *parts])
    if cut < 20:
        body = body[: len(body) - cut]
    answer = client.post(
        "/v1/images/edits", content=body, headers={"content-type": "multipart/form-data; boundary=edge"}
    )
    assert answer.status_code < 500, answer.text
    assert answer.status_code == 200 or set(answer.json()["error"]) >= {"message", "type", "param", "code"}


@settings(max_examples=EXAMPLES // 2, deadline=None, suppress_health_check=list(HealthCheck))
@given(fields=st.dictionaries(NAMES | st.just("images"), JSON, max_size=6) | JSON)
def test_json(client: TestClient, fields: object) -> None:
    body = json.dumps(fields).encode()
    answer = client.post("/v1/images/edits", content=body, headers={"content-type": "application/json"})
    assert answer.status_code < 500, answer.text
