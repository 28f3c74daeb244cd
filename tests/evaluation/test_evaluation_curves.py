"""Curves of a training run: points against minutes, a picture, and what is said of a folder that is no run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from openwu import cli
from openwu.errors import OpenwuError
from openwu.evaluation.curves import SHOWN, read_curves
from openwu.training.embedded.config import STAGES
from openwu.training.loop import SECONDS


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two stages as the training loop leaves them: six minutes each, an evaluation every two."""
    for stage, name in (("instruction", "held_out/right_edit_en"), ("base", "psnr_mean")):
        folder = tmp_path / "run" / stage
        with SummaryWriter(str(folder)) as curves:
            for step in (10, 20, 30):
                curves.add_scalar(name, step / 100, step)
                curves.add_scalar("learning_rate", 1.0, step)
        (folder / SECONDS).write_text("120.0\n240.0\n", encoding="utf-8")
    return tmp_path / "run"


def test_points_stand_at_their_minutes(run: Path) -> None:
    curves = read_curves(run)
    assert list(curves) == ["instruction", "base"]
    assert curves["base"] == {"psnr_mean": [(2.0, 0.1), (4.0, 0.2), (6.0, 0.3)]}
    assert list(curves["instruction"]) == ["held_out/right_edit_en"]


def test_the_command_writes_points_and_a_picture(run: Path, tmp_path: Path) -> None:
    assert cli.main(["eval", "curves", "--run", str(run), "--output", str(tmp_path / "out")]) == 0
    points = json.loads((tmp_path / "out" / "curves.json").read_text(encoding="utf-8"))
    assert points["base"]["psnr_mean"][-1] == [6.0, 0.3]
    with Image.open(tmp_path / "out" / "curves.png") as picture:
        assert picture.size[0] > picture.size[1] > 100


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(OpenwuError, match="expected the folder of a training run"):
        read_curves(tmp_path)
    assert cli.main(["eval", "curves", "--run", str(tmp_path), "--output", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()


def test_every_stage_has_curves() -> None:
    assert set(SHOWN) == set(STAGES)
