"""`openwu eval suite` from end to end: files, numbers, marks of a card, and what is refused before the work begins."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from openwu import cli
from openwu.cli.evaluate import run as command
from openwu.errors import CheckpointError, OpenwuError
from openwu.evaluation import model_card
from openwu.evaluation.model_card import SECTIONS, load_model, load_photographs
from openwu.evaluation.suite import METHODS, Report, Score, evaluate_suite
from openwu.files.markdown import filled
from openwu.types import Adapter

FEW = ("brighten", "darken", "blur")
SMALL = ["--side", "40", "--seeds", "3", "--photograph", "coffee", "--photograph", "rocket"]


def blank_card() -> str:
    return "# Card\n" + "".join(f"<!-- {name}: begin -->\nold\n<!-- {name}: end -->\nkept 保留\n" for name in SECTIONS)


def refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def test_the_command_writes_tables_numbers_and_pictures(
    model_with_baseline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model knows three edits: goals, repairs and combinations of others are left out, not wrong."""
    card, output = tmp_path / "card.md", tmp_path / "deep" / "out"
    card.write_text(blank_card(), encoding="utf-8")
    arguments = ["eval", "suite", "--model", str(model_with_baseline), "--output", str(output), "--card", str(card)]
    assert cli.main([*arguments, *SMALL]) == 0
    printed = capsys.readouterr().out
    assert {file.name for file in output.iterdir()} == {
        *(f"suite.{kind}" for kind in ("json", "md", "jpg")),
        "worst.jpg",
        "strength.jpg",
        "report",
        "trials",
    }
    pages = {page.parent.name for page in output.glob("report/*/report.html")}
    assert pages == {"suite-suite", "suite-wording", "suite-strength"}

    numbers = json.loads((output / "suite.json").read_text(encoding="utf-8"), parse_constant=refuse_constant)
    assert (numbers["seeds"], numbers["side"]) == ([3], 40)
    assert {each["edit"] for each in numbers["scores"]} == set(FEW)
    assert {each["photograph"] for each in numbers["scores"]} == {"coffee", "rocket"}
    assert {each["method"] for each in numbers["scores"]} == set(METHODS)
    report = Report([Score(**score) for score in numbers["scores"]])
    assert numbers["summary"] == pytest.approx(report.summary())
    assert numbers["missed"] == report.missed()
    assert (numbers["composition"], numbers["repairs"]) == ([], {})
    assert {each["edit"] for each in numbers["strength"]} == set(FEW)
    assert {each["edit"] for each in numbers["wording"]} == set(FEW)
    asked = [goal["name"] for goal in numbers["goals"]]
    assert "blur, PSNR (dB)" in asked
    assert not any(word in name for name in asked for word in ("denoise", "deblur", "restore"))
    assert all(goal["met"] == (goal["measured"] >= goal["wanted"]) for goal in numbers["goals"])

    text = card.read_text(encoding="utf-8")
    assert text.count("old") == 0
    assert text.count("kept 保留") == len(SECTIONS)
    page = (output / "suite.md").read_text(encoding="utf-8")
    for name in SECTIONS:
        begin, end = text.index(f"<!-- {name}: begin -->"), text.index(f"<!-- {name}: end -->")
        section = text[begin:end].split("-->")[1].strip()
        assert len(section) > 40
        assert section in printed
        assert section in page
        assert f"## {name.capitalize()}\n" in page
    with Image.open(output / "suite.jpg") as sheet:
        assert sheet.size[0] > 6 * 40

    without = Path(shutil.copytree(model_with_baseline, tmp_path / "without"))
    baseline = Path(shutil.move(without / "shared", tmp_path / "baseline"))
    assert cli.main(["eval", "suite", "--model", str(without), "--output", str(tmp_path / "two"), *SMALL]) == 0
    numbers = json.loads((tmp_path / "two" / "suite.json").read_text(encoding="utf-8"), parse_constant=refuse_constant)
    assert {each["method"] for each in numbers["scores"]} == set(METHODS) - {"shared"}

    arguments = [
        "eval",
        "suite",
        "--model",
        str(without),
        "--shared",
        str(baseline),
        "--output",
        str(tmp_path / "three"),
    ]
    assert cli.main([*arguments, *SMALL]) == 0
    given = json.loads((tmp_path / "three" / "suite.json").read_text(encoding="utf-8"))
    beside = json.loads((output / "suite.json").read_text(encoding="utf-8"))
    assert given["scores"] == beside["scores"]


