"""`openwu edit --ray` without a cluster: what travels to the workers, what is reported, and what is tried again."""

from __future__ import annotations

import json
import os
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from cli_cases import FakeEditor, edit, names

from openwu.cli.console import say
from openwu.serving import bulk
from openwu.serving.engines.cluster import ClusterOptions

Captured = pytest.CaptureFixture[str]


class InThisProcess:
    """A cluster whose worker is this process, in another folder; it loses the inputs at some indices."""

    def __init__(self, lost: Sequence[int] = ()) -> None:
        self.lost = lost
        self.options: list[ClusterOptions] = []

    @contextmanager
    def joined(self, options: ClusterOptions) -> Iterator[InThisProcess]:
        self.options.append(options)
        yield self

    def spread(self, inputs: Sequence[Any], worker: Callable[[], Callable[[Any], Any]]) -> Iterator[tuple[int, Any]]:
        here = Path.cwd()
        os.chdir("/")
        try:
            call = pickle.loads(pickle.dumps(worker))()
            found = {
                index: pickle.loads(pickle.dumps(call(pickle.loads(pickle.dumps(each)))))
                for index, each in enumerate(inputs)
            }
        finally:
            os.chdir(here)
        for index in reversed(range(len(inputs))):
            yield index, None if index in self.lost else found[index]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> InThisProcess:
    made = InThisProcess()
    monkeypatch.setattr(bulk, "cluster", made.joined)
    return made


def test_photos_are_edited_by_workers_and_reported_by_the_names_they_have_here(
    here: Path, editor: FakeEditor, cluster: InThisProcess, capsys: Captured
) -> None:
    arguments = ("a.png", "b.png", "c.jpg", "--output", "out/", "--report", "report", "--compare")
    assert edit(*arguments, "--ray", "first:6379", "--workers", "3", "--worker-gpus", "0.5") == 0
    assert cluster.options == [ClusterOptions(address="first:6379", replicas=3, gpus=0.5)]
    assert names(here / "out") == {each for n in ("a.png", "b.png", "c.jpg") for each in (n, f"{n[0]}.compare.png")}
    assert sorted(each["images"][0] for each in editor.asked) == [
        str(here / name) for name in ("a.png", "b.png", "c.jpg")
    ]
    told = [json.loads(line) for line in (here / "report").read_text().splitlines()]
    assert {(each["photo"], each["output"], each["status"]) for each in told} == {
        (name, f"out/{name}", "done") for name in ("a.png", "b.png", "c.jpg")
    }
    assert str(here) not in capsys.readouterr().out
    editor.asked.clear()
    assert edit(*arguments, "--ray") == 0  # what is done is skipped, and no cluster is asked
    assert (editor.asked, len(cluster.options)) == ([], 1)


def test_what_fails_or_is_lost_stops_no_other(
    here: Path, editor: FakeEditor, cluster: InThisProcess, capsys: Captured
) -> None:
    editor.fails["a.png"] = RuntimeError("no luck")
    cluster.lost = [1]
    assert edit("a.png", "b.png", "c.jpg", "--output", "out/", "--ray") == 1
    errors = capsys.readouterr().err
    assert "no luck" in errors
    assert "b.png: its worker died every time" in errors
    assert "2 of 3 photos failed; the others are done" in errors


def test_what_killed_workers_left_is_removed_once_it_is_old(
    here: Path, editor: FakeEditor, cluster: InThisProcess
) -> None:
    (here / "out").mkdir()
    old, new = (here / "out" / f".openwu-{digit * 16}.part" for digit in "ab")
    old.touch()
    new.touch()
    os.utime(old, (0, 0))
    assert edit("a.png", "b.png", "--output", "out/", "--ray") == 0
    assert names(here / "out") == {"a.png", "b.png", new.name}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ray", "--cache", "cache"], "--cache: expected without --ray"),
        (["--workers", "2"], "--workers, --worker-gpus: expected with --ray"),
        (["--ray", "auto", "--output", "-"], "--ray: expected files, got -"),
    ],
)
def test_options_that_contradict_one_another(
    here: Path, editor: FakeEditor, capsys: Captured, monkeypatch: pytest.MonkeyPatch, options: list[str], words: str
) -> None:
    assert edit("a.png", *options) == 2
    assert words in capsys.readouterr().err
    assert editor.loaded == 0


def test_lost_inputs_are_run_once_more_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[tuple[list[int], int]] = []

    def run(self: object, inputs: dict[int, str], worker: object, size: int) -> Iterator[tuple[int, str]]:
        runs.append((list(inputs), size))
        for index in inputs:
            if index % 7 or (size == 1 and index):
                yield index, f"done {index}"
            if index == 5:
                yield index, "a second time"

    monkeypatch.setattr(bulk.Cluster, "_run", run)
    found = list(bulk.Cluster(ClusterOptions()).spread(["x"] * 4000, lambda: str))
    assert [size for _, size in runs] == [4, 1]
    assert runs[1][0] == list(range(0, 4000, 7))
    assert len(found) == 4000
    assert dict(found) == {0: None} | {index: f"done {index}" for index in range(1, 4000)}


def test_what_ray_prints_does_not_reach_standard_output(capsys: Captured) -> None:
    with redirect_stdout(bulk.OwnOutput()):
        say("ours")
        thread = threading.Thread(target=print, args=("a task failed",))
        thread.start()
        thread.join()
    found = capsys.readouterr()
    assert (found.out, found.err) == ("ours\n", "a task failed\n")
