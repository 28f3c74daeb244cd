"""Acceptance of `openwu serve --ray` and `openwu edit --ray` on a cluster of several nodes on this machine."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from ray_nodes import Nodes, kill_one, nodes, processes
from served import Served, offline, pixels, post, say
from serving_clients import PROMPT, png

from openwu.editor.editor import Editor
from openwu.serving.access import new_key

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
LIMITS = ("--queue-seconds", "9999", "--key-seconds", "9999", "--request-seconds", "900", "--drain-seconds", "900")
PHOTOS = 30


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[Nodes, list[Any]]]:
    with nodes([1, 1]) as made:
        yield made


@pytest.fixture(scope="module")
def server(cluster: tuple[Nodes, list[Any]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("ray") / "log"
    with Served("--ray", cluster[0].address, "--workers", "2", *LIMITS, log=log) as server:
        yield server


def until(true: Callable[[], bool], seconds: float = 1200) -> float:
    """Wait until something holds; return how long that took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds
        time.sleep(0.1)
    return time.monotonic() - began


def workers(server: Served) -> int:
    answer = httpx.get(f"{server.url}/health/ready", timeout=60)
    return int(answer.json()["workers"]) if answer.status_code == 200 else 0


def test_what_is_served_from_a_cluster_equals_the_editor(server: Served, editor: Editor) -> None:
    answer = post(server.url, png(), seed="3", n="2").json()
    assert np.array_equal(pixels(answer["data"][0]["b64_json"]), offline(editor, png(), seed=3))
    assert np.array_equal(pixels(answer["data"][1]["b64_json"]), offline(editor, png(), seed=4))
    stream = post(server.url, png(seed=1), stream="true")
    event = json.loads(next(line for line in stream.text.splitlines() if line.startswith("data: "))[6:])
    assert np.array_equal(pixels(event["b64_json"]), offline(editor, png(seed=1)))
    made = httpx.post(f"{server.url}/v1/adapters", files={"image": png()}, data={"prompt": PROMPT}, timeout=900).json()
    again = post(server.url, png(), adapter=made["id"]).json()
    assert np.array_equal(pixels(again["data"][0]["b64_json"]), offline(editor, png()))
    refused = post(server.url, png(), "sing me a song about taxes")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unknown_instruction")


def test_who_leaves_stops_the_work_on_the_cluster(server: Served) -> None:
    before = server.figure("cancelled_total")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{server.url}/v1/images/edits", files={"image": png(3000, 2400)}, data={"prompt": PROMPT}, timeout=3
        )
    until(lambda: server.figure("cancelled_total") > before)
    assert post(server.url, png()).status_code == 200


def test_a_killed_replica_and_a_killed_node_cost_no_answer(
    server: Served, cluster: tuple[Nodes, list[Any]], editor: Editor
) -> None:
    expected = {seed: offline(editor, png(256, 256, seed=seed)) for seed in range(4)}
    found: Counter[int] = Counter()
    over, wrong = threading.Event(), []

    def client(number: int) -> None:
        while not over.is_set():
            answer = post(server.url, png(256, 256, seed=number))
            found[answer.status_code] += 1
            if answer.status_code == 200:
                if not np.array_equal(pixels(answer.json()["data"][0]["b64_json"]), expected[number]):
                    wrong.append(number)
            else:
                wrong.append(answer.text)

    with ThreadPoolExecutor(4) as clients:
        running = [clients.submit(client, number) for number in range(4)]
        try:
            until(lambda: found[200] >= 8)
            kill_one("ServeReplica:openwu:editors")
            until(lambda: workers(server) < 2)
            replica = until(lambda: workers(server) == 2)
            enough = found[200] + 8
            until(lambda: found[200] >= enough)
            cluster[0].add()
            cluster[0].kill(cluster[1][0])
            until(lambda: workers(server) < 2)
            node = until(lambda: workers(server) == 2)
            enough = found[200] + 8
            until(lambda: found[200] >= enough)
        finally:
            over.set()
        for each in running:
            each.result()
    retried = server.figure("retried_total")
    say(
        f"under 4 clients a replica and a node were killed: {dict(found)}, {retried:.0f} run again; capacity was back "
        f"{replica:.1f} s and {node:.1f} s after it was missed"
    )
    assert wrong == []
    assert set(found) == {200}


def test_sigterm_finishes_what_was_admitted(server: Served) -> None:
    with ThreadPoolExecutor(6) as clients:
        answers = [clients.submit(post, server.url, png(512, 512, seed=i)) for i in range(6)]
        until(lambda: server.figure("queue_length") >= 2)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        late = post(server.url, png())
        assert (late.status_code, late.json()["error"]["code"]) == (503, "shutting_down")
        assert [each.result().status_code for each in answers] == [200] * 6
    assert server.process.wait(300) == 0
    until(lambda: not processes("ServeReplica:openwu:editors"))


