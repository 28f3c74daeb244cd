"""How the generator's time grows: sizes go in, curves of measured seconds against the cost model's operations come out.

One thing changes at a time: the condition's length, the number of targets (positions of one base layer), the number of
base layers, the width, and the fast path's pieces, whose size should change nothing. All on the fast path in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from openwu.bench.generator_sizes import generator_flops, small_config
from openwu.bench.growth import Growth, Point
from openwu.bench.row import interleaved
from openwu.config import GeneratorConfig
from openwu.generator.inference.fast import FastGenerator, FastOptions
from openwu.generator.model import ParameterGenerator

LENGTH = 256
"""Condition tokens where another thing changes."""

LAW = "by the operations of the cost model"


@dataclass(frozen=True)
class Case:
    """A generator and what it is given."""

    config: GeneratorConfig
    length: int = LENGTH
    options: FastOptions | None = None


def measure_condition(quick: bool) -> Growth:
    """Time against the condition's length."""
    cases = {length: Case(_sized(quick), length) for length in _some((64, 256, 1024, 2048), quick)}
    return measured(f"generator, length of the condition, {LAW}", "tokens", cases, quick)


def measure_targets(quick: bool) -> Growth:
    """Time against the targets of a base layer, each of which has 192 positions."""
    cases = {count: Case(_sized(quick, targets=count)) for count in _some((1, 2, 4), quick)}
    return measured(f"generator, targets in every base layer, {LAW}", "targets", cases, quick)


def measure_layers(quick: bool) -> Growth:
    """Time against the base's layers."""
    cases = {count: Case(_sized(quick, layers=count)) for count in _some((2, 4, 8, 16), quick)}
    return measured(f"generator, base layers, {LAW}", "layers", cases, quick)


def measure_width(quick: bool) -> Growth:
    """Time against the generator's width."""
    cases = {wide: Case(_sized(quick, d_model=wide)) for wide in _some((64, 128, 256, 512), quick)}
    return measured(f"generator, width, {LAW}", "numbers", cases, quick)


def measure_pieces(quick: bool) -> Growth:
    """Time against the workspace of one piece."""
    sizes = _some((1, 4, 16, 64), quick)
    cases = {size: Case(_sized(quick), LENGTH, FastOptions(chunk_bytes=size * 2**20)) for size in sizes}
    return measured(f"generator, workspace of one piece, {LAW}", "MB", cases, quick)


def measured(what: str, unit: str, cases: Mapping[int, Case], quick: bool) -> Growth:
    """One curve, its sizes timed in turn."""
    torch.manual_seed(0)
    runs: dict[str, Callable[[], object]] = {}
    operations = {}
    for x, case in cases.items():
        fast = FastGenerator(ParameterGenerator(case.config), case.options)
        runs[str(x)] = partial(fast, torch.randn(1, case.length, case.config.input_dim))
        operations[x] = sum(generator_flops(case.config, case.length, first_block_kept=True).values())
    timings = interleaved(runs, repeats=2 if quick else 5)
    return Growth(what, unit, tuple(Point(x, timings[str(x)], operations[x]) for x in cases))


def _sized(quick: bool, *, d_model: int | None = None, layers: int | None = None, targets: int = 1) -> GeneratorConfig:
    wide, deep, blocks = (64, 2, 1) if quick else (256, 4, 2)
    return small_config(d_model=d_model or wide, layers=layers or deep, targets=targets, blocks=blocks)


def _some(values: Sequence[int], quick: bool) -> Sequence[int]:
    return values[:2] if quick else values
