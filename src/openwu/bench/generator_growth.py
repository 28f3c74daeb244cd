"""How the generator's time grows: a generator's size goes in, measured and predicted seconds come out as plain data.

One thing changes at a time: the condition's length, the number of targets (positions of one base layer), the number of
base layers, the width, and the fast path's pieces. A prediction is the cost model's operations, at the rate that the
curve's first point reached.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from openwu.bench.generator_sizes import generator_flops, small_config, widened
from openwu.bench.row import interleaved
from openwu.config import GeneratorConfig
from openwu.generator.fast import FastGenerator, FastOptions
from openwu.generator.model import ParameterGenerator

LENGTH = 256
"""Condition tokens where another thing changes."""


@dataclass(frozen=True)
class Point:
    """One size."""

    x: int
    """What changes: tokens, targets, layers, numbers of width, or bytes of a piece."""
    gflop: float
    seconds: float
    """Median."""
    quartiles: tuple[float, float]
    predicted: float
    """Seconds, from the cost model and the curve's first point."""


@dataclass(frozen=True)
class Case:
    """A generator and what it is given."""

    config: GeneratorConfig
    length: int = LENGTH
    options: FastOptions | None = None


def growth(quick: bool) -> dict[str, list[dict[str, Any]]]:
    """Curve -> its points as plain JSON values; `quick` takes smaller sizes, for a look or a test."""
    d, layers, blocks = (64, 2, 1) if quick else (256, 4, 2)

    def sized(targets: int = 1, layers: int = layers) -> GeneratorConfig:
        return small_config(d_model=d, layers=layers, targets=targets, blocks=blocks)

    base = sized()

    def some(values: Sequence[int]) -> Sequence[int]:
        return values[:2] if quick else values

    curves: dict[str, Mapping[int, Case]] = {
        "condition tokens": {length: Case(base, length) for length in some((64, 256, 1024, 2048))},
        "targets in a layer": {count: Case(sized(targets=count)) for count in some((1, 2, 4))},
        "base layers": {count: Case(sized(layers=count)) for count in some((layers, 2 * layers, 4 * layers))},
        "width": {wide: Case(widened(base, wide)) for wide in some((d, 2 * d, 4 * d))},
        "bytes of a piece": {
            size: Case(base, LENGTH, FastOptions(chunk_bytes=size))
            for size in some((2**18, 2**20, 2**22, 2**24, 2**26))
        },
    }
    return {name: [asdict(point) for point in measured(cases, 2 if quick else 5)] for name, cases in curves.items()}


def measured(cases: Mapping[int, Case], repeats: int) -> list[Point]:
    """The points of one curve, timed in turn."""
    torch.manual_seed(0)
    runs: dict[str, Callable[[], object]] = {}
    gflop = {}
    for x, case in cases.items():
        fast = FastGenerator(ParameterGenerator(case.config), case.options)
        condition = torch.randn(1, case.length, case.config.input_dim)
        runs[str(x)] = partial(fast, condition)
        gflop[x] = sum(generator_flops(case.config, case.length, first_block_kept=True).values()) / 1e9
    timings = interleaved(runs, repeats)
    first = next(iter(cases))
    rate = timings[str(first)].median / gflop[first]
    return [Point(x, gflop[x], timings[str(x)].median, timings[str(x)].quartiles, gflop[x] * rate) for x in cases]