@pytest.mark.parametrize("broken", SECTIONS)
def test_a_card_is_filled_for_every_section_or_not_at_all(tmp_path: Path, broken: str) -> None:
    card, sections = tmp_path / "card.md", {name: f"| new {name} |\n\n" for name in SECTIONS}
    card.write_text(blank_card(), encoding="utf-8")
    page = filled(card, sections, "--card")
    assert page == blank_card().replace("old", "{}").format(*(f"| new {name} |" for name in SECTIONS))
    card.write_text(page, encoding="utf-8")
    assert filled(card, sections, "--card") == page
    begin, end = f"<!-- {broken}: begin -->", f"<!-- {broken}: end -->"
    for text in (
        blank_card().replace(begin, ""),
        blank_card().replace(end, ""),
        blank_card().replace(begin, "?").replace(end, begin).replace("?", end),
    ):
        card.write_text(text, encoding="utf-8")
        with pytest.raises(OpenwuError, match=f"expected the marks {begin}"):
            filled(card, sections, "--card")
        assert card.read_text(encoding="utf-8") == text


def test_a_card_that_cannot_be_filled_is_refused_before_the_work(
    model_with_baseline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_card, "measure", lambda *_: pytest.fail("measured"))
    card = tmp_path / "card.md"
    arguments = ["suite", "--model", str(model_with_baseline), "--output", str(tmp_path / "out"), *SMALL]
    with pytest.raises(OpenwuError, match=r"--card: expected a Markdown file, got .*card\.md"):
        command.run([*arguments, "--card", str(card)])
    card.write_text(blank_card().replace("<!-- wording: end -->", ""), encoding="utf-8")
    before = card.read_bytes()
    with pytest.raises(OpenwuError, match="wording"):
        command.run([*arguments, "--card", str(card)])
    assert card.read_bytes() == before


def test_what_cannot_be_evaluated_is_refused(model_with_baseline: Path, tmp_path: Path) -> None:
    with pytest.raises(OpenwuError, match=r"--photograph: expected some of .*, got \['lena'\]"):
        command.run(["suite", "--model", str(model_with_baseline), "--side", "32", "--photograph", "lena"])
    (model_with_baseline / "shared" / "adapter_config.json").write_text("{}")
    arguments = ["--side", "32", "--output", str(tmp_path / "out")]
    with pytest.raises(CheckpointError, match="shared"):
        command.run(["suite", "--model", str(model_with_baseline), *arguments])
    with pytest.raises(CheckpointError, match=r"config\.json"):
        command.run(["suite", "--model", str(tmp_path / "nowhere"), *arguments])
    with pytest.raises(CheckpointError, match="baseline"):
        command.run(["suite", "--model", str(model_with_baseline), "--shared", str(tmp_path / "baseline"), *arguments])


def test_an_interrupted_measurement_goes_on(
    model_with_baseline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["eval", "suite", "--model", str(model_with_baseline), "--output", str(tmp_path / "out"), *SMALL]
    asked: list[str | None] = []

    def suite(*given: Any, only: str | None = None) -> Report:
        if asked == ["coffee"]:
            asked.append("interrupted")
            raise OpenwuError("interrupted")
        asked.append(only)
        return evaluate_suite(*given, only=only)

    monkeypatch.setattr(model_card, "evaluate_suite", suite)
    assert cli.main(arguments) != 0
    assert not (tmp_path / "out" / "suite.json").exists()

    def again(*_: Any) -> Any:
        raise AssertionError("measured twice")

    for name in ("evaluate_wording", "evaluate_strength", "evaluate_composition", "repair_gains"):
        monkeypatch.setattr(model_card, name, again)
    assert cli.main(arguments) == 0
    assert asked == ["coffee", "interrupted", "rocket"]
    numbers = json.loads((tmp_path / "out" / "suite.json").read_text(encoding="utf-8"))
    assert len(numbers["scores"]) == 2 * len(FEW) * len(METHODS)
    pictures = load_photographs(40, ["coffee", "rocket"])
    model, folder = load_model(str(model_with_baseline))
    at_once = evaluate_suite(model, Adapter.from_pretrained(folder / "shared"), pictures, [3], FEW)
    assert [Score(**each) for each in numbers["scores"]] == at_once.scores
