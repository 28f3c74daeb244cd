"""Acceptance of the service under load, with real processes: tenants, fairness, overload, a soak, shutdown."""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from served import Served, offline, pixels, post, say
from serving_clients import PROMPT, png

from openwu.editor.editor import Editor
from openwu.serving.access import new_key

pytestmark = pytest.mark.slow
SECONDS = float(os.environ.get("OPENWU_SOAK_SECONDS", "60"))
"""How long overload and soak last; docs/serving.md says for how long its figures were measured."""
PAUSE = float(os.environ.get("OPENWU_SOAK_PAUSE", "0"))
"""Seconds that each client of the soak waits between its requests, to leave the machine to others."""
FILLED = 200
"""Requests of the soak before memory is first looked at; they fill its stores, and what PyTorch and Python keep."""
ENOUGH = 2000
"""Requests from which the slope of memory is more than noise."""
REQUESTS = int(os.environ.get("OPENWU_MIXED_REQUESTS", "96"))
"""How many requests the keys send together."""
PROMPTS = (PROMPT, "turn it black and white", "blur the photo")
NAMES = ("a", "b", "c", "d", "e", "f", "g", "h")


@dataclass
class Keyed:
    """A server with API keys."""

    server: Served
    keys: dict[str, str]
    metrics: str
    """URL of the figures on a port of their own."""

    def post(self, name: str, data: bytes, prompt: str = PROMPT, **fields: str) -> httpx.Response:
        return post(self.server.url, data, prompt, self.keys[name], **fields)


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    folder = tmp_path_factory.mktemp("keyed")
    keys = {name: new_key(folder / "keys", name, admin=name == "h") for name in NAMES}
    limits = ("--queue-seconds", "9999", "--key-seconds", "9999", "--request-seconds", "900")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ("--keys", str(folder / "keys"), "--batch", "1", "--threads", "1", "--metrics-port", str(port))
    with Served(*options, *limits, log=folder / "log") as server:
        yield Keyed(server, keys, f"http://127.0.0.1:{port}/metrics")


