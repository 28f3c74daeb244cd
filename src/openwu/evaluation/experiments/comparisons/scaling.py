"""Scaling: quality on unseen photographs against parameters of the generator and of the base, with a fitted line.

The two axes are separate: generators of several sizes on one frozen base, or bases of several sizes, each trained on
the base's own tasks first, with a generator of one size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openwu.backbones.embedded.config import tiny_layer_groups
from openwu.data.suite.photographs import Photograph
from openwu.evaluation.cases import draw_cases, score
from openwu.evaluation.experiments.geometry import Mean, mean_over
from openwu.evaluation.experiments.methods import Budget, Method, fit, generated_on, precision, sampler
from openwu.evaluation.experiments.results import UNCACHED, ResultCache, TrialResult, columns
from openwu.training.embedded.model import EmbeddedConfig, EmbeddedModel

GENERATOR_SIZES = ((128, 1), (256, 1), (384, 2), (512, 3))
"""(width, blocks)"""
AXES = ("generator", "base")
"""What varies."""
BASE_WIDTHS = (96, 128, 192, 256)
"""Widths of the base's blocks; feed-forward layers are three times as wide."""
BASE_RATES = {"learning_rate": 2.5e-3, "matrix_learning_rate": 1e-2}


@dataclass(frozen=True)
class Point:
    """The scores of one size with one seed."""

    axis: str
    """What varies, one of AXES."""
    size: str
    parameters: int
    """Of what varies."""
    seed: int
    scores: dict[str, float]
    """Task -> mean PSNR in dB over the test photographs."""


@dataclass(frozen=True)
class Line:
    """PSNR = offset + slope * log10(parameters), by least squares over sizes and seeds."""

    slope: float
    """dB for ten times as many parameters"""
    offset: float
    residual: float
    """Root mean square of what the line leaves, dB"""


