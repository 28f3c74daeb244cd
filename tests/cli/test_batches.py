"""Batches: what is found, what is skipped, what fails, what is reported, and how a batch is stopped and goes on."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
from cli_cases import FakeEditor, edit, names
from PIL import Image

from openwu.cli.edit import progress as bars
from openwu.cli.edit.find import find_photos
from openwu.cli.edit.report import LineFile
from openwu.errors import OpenwuError
from openwu.images import read_picture
from openwu.types import Understood

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def tree(here: Path) -> Path:
    """photos/1.png, 2.jpg, 10.png, sub/1.png, and what is no photograph."""
    for name in ("1.png", "2.jpg", "10.png", "sub/1.png", ".hidden.png", ".thumbnails/1.png"):
        file = here / "photos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (9, 9, 200)).save(file)
    (here / "photos" / "notes.txt").write_text("no picture")
    (here / "photos" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    return here


def asked(editor: FakeEditor) -> list[str]:
    return [each["images"][0] for each in editor.asked]


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# What is found


def test_a_folder_stands_for_its_pictures_in_natural_order(tree: Path, editor: FakeEditor, capsys: Captured) -> None:
    assert edit("photos", "--output", "out") == 1
    assert asked(editor) == ["photos/1.png", "photos/2.jpg", "photos/10.png"]
    assert names(tree / "out") == {"1.png", "2.jpg", "10.png"}
    errors = capsys.readouterr().err
    assert "photos/broken.jpg" in errors
    assert "1 of 4 photos failed; the others are done" in errors


def test_recursive_keeps_the_tree_and_leaves_out_its_own_output(tree: Path, editor: FakeEditor) -> None:
    (tree / "photos" / "broken.jpg").unlink()
    for _ in range(2):
        assert edit("photos", "--recursive", "--output", "photos/out", "--compare", "--save-adapter", "kept") == 0
        assert {name for name in names(tree / "photos/out") if "compare" not in name} == {
            *("1.png", "2.jpg", "10.png", "sub/1.png")
        }
        assert len(editor.asked) == 4
    assert (tree / "kept/sub/1/adapter_config.json").is_file()


def test_results_of_earlier_edits_are_not_edited_again(here: Path, editor: FakeEditor, capsys: Captured) -> None:
    assert edit(".", "--compare") == 0
    assert edit(*sorted(path.name for path in here.iterdir()), "--overwrite") == 0
    assert len(editor.asked) == 6
    assert "a.edited.compare.png and 5 more left out: made by earlier edits" in capsys.readouterr().err
    # Named alone, or without its original, it is a photograph like any other.
    assert edit("a.edited.png") == 0
    assert (here / "a.edited.edited.png").exists()
    (here / "new").mkdir()
    (here / "a.edited.png").rename(here / "new" / "a.edited.png")
    assert edit("new") == 0


def test_patterns_home_and_duplicates(tree: Path, editor: FakeEditor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tree))
    found = find_photos(["~/photos/1*.png", "photos/./1.png", "a.png", "b.png"], recursive=False, output=None)
    photos = [str(photo.path) for photo in found.photos]
    assert photos == [*(str(tree / "photos" / name) for name in ("1.png", "10.png")), "a.png", "b.png"]
    assert edit("a.png", "--output=~/at home/") == 0
    assert (tree / "at home" / "a.png").exists()


def test_a_pattern_without_matches_stops_no_other(here: Path, editor: FakeEditor, capsys: Captured) -> None:
    assert edit("*.gif", "a.png", "--output", "out") == 1
    assert names(here / "out") == {"a.png"}
    assert "*.gif: nothing matches; check the pattern and the folder" in capsys.readouterr().err


def test_camera_raw_files_are_left_out_of_folders_and_said(tree: Path, editor: FakeEditor, capsys: Captured) -> None:
    (tree / "photos" / "1.NEF").write_bytes(b"II*\0")
    edit("photos", "--output", "out")
    assert "photos/1.NEF left out: camera raw files" in capsys.readouterr().err


def test_a_folder_that_cannot_be_searched_stops_no_other(
    tree: Path, editor: FakeEditor, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("sub"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert edit("photos", "--recursive", "--output", "out") == 1
    assert names(tree / "out") == {"1.png", "2.jpg", "10.png"}
    assert "photos/sub: the folder cannot be searched: Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["secret/o.png", "secret/new/o.png", "secret/new/"])
def test_a_place_where_nobody_may_look_is_an_error_in_a_line(
    here: Path, editor: FakeEditor, capsys: Captured, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    real = os.stat

    def stat(path: Any, *args: Any, **options: Any) -> os.stat_result:
        if "secret" in str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, *args, **options)

    monkeypatch.setattr(os, "stat", stat)
    assert edit("a.png", "--output", place) == 1
    assert edit("a.png", "--output", "o.png", "--save-adapter", "secret/a") == 1
    assert edit("secret/a.png") == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("openwu: error: ") and "secret" in line for line in lines)


# Where pictures go


@pytest.mark.parametrize("photos", [["a.png"], ["a.png", "c.jpg"]])
@pytest.mark.parametrize("output", ["new", "new/", "new/deep", "old"])
def test_output_folders_are_made_alike_for_one_and_many(
    here: Path, editor: FakeEditor, photos: list[str], output: str
) -> None:
    (here / "old").mkdir()
    assert edit(*photos, "--output", output) == 0
    assert names(here / output) == set(photos)


def test_the_folder_of_an_output_file_is_made(here: Path, editor: FakeEditor) -> None:
    assert edit("a.png", "--output", "new/deep/out.png") == 0
    assert names(here / "new") == {"deep/out.png"}


def test_photos_of_one_name_do_not_stop_a_batch(here: Path, editor: FakeEditor) -> None:
    Image.new("P", (4, 4)).save(here / "a.gif")
    Image.new("RGB", (4, 4)).save(here / "a.jpg")
    assert edit(".", "--output", "out", "--compare", "--save-adapter", "kept") == 0
    made = {name for name in names(here / "out") if "compare" not in name}
    assert made == {"a.gif.png", "a.jpg", "a.png", "b.png", "c.jpg"}
    assert {path.name for path in (here / "kept").iterdir()} == {"a.gif", "a.jpg", "a.png", "b", "c"}


def test_standard_input_and_output(
    here: Path, editor: FakeEditor, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    editor.understood = Understood("invert", 0.9)

    def given(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    given((here / "c.jpg").read_bytes())
    assert edit("-") == 0
    captured = capfdbinary.readouterr()
    assert captured.out.startswith(b"\xff\xd8\xff")
    assert abs(int(read_picture(captured.out).pixels[0, 0, 0]) - 225) < 4
    assert b"openwu: note: invert (90%)" in captured.err
    given((here / "a.png").read_bytes())
    assert edit("-", "--output", "out.webp", "--compare") == 0
    assert {"out.webp", "out.compare.png"} <= names(here)
    capfdbinary.readouterr()
    assert edit("a.png", "--output", "-", "--quiet") == 0
    captured = capfdbinary.readouterr()
    assert captured.out.startswith(b"\x89PNG")
    assert captured.err == b""
    for data, words in ((b"", b"expected a picture on standard input, got nothing"), (b"hello", b"got something else")):
        given(data)
        assert edit("-") > 0
        captured = capfdbinary.readouterr()
        assert captured.out == b""
        assert words in captured.err


# What fails, and what goes on


def test_instructions_are_checked_once_and_before_any_photo(here: Path, editor: FakeEditor, capsys: Captured) -> None:
    assert edit("a.png", "b.png", "c.jpg", "--output", "out", instruction="add a dragon") == 2
    assert capsys.readouterr().err.count("openwu: error: ") == 1
    assert editor.asked == []
    assert not (here / "out").exists()


def test_every_instruction_is_understood_before_any_photo(here: Path, editor: FakeEditor, capsys: Captured) -> None:
    editor.understood = Understood("invert", 0.9, then=(Understood("blur", 0.8),))
    assert edit("a.png", "--then", "blur it") == 0
    assert capsys.readouterr().out.startswith("invert (90%), then blur (80%)\n")
    assert edit("b.png", "--then", "add a dragon") == 2
    assert len(editor.asked) == 1


def test_edits_in_turn_have_no_adapter_to_save(here: Path, editor: FakeEditor, capsys: Captured) -> None:
    """Neither those of --then, nor those of a sentence that itself asks for several."""
    editor.understood = Understood("invert", 0.9, then=(Understood("blur", 0.8),))
    assert edit("a.png", "--save-adapter", "x", instruction="invert and blur it") == 2
    assert "'invert and blur it' asks for several edits (invert (90%), then blur (80%))" in capsys.readouterr().err
    assert editor.asked == []
    assert not (here / "x").exists()


def test_a_model_is_not_loaded_for_nothing(here: Path, editor: FakeEditor) -> None:
    assert edit("missing.png", "gone.png", "--output", "out") == 1
    assert edit("a.png", "b.png", "--output", "out") == 0
    assert edit("a.png", "b.png", "--output", "out") == 0  # all done
    assert editor.loaded == 1


def test_whatever_one_photo_leads_to_the_others_are_edited(here: Path, editor: FakeEditor, capsys: Captured) -> None:
    (here / "empty.png").touch()
    editor.fails = {"a.png": ZeroDivisionError("odd"), "b.png": MemoryError()}
    photos = ("missing.png", "a.png", "empty.png", "b.png", "c.jpg")
    assert edit(*photos, "--output", "out") == 1
    assert names(here / "out") == {"c.jpg"}
    *lines, last = capsys.readouterr().err.splitlines()
    assert last == "openwu: error: 4 of 5 photos failed; the others are done"
    assert len(lines) == 4
    assert "unexpected ZeroDivisionError: odd; --verbose shows where" in lines[1]
    assert edit("a.png", "c.jpg", "--output", "new", "--verbose") == 1
    assert "in edit" in capsys.readouterr().err  # the traceback


def test_a_batch_skips_what_is_done_unless_told_otherwise(here: Path, editor: FakeEditor, capsys: Captured) -> None:
    assert edit("a.png", "b.png", "--output", "out") == 0
    assert edit("a.png", "b.png", "c.jpg", "--output", "out") == 0
    assert asked(editor) == ["a.png", "b.png", "c.jpg"]
    note = "2 of 3 photos were done already and skipped; --overwrite edits them again"
    assert note in capsys.readouterr().err
    # An option that asks for more than what is there is not ignored in silence.
    assert edit("a.png", "b.png", "--output", "out", "--compare") == 1
    assert "already exists" in capsys.readouterr().err
    assert edit("a.png", "b.png", "--output", "out", "--compare", "--overwrite") == 0
    # The output is written last: what stands beside a missing one is of a run that was stopped.
    (here / "out" / "a.png").unlink()
    assert edit("a.png", "b.png", "--output", "out", "--compare") == 0
    assert asked(editor)[-1] == "a.png"


def test_a_full_disk_ends_a_batch(
    here: Path, editor: FakeEditor, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert edit("a.png", "b.png", "c.jpg", "--output", "out") == 1
    assert asked(editor) == ["a.png"]
    assert "0 of 3 photos are done, run the same command again to go on" in capsys.readouterr().err


# What is reported


def test_json_is_an_object_for_every_photo_and_nothing_else(tree: Path, editor: FakeEditor, capsys: Captured) -> None:
    editor.understood = Understood("invert", 0.9)
    assert edit("photos", "--output", "out", "--json", "--compare", "--cache", "kept") == 1
    found = {each["photo"]: each for each in objects(capsys.readouterr().out)}
    assert {name: each["status"] for name, each in found.items()} == {
        "photos/1.png": "done",
        "photos/2.jpg": "done",
        "photos/10.png": "done",
        "photos/broken.jpg": "failed",
    }
    assert found["photos/1.png"]["output"] == "out/1.png"
    assert found["photos/1.png"]["comparison"] == "out/1.compare.png"
    assert found["photos/1.png"]["understood"]["edit"] == "invert"
    assert found["photos/1.png"]["seconds"].keys() == {"read", "condition", "generate", "edit", "write"}
    assert "photos/broken.jpg" in found["photos/broken.jpg"]["error"]
    edit("photos", "--output", "out", "--json", "--quiet", "--compare")
    assert [each["status"] for each in objects(capsys.readouterr().out)] == ["skipped"] * 3 + ["failed"]
    edit("a.png", "--json", "--dry-run")
    (planned,) = objects(capsys.readouterr().out)
    assert (planned["status"], planned["understood"]["edit"]) == ("planned", "invert")


def test_a_report_is_appended_line_by_line(here: Path, editor: FakeEditor) -> None:
    report = here / "report.jsonl"
    report.write_text('{"cut')  # what a crash left
    assert edit("a.png", "missing.png", "--output", "out", "--report", "report.jsonl") == 1
    assert edit("a.png", "b.png", "--output", "out", "--report", "report.jsonl") == 0
    cut, *lines = report.read_text().splitlines()
    assert cut == '{"cut'
    assert [json.loads(line)["status"] for line in lines] == ["done", "failed", "skipped", "done"]
    edit("c.jpg", "--report", "dry.jsonl", "--dry-run")
    assert not (here / "dry.jsonl").exists()


def test_a_report_that_cannot_be_written_stops_no_photo(
    here: Path, editor: FakeEditor, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = here / "report.jsonl"
    report.write_text("{}\n")
    real = os.write
    monkeypatch.setattr(os, "write", lambda number, data: real(number, data[:5]))
    assert edit("a.png", "b.png", "--output", "out", "--report", "report.jsonl") == 1
    assert names(here / "out") == {"a.png", "b.png"}
    assert report.read_text() == "{}\n"  # no half line
    assert capsys.readouterr().err.count("--report: report.jsonl cannot be written") == 1
    with pytest.raises(OpenwuError, match="--report"):
        LineFile("missing/report.jsonl")


def test_notes_are_said_once_per_kind(here: Path, editor: FakeEditor, capsys: Captured) -> None:
    for name in ("d", "e", "f"):
        (here / f"{name}.ppm").write_bytes(b"P6 1 1 65535\n" + bytes(6))
    photos = ("d.ppm", "e.ppm", "f.ppm")
    assert edit(*photos, "--output", "out") == 0
    err = capsys.readouterr().err
    assert err.count("16 bits per channel are read as 8") == 1
    assert "openwu: note: 2 more like it: " in err
    assert edit(*photos, "--output", "out", "--overwrite", "--verbose") == 0
    assert capsys.readouterr().err.count("16 bits per channel are read as 8") == 3


def test_verbose_says_what_else_was_likely_and_what_is_skipped(
    here: Path, editor: FakeEditor, capsys: Captured
) -> None:
    editor.understood = Understood("invert", 0.9, runners_up=(("black_and_white", 0.05),))
    assert edit("a.png", "b.png", "--verbose") == 0
    assert "b.png: invert (90%); next: black and white (5%)" in capsys.readouterr().out
    assert edit("a.png", "b.png", "--verbose") == 0
    assert "b.png: skipped, b.edited.png exists" in capsys.readouterr().err


def test_the_bar_shows_what_takes_time_before_the_first_photo(
    here: Path, editor: FakeEditor, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert edit("a.png") == 0
    assert "loading the model" in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    monkeypatch.setattr(bars, "DELAY", 0.0)
    monkeypatch.setattr(bars, "TICK", 0.01)
    load = editor.from_pretrained

    def slow(*args: Any, **options: Any) -> FakeEditor:
        time.sleep(0.3)
        return load(*args, **options)

    monkeypatch.setitem(
        sys.modules,
        "openwu.editor.editor",
        types.SimpleNamespace(Editor=types.SimpleNamespace(from_pretrained=slow)),  # type: ignore[arg-type]
    )
    assert edit("b.png") == 0
    assert capsys.readouterr().err.count("openwu: note: ") == 1
    edit("c.jpg", "--quiet")
    assert capsys.readouterr().err == ""


# How it is stopped

STAND_IN = """
import signal, sys, time, types
signal.signal(signal.SIGINT, signal.default_int_handler)  # a run in the background ignores it
signal.signal(signal.SIGHUP, signal.SIG_DFL)
import openwu.files.writing, os
from openwu.images import read_picture
class Result:
    adapter = understood = reproduced = None
    timings = {}
    def __init__(self, photo): self.photo = photo
