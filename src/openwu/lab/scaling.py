"""Does quality grow with the generator, and with the base? Trainings of equal length at several sizes.

Enters: a model, tasks, sizes. Leaves: quality on unseen photographs against parameters, with a fitted line per axis and
what it leaves unexplained.

The two axes are separate: generators of several sizes on one frozen base, or bases of several sizes, each trained on
the base's own tasks first, with a generator of one size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openwu.data.photographs import Photograph
from openwu.embedded import EmbeddedConfig, EmbeddedModel, tiny_layer_groups
from openwu.lab.embedded import draw, score
from openwu.lab.intervals import Mean, mean_over
from openwu.lab.methods import Budget, Method, fit, generated_on

GENERATOR_SIZES = ((128, 1), (256, 1), (384, 2), (512, 3))
"""(width, blocks)"""
BASE_WIDTHS = (96, 128, 192, 256)
"""Widths of the base's blocks; feed-forward layers are three times as wide."""
BASE_RATES = {"learning_rate": 2.5e-3, "matrix_learning_rate": 1e-2}


@dataclass(frozen=True)
class Point:
    """One size, one seed."""

    axis: str
    """What varies: "generator" or "base"."""
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
    """All that was found."""

    points: list[Point]

    @property
    def axes(self) -> list[str]:
        return list(dict.fromkeys(point.axis for point in self.points))

    def sizes(self, axis: str) -> dict[str, int]:
        """Size -> parameters."""
        return {point.size: point.parameters for point in self.points if point.axis == axis}

    def mean(self, axis: str, size: str) -> Mean:
        """Over tasks and seeds."""
        found = [point.scores for point in self.points if (point.axis, point.size) == (axis, size)]
        return mean_over([s for each in found for s in each.values()], [task for each in found for task in each])

    def line(self, axis: str) -> Line:
        own = [point for point in self.points if point.axis == axis]
        x = np.log10([point.parameters for point in own])
        y = np.array([sum(point.scores.values()) / len(point.scores) for point in own])
        slope, offset = np.polyfit(x, y, 1)
        residual = float(np.sqrt(np.mean((y - slope * x - offset) ** 2)))
        return Line(float(slope), float(offset), residual)

    def to_json(self) -> dict[str, Any]:
        return {
            "lines": {axis: dataclasses.asdict(self.line(axis)) for axis in self.axes},
            "sizes": [
                {"axis": axis, "size": size, "parameters": parameters, **dataclasses.asdict(self.mean(axis, size))}
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
) -> Scaling:
    """Generators on the model's own base; then bases of other widths, trained on `base_tasks` for `base_steps`."""
    found = Scaling([])
    for seed in seeds:
        cases = draw(test, tasks, seed)
        sized = [
            *_generators(model, generator_sizes),
            *_bases(model, base_widths, photographs, base_tasks, budget, base_steps, seed),
        ]
        for axis, size, changed in sized:
            varies = changed.backbone if axis == "base" else changed.generator
            method = generated_on(changed, seed)
            fit(method, photographs, tasks, budget, budget.steps, method.rates, seed)
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
                values = score(changed, cases, method.serve(cases))
            scores = {
                task: float(np.mean([v for case, v in zip(cases, values, strict=True) if case.edit == task]))
                for task in tasks
            }
            parameters = sum(parameter.numel() for parameter in varies.parameters())
            found.points.append(Point(axis, size, parameters, seed, scores))
    return found


def _generators(model: EmbeddedModel, sizes: Sequence[tuple[int, int]]) -> Iterator[tuple[str, str, EmbeddedModel]]:
    for width, blocks in sizes:
        generator = dataclasses.replace(model.config.generator, d_model=width, num_pg_layers=blocks)
        changed = EmbeddedModel(dataclasses.replace(model.config, generator=generator)).requires_grad_(False)
        changed.instruction.load_state_dict(model.instruction.state_dict())
        changed.backbone.load_state_dict(model.backbone.state_dict())
        yield "generator", f"width {width}, {blocks} blocks", changed


def _bases(
    model: EmbeddedModel,
    widths: Sequence[int],
    photographs: list[Photograph],
    base_tasks: Sequence[str],
    budget: Budget,
    steps: int,
    seed: int,
) -> Iterator[tuple[str, str, EmbeddedModel]]:
    for width in widths:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            changed = EmbeddedModel(with_base_width(model.config, width)).requires_grad_(False)
        changed.instruction.load_state_dict(model.instruction.state_dict())
        method = Method(
            f"base, width {width}",
            changed.backbone.requires_grad_(True),
            changed,
            lambda *_: None,
            lambda _: None,
            BASE_RATES,
        )
        fit(method, photographs, base_tasks, budget, steps, method.rates, seed)
        changed.backbone.requires_grad_(False)
        yield "base", f"width {width}", changed


def with_base_width(config: EmbeddedConfig, width: int) -> EmbeddedConfig:
    """The same model with a base of another width, and a generator whose tokens fit it."""
    backbone = dataclasses.replace(config.backbone, d_model=width, ffn_dim=3 * width)
    generator = dataclasses.replace(config.generator, token_dim=width, groups=tiny_layer_groups(backbone))
    return dataclasses.replace(config, backbone=backbone, generator=generator)
