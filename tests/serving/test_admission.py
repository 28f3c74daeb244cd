"""What is too large is refused from the headers of its pictures alone: no worker ever sees it."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import pytest
from serving_clients import PROMPT, SleepingEngine, mask_png, png
from starlette.testclient import TestClient

from openwu.serving.app import create_app
from openwu.serving.queue import Limits
from openwu.serving.requests.schema import cost_of
from openwu.serving.state import Settings

MOST = 1_000_000
"""Pixels of one picture that the service of these tests reads."""


def header_only(width: int, height: int) -> bytes:
    """A PNG that says its size and has next to no pixels: decoding it would fail."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.fixture
def engine() -> SleepingEngine:
    return SleepingEngine(0.0)


@pytest.fixture
def client(engine: SleepingEngine) -> Iterator[TestClient]:
    # The engine takes, as it says, a second for a megapixel.
    settings = Settings(max_pixels=MOST, limits=Limits(request_seconds=1.0))
    with TestClient(create_app(engine, settings), base_url="http://localhost") as client:
        yield client


@pytest.mark.parametrize(
    ("files", "param"),
    [
        ([("image", header_only(1001, 1000))], "image"),
        ([("image", png()), ("image", header_only(1001, 1000))], "image"),
        ([("image", png()), ("mask", header_only(1001, 1000))], "mask"),
        ([("image", header_only(1000, 1000))] * 3, "image"),
    ],
    ids=["the picture", "a reference", "the mask", "all together"],
)
def test_too_many_pixels(
    client: TestClient, engine: SleepingEngine, files: list[tuple[str, bytes]], param: str
) -> None:
    answer = client.post("/v1/images/edits", files=files, data={"prompt": PROMPT})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("image_too_large", param)
    assert "expected at most" in error["message"]
    assert answer.headers["x-should-retry"] == "false"
    assert engine.batches == []


def test_an_answer_that_is_too_large(client: TestClient, engine: SleepingEngine) -> None:
    answer = client.post("/v1/images/edits", files={"image": png()}, data={"prompt": PROMPT, "size": "8192x8192"})
    assert answer.json()["error"]["code"] == "image_too_large"
    assert engine.batches == []


def test_adapters_too(client: TestClient, engine: SleepingEngine) -> None:
    answer = client.post("/v1/adapters", files={"image": header_only(1001, 1000)}, data={"prompt": PROMPT})
    assert answer.json()["error"]["code"] == "image_too_large"
    assert engine.batches == []


def test_work_that_cannot_be_done_in_time(client: TestClient, engine: SleepingEngine) -> None:
    picture = header_only(1000, 900)
    answer = client.post("/v1/images/edits", files={"image": picture}, data={"prompt": PROMPT, "n": "4"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] == "image_too_large"
    assert "about 4 s" in answer.json()["error"]["message"]
    assert engine.batches == []
    assert client.post("/v1/images/edits", files={"image": picture}, data={"prompt": PROMPT}).status_code == 200


def test_what_is_only_read_costs_a_tenth(client: TestClient, engine: SleepingEngine) -> None:
    files = [("image", png(100, 100)), ("image", png(100, 100)), ("mask", mask_png(100, 100))]
    data = {"prompt": PROMPT, "size": "200x100"}
    assert client.post("/v1/images/edits", files=files, data=data).status_code == 200
    ((task,),) = engine.batches
    assert task.cost == pytest.approx(cost_of(10_000, 1, 10_000 + 10_000 + 20_000))
    assert task.cost == pytest.approx(0.05 + 0.01 + 0.004)


def test_a_narrow_picture_costs_what_models_pad_it_to(client: TestClient, engine: SleepingEngine) -> None:
    answer = client.post("/v1/images/edits", files={"image": header_only(1, 10_000)}, data={"prompt": PROMPT})
    assert answer.status_code == 200, answer.text
    assert engine.batches[0][0].cost == cost_of(64 * 10_000)