@dataclass
class Scaling:
    """The scores of all sizes and seeds."""

    points: list[Point]

    @property
    def axes(self) -> list[str]:
        return list(dict.fromkeys(point.axis for point in self.points))

    def sizes(self, axis: str) -> dict[str, int]:
        """Return size -> parameters."""
        return {point.size: point.parameters for point in self.points if point.axis == axis}

    def mean(self, axis: str, size: str) -> Mean:
        """Average a size over tasks and seeds."""
        found = [point.scores for point in self.points if (point.axis, point.size) == (axis, size)]
        return mean_over([s for each in found for s in each.values()], [task for each in found for task in each])

    def line(self, axis: str, without: str | None = None) -> Line:
        """Fit the line of an axis; `without`: leave a size out."""
        own = [point for point in self.points if point.axis == axis and point.size != without]
        x = np.log10([point.parameters for point in own])
        y = np.array([sum(point.scores.values()) / len(point.scores) for point in own])
        slope, offset = np.polyfit(x, y, 1)
        residual = float(np.sqrt(np.mean((y - slope * x - offset) ** 2)))
        return Line(float(slope), float(offset), residual)

    def line_without_smallest(self, axis: str) -> Line | None:
        """Fit the line of an axis without its smallest size; None where fewer than three sizes remain."""
        sizes = self.sizes(axis)
        return self.line(axis, min(sizes, key=lambda size: sizes[size])) if len(sizes) > 3 else None

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Scaling:
        """Read what `to_json` returned: the table can be made again."""
        return cls([Point(**each) for each in stored["points"]])

    def table(self) -> str:
        """Return every size and the fitted lines as plain text."""
        rows = [
            (axis, size, f"{parameters:,}", str(self.mean(axis, size)))
            for axis in self.axes
            for size, parameters in self.sizes(axis).items()
        ]
        lines = []
        for axis in self.axes:
            line, rest = self.line(axis), self.line_without_smallest(axis)
            shown = f"{axis}: {line.slope:+.2f} dB for ten times the parameters, residual {line.residual:.2f}"
            if rest is not None:
                shown += f"; without the smallest size {rest.slope:+.2f}, residual {rest.residual:.2f}"
            lines.append(shown)
        return columns(("what varies", "size", "parameters", "mean, dB"), rows) + "\n" + "\n".join(lines) + "\n"

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as JSON."""
        return {
            "lines": {axis: dataclasses.asdict(self.line(axis)) for axis in self.axes},
            "lines_without_smallest": {
                axis: dataclasses.asdict(line)
                for axis in self.axes
                if (line := self.line_without_smallest(axis)) is not None
            },
            "sizes": [
                {"axis": axis, "size": size, "parameters": parameters, **self.mean(axis, size).to_json()}
                for axis in self.axes
                for size, parameters in self.sizes(axis).items()
            ],
            "points": [dataclasses.asdict(point) for point in self.points],
        }


def scaling(
    model: EmbeddedModel,
    photographs: list[Photograph],
    test: dict[str, Tensor],
    tasks: Sequence[str],
    base_tasks: Sequence[str],
    budget: Budget,
    base_steps: int,
    seeds: Sequence[int],
    generator_sizes: Sequence[tuple[int, int]] = GENERATOR_SIZES,
    base_widths: Sequence[int] = BASE_WIDTHS,
    cache: ResultCache = UNCACHED,
) -> Scaling:
    """Train generators on the model's own base; then bases of other widths, on `base_tasks` for `base_steps`.

    cache: where results of finished trials are found again; a trial is one size with one seed.
    """
    found = Scaling([])

    def run(axis: str, size: str, changed: Callable[[], EmbeddedModel], seed: int) -> TrialResult:
        resized, cases = changed(), draw_cases(test, tasks, seed)
        varies = resized.backbone if axis == "base" else resized.generator
        method = generated_on(resized, seed)
        batches = sampler(photographs, tasks, budget, seed)
        fit(method, batches, budget, budget.steps, method.rates, f"{size}, seed {seed}")
        with torch.inference_mode(), precision():
            values = score(resized, cases, method.serve(cases))
        scores = {
            task: float(np.mean([v for case, v in zip(cases, values, strict=True) if case.task == task]))
            for task in tasks
        }
        parameters = sum(parameter.numel() for parameter in varies.parameters())
        return TrialResult(vars(Point(axis, size, parameters, seed, scores)))

    for seed in seeds:
        sized: list[tuple[str, str, Callable[[], EmbeddedModel]]] = [
            ("generator", f"width {width}, {blocks} blocks", partial(_with_generator, model, width, blocks))
            for width, blocks in generator_sizes
        ]
        trained = partial(_with_base, model, photographs, base_tasks, budget, base_steps, seed)
        sized += [("base", f"width {width}", partial(trained, width)) for width in base_widths]
        for axis, size, changed in sized:
            trial = cache.get(f"{axis}, {size}, seed {seed}", partial(run, axis, size, changed, seed))
            found.points.append(Point(**trial.values))
    return found


def _with_generator(model: EmbeddedModel, width: int, blocks: int) -> EmbeddedModel:
    """Put an untrained generator of another size on the model's base."""
    generator = dataclasses.replace(model.config.generator, d_model=width, num_pg_layers=blocks)
    changed = EmbeddedModel(dataclasses.replace(model.config, generator=generator)).requires_grad_(False)
    changed.instruction.load_state_dict(model.instruction.state_dict())
    changed.backbone.load_state_dict(model.backbone.state_dict())
    return changed


def _with_base(
    model: EmbeddedModel,
    photographs: list[Photograph],
    base_tasks: Sequence[str],
    budget: Budget,
    steps: int,
    seed: int,
    width: int,
) -> EmbeddedModel:
    """Train a base of another width on its own tasks, and freeze it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        changed = EmbeddedModel(with_base_width(model.config, width)).requires_grad_(False)
    changed.instruction.load_state_dict(model.instruction.state_dict())
    base = changed.backbone.requires_grad_(True)
    method = Method(f"base, width {width}", base, changed, lambda *_: None, lambda _: None, BASE_RATES)
    batches = sampler(photographs, base_tasks, budget, seed)
    fit(method, batches, budget, steps, method.rates, f"{method.name}, seed {seed}")
    changed.backbone.requires_grad_(False)
    return changed


def with_base_width(config: EmbeddedConfig, width: int) -> EmbeddedConfig:
    """Return the config with a base of another width, and a generator whose tokens fit it."""
    backbone = dataclasses.replace(config.backbone, d_model=width, ffn_dim=3 * width)
    generator = dataclasses.replace(config.generator, token_dim=width, groups=tiny_layer_groups(backbone))
    return dataclasses.replace(config, backbone=backbone, generator=generator)
