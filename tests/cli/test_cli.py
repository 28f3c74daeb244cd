"""Every path through the command line, with a stand-in for the editor: no trained model is needed."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_cases import FakeEditor, edit, names
from PIL import Image

import openwu
from openwu import cli
from openwu.backbones.embedded.base import EmbeddedBase
from openwu.backbones.protocol import KnownEdit
from openwu.cli import console, models
from openwu.errors import CheckpointError, OpenwuError
from openwu.generator.model import ParameterGenerator
from openwu.images import read_picture
from openwu.types import Understood

PYTHON = [sys.executable, "-m", "openwu"]


# What was understood


def test_a_run_says_once_what_was_understood(
    here: Path, editor: FakeEditor, capsys: pytest.CaptureFixture[str]
) -> None:
    editor.understood = Understood("brighten", 0.84)
    assert edit("a.png", "b.png") == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert first == "brighten (84%)"
    assert [line.split(" ->")[0] for line in others] == ["a.png", "b.png"]
    assert edit("a.png", "--quiet", "--overwrite") == 0
    assert capsys.readouterr().out == ""


def test_an_edit_may_be_asked_for_by_name(here: Path, editor: FakeEditor, capsys: pytest.CaptureFixture[str]) -> None:
    assert edit("a.png", "--edit", "brighten", instruction=None) == 0
    assert editor.named == "brighten"
    assert editor.asked[0]["instruction"] == ""
    assert edit("a.png", "--edit", "brighten", instruction="darker") == 2
    assert "--edit: expected without --instruction" in capsys.readouterr().err


def test_a_dry_run_says_what_would_be_done_and_touches_nothing(
    here: Path, editor: FakeEditor, capsys: pytest.CaptureFixture[str]
) -> None:
    editor.understood = Understood("invert", 0.9, then=(Understood("blur", 0.95),))
    before = names(here)
    arguments = ("a.png", "b.png", "--dry-run", "--then", "blur it", "--reference", "c.jpg", "--output", "new/")
    assert edit(*arguments) == 0
    assert capsys.readouterr().out.splitlines() == [
        "invert (90%), then blur (95%)",
        f"a.png -> {Path('new/a.png')}  (dry run)",
        f"b.png -> {Path('new/b.png')}  (dry run)",
    ]
    assert editor.read == ("invert it", None, ("blur it",), 1)
    assert editor.asked == []
    assert names(here) == before
    assert not (here / "new").exists()
    assert edit("a.png", "--dry-run", instruction="add a dragon") == 2
    assert edit("a.png", "--dry-run", "--adapter", "x", instruction=None) == 2


def test_edits_are_listed_and_searched(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["edits"]) == 0
    every = capsys.readouterr().out.splitlines()
    assert len(every) == 62
    assert cli.main(["edits", "black", "and", "white"]) == 0
    found = capsys.readouterr().out.splitlines()
    assert found[0].startswith("black_and_white ")
    assert len(found) < 62
    assert any(ord(character) > 0x4E00 for character in found[0])
    assert cli.main(["edits", "xqzj"]) == 1
    assert "no edit resembles 'xqzj'" in capsys.readouterr().err
    assert cli.main(["edits", "rain"]) == 0
    out, err = capsys.readouterr()
    assert "rain is withdrawn" in err
    assert not out.startswith("rain ")


# Where pictures go


def test_one_photo_to_a_file(here: Path, editor: FakeEditor, capsys: pytest.CaptureFixture[str]) -> None:
    assert edit("a.png", "--output", "out.webp", "--strength", "-0.5", "--seed", "7", "--model", "folder") == 0
    assert editor.asked == [{"images": ["a.png"], "instruction": "invert it", "then": (), "strength": -0.5, "seed": 7}]
    assert editor.model == "folder"
    assert np.abs(read_picture("out.webp").pixels.astype(int)[0, 0] - (245, 245, 55)).max() < 4
    captured = capsys.readouterr()
    assert re.fullmatch(
        r"a\.png -> out\.webp  1\.\d\d s \(read 0\.10, condition 0\.20, generate 0\.30, edit 0\.40, write \d\.\d\d\)\n",
        captured.out,
    )


@pytest.mark.parametrize("given_text", ["  warm \t it\n", "warm it"])
def test_the_instruction_is_normalised(here: Path, editor: FakeEditor, given_text: str) -> None:
    assert edit("a.png", instruction=given_text) == 0
    assert editor.asked[0]["instruction"] == "warm it"


def test_several_instructions_reach_the_editor_in_their_order(here: Path, editor: FakeEditor) -> None:
    assert edit("a.png", "b.png", "--then", " blur \n it ", "--then", "加一点雾") == 0
    assert [asked["instruction"] for asked in editor.asked] == ["invert it"] * 2
    assert [asked["then"] for asked in editor.asked] == [("blur it", "加一点雾")] * 2


def test_the_reference_goes_with_every_photo(here: Path, editor: FakeEditor) -> None:
    before = (here / "c.jpg").read_bytes()
    assert edit("a.png", "b.png", "--reference", "c.jpg", "--output", "out", "--compare") == 0
    assert [asked["images"] for asked in editor.asked] == [["a.png", "c.jpg"], ["b.png", "c.jpg"]]
    assert names(here / "out") == {"a.png", "b.png", "a.compare.png", "b.compare.png"}
    assert (here / "c.jpg").read_bytes() == before
    # A photograph may be its own reference.
    assert edit("a.png", "--reference", "a.png", "--output", "self.png") == 0
    assert editor.asked[-1]["images"] == ["a.png", "a.png"]


def test_default_names_stand_beside_the_photos(here: Path, editor: FakeEditor) -> None:
    Image.new("P", (4, 4)).save(here / "d.gif")
    (here / "sub").mkdir()
    Image.new("RGB", (4, 4)).save(here / "sub" / "a.png")
    assert edit("a.png", "c.jpg", "d.gif", "sub/a.png") == 0
    made = names(here) - {"a.png", "b.png", "c.jpg", "d.gif", "sub/a.png"}
    assert made == {"a.edited.png", "c.edited.jpg", "d.edited.png", "sub/a.edited.png"}
    assert len(editor.asked) == 4


@pytest.mark.parametrize("output", ["new", "new/", "new/deep", "old"])
def test_several_photos_go_to_a_folder(here: Path, editor: FakeEditor, output: str) -> None:
    (here / "old").mkdir()
    assert edit("a.png", "c.jpg", "--output", output) == 0
    assert names(here / output) == {"a.png", "c.jpg"}


def test_one_photo_goes_to_a_folder_that_is_named_as_one(here: Path, editor: FakeEditor) -> None:
    assert edit("a.png", "--output", "new/") == 0
    assert names(here / "new") == {"a.png"}


def test_existing_outputs_stay_unless_allowed(
    here: Path, editor: FakeEditor, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (here / "b.png").read_bytes()
    assert edit("a.png", "--output", "b.png") == 1
    assert "already exists; choose another name or allow overwriting (--overwrite)" in capsys.readouterr().err
    assert (here / "b.png").read_bytes() == before
    assert not editor.asked
    assert edit("a.png", "--output", "b.png", "--overwrite") == 0
    assert (here / "b.png").read_bytes() != before


def test_compare_writes_before_and_after(here: Path, editor: FakeEditor) -> None:
    assert edit("a.png", "b.png", "--output", "out", "--compare") == 0
    assert names(here / "out") == {"a.png", "b.png", "a.compare.png", "b.compare.png"}
    sheet = Image.open(here / "out" / "a.compare.png")
    assert sheet.getpixel((2, sheet.height - 1)) == (10, 10, 200)
    assert sheet.getpixel((sheet.width - 2, sheet.height - 1)) == (245, 245, 55)
    sheet.close()


def test_adapters_are_saved_and_used_again(here: Path, editor: FakeEditor, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"adapter_config.json", "adapter_model.safetensors"}
    assert edit("a.png", "--save-adapter", "one") == 0
    assert names(here / "one") == files
    assert "a.png -> one" in capsys.readouterr().out
    assert edit("a.png", "b.png", "--output", "out", "--save-adapter", "many") == 0
    assert names(here / "many") == {f"{stem}/{file}" for stem in "ab" for file in files}
    assert edit("a.png", "--output", "again.png", "--adapter", "one", instruction=None) == 0
    assert editor.asked[-1]["instruction"] == ""
    assert edit("a.png", "--output", "x.png", "--save-adapter", "one") == 1
    assert "one: already holds files" in capsys.readouterr().err
    assert edit("a.png", "--output", "x.png", "--save-adapter", "one", "--overwrite") == 0
    assert edit("a.png", "--output", "y.png", "--save-adapter", "b.png") == 1
    assert "b.png: expected a folder for the adapter, got a file" in capsys.readouterr().err
    assert edit("a.png", "--output", "y.png", "--save-adapter", "b.png/inside") == 1
    assert "b.png/inside: the folder cannot be made" in capsys.readouterr().err
    assert edit("a.png", "--output", "y.png", "--adapter", "missing") == 1
    assert "missing: no such folder" in capsys.readouterr().err


def test_a_cache_is_reported(here: Path, editor: FakeEditor, capsys: pytest.CaptureFixture[str]) -> None:
    assert edit("a.png", "--cache", "kept") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "kept: 0 of 0 adapters found, 0.0 MB held"
    assert edit("a.png", "--cache", "kept", "--overwrite", "--quiet") == 0
    assert capsys.readouterr().out == ""


# What is refused before any work


@pytest.mark.parametrize(
    ("arguments", "instruction", "code", "words"),
    [
        ([], "warm", 2, "the following arguments are required: PHOTO"),
        (["a.png"], None, 2, "--instruction: expected what to do, got nothing"),
        (["a.png"], "", 2, "instruction: expected text, got nothing"),
        (["a.png"], "x" * 10_000, 2, "expected at most 500 characters, got 10000"),
        (["a.png"], "😀", 2, "expected words"),
        (["a.png"], "\udcff", 2, "U+DCFF"),
        (["a.png", "--strength", "nan"], "warm", 2, "expected a finite number, got 'nan'"),
        (["a.png", "--strength", "inf"], "warm", 2, "expected a finite number, got 'inf'"),
        (["a.png", "--strength", "much"], "warm", 2, "expected a finite number, got 'much'"),
        (["a.png", "--seed", "1.5"], "warm", 2, "expected a whole number from 0 to 9223372036854775807, got '1.5'"),
        (["a.png", "--seed", str(2**63)], "warm", 2, "expected a whole number"),
        (["a.png", "--output", ""], "warm", 2, "--output: expected a file or folder, got nothing"),
        (["a.png", "--adapter", "x", "--save-adapter", "y"], "warm", 2, "leave one of them out"),
        (["a.png", "--adapter", "x", "--cache", "y"], None, 2, "--cache: the adapter of --adapter needs no look-up"),
        (["a.png", "--cache", "b.png"], "warm", 1, "cache: expected a folder, or a place to make one, got b.png"),
        (["a.png", "--adapter", "x", "--then", "blur it"], None, 2, "--then: an adapter of --adapter is complete"),
        (["a.png", "--adapter", "x", "--then", "blur it"], "warm", 2, "generate with --instruction and --then instead"),
        (["a.png", "--then", "blur it"], None, 2, "--instruction: expected what to do, got nothing"),
        (["a.png", "--then", "blur it", "--sequential"], "warm", 2, "unrecognized arguments: --sequential"),
        (["a.png", "--then", "blur it", "--save-adapter", "x"], "warm", 2, "an adapter each"),
        (["a.png", "--then", ""], "warm", 2, "instruction: expected text, got nothing"),
        (["a.png", "--then", "blur it", "--then", "😀"], "warm", 2, "expected words"),
        (["a.png", "--reference", "missing.png"], "warm", 1, "missing.png: no such file"),
        (["a.png", "--reference", "."], "warm", 1, "expected a picture, got a folder"),
        (
            ["a.png", "--reference", "b.png", "--output", "b.png", "--overwrite"],
            "warm",
            1,
            "the output is the input b.png",
        ),
        (["a.png", "--colour"], "warm", 2, "unrecognized arguments: --colour"),
        (["a.png", "b.png", "--output", "out.png"], "warm", 2, "expected a folder for 2 photos"),
        (["a.png", "b.png", "--output", "c.jpg"], "warm", 2, "expected a folder for 2 photos, got the file c.jpg"),
        (["a.png", "sub/A.PNG", "--output", "out"], "warm", 2, "would both write"),
        (["a.png", "sub/a.png", "--save-adapter", "out"], "warm", 2, "would both write out/a"),
        (["missing.png"], "warm", 1, "missing.png: no such file; check the name and the folder"),
        (
            ["empty"],
            "warm",
            1,
            "empty: expected pictures in the folder, found none; --recursive looks into the folders",
        ),
        (["a.png", "--output", "a.png", "--overwrite"], "warm", 1, "the output is the input a.png"),
        (["a.png", "b.png", "--output", ".", "--overwrite"], "warm", 1, "a.png: the output is the input a.png"),
        (["a.png", "--output", "out.xyz"], "warm", 1, "expected a name that ends in one of"),
        (["a.png", "--output", "a.png/x"], "warm", 1, "a.png/x: the folder cannot be made"),
        (["a.png", "--output", "x" * 260], "warm", 1, "the folder cannot be made: File name too long"),
        (["a.png", "--output", "x" * 260 + ".png"], "warm", 1, "cannot be written: File name too long"),
        (["a.png", "--save-adapter", "x" * 260], "warm", 1, "the folder cannot be made: File name too long"),
        (["a.png", "--report", "no/report.jsonl"], "warm", 1, "--report: no/report.jsonl cannot be written"),
        (["x" * 260 + ".png"], "warm", 1, "File name too long"),
        (["*.gif"], "warm", 1, "*.gif: nothing matches; check the pattern and the folder"),
        (["a.png", "b.png", "--output", "-"], "warm", 2, "expected a folder for several photos, got -"),
        (["a.png", "--output", "-", "--compare"], "warm", 2, "--compare: expected an output file"),
        (["a.png", "--output", "-", "--json"], "warm", 2, "--json: standard output holds the picture"),
        (["a.png", "--quiet", "--verbose"], "warm", 2, "not allowed with argument"),
        (["a.png", "b.png", "--output", "a.png/x"], "warm", 1, "a.png/x: the folder cannot be made"),
        (["clear.png", "--output", "out.jpg"], "warm", 1, "JPEG cannot keep the picture's transparency"),
        (["long.png", "--output", "out.webp"], "warm", 1, "WEBP holds at most 16383 pixels on a side, got 17000"),
    ],
)
def test_bad_command_lines(
    here: Path,
    editor: FakeEditor,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    instruction: str | None,
    code: int,
    words: str,
) -> None:
    Image.new("RGBA", (4, 4)).save("clear.png")
    Image.new("L", (17_000, 1)).save("long.png")
    (here / "empty").mkdir()
    before = names(here)
    try:
        assert edit(*arguments, instruction=instruction) == code
    except SystemExit as stop:
        assert stop.code == code  # noqa: PT017
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert any(words in line for line in lines), captured.err
    assert all(line.startswith("openwu: error: ") for line in lines)
    assert names(here) == before
    assert editor.loaded == 0 or "--cache" in arguments
    assert not editor.asked


def test_opaque_pictures_with_alpha_may_become_jpeg(here: Path, editor: FakeEditor) -> None:
    Image.new("RGBA", (4, 4), (9, 9, 9, 255)).save("opaque.png")
    assert edit("opaque.png", "--output", "out.jpg") == 0


# What happens on the way


def test_one_failure_does_not_stop_the_others(
    here: Path, editor: FakeEditor, capsys: pytest.CaptureFixture[str]
) -> None:
    editor.fails["b.png"] = OpenwuError("b.png: too hard")
    assert edit("a.png", "b.png", "c.jpg", "--output", "out") == 1
    assert names(here / "out") == {"a.png", "c.jpg"}
    errors = capsys.readouterr().err.splitlines()
    assert errors == ["openwu: error: b.png: too hard", "openwu: error: 1 of 3 photos failed; the others are done"]


def test_a_truncated_photo_fails_when_its_turn_comes(
    here: Path, editor: FakeEditor, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save("cut.png")
    (here / "cut.png").write_bytes((here / "cut.png").read_bytes()[:6000])
    assert edit("cut.png", "a.png", "--output", "out") == 1
    assert "cut.png: the picture is damaged or cut short" in capsys.readouterr().err
    assert names(here / "out") == {"a.png"}


def test_a_full_disk_leaves_nothing_behind(
    here: Path, editor: FakeEditor, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = names(here)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert edit("a.png", "b.png", "--overwrite") == 1
    assert "the disk is full" in capsys.readouterr().err
    assert names(here) == before


@pytest.mark.parametrize("words", ["--save-adapter=out", "--compare"])
def test_stopping_leaves_no_partial_files(
    here: Path, editor: FakeEditor, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    before = names(here)
    editor.fails["b.png"] = KeyboardInterrupt()
    assert edit("b.png", words) == 130
    assert capsys.readouterr().err == "openwu: error: stopped\n"
    assert names(here) == before

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    assert edit("a.png") == 130
    assert names(here) == before


def test_memory_and_missing_packages(here: Path, editor: FakeEditor, capsys: pytest.CaptureFixture[str]) -> None:
    editor.fails["a.png"] = MemoryError()
    assert edit("a.png") == 1
    assert "not enough memory" in capsys.readouterr().err
    editor.fails["a.png"] = ModuleNotFoundError("no", name="skimage")
    assert edit("a.png") == 1
    assert "package 'skimage' is not installed" in capsys.readouterr().err
    editor.fails["a.png"] = ModuleNotFoundError("no", name="openwu.gone")
    with pytest.raises(ModuleNotFoundError):
        edit("a.png")


def test_quiet_prints_only_errors(here: Path, editor: FakeEditor, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "deep.ppm").write_bytes(b"P6 1 1 65535\n" + bytes(6))
    assert edit("deep.ppm", "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    for photo, reference in (("deep.ppm", "a.png"), ("a.png", "deep.ppm")):
        assert edit(photo, "--reference", reference, "--output", f"x-{photo}.png") == 0
        captured = capsys.readouterr()
        assert captured.err.startswith("openwu: note: deep.ppm: 16 bits per channel are read as 8")
    values = np.arange(16, dtype=np.uint16).reshape(4, 4) * 4000
    Image.fromarray(values).save("grey.png")
    assert edit("grey.png", "--output", "grey.jpg") == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("openwu: note: grey.jpg: 16 bits are written as 8")
    assert captured.out.startswith("grey.png -> grey.jpg")


def test_the_bar_shows_on_a_terminal_and_waits_elsewhere(
    here: Path, editor: FakeEditor, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert edit("a.png") == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert edit("a.png", "b.png", "--overwrite") == 0
    captured = capsys.readouterr().err
    assert "1/2 a.png" in captured
    assert edit("a.png", "--quiet", "--overwrite") == 0
    assert capsys.readouterr().err == ""


def test_odd_file_names_are_printed_on_one_line(
    here: Path, editor: FakeEditor, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = os.fsdecode(b"photo \xff\n\x1b[31m.png")
    os.rename("a.png", odd)  # noqa: PTH104
    assert edit(odd) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "photo \\udcff\\n\\x1b[31m.png -> " in out
    assert edit("照片.png") == 1
    assert "照片.png: no such file" in capsys.readouterr().err


def test_an_error_of_several_problems_has_a_line_for_each(
    here: Path, editor: FakeEditor, capsys: pytest.CaptureFixture[str]
) -> None:
    editor.fails["a.png"] = OpenwuError.listing("2 problems:", ["a\nb: missing", "\x1b[31mc: unknown"])
    assert edit("a.png") == 1
    assert capsys.readouterr().err.splitlines() == [
        "openwu: error: 2 problems:",
        r"  a\nb: missing",
        r"  \x1b[31mc: unknown",
    ]
    # A line break in a message of one line is foreign text: nothing may pass itself off as a line of ours.
    editor.fails["a.png"] = OpenwuError("odd\nopenwu: error: forged")
    assert edit("a.png") == 1
    assert capsys.readouterr().err == "openwu: error: odd\\nopenwu: error: forged\n"


def test_a_broken_generator_is_told_line_by_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "generator"
    folder.mkdir()
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError) as error:
        ParameterGenerator.from_pretrained(folder)
    console.complain(error.value)
    first, *problems = capsys.readouterr().err.splitlines()
    assert first == f"openwu: error: {folder}: 2 problems in this checkpoint:"
    assert len(problems) == 2
    assert problems[0].startswith("  config.json: ")
    assert problems[1].startswith("  expected model.safetensors")


@pytest.mark.parametrize("verb", [("lab", "conflict"), ("audit",), ("eval", "suite"), ("bench",), ("edit", "a.png")])
def test_every_verb_refuses_unknown_options_in_one_line(
    verb: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([*verb, "--colour"])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("openwu: error: unrecognized arguments: --colour (see openwu ")


# The other verbs


def test_models_reads_its_facts_from_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(EmbeddedBase, "bundled_folder", lambda: tmp_path / "weights")
    examples = {"warm": {"en": "", "zh": ""}, "cool": {"en": "", "zh": ""}}
    edits = {name: KnownEdit(name, texts) for name, texts in examples.items()}
    monkeypatch.setattr(models, "package_edits", lambda: edits)
    assert cli.main(["models"]) == 0
    assert "embedded: not in this installation" in capsys.readouterr().out
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "config.json").write_text("{}")
    header = json.dumps({"__metadata__": {}, "w": {"dtype": "F16", "shape": [30, 40], "data_offsets": [0, 2400]}})
    content = len(header).to_bytes(8, "little") + header.encode() + bytes(2400)
    for part in ("backbone", "generator"):
        (tmp_path / "weights" / f"{part}.safetensors").write_bytes(content)
    assert cli.main(["models"]) == 0
    out = capsys.readouterr().out
    assert "2,400 (backbone 1,200, generator 1,200)" in out
    assert "0.0 MB" in out
    assert "Apache-2.0" in out
    assert "English, Chinese" in out
    assert "2 kinds" in out
    del examples["cool"]["zh"]
    assert cli.main(["models"]) == 0
    assert "Chinese" not in capsys.readouterr().out


def test_train_and_eval_are_passed_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[Any] = []

    def train(recipe: str, overrides: list[str], **options: Any) -> Path:
        asked.append((recipe, overrides, options))
        return Path("runs/x")

    def evaluate(arguments: list[str]) -> int:
        asked.append(arguments)
        return 4

    monkeypatch.setitem(sys.modules, "openwu.cli.train", types.SimpleNamespace(run=train))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "openwu.cli.evaluate.run", types.SimpleNamespace(run=evaluate))  # type: ignore[arg-type]
    assert cli.main(["train", "a.py", "steps=10", "lr=1e-3", "--output", "runs/x", "--stage", "base"]) == 0
    assert capsys.readouterr().out == f"a.py -> {Path('runs/x')}\n"
    assert cli.main(["eval", "--help", "photo.png", "--model", "x"]) == 4
    options = {"output": "runs/x", "stages": ["base"]}
    assert asked == [("a.py", ["steps=10", "lr=1e-3"], options), ["--help", "photo.png", "--model", "x"]]


def test_an_unknown_verb_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["paint"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2
        assert capsys.readouterr().err.startswith("openwu: error: ")


def test_every_option_is_explained() -> None:
    verbs = next(action for action in cli.build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    for verb in ("edit", "train"):
        assert all(action.help for action in verbs.choices[verb]._actions)


# A process of its own


def start(*arguments: str, code: str | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    command = PYTHON if code is None else [sys.executable, "-c", code]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60, **options)


@pytest.mark.parametrize("arguments", [["--help"], ["edit", "--help"], ["train", "--help"], ["--version"]])
def test_help_is_instant_and_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from openwu.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print([name for name in ('torch', 'numpy', 'PIL', 'tqdm') if name in sys.modules])"
    )
    run = start(*arguments, code=code)
    assert run.stdout.splitlines()[-1] == "[]"
    seconds = []
    for _ in range(3):
        before = os.times()  # the processor's seconds: the machine may be busy with something else
        assert start(*arguments).returncode == 0
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(seconds) < 0.5


def test_version() -> None:
    assert start("--version").stdout == f"openwu {openwu.__version__}\n"


def test_a_closed_pipe_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    run = subprocess.run([*PYTHON, "models"], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    assert run.returncode == cli.PIPE_CLOSED
    assert run.stderr == ""


def test_a_real_interrupt_stops_with_130(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    code = (
        "import signal, sys, time, types\n"
        # A test run started in the background inherits that interrupts are ignored; a person's terminal does not.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Editor:\n"
        "    from_pretrained = classmethod(lambda cls, model, **_: cls())\n"
        "    understand = lambda *_, **__: None\n"
        "    def edit(self, *_, **__): print('working', flush=True); [time.sleep(0.05) for _ in range(1000)]\n"
        "sys.modules['openwu.editor.editor'] = types.SimpleNamespace(Editor=Editor)\n"
        "fake = dict(Adapter=None, LoadingOptions=dict, SamplingOptions=dict)\n"
        "sys.modules['openwu.types'] = types.SimpleNamespace(**fake)\n"
        "from openwu.cli import main\n"
        "sys.exit(main(['edit', 'a.png', '--instruction', 'warm']))"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with run:
        assert run.stdout
        assert run.stderr
        assert run.stdout.readline() == "working\n"
        run.send_signal(signal.SIGINT)
        assert run.wait(20) == 130
        assert run.stderr.read() == "openwu: error: stopped\n"
    assert names(tmp_path) == {"a.png"}


def test_messages_survive_a_terminal_without_unicode(capfd: pytest.CaptureFixture[str]) -> None:
    run = start("edit", "照片.png", "--instruction", "warm", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert run.returncode == 1
    assert "\\u7167\\u7247.png: no such file" in run.stderr
    console.say("照片")
    assert capfd.readouterr().out == "照片\n"


def test_anyway_tries_what_the_model_refuses(
    here: Path, editor: FakeEditor, capsys: pytest.CaptureFixture[str]
) -> None:
    assert edit("a.png", "--output", "out.png", instruction="add a dragon") == 2
    assert "--allow-out-of-scope" in capsys.readouterr().err
    assert not Path("out.png").exists()
    assert edit("a.png", "--output", "out.png", "--allow-out-of-scope", instruction="add a dragon") == 0
    assert Path("out.png").exists()


def test_a_full_disk_ends_the_command_with_nothing_left_behind(
    here: Path, editor: FakeEditor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = names(here)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    assert edit("a.png", "--output", "out.png", "--compare") == 1
    assert "the disk is full" in capsys.readouterr().err
    assert names(here) == before
