"""Cost of a generator's config, told before anything is trained: positions, operations, bytes, seconds of an update.

Operations are counted by torch on the meta device, so that no weight is made. Positions decide: attention runs over all
of a base layer's, and every target, rank and token width adds some. The base's own passes come on top.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from openwu.config import GeneratorConfig
from openwu.generator.layout import GeneratorLayout
from openwu.generator.model import ParameterGenerator
from openwu.kernels.memory import gigabytes
from openwu.training.memory import FLOAT, KEPT
from openwu.types import Condition, Segment

PASSES = 3
"""An update costs about three forward passes: one forward, two backward."""
PROBE = 1024
"""Side of the matrices by which a device's speed is measured."""
TOKENS = 256
"""Condition tokens where none are given."""


@dataclass(frozen=True)
class GeneratorCost:
    """What one update of a generator costs, without its base."""

    parameters: int
    positions: int
    """Sequence positions that the generator computes for one adapter, over all base layers."""
    adapter_size: int
    """Numbers of one adapter."""
    flops: int
    """Floating-point operations of one update."""
    held: int
    """Bytes of weights, gradients and optimiser state in float32."""
    activations: int
    """Bytes that a pass keeps for its backward, estimated; without gradient checkpointing."""

    def seconds(self, rate: float) -> float:
        """Return about how long an update takes at so many operations a second (`measured_rate`)."""
        return self.flops / rate

    def report(self, rate: float | None = None) -> str:
        """Describe the cost in one line, with seconds where the rate is known."""
        took = "" if rate is None else f", about {self.seconds(rate):.2g} s an update"
        return (
            f"generator: {self.parameters:,} parameters, {self.positions:,} positions for an adapter of "
            f"{self.adapter_size:,} numbers, {self.flops / 1e12:.2g} TFLOP{took}; {gigabytes(self.held)} of weights, "
            f"gradients and optimiser, about {gigabytes(self.activations)} of activations\n"
        )


def generator_cost(config: GeneratorConfig, batch: int, tokens: int = TOKENS) -> GeneratorCost:
    """Count what an update of a generator with this config costs, for `batch` adapters and so many condition tokens."""
    with torch.device("meta"):
        generator = ParameterGenerator(config)
        more = {name: Segment(torch.empty(batch, tokens, width)) for name, width in config.more_inputs.items()}
        condition = Condition(torch.empty(batch, tokens, config.input_dim), more=more)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        generator(condition)
    layout = GeneratorLayout.of(config)
    return GeneratorCost(
        generator.num_parameters,
        layout.num_positions,
        layout.adapter_size,
        PASSES * counter.get_total_flops(),
        4 * FLOAT * generator.num_parameters,
        int(batch * FLOAT * config.d_model * KEPT * config.num_pg_layers * layout.num_positions),
    )


def measured_rate(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """Measure a device's floating-point operations a second by a product of two large matrices; the best of three."""
    device = torch.device(device)
    x = torch.randn(PROBE, PROBE, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):  # The first one warms up.
        began = time.perf_counter()
        y = x @ x
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    assert y.shape == x.shape
    return 2 * PROBE**3 / best
