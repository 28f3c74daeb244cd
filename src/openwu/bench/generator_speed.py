"""Row C1: the small generator on a CPU, the fast path against the clear one.

Enters: random weights and a random condition. Leaves: a `Row` whose value is how many times faster the fast path is in
float32; bfloat16, and the fast path without the kept first block, are in the details.
"""

from __future__ import annotations

import torch

from openwu.bench.generator_sizes import generator_flops, small_config
from openwu.bench.row import Row, interleaved
from openwu.config import GeneratorConfig
from openwu.errors import OpenwuError
from openwu.generator.inference.fast import FastGenerator, FastOptions
from openwu.generator.model import ParameterGenerator
from openwu.types import Adapter

CONDITION_TOKENS = 256
GOAL = 1.1
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}
"""Largest relative difference (norms) of a tensor of the adapter."""


def measure(quick: bool) -> Row:
    """`quick` takes two base layers and two blocks, and few repeats."""
    return measured(small_config(layers=2, blocks=2), repeats=3) if quick else measured(small_config(), repeats=9)


@torch.no_grad()
def measured(config: GeneratorConfig, repeats: int) -> Row:
    """The row for a generator of any size."""
    torch.manual_seed(0)
    generator = ParameterGenerator(config)
    condition = torch.randn(1, CONDITION_TOKENS, config.input_dim)
    floats = sum(generator_flops(config, CONDITION_TOKENS).values())
    layers, positions = config.groups[0].num_layers, generator.layout.groups[0].positions_per_layer
    details: dict[str, float | int] = {"GFLOP": floats / 1e9}
    sides = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = ParameterGenerator(config).to(dtype)
        model.load_state_dict(generator.state_dict())
        fast = FastGenerator(model)
        whole = FastGenerator(model, FastOptions(keep_first_block=False))
        given = condition.to(dtype)
        error = adapter_error(fast(given), model(given))
        if not error <= TOLERANCE[dtype]:
            raise OpenwuError(f"C1: the two ways differ by {error:.2g} in {dtype}; not measured")
        runs = {
            "clear": lambda model=model, given=given: model(given),
            "fast": lambda fast=fast, given=given: fast(given),
            "fast, first block not kept": lambda whole=whole, given=given: whole(given),
        }
        sides = interleaved(runs, repeats)
        name = str(dtype).removeprefix("torch.")
        for side, timing in sides.items():
            details[f"{name} {side}: s"] = timing.median
        for side in ("fast", "fast, first block not kept"):
            details[f"{name} {side}: times faster"] = sides["clear"].median / sides[side].median
        details[f"{name}: relative error"] = error
    return Row(
        "C1",
        f"generator (d {config.d_model}, n {layers}, hw {positions}, {config.num_pg_layers} blocks, "
        f"{CONDITION_TOKENS} condition tokens, float32), against the plain reference",
        sides["clear"].median / sides["fast"].median,
        "x",
        GOAL,
        sides=sides,
        error=error,
        details=details,
    )


def adapter_error(came: Adapter, expected: Adapter) -> float:
    """The largest difference of a generated tensor, relative to its norm."""
    ours = came.state_dict()
    return max(
        float((ours[key].double() - tensor.double()).norm() / tensor.double().norm())
        for key, tensor in expected.state_dict().items()
    )
