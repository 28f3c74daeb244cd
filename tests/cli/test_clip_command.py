"""`openwu edit` takes clips: alone, in folders with photographs, and with the options that mean something for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_cases import FakeAdapter, FakeEditor, edit
from clip_cases import clip, make
from PIL import Image

from openwu.cli.edit.progress import Progress
from openwu.editor.clip import ClipResult

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def asked(editor: FakeEditor, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the stand-in is asked for clips; it writes a file that says so."""
    calls: list[dict[str, Any]] = []

    def edit_clip(_: FakeEditor, source: Path, output: Path, instruction: str, **options: Any) -> ClipResult:
        options.pop("progress")(5, 10)
        calls.append({"clip": source, "instruction": instruction, **options})
        if options["strength"] == 9:
            raise KeyboardInterrupt
        output.write_bytes(b"clip")
        return ClipResult(output, (FakeAdapter(),), None, 0, 10, 5, 4, {"edit": 1.0}, ("deinterlaced",))  # type: ignore[arg-type]

    monkeypatch.setattr(FakeEditor, "edit_clip", edit_clip, raising=False)
    return calls


@pytest.fixture
def film(here: Path) -> Path:
    return clip(here / "film.mp4")


def test_a_clip_is_edited_beside_photographs(
    film: Path, editor: FakeEditor, asked: list[dict[str, Any]], capsys: Captured
) -> None:
    assert edit("a.png", "film.mp4", "--output", "out", "--save-adapter", "kept", "--noise-per-frame") == 0
    assert Path("out/film.mp4").read_bytes() == b"clip"
    assert Path("out/a.png").is_file()
    assert Path("kept/film/adapter_config.json").is_file()
    (call,) = asked
    assert (call["noise_per_frame"], call["metadata"]) == (True, "no_location")
    said = capsys.readouterr()
    assert "film.mp4 -> out/film.mp4" in said.out
    assert "4 of 10 frames were done already" in said.err
    assert "deinterlaced" in said.err
    assert edit("a.png", "film.mp4", "--output", "out") == 0  # a batch that goes on
    assert len(asked) == 1


def test_a_folder_holds_clips_too_and_bad_ones_stop_no_other(
    film: Path, editor: FakeEditor, asked: list[dict[str, Any]], capsys: Captured
) -> None:
    Path("broken.mp4").write_text("no clip")
    assert edit(".", "--output", "out", "--metadata", "keep") == 1
    assert [str(call["clip"]) for call in asked] == ["film.mp4"]
    assert asked[0]["metadata"] == "keep"
    said = capsys.readouterr().err
    assert "broken.mp4: expected a video file" in said
    assert "1 of 5 photos failed" in said


def test_a_clip_alone_is_written_beside_it_with_a_suffix_that_can_be_written(
    here: Path, editor: FakeEditor, asked: list[dict[str, Any]], capsys: Captured
) -> None:
    make(here / "old.avi", "-f", "lavfi", "-i", "color=size=32x24:duration=0.1", "-c:v", "mpeg4")
    assert edit("old.avi") == 0
    assert Path("old.edited.mp4").is_file()
    assert edit("old.avi", "--output", "x.png") == 1
    assert "to end in .mp4" in capsys.readouterr().err
    assert edit("old.avi", "--dry-run", "--output", "new.mp4") == 0
    assert not Path("new.mp4").exists()


@pytest.mark.parametrize(
    "option",
    [
        ("--compare",),
        ("--output", "-"),
        ("--per-photo", "--example", "a.png", "b.png"),
        ("--reasoning", "x"),
        ("--image-size", "10x10"),
        ("--fit-to-photo",),
    ],
)
def test_what_means_nothing_for_a_clip_is_refused_by_name(
    film: Path, editor: FakeEditor, asked: list[dict[str, Any]], option: tuple[str, ...], capsys: Captured
) -> None:
    assert edit("film.mp4", *option) == 2
    assert f"{option[0]}" in capsys.readouterr().err
    assert not asked


def test_a_mask_limits_photographs_and_clips(
    film: Path, editor: FakeEditor, asked: list[dict[str, Any]], capsys: Captured
) -> None:
    alpha = np.full((12, 16), 255, np.uint8)
    alpha[:6] = 0
    Image.fromarray(np.dstack((np.zeros((12, 16, 3), np.uint8), alpha))).save("mask.png")
    assert edit("a.png", "film.mp4", "--mask", "mask.png", "--output", "out") == 0
    found, before = (np.asarray(Image.open(path)) for path in ("out/a.png", "a.png"))
    assert np.array_equal(found[6:], before[6:])
    assert np.array_equal(found[:6], 255 - before[:6])
    assert asked[0]["mask"] == "mask.png"
    Image.open("mask.png").crop((0, 0, 8, 8)).save("small.png")
    for mask, words in (("small.png", "expected 16x12"), ("b.png", "alpha"), ("no.png", "no such file")):
        assert edit("a.png", "--mask", mask, "--output", "other.png") == 1
        assert words in capsys.readouterr().err
    assert edit("a.png", "b.png", "--mask", "b.png", "--output", "other") == 1
    assert capsys.readouterr().err.count("mask: expected") == 1  # refused once, not for each photo
    assert edit("a.png", "--mask", "mask.png", "--output", "mask.png", "--overwrite") == 1
    assert edit("a.png", "--mask", "small.png", "--dry-run") == 1
    assert "a.png: mask: expected 16x12" in capsys.readouterr().err
    assert not Path("other.png").exists()


def test_a_mask_has_the_size_of_the_upright_photograph(here: Path, editor: FakeEditor, capsys: Captured) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, shown standing
    Image.new("RGB", (16, 12), (10, 10, 200)).save("turned.png", exif=exif)
    alpha = np.zeros((16, 12), np.uint8)
    alpha[:4] = 255
    Image.fromarray(np.dstack((np.zeros((16, 12, 3), np.uint8), alpha))).save("mask.png")
    assert edit("turned.png", "--mask", "mask.png", "--output", "out.png") == 0, capsys.readouterr().err
    found = np.asarray(Image.open("out.png"))
    assert (found[:4] == (10, 10, 200)).all()
    assert (found[4:] == (245, 245, 55)).all()


def test_noise_per_frame_is_refused_for_photographs(here: Path, editor: FakeEditor, capsys: Captured) -> None:
    assert edit("a.png", "--noise-per-frame") == 2
    assert "--noise-per-frame: expected with a clip" in capsys.readouterr().err


def test_a_stop_says_that_the_same_command_goes_on(
    film: Path, editor: FakeEditor, asked: list[dict[str, Any]], capsys: Captured
) -> None:
    assert edit("film.mp4", "--strength", "9") == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_the_time_that_is_left_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 1000, 10))
    progress = Progress(hidden=True)
    monkeypatch.setattr("openwu.cli.edit.progress.time.monotonic", lambda: next(now))
    with progress:
        report = progress.clip(1, 1, "a.mp4")
        report(4, 10)
        assert progress._words == "a.mp4: frame 4 of 10"
        report(6, 10)
        assert progress._words == "a.mp4: frame 6 of 10, 00:20 left"