def test_many_photographs_are_edited_once_each_whatever_is_killed(
    cluster: tuple[Nodes, list[Any]], editor: Editor, tmp_path: Path
) -> None:
    photos, output, report = tmp_path / "photos", tmp_path / "output", tmp_path / "report.jsonl"
    photos.mkdir()
    for number in range(PHOTOS):
        (photos / f"{number}.png").write_bytes(png(64, 48, seed=number))
    (photos / "broken.png").write_bytes(png()[:60])
    command = [sys.executable, "-m", "openwu", "edit", str(photos), "--instruction", PROMPT, "--output", f"{output}/"]
    command += ["--report", str(report), "--ray", cluster[0].address, "--workers", "2", "--quiet"]

    def written() -> int:
        return len(list(output.glob("*.png"))) if output.is_dir() else 0

    first = subprocess.Popen(command, stderr=subprocess.PIPE)
    until(lambda: written() >= 3 or first.poll() is not None)
    kill_one("Spread")  # a worker
    until(lambda: written() >= 8 or first.poll() is not None)
    assert first.poll() is None
    first.kill()  # and the command itself
    first.communicate()
    before = written()
    assert before < PHOTOS
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 1, second.stderr  # one of them is broken
    assert {path.name for path in output.iterdir() if path.suffix == ".png"} == {f"{i}.png" for i in range(PHOTOS)}
    for number in range(0, PHOTOS, 7):
        pixels = np.asarray(Image.open(output / f"{number}.png").convert("RGB"))
        assert np.array_equal(pixels, offline(editor, png(64, 48, seed=number)))
    told = [json.loads(line) for line in report.read_text().splitlines()]
    done = Counter(each["photo"] for each in told if each["status"] == "done")
    assert set(done.values()) == {1}
    last = {each["photo"]: each["status"] for each in told}
    assert len(last) == PHOTOS + 1
    assert last[str(photos / "broken.png")] == "failed"
    kinds = Counter(last.values())
    assert kinds["failed"] == 1
    assert kinds["done"] + kinds["skipped"] == PHOTOS
    assert kinds["skipped"] >= before  # what was being written when the command died may have been finished
    say(f"{PHOTOS} photographs, a worker and the command killed after {before}: each was edited once")


def test_a_second_replica_comes_under_load_and_goes_when_it_is_idle(editor: Editor, tmp_path: Path) -> None:
    expected = {seed: offline(editor, png(256, 256, seed=seed)) for seed in range(4)}
    over, wrong = threading.Event(), []

    def client(number: int) -> None:
        while not over.is_set():
            answer = post(server.url, png(256, 256, seed=number))
            if answer.status_code != 200:
                wrong.append(answer.text)
            elif not np.array_equal(pixels(answer.json()["data"][0]["b64_json"]), expected[number]):
                wrong.append(number)

    with nodes([1, 1]) as (made, _):
        scaling = ("--workers", "1", "--max-workers", "2", "--idle-seconds", "15")
        with Served("--ray", made.address, *scaling, *LIMITS, log=tmp_path / "log") as server:
            assert workers(server) == 1
            with ThreadPoolExecutor(4) as clients:
                running = [clients.submit(client, number) for number in range(4)]
                try:
                    more = until(lambda: workers(server) == 2)
                finally:
                    over.set()
                for each in running:
                    each.result()
            fewer = until(lambda: workers(server) == 1)
            assert post(server.url, png(256, 256)).status_code == 200
            say(f"a second replica ran {more:.1f} s after the load began, and was gone {fewer:.1f} s after it ended")
    assert wrong == []


INSIDE = """
import sys, ray
from ray import serve
from openwu.serving.deployment import application
ray.init(address=sys.argv[1], log_to_driver=False)
serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
arguments = {"keys": sys.argv[3], "replicas": 1, "aliases": ["gpt-image-1"], "key_seconds": 9999}
serve.run(application(arguments), name="inside")
"""


def test_the_whole_service_runs_inside_ray_serve(editor: Editor, tmp_path: Path) -> None:
    key = new_key(tmp_path / "keys", "ann")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with nodes([1]) as (made, _):
        command = [sys.executable, "-c", INSIDE, made.address, str(port), str(tmp_path / "keys")]
        deployed = subprocess.run(command, capture_output=True, text=True, check=False)
        assert deployed.returncode == 0, deployed.stderr
        url = f"http://127.0.0.1:{port}"
        until(lambda: httpx.get(f"{url}/health/ready", timeout=60).status_code == 200)
        answer = post(url, png(), key=key, seed="3", model="gpt-image-1")
        assert np.array_equal(pixels(answer.json()["data"][0]["b64_json"]), offline(editor, png(), seed=3))
        stream = post(url, png(), key=key, stream="true")
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert "event: image_edit.completed" in stream.text
        assert post(url, png(), key="wrong").json()["error"]["code"] == "invalid_api_key"
        assert post(url, b"broken", key=key).json()["error"]["code"] == "invalid_image"
        foreign = httpx.get(f"{url}/v1/models", headers={"host": "evil.example", "authorization": f"Bearer {key}"})
        assert foreign.json()["error"]["code"] == "foreign_host"