class Editor:
    cache = None
    from_pretrained = classmethod(lambda cls, model, **_: cls())
    understand = lambda *_, **__: None
    def edit(self, images, *_, **__): return Result(read_picture(images[0]))
def sync(_):
    if os.path.exists("out/a.png"):
        try:
            print("writing", flush=True)
            # In short naps: a signal that comes just before a sleep begins is noticed when it ends.
            for _ in range(1000): time.sleep(0.05)
        except KeyboardInterrupt:
            if "swallow" not in sys.argv: raise
sys.modules["openwu.editor.editor"] = types.SimpleNamespace(Editor=Editor)
sys.modules["openwu.types"] = types.SimpleNamespace(Adapter=None, LoadingOptions=dict, SamplingOptions=dict)
os.fsync = sync
from openwu.cli import main
sys.exit(main(["edit", "a.png", "b.png", "c.jpg", "--output", "out", "--instruction", "warm", "--json"]))
"""


@pytest.mark.parametrize(
    ("number", "word"),
    [(signal.SIGTERM, ""), (signal.SIGINT, ""), (signal.SIGHUP, ""), (signal.SIGTERM, "swallow")],
)
def test_signals_leave_atomic_files_and_say_how_far_it_came(here: Path, number: signal.Signals, word: str) -> None:
    command = [sys.executable, "-c", STAND_IN, word]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        assert json.loads(run.stdout.readline())["photo"] == "a.png"
        assert run.stdout.readline() == "writing\n"
        run.send_signal(number)
        run.send_signal(number)  # an impatient user
        err = run.stderr.read()
        assert run.wait(20) == 128 + number
    done = 2 if word else 1
    *notes, last = err.splitlines()
    assert last == f"openwu: error: stopped; {done} of 3 photos are done, run the same command again to go on"
    assert all(line.startswith("openwu: note: 2/3 b.png") for line in notes)  # where the machine was slow
    assert names(here / "out") == ({"a.png", "b.png"} if word else {"a.png"})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("words", [["a.png", "b.png"], ["a.png", "--output", "-"]])
def test_a_full_or_closed_standard_output_is_no_traceback(here: Path, words: list[str]) -> None:
    code = STAND_IN.replace("os.fsync = sync", "").replace(
        '["edit", "a.png", "b.png", "c.jpg", "--output", "out", "--instruction", "warm", "--json"]',
        repr(["edit", *words, "--instruction", "warm"]),
    )
    with open("/dev/full", "w") as full:  # noqa: PTH123
        run = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert run.returncode == 1
    assert "No space left on device" in run.stderr
    assert "Traceback" not in run.stderr
    reading, writing = os.pipe()
    os.close(reading)
    run = subprocess.run(
        [sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, check=False
    )
    os.close(writing)
    assert (run.returncode, run.stderr) == (141, "")
