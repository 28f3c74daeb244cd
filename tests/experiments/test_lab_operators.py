"""`openwu lab operators`: every kind is trained on the same base, its numbers are counted, and the table comes back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from openwu.cli import main
from openwu.data.suite.photographs import load_folder
from openwu.evaluation.experiments.comparisons.operators import BASE, KINDS, Kind, OperatorResults, Point, with_kind
from openwu.evaluation.experiments.methods import Budget
from openwu.training.embedded.model import EmbeddedModel

SOME = (Kind("lora", 4), Kind("basis_diagonal", 4), Kind("lora+offset", 4))


def test_the_command_trains_counts_and_draws(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    two = load_folder(Path("photos"), validation=True)
    monkeypatch.setattr("openwu.evaluation.experiments.runs.load_folder", lambda *_, **__: two)
    monkeypatch.setattr("openwu.evaluation.experiments.runs.QUICK_OPERATORS", Budget(steps=1, requests=1, crop=32))
    monkeypatch.setattr("openwu.evaluation.experiments.methods.SIDE", 64)
    monkeypatch.setattr("openwu.evaluation.experiments.runs.OPERATOR_KINDS", SOME)
    words = ["lab", "operators", "--quick", "--side", "48", "--seeds", "0", "--edit", "fog", "--edit", "age"]
    assert main([*words, "--model", str(model_folder), "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "numbers a request" in printed
    stored = json.loads((tmp_path / "operators.json").read_text())
    assert [each["kind"] for each in stored["kinds"]] == [BASE, *(kind.name for kind in SOME)]
    counted = {each["kind"]: (each["numbers"], each["shared"]) for each in stored["kinds"]}
    assert counted[BASE] == (0, 0)
    low, basis, both = (counted[kind.name] for kind in SOME)
    assert basis[0] < low[0] < both[0]
    assert (low[1], basis[1]) == (0, low[0])  # A0 and B0 are as many as A and B.
    assert (tmp_path / "operators.png").stat().st_size > 5000
    assert main(["lab", "operators", "--from", str(tmp_path / "operators.json")]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_kind_has_the_scale_of_the_shipped_generator(embedded_model: EmbeddedModel, kind: Kind) -> None:
    changed = with_kind(embedded_model, kind, 16)
    assert changed.generator.scale == pytest.approx(embedded_model.generator.scale)
    assert {target.operator for target in changed.generator.targets} == {kind.operator}
    assert torch.equal(changed.backbone.embed.weight, embedded_model.backbone.embed.weight)


def test_a_model_that_reads_examples_is_compared_without_that_branch(embedded_model: EmbeddedModel) -> None:
    """The branch has the generator's rank, so that no other rank would fit beside it."""
    config = embedded_model.config.with_examples(d_model=32, head_dim=16, dim_accumulation=2, blocks=1)
    changed = with_kind(EmbeddedModel(config), Kind("lora", 1), 16)
    assert (changed.generator.config.rank, dict(changed.generator.branches)) == (1, {})
    assert changed.instruction.wordless is None


def test_a_lead_is_taken_task_by_task() -> None:
    points = [Point(BASE, 0, 0, 0, {"a": 10.0, "b": 20.0}), Point("scale", 0, 5, 0, {"a": 12.0, "b": 21.0})]
    found = OperatorResults(points)
    assert found.lead("scale", BASE).value == pytest.approx(1.5)
    assert found.table().splitlines()[2].startswith("scale")
