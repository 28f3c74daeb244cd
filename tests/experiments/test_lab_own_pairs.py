"""`openwu lab own-pairs`: what is scored against what, and what the guards change."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from openwu.backbones.embedded.config import read_config
from openwu.cli import main
from openwu.data.suite.photographs import Photograph, load_folder
from openwu.evaluation.experiments.comparisons.own_pairs import (
    LOOKS,
    WAYS,
    OwnPairsResults,
    OwnPairsScore,
    look_pairs,
)
from openwu.evaluation.metrics import psnr

KNOWN = {"blur": 30.0, "warm": 34.0}


@pytest.mark.parametrize("name", LOOKS)
def test_pairs_show_the_look_in_every_wording(name: str) -> None:
    photographs, look = load_folder(Path("photos"), validation=True), LOOKS[name]
    pairs = look_pairs(name, photographs, 2, seed=1)
    assert {pair.where for pair in pairs.pairs} == {photograph.name for photograph in photographs}
    images, target = pairs.pairs[0].load()
    assert float(psnr(look.apply(images[0])[None], target[None])[0]) > 50  # up to the rounding of bytes
    assert float(psnr(images[0][None], target[None])[0]) < 25
    assert all(pair.task == name and pair.instructions == look.wordings for pair in pairs.pairs)
    assert not set(look.wordings) & set(look.paraphrases)


def test_what_is_lost_is_counted_from_the_start_of_the_same_seed() -> None:
    start = OwnPairsScore("start", 0, KNOWN, 13.0, 12.0)
    worse = replace(start, way="as read, alone", known={"blur": 27.0, "warm": 33.5}, trained=20.0, steps=4, seconds=9)
    second = [replace(each, seed=1, known={name: 1 + v for name, v in each.known.items()}) for each in (start, worse)]
    glowing = replace(worse, look="album", known=KNOWN, trained=25.0)
    found = OwnPairsResults([start, worse, *second, glowing], copied={"shop": 18.6, "album": 17.0})
    table = found.table()
    row = next(line for line in table.splitlines() if line.startswith("as read, alone  shop"))
    assert "  1.75 [" in row
    assert "3.00 (blur)" in row
    assert "20.00" in row
    assert "2 known edits, seeds: 2; copying the picture has: shop 18.60 dB, album 17.00 dB" in table
    other = next(line for line in table.splitlines() if line.startswith("as read, alone  album"))
    assert other.split()[4:10] == ["0.00", "[0.00,", "0.00]", "0.00", "25.00", "12.00"]
    assert OwnPairsResults.from_json(json.loads(json.dumps(found.to_json()))).table() == table


def test_every_way_is_trained_and_scored(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    two: list[Photograph] = load_folder(Path("photos"), validation=True)
    monkeypatch.setattr("openwu.evaluation.experiments.runs.load_folder", lambda *_, **__: two)
    monkeypatch.setattr("openwu.evaluation.experiments.comparisons.own_pairs.PAIRS", 1)
    monkeypatch.setattr("openwu.evaluation.experiments.comparisons.own_pairs.HELD_BACK", 1)
    monkeypatch.setattr("openwu.training.embedded.own_words.STEPS", 20)
    monkeypatch.setattr("openwu.training.embedded.own_words.SENTENCES", 40)
    arguments = ["--model", str(model_folder), "--output", str(tmp_path), "--quick", "--side", "48", "--seeds", "0"]
    arguments += ["--look", "zine"]
    assert main(["lab", "own-pairs", *arguments, "--steps", "1"]) == 0
    printed = capsys.readouterr().out
    stored = json.loads((tmp_path / "own_pairs.json").read_text())
    assert [each["way"] for each in stored["scores"]] == ["start", *WAYS]
    assert {each["look"] for each in stored["scores"]} == {"zine"} == set(stored["copied"])
    start, alone, *_ = stored["scores"]
    assert set(start["known"]) == set(read_config(model_folder)["instruction"]["labels"]) - {"out_of_scope"}
    words = next(each for each in stored["scores"] if each["way"] == "own label, words")
    assert words["kept"] == 1.0
    assert alone["steps"] == 1
    assert main(["lab", "own-pairs", "--from", str(tmp_path / "own_pairs.json")]) == 0
    assert capsys.readouterr().out == printed
    assert main(["lab", "own-pairs", "--edit", "warm"]) == 2
    assert main(["lab", "conflict", "--look", "zine"]) == 2
