"""Cosines of gradients: of known losses, and of the embedded model's sub-tasks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from openwu.cli import main
from openwu.data.suite.photographs import load_folder
from openwu.evaluation.experiments.pictures import draw_gradient_curves
from openwu.evaluation.experiments.probes import gradients
from openwu.evaluation.experiments.probes.gradients import (
    GradientConflict,
    generator_conflict,
    gradient,
    shared_conflicts,
    task_cosines,
)
from openwu.evaluation.experiments.runs import EXPERIMENTS
from openwu.training.embedded.model import EmbeddedModel

TASKS, OPPOSITES = ("warm", "cool", "fog"), (("warm", "cool"),)


def test_a_gradient_is_autograds() -> None:
    layer = nn.Linear(2, 1)
    found = gradient(layer, lambda: (layer(torch.tensor([[3.0, 4.0]]))).sum())
    assert found.tolist() == [3, 4, 1]
    assert layer.weight.grad is None
    assert gradient(layer, lambda: layer.weight.sum(), lambda name: name == "bias").tolist() == [0]


def test_cosines_compare_different_samples_alone() -> None:
    """Two tasks that pull apart, each with noise that both share in a sample: the noise must not make them alike."""
    noise = 10 * torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    noise -= noise.mean(1, keepdim=True)

    def sample(task: str, which: int) -> Tensor:
        return (1.0 if task == "up" else -1.0) * 30 * torch.ones(50) + noise[which]

    cosine = task_cosines("test", ("up", "down"), sample, 4)
    assert cosine[0, 0] > 0.8
    assert cosine[0, 1] == pytest.approx(-float(cosine[0, 0]), abs=0.05)
    assert torch.equal(cosine, cosine.t())
    with pytest.raises(ValueError, match="samples: expected at least 2"):
        task_cosines("test", ("up", "down"), sample, 1)


def test_means_over_pairs() -> None:
    first = torch.tensor([[0.9, -0.5, 0.1], [-0.5, 0.8, 0.2], [0.1, 0.2, 0.7]])
    found = GradientConflict("here", TASKS, torch.stack([first, first]), OPPOSITES)
    assert found.contradictory.value == pytest.approx(-0.5)
    assert found.all_pairs.value == pytest.approx((-0.5 + 0.1 + 0.2) / 3)
    assert found.same_task.value == pytest.approx(0.8)
    stored = json.loads(json.dumps(found.to_json()))
    assert stored["contradictory"]["value"] == pytest.approx(-0.5)


def test_sub_tasks_of_the_embedded_model(embedded_model: EmbeddedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "SIDE", 64)
    monkeypatch.setattr(gradients, "CROP", 32)
    monkeypatch.setattr(gradients, "REQUESTS", 2)
    photographs = load_folder(Path("photos"), validation=True)
    before = {name: value.clone() for name, value in embedded_model.state_dict().items()}
    found = shared_conflicts(embedded_model, photographs, TASKS, OPPOSITES, (0, 3), (0, 1))
    untold = shared_conflicts(embedded_model, photographs, TASKS, OPPOSITES, (0,), (0,), base_reads_instruction=False)
    assert [each.where for each in untold] == ["shared LoRA, base not told, after 0 steps"]
    assert not torch.equal(untold[0].cosine[0], found[0].cosine[0])
    found.append(generator_conflict(embedded_model, photographs, TASKS, OPPOSITES, (0,)))
    assert [each.where for each in found] == [
        "shared LoRA after 0 steps",
        "shared LoRA after 3 steps",
        "generator, trained",
    ]
    assert [each.cosine.shape for each in found] == [(2, 3, 3), (2, 3, 3), (1, 3, 3)]
    for each in found:
        assert bool(each.cosine.isfinite().all())
        assert each.cosine.abs().max() <= 1 + 1e-4
    assert not torch.equal(found[0].cosine, found[1].cosine)
    assert all(torch.equal(before[name], value) for name, value in embedded_model.state_dict().items())
    assert not any(p.requires_grad for p in embedded_model.parameters())


def test_cosines_along_a_training_are_drawn_told_and_untold_apart(tmp_path: Path) -> None:
    cosine = torch.eye(3).expand(2, 3, 3)
    found = [
        GradientConflict(f"after {step}", TASKS, cosine * (1 - step / 20), OPPOSITES, step, told)
        for told in (True, False)
        for step in (0, 1, 10)
    ]
    stored = json.loads(json.dumps([each.to_json() for each in found]))
    assert [(each["step"], each["told"]) for each in stored[2:4]] == [(10, True), (0, False)]
    drawn = draw_gradient_curves(found, tmp_path / "curves.png")
    other = draw_gradient_curves(
        [*found[:3], *[replace(each, told=False) for each in found[:2]]], tmp_path / "other.png"
    )
    assert drawn.read_bytes() != other.read_bytes()


def test_steps_of_the_curve_are_checked_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "gradients", "--along", "0", "5", "5"]) == 1
    assert "--along: expected different numbers of steps, none below 0, got [0, 5, 5]" in capsys.readouterr().err
    assert main(["lab", "conflict", "--along", "0"]) == 2
    assert "it does not read --along" in capsys.readouterr().err


def test_the_report_of_a_curve_is_made_from_its_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[Path] = []
    monkeypatch.setattr("openwu.cli.lab.note_reports", noted.append)
    monkeypatch.setitem(EXPERIMENTS, "gradients", lambda _: "")
    assert main(["lab", "gradients", "--quick", "--along", "0", "5", "--output", str(tmp_path)]) == 0
    assert main(["lab", "gradients", "--quick", "--output", str(tmp_path)]) == 0
    assert [file.name for file in noted] == ["gradients-along.json", "gradients.json"]
