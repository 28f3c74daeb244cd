"""Acceptance of the service with real processes and clients, as `make test-service` runs it."""

from __future__ import annotations

import base64
import io
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from served import Served
from serving_clients import PROMPT, mask_png, png

from openwu.editor.editor import Editor
from openwu.images import read_picture
from openwu.serving.access import new_key

pytestmark = pytest.mark.slow
SECONDS = float(os.environ.get("OPENWU_SOAK_SECONDS", "60"))
"""How long overload lasts; the figures in docs/serving.md say how long they were measured."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("served") / "log"
    with Served("--workers", "2", "--threads", "1", "--alias", "gpt-image-1", "--memory-gb", "1.5", log=log) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=900)


def pixels(data: str | None) -> np.ndarray:
    assert data is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def offline(editor: Editor, data: bytes, prompt: str = PROMPT, seed: int = 0) -> np.ndarray:
    return editor.edit([read_picture(data)], prompt, seed=seed).photo.pixels


def post(url: str, data: bytes, prompt: str = PROMPT, key: str = "none", **fields: str) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"}
    form = {"prompt": prompt, **fields}
    return httpx.post(f"{url}/v1/images/edits", files={"image": data}, data=form, headers=headers, timeout=900)


# The SDKs


def test_openai_for_python_edits(client: openai.OpenAI, editor: Editor) -> None:
    answer = client.images.edit(image=png(), prompt=PROMPT, model="gpt-image-1", extra_body={"seed": 5})
    assert np.array_equal(pixels(answer.data[0].b64_json), offline(editor, png(), seed=5))
    two = client.images.edit(image=[png(), png(seed=1)], prompt="use the colours of the reference", n=2)
    assert len(two.data) == 2
    masked = client.images.edit(image=png(), mask=mask_png(), prompt=PROMPT)
    assert np.array_equal(pixels(masked.data[0].b64_json)[:, 24:], pixels(base64.b64encode(png()).decode())[:, 24:])
    assert client.models.list().data[0].id == "embedded"
    assert client.models.retrieve("gpt-image-1").id == "gpt-image-1"


def test_openai_for_python_streams(client: openai.OpenAI, editor: Editor) -> None:
    events = list(client.images.edit(image=png(), prompt=PROMPT, stream=True, partial_images=2))
    assert [event.type for event in events] == ["image_edit.completed"]
    assert np.array_equal(pixels(events[0].b64_json), offline(editor, png()))


def test_openai_for_python_gets_its_errors(client: openai.OpenAI, server: Served) -> None:
    with pytest.raises(openai.BadRequestError) as unknown:
        client.images.edit(image=png(), prompt="sing me a song about taxes")
    assert unknown.value.code == "unknown_instruction"
    with pytest.raises(openai.NotFoundError):
        client.images.edit(image=png(), prompt=PROMPT, model="none")
    with pytest.raises(openai.BadRequestError):
        client.images.edit(image=b"broken", prompt=PROMPT)
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt=PROMPT)
    with pytest.raises(openai.APIStatusError) as large:
        client.images.edit(image=bytes(65 * 2**20), prompt=PROMPT)
    assert large.value.status_code == 413


NODE = """
const OpenAI = require("openai");
const fs = require("fs");
const client = new OpenAI.OpenAI({baseURL: process.argv[2] + "/v1", apiKey: "none"});
(async () => {
  const one = () => OpenAI.toFile(fs.createReadStream("a.png"), "a.png", {type: "image/png"});
  const answer = await client.images.edit({image: await one(), prompt: "make it brighter", size: "64x64"});
  const two = await client.images.edit({image: [await one(), await one()], prompt: "make it brighter", n: 2});
  let completed = 0;
  for await (const event of await client.images.edit({image: await one(), prompt: "make it brighter", stream: true}))
    completed += event.type === "image_edit.completed" ? 1 : 0;
  let code = "";
  try { await client.images.edit({image: await one(), prompt: "write me a poem about tax law"}); }
  catch (error) { code = error.code; }
  const models = (await client.models.list()).data.length;
  console.log([answer.size, two.data.length, completed, code, models].join(" "));
})();
"""


def test_openai_for_node(server: Served, tmp_path: Path) -> None:
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    (tmp_path / "package.json").write_text("{}")
    installed = subprocess.run(
        ["npm", "install", "openai"], cwd=tmp_path, capture_output=True, timeout=900, check=False
    )
    if installed.returncode:
        pytest.skip("npm cannot install openai here")
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "a.js").write_text(NODE)
    run = subprocess.run(
        ["node", "a.js", server.url], cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False
    )
    assert run.stdout.split() == ["64x64", "2", "1", "unknown_instruction", "2"], run.stderr


# Faults and bad pictures


def bomb(width: int, height: int) -> bytes:
    """A PNG of one colour: few bytes, many pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = zlib.compressobj()
    body = b"".join(rows.compress(bytes(1 + 3 * width)) for _ in range(height)) + rows.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_a_killed_worker_loses_nothing(server: Served, editor: Editor) -> None:
    expected = [offline(editor, png(seed=i), seed=i) for i in range(12)]
    with ThreadPoolExecutor(12) as clients:
        answers = [clients.submit(post, server.url, png(seed=i), seed=str(i)) for i in range(12)]
        time.sleep(0.3)
        os.kill(server.workers()[0], signal.SIGKILL)
        found = [answer.result() for answer in answers]
    assert [answer.status_code for answer in found] == [200] * 12
    for answer, pixel in zip(found, expected, strict=True):
        assert np.array_equal(pixels(answer.json()["data"][0]["b64_json"]), pixel)
    assert httpx.get(f"{server.url}/health/ready").json()["restarts"] >= 1


