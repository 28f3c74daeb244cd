"""The page of all edits: every edit that the model knows, and its pictures."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from openwu import cli
from openwu.data.suite import EDITS
from openwu.data.suite.phrases import OUT_OF_SCOPE, load_phrases
from openwu.errors import OpenwuError
from openwu.evaluation import gallery
from openwu.evaluation.gallery import write_gallery
from openwu.evaluation.pictures import HEAD, LABEL
from openwu.training.embedded.model import EmbeddedModel

SHOWN = ("brighten", "take_light", "take_grain", OUT_OF_SCOPE)


@pytest.fixture
def photographs(scene: Callable[..., NDArray[np.uint8]], monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    monkeypatch.setattr(gallery, "SIDE", 48)
    sizes = {"coffee": (60, 50), "low": (60, 20), "rocket": (48, 48)}
    return {
        name: torch.from_numpy(scene(*size, seed)).permute(2, 0, 1).float() / 255
        for seed, (name, size) in enumerate(sizes.items())
    }


def test_every_known_edit_is_listed_and_shown(
    embedded_model: EmbeddedModel, photographs: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    model = embedded_model
    model.config = replace(model.config, instruction=replace(model.config.instruction, labels=SHOWN))
    page = write_gallery(model, photographs, tmp_path)
    text = page.read_text(encoding="utf-8")
    assert page.name == "README.md"
    listed = re.findall(r"^\| `(\w+)`( \*)? \| (?:`(\w+)`)? \| (.*) \| (.*) \|$", text, flags=re.MULTILINE)
    assert [row[0] for row in listed] == [name for name in EDITS if name in SHOWN]
    for name, star, opposite, english, chinese in listed:
        assert bool(star) == EDITS[name].graded
        assert (opposite or None) == EDITS[name].opposite
        phrases = load_phrases()[name]
        assert (english, chinese) == (phrases["en"]["train"][0], phrases["zh"]["train"][0])
    pictures = re.findall(r"!\[(\w+)\]\((\w+\.jpg)\)", text)
    assert pictures == [("light", "light.jpg"), ("reference", "reference.jpg")]
    assert {file.name for file in tmp_path.iterdir()} == {"README.md", "light.jpg", "reference.jpg"}
    for file, columns, rows in (("light.jpg", 3, 1), ("reference.jpg", 4, 2)):
        with Image.open(tmp_path / file) as sheet:
            assert sheet.size == (LABEL + columns * 48, HEAD + rows * 48)
            assert np.asarray(sheet)[HEAD:, LABEL:].std() > 20


def test_photographs_that_are_too_small_are_refused(
    embedded_model: EmbeddedModel, photographs: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    with pytest.raises(OpenwuError, match="at least 48 x 48 pixels, got none; ask for a larger --side"):
        write_gallery(embedded_model, {"low": photographs["low"]}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_command_line_writes_the_page(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery, "SIDE", 32)
    output = tmp_path / "new" / "edits"
    assert cli.main(["eval", "gallery", "--model", str(model_folder), "--output", str(output), "--side", "64"]) == 0
    assert capsys.readouterr().out == f"{output / 'README.md'}\n"
    assert {file.name for file in output.iterdir()} == {"README.md", "light.jpg", "sharpness.jpg"}
    assert cli.main(["eval", "gallery", "--model", str(model_folder), "--output", str(output), "--side", "24"]) == 1
    assert "ask for a larger --side" in capsys.readouterr().err