def test_every_key_gets_its_own_pictures_and_no_others_adapters(keyed: Keyed, editor: Editor) -> None:
    cases = [(NAMES[i % 8], i % 12, PROMPTS[(i // 8 + i) % 3]) for i in range(REQUESTS)]
    expected = {(seed, prompt): offline(editor, png(seed=seed % 4), prompt, seed) for _, seed, prompt in cases}
    random.Random(0).shuffle(cases)
    made: dict[str, str] = {}

    def one(case: tuple[str, int, str]) -> bool:
        name, seed, prompt = case
        answer = keyed.post(name, png(seed=seed % 4), prompt, seed=str(seed))
        assert answer.status_code == 200, answer.text
        made[answer.json()["openwu"]["adapter_id"]] = name
        return bool(np.array_equal(pixels(answer.json()["data"][0]["b64_json"]), expected[seed, prompt]))

    with ThreadPoolExecutor(8) as clients:
        assert all(clients.map(one, cases))
    for adapter, owner in list(made.items())[-16:]:
        for name in (owner, NAMES[(NAMES.index(owner) + 1) % 8]):
            headers = {"authorization": f"Bearer {keyed.keys[name]}"}
            found = httpx.get(f"{keyed.server.url}/v1/adapters/{adapter}", headers=headers, timeout=300)
            assert found.status_code == (200 if name == owner else 404)
    say(f"{len(cases)} requests of 8 keys at once, every picture equal to its own reference")


def test_openai_for_python_gets_the_errors_of_keys(keyed: Keyed) -> None:
    base = f"{keyed.server.url}/v1"
    origin = {"origin": "https://evil.example"}
    with (
        openai.OpenAI(base_url=base, api_key="wrong", timeout=300) as stranger,
        openai.OpenAI(base_url=base, api_key=keyed.keys["a"], timeout=300) as known,
    ):
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        with pytest.raises(openai.PermissionDeniedError):
            known.with_options(default_headers=origin).models.list()
        assert known.models.list().data
    assert "openwu_requests_total" in httpx.get(keyed.metrics, timeout=300).text


def test_a_flood_of_one_key_delays_another_by_two_turns(keyed: Keyed) -> None:
    done: list[str] = []
    lock = threading.Lock()

    def one(name: str, seed: int) -> int:
        answer = keyed.post(name, png(256, 256, seed=seed), seed=str(seed))
        with lock:
            done.append(name)
        return answer.status_code

    with ThreadPoolExecutor(51) as clients:
        flood = [clients.submit(one, "a", seed) for seed in range(50)]
        end = time.monotonic() + 300
        while keyed.server.figure("queue_length", keyed.keys["h"]) < 20 and time.monotonic() < end:
            time.sleep(0.1)
        before = len(done)
        assert clients.submit(one, "b", 0).result() == 200
        ahead = done.index("b") - before
        assert [each.result() for each in flood] == [200] * 50
    say(f"a flood of 50: {ahead} of them were answered between another key's request and its answer")
    # The one that runs, and one turn; answers that were on their way when the request was sent count, too.
    assert ahead <= 5


def test_a_soak_leaves_memory_files_and_threads_as_they_were(tmp_path: Path) -> None:
    """With stores so small that they are full before memory is looked at, it has to stay as it is."""
    keys = {name: new_key(tmp_path / "keys", name) for name in NAMES[:4]}
    small = ("--adapters-per-key", "4", "--store-mb", "2", "--cache-mb", "1")
    options = ("--keys", str(tmp_path / "keys"), "--threads", "1", "--request-seconds", "900", *small)
    with Served(*options, log=tmp_path / "log") as server, ThreadPoolExecutor(4) as clients:
        done = [0] * 4

        def client(number: int, most: int, end: float, pause: float) -> None:
            while done[number] < most and time.monotonic() < end:
                soak_request(server.url, keys[NAMES[number]], number, done[number])
                done[number] += 1
                time.sleep(pause)

        forever = time.monotonic() + 86_400
        list(clients.map(client, range(4), [FILLED // 4] * 4, [forever] * 4, [0.0] * 4))
        files, threads = server.files(), server.threads()
        counts, app, workers = [sum(done)], [server.memory("app")], [server.memory("workers")]
        end = time.monotonic() + SECONDS
        running = [clients.submit(client, number, 10**9, end, PAUSE) for number in range(4)]
        while time.monotonic() < end:
            time.sleep(min(SECONDS / 60, max(0.0, end - time.monotonic())))
            counts.append(sum(done))
            app.append(server.memory("app"))
            workers.append(server.memory("workers"))
        for each in running:
            each.result()
        time.sleep(20)  # kept-alive connections end
        count, half = sum(done) - counts[0], len(counts) // 2
        grown = (server.memory() - app[0] - workers[0]) / 1e6

        def slope(bytes: list[int], first: int = 0) -> float:
            return float(np.polyfit(counts[first:], bytes[first:], 1)[0]) * 1000 / 1e6

        memory = [sum(each) for each in zip(app, workers, strict=True)]
        say(
            f"soak of {SECONDS:g} s after {FILLED} requests: {count} requests; memory {memory[0] / 1e6:.0f} MB, "
            f"{grown:+.1f} MB at the end; for 1,000 requests {slope(memory):+.2f} MB (the app {slope(app):+.2f}, its "
            f"worker {slope(workers):+.2f}; second half {slope(memory, half):+.2f}); "
            f"files {server.files() - files:+d}, threads {server.threads() - threads:+d}"
        )
        assert grown < 40 + count / 1000
        if count >= ENOUGH:
            assert slope(memory, half) < 1
        assert server.files() <= files + 4
        assert server.threads() <= threads + 4


def soak_request(url: str, key: str, number: int, count: int) -> None:
    """Send one of the kinds of requests that clients send: edits as base64, link or stream, and what is refused."""
    size = (64 + 16 * (count % 5), 48 + 16 * (count % 3))
    data, prompt, seed = png(*size, seed=number * 7 + count % 9), PROMPTS[count % 3], str(count)
    kind = count % 10
    if kind == 7:
        assert post(url, data[:80], prompt, key).status_code == 400
    elif kind == 8:
        assert post(url, data, "sing me a song about taxes", key).status_code == 400
    elif kind == 9:
        form, headers = {"prompt": prompt, "stream": "true"}, {"authorization": f"Bearer {key}"}
        with suppress(httpx.ReadTimeout):  # a client that leaves
            httpx.post(f"{url}/v1/images/edits", files={"image": data}, data=form, headers=headers, timeout=0.1)
    else:
        fields = ({}, {"response_format": "url"}, {"stream": "true"})[kind % 3]
        answer = post(url, data, prompt, key, seed=seed, **fields)
        assert answer.status_code == 200, answer.text


def test_overload_is_only_200_and_429_and_memory_stays(tmp_path: Path) -> None:
    options = ("--queue-seconds", "5", "--key-seconds", "5", "--threads", "1", "--request-seconds", "900")
    with Served(*options, log=tmp_path / "log") as server:
        for _ in range(20):
            post(server.url, png(256, 256))
        before, began = server.memory(), time.monotonic()
        worked, end = server.figure("stage_seconds_sum"), began + SECONDS

        def client(number: int) -> Counter[int]:
            seen: Counter[int] = Counter()
            while time.monotonic() < end:
                answer = post(server.url, png(256, 256, seed=number))
                seen[answer.status_code] += 1
                if answer.status_code == 429:
                    assert 1 <= int(answer.headers["retry-after"]) <= 120
                    time.sleep(0.2)
            return seen

        with ThreadPoolExecutor(30) as clients:
            found = sum(clients.map(client, range(30)), Counter())
        seconds, grown = time.monotonic() - began, (server.memory() - before) / 1e6
        busy = (server.figure("stage_seconds_sum") - worked) / seconds
        say(f"30 clients, {seconds:.0f} s: {dict(found)}; the worker edited {busy:.0%} of it; memory {grown:+.1f} MB")
        assert set(found) <= {200, 429}
        assert found[429] > 0
        assert busy > 0.5
        assert grown < 150


def test_sigterm_finishes_what_was_admitted_and_refuses_the_rest(tmp_path: Path) -> None:
    limits = ("--drain-seconds", "900", "--request-seconds", "900", "--key-seconds", "9999", "--queue-seconds", "9999")
    with Served("--threads", "1", *limits, log=tmp_path / "log") as server, ThreadPoolExecutor(4) as clients:
        answers = [clients.submit(post, server.url, png(512, 512, seed=i)) for i in range(4)]
        end = time.monotonic() + 300
        while server.figure("queue_length") < 3:
            assert time.monotonic() < end
            time.sleep(0.05)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        late = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)
        with late, pytest.raises(openai.InternalServerError) as refused:
            late.images.edit(image=png(), prompt=PROMPT)
        assert (refused.value.status_code, refused.value.code) == (503, "shutting_down")
        assert [answer.result().status_code for answer in answers] == [200] * 4
        assert server.process.wait(300) == 0