def test_hostile_pictures_are_400_and_the_workers_live(server: Served) -> None:
    rng = random.Random(0)
    samples = [bomb(20_000, 20_000), b"", b"\x89PNG\r\n\x1a\n", b"GIF89a" + bytes(50), b"<svg/>", b"%PDF-1.7"]
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"):
        whole = png(format=kind)
        for _ in range(8):
            broken = bytearray(whole)
            for _ in range(rng.randint(1, 12)):
                broken[rng.randrange(len(broken))] = rng.randrange(256)
            samples.append(bytes(broken[: rng.randint(len(broken) // 2, len(broken))]))
    before = server.workers()
    found = Counter(post(server.url, data, allow_out_of_scope="true").status_code for data in samples)
    assert set(found) <= {200, 400}, found
    assert found[400] >= 30, found
    assert server.workers() == before


def test_more_memory_than_a_worker_may_have_is_a_400(server: Served) -> None:
    before = server.workers()
    answer = post(server.url, bomb(8000, 6000))
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] in ("image_too_large", "invalid_image")
    assert server.workers() == before
    assert post(server.url, png()).status_code == 200


def test_who_leaves_stops_the_work(server: Served) -> None:
    before = server.figure("cancelled_total")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{server.url}/v1/images/edits", files={"image": bomb(2500, 2500)}, data={"prompt": PROMPT}, timeout=3
        )
    began = time.monotonic()
    while server.figure("cancelled_total") == before or server.figure("queue_length"):
        assert time.monotonic() - began < 10
        time.sleep(0.2)
    assert post(server.url, png()).status_code == 200


def test_slow_connections_are_closed(server: Served) -> None:
    head = b"POST /v1/images/edits HTTP/1.1\r\nHost: localhost\r\n"
    body = head + b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
    began = time.monotonic()
    slow = []
    for number in range(200):
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.sendall((b"", head, body)[number % 3])
        slow.append(connection)
    assert post(server.url, png()).status_code == 200
    for connection in slow:
        connection.settimeout(max(0.1, began + 20 - time.monotonic()))
        try:
            while connection.recv(4096):
                pass
        except ConnectionError:
            pass
        connection.close()
    assert time.monotonic() - began < 16


# Tenants, load, shutdown


def test_every_key_gets_its_own_pictures(tmp_path: Path, editor: Editor) -> None:
    keys = {name: new_key(tmp_path / "keys", name) for name in ("a", "b", "c", "d", "e", "f", "g", "h")}
    prompts = (PROMPT, "turn it black and white", "blur the photo")
    cases = [(name, seed, prompts[(seed + place) % 3]) for place, name in enumerate(keys) for seed in range(12)]
    random.Random(0).shuffle(cases)
    options = ("--keys", str(tmp_path / "keys"), "--batch", "1", "--threads", "1", "--key-seconds", "600")
    with Served(*options, "--queue-seconds", "600", log=tmp_path / "log") as server:

        def one(case: tuple[str, int, str]) -> bool:
            name, seed, prompt = case
            answer = post(server.url, png(seed=seed % 4), prompt, keys[name], seed=str(seed))
            assert answer.status_code == 200, answer.text
            found = pixels(answer.json()["data"][0]["b64_json"])
            return bool(np.array_equal(found, offline(editor, png(seed=seed % 4), prompt, seed)))

        with ThreadPoolExecutor(8) as clients:
            assert all(clients.map(one, cases))
        assert post(server.url, png()).status_code == 401


def test_overload_is_only_200_and_429_and_memory_stays(tmp_path: Path) -> None:
    with Served("--queue-seconds", "5", "--key-seconds", "5", "--threads", "1", log=tmp_path / "log") as server:
        for _ in range(20):
            post(server.url, png(256, 256))
        began = time.monotonic()
        for _ in range(10):
            assert post(server.url, png(256, 256)).status_code == 200
        alone = (time.monotonic() - began) / 10
        before, end = server.memory(), time.monotonic() + SECONDS

        def client(number: int) -> Counter[int]:
            seen: Counter[int] = Counter()
            while time.monotonic() < end:
                status = post(server.url, png(256, 256, seed=number)).status_code
                seen[status] += 1
                if status == 429:
                    time.sleep(0.2)
            return seen

        with ThreadPoolExecutor(30) as clients:
            found = sum(clients.map(client, range(30)), Counter())
        after = server.memory()
        sys.stdout.write(
            f"\n{SECONDS:g} s: {dict(found)}; {alone:.3f} s for one alone, so {SECONDS / alone:.0f} at most; "
            f"memory {(after - before) / 1e6:+.1f} MB\n"
        )
        assert set(found) <= {200, 429}
        assert found[429] > 0
        assert after - before < 150e6


def test_sigterm_finishes_what_was_admitted(tmp_path: Path) -> None:
    with Served("--threads", "1", log=tmp_path / "log") as server, ThreadPoolExecutor(3) as clients:
        answers = [clients.submit(post, server.url, png(512, 512, seed=i)) for i in range(3)]
        time.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        assert [answer.result().status_code for answer in answers] == [200] * 3
        assert server.process.wait(30) == 0
