"""Quality against size: each axis alone, and a line through what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from openwu.data.suite.photographs import load_folder
from openwu.evaluation.experiments import methods
from openwu.evaluation.experiments.comparisons.scaling import Point, Scaling, scaling, with_base_width
from openwu.evaluation.experiments.methods import Budget
from openwu.training.embedded.model import EmbeddedModel

TASKS = ("darken", "fade")


def test_both_axes_are_measured_apart(embedded_model: EmbeddedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "SIDE", 64)
    photographs = load_folder(Path("photos"), validation=True)
    test = {name: torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(0)) for name in ("coffee", "china")}
    before = {name: value.clone() for name, value in embedded_model.state_dict().items()}
    found = scaling(
        embedded_model, photographs, test, TASKS, ("warm",), Budget(2, 2, 32), 2, (0,), ((16, 1), (32, 1)), (16, 32)
    )
    assert found.axes == ["generator", "base"]
    assert list(found.sizes("generator")) == ["width 16, 1 blocks", "width 32, 1 blocks"]
    assert found.sizes("generator")["width 32, 1 blocks"] == embedded_model.num_parameters["generator"]
    small, large = found.sizes("base").values()
    assert small < large
    assert {tuple(point.scores) for point in found.points} == {TASKS}
    assert all(torch.equal(before[name], value) for name, value in embedded_model.state_dict().items())
    json.dumps(found.to_json())


def test_the_line_is_the_one_through_the_points() -> None:
    points = [
        Point("generator", str(n), n, 0, {"x": 10 + 2 * power, "y": 12 + 2 * power})
        for power, n in enumerate((10, 100, 1000))
    ]
    line = Scaling(points).line("generator")
    assert line.slope == pytest.approx(2)
    assert line.offset == pytest.approx(9)
    assert line.residual == pytest.approx(0, abs=1e-9)
    crooked = [*points[:2], Point("generator", "1000", 1000, 0, {"x": 20, "y": 20})]
    assert Scaling(crooked).line("generator").residual > 0.5
    assert Scaling(points).mean("generator", "100").value == pytest.approx(13)
    assert Scaling(points).line_without_smallest("generator") is None
    outlier = [Point("generator", "1", 1, 0, {"x": -9, "y": -9}), *points]
    rest = Scaling(outlier).line_without_smallest("generator")
    assert rest is not None
    assert rest.slope == pytest.approx(2) != Scaling(outlier).line("generator").slope
    table = Scaling(outlier).table()
    assert "without the smallest size +2.00, residual 0.00" in table
    assert Scaling.from_json(json.loads(json.dumps(Scaling(outlier).to_json()))).table() == table


def test_a_base_of_another_width_fits_its_generator(embedded_model: EmbeddedModel) -> None:
    config = with_base_width(embedded_model.config, 48)
    assert config.backbone.ffn_dim == 144
    assert EmbeddedModel(config).generator.config.token_dim == 48
