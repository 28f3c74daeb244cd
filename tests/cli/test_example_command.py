"""`openwu edit --example`: one adapter for all photos, how far the example is understood, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_cases import FakeBackbone, FakeEditor, edit, names
from PIL import Image

from openwu.cli.edit import progress as bars
from openwu.editor.shown.reproduction import Reproduction
from openwu.errors import ExampleError

PAIR = ("--example", "a.png", "b.png")


@pytest.fixture
def here(here: Path) -> Path:
    """The folder with larger pictures: those of an example must not be tiny."""
    for name, value in (("a.png", 10), ("b.png", 20), ("c.jpg", 30)):
        Image.new("RGB", (48, 36), (value, value, 200)).save(name)
    return here


def test_an_example_is_measured_once_and_said(
    here: Path, editor: FakeEditor, capsys: pytest.CaptureFixture[str]
) -> None:
    assert edit("a.png", "c.jpg", *PAIR, "--output", "out/", instruction=None) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0] == "example: 90% of its change reproduced (34.0 dB)"
    assert "partly" not in captured.err
    assert editor.shown == ("", 1, None)
    assert all("example" not in each for each in editor.asked)  # the adapter says it all
    assert edit("a.png", *PAIR, *PAIR, "--output", "new/", "--json", instruction="warmer") == 0
    assert json.loads(capsys.readouterr().out)["reproduced"] == 0.9
    assert editor.shown == ("warmer", 2, None)


def test_an_example_that_is_partly_understood_is_noted_once(
    here: Path, editor: FakeEditor, capsys: pytest.CaptureFixture[str]
) -> None:
    editor.reproduced = Reproduction((0.2,), (0.1,))
    assert edit("a.png", "c.jpg", *PAIR, "--output", "out/", instruction=None) == 0
    captured = capsys.readouterr()
    assert "example: 50%" in captured.out
    assert captured.err.count("only partly understood (50% of its change)") == 1


def test_an_example_that_is_not_understood_edits_nothing(
    here: Path, editor: FakeEditor, capsys: pytest.CaptureFixture[str]
) -> None:
    before = names(here)
    same = ("--example", "a.png", "a.png")
    assert edit("a.png", "c.jpg", *same, "--output", "out/", instruction=None) == 2
    assert "example: not understood" in capsys.readouterr().err
    assert names(here) == before
    assert edit("a.png", *same, "--dry-run", instruction=None) == 2
    assert edit("a.png", *same, "--output", "out/", "--allow-out-of-scope", instruction=None) == 0


def test_an_example_is_refined_where_that_is_asked(
    here: Path, editor: FakeEditor, capsys: pytest.CaptureFixture[str]
) -> None:
    editor.reproduced = Reproduction((0.2,), (0.006,), before=0.86)
    assert edit("a.png", "c.jpg", *PAIR, "--output", "out/", instruction=None) == 0
    assert editor.refined == 0
    assert edit("a.png", *PAIR, "--output", "new/", "--refine", instruction=None) == 0
    assert editor.refined == 30
    assert "example: 86% -> 97% of its change reproduced" in capsys.readouterr().out
    assert edit("a.png", *PAIR, "--output", "more/", "--refine", "100", instruction=None) == 0
    assert editor.refined == 100


@pytest.mark.parametrize(
    "arguments",
    [
        ("--refine", "--instruction", "warmer"),
        (*PAIR, "--refine", "--per-photo"),
        (*PAIR, "--refine", "--ray"),
        *((*PAIR, "--refine", steps) for steps in ("0", "501", "c.jpg")),
    ],
)
def test_refining_is_refused_where_it_makes_no_sense(
    here: Path, editor: FakeEditor, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    try:
        code: object = edit("a.png", "--output", "out/", *arguments, instruction=None)
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert "--refine: expected" in capsys.readouterr().err
    assert editor.loaded == 0


@pytest.mark.parametrize("per_photo", [(), ("--per-photo",)])
@pytest.mark.parametrize(
    ("pair", "code", "words"),
    [
        (("missing.png", "b.png"), 1, "missing.png: no such file"),
        (("a.png", "."), 1, "expected a picture, got a folder"),
        (("broken.png", "b.png"), 1, "broken.png: "),
        (("cut.png", "b.png"), 1, "cut.png: "),
        (("dot.png", "dot.png"), 2, "example: expected two pictures of at least 32 pixels on a side, got 1 x 1 before"),
        (("a.png", "dot.png"), 2, "example: expected two pictures of at least 32 pixels"),
        (("a.png", "wide.png"), 2, "example: expected two pictures of one shape, got 48 x 36 before and 90 x 36 after"),
        (("left.png", "right.png"), 2, "example: the two pictures do not show the same scene"),
    ],
)
def test_pairs_that_are_no_example_end_the_command_before_any_photo(
    here: Path,
    editor: FakeEditor,
    capsys: pytest.CaptureFixture[str],
    pair: tuple[str, str],
    code: int,
    words: str,
    per_photo: tuple[str, ...],
) -> None:
    """Files that cannot be read are 1, as of photographs; what an example shows is 2, as what words say."""
    Image.new("RGB", (1, 1)).save("dot.png")
    Image.new("RGB", (90, 36)).save("wide.png")
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    noise.save("left.png")
    noise.rotate(90).save("right.png")
    noise.save("cut.png")
    (here / "cut.png").write_bytes((here / "cut.png").read_bytes()[:-400])
    (here / "broken.png").write_bytes(b"no picture")
    before = names(here)
    assert edit("a.png", "c.jpg", "--example", *pair, *per_photo, "--output", "out/", instruction=None) == code
    error = capsys.readouterr().err
    assert words in error
    assert error.count("error:") == 1
    assert names(here) == before
    assert editor.loaded == 0
    assert not editor.asked


def test_what_no_photo_can_be_served_with_is_said_once_with_an_adapter_for_each_too(
    here: Path, editor: FakeEditor, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("a.png", "c.jpg", "--per-photo", "--output", "out/")
    assert edit(*asked, "--example", "a.png", "a.png", instruction=None) == 2
    assert (
        capsys.readouterr().err.count("example: expected a picture before an edit and one after it, got two that") == 1
    )
    editor.backbone = FakeBackbone(reads_examples=False)
    assert edit(*asked, *PAIR, instruction=None) == 2
    assert capsys.readouterr().err.count("example: expected none for fake, which reads words only") == 1
    editor.backbone = FakeBackbone()
    assert edit(*asked, *PAIR, "--strength", "3", instruction=None) == 2
    assert capsys.readouterr().err.count("strength: expected -1 to 2 for fake") == 1
    assert not editor.asked
    editor.fails["c.jpg"] = ExampleError("example: not understood")  # by the adapter of this photo
    assert edit(*asked, *PAIR, instruction=None) == 1


def test_an_example_is_not_written_over(here: Path, editor: FakeEditor, capsys: pytest.CaptureFixture[str]) -> None:
    before = (here / "b.png").read_bytes()
    assert edit("a.png", *PAIR, "--output", "b.png", "--overwrite", instruction=None) == 1
    assert "the output is the input b.png" in capsys.readouterr().err
    assert (here / "b.png").read_bytes() == before


def test_refining_is_said_only_where_it_trains(here: Path, editor: FakeEditor, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    real = bars.Progress.photo

    def photo(self: bars.Progress, number: int, total: int, name: str) -> object:
        shown.append(name)
        return real(self, number, total, name)

    monkeypatch.setattr(bars.Progress, "photo", photo)
    assert edit("a.png", *PAIR, "--output", "out/", "--refine", "3", instruction=None) == 0
    assert shown == ["refining on the example", "a.png"]
    shown.clear()
    editor.kept = True
    assert edit("a.png", *PAIR, "--output", "new/", "--refine", "3", instruction=None) == 0
    assert shown == ["a.png"]


def test_a_dry_run_does_not_train(here: Path, editor: FakeEditor, capsys: pytest.CaptureFixture[str]) -> None:
    before = names(here)
    assert edit("a.png", *PAIR, "--refine", "40", "--dry-run", instruction=None) == 0
    captured = capsys.readouterr()
    assert editor.refined == 0
    assert "example: 90% of its change reproduced" in captured.out
    assert "a.png -> a.edited.png  (dry run)" in captured.out
    assert "refine: the adapter was not trained; without --dry-run it is, for 40 steps on the example" in captured.err
    assert "accepted from" not in captured.err
    editor.reproduced = Reproduction((0.2,), (0.19,))  # too little as generated, which training may change
    assert edit("a.png", *PAIR, "--refine", "40", "--dry-run", instruction=None) == 0
    assert "and accepted from 60% of the change on" in capsys.readouterr().err
    assert edit("a.png", "--example", "a.png", "a.png", "--refine", "--dry-run", instruction=None) == 2
    assert "look alike" in capsys.readouterr().err
    editor.backbone = FakeBackbone(refines_examples=False)
    assert edit("a.png", *PAIR, "--refine", "--dry-run", instruction=None) == 2
    assert "refine: expected 0 for fake" in capsys.readouterr().err
    assert names(here) == before
