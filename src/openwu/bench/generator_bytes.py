"""Row C2: bytes that one block materialises, the fast path against the clear one; times play no part in it.

Enters: the small generator with random weights and a random condition. Leaves: a `Row` whose value is the ratio of the
fresh memory that results take, in float32. The details have bfloat16 too, and the ratio of all results that are
written, those over memory that was there before included: the fast path writes most of its results into a workspace.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openwu.bench.generator_sizes import small_config
from openwu.bench.row import Row
from openwu.bench.traffic import Traffic
from openwu.errors import OpenwuError
from openwu.generator.blocks import Block, block_rotary
from openwu.generator.inference.fast import FastGenerator
from openwu.generator.model import ParameterGenerator

CONDITION_TOKENS = 256
GOAL = 0.45
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02}
"""Largest relative difference (norms) of what a block adds to the stream."""


@torch.no_grad()
def measure(quick: bool) -> Row:
    """`quick` takes two base layers instead of eight: ratios hardly change."""
    torch.manual_seed(0)
    generator = ParameterGenerator(small_config(layers=2 if quick else 8, blocks=1))
    details: dict[str, float] = {}
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        clear, fast, errors[dtype] = block_traffic(generator.to(dtype), CONDITION_TOKENS)
        if not errors[dtype] <= TOLERANCE[dtype]:
            raise OpenwuError(f"C2: the block's two ways differ by {errors[dtype]:.2g} in {dtype}; not measured")
        name = str(dtype).removeprefix("torch.")
        for side, traffic in (("clear", clear), ("fast", fast)):
            details[f"{name} {side}: MB written"] = traffic.written / 2**20
            details[f"{name} {side}: MB allocated"] = traffic.allocated / 2**20
        details[f"{name}: ratio written"] = fast.written / clear.written
        details[f"{name}: ratio allocated"] = fast.allocated / clear.allocated
    return Row(
        "C2",
        "fresh memory of one generator block's results (d 256, n 8, hw 384), against the plain reference",
        details["float32: ratio allocated"],
        "x",
        GOAL,
        at_least=False,
        error=errors[torch.float32],
        details=details,
    )


def block_traffic(generator: ParameterGenerator, condition_tokens: int) -> tuple[Traffic, Traffic, float]:
    """Traffic of a block of the first group on the clear and on the fast path, and how much their updates differ."""
    layout, config = generator.layout.groups[0], generator.config
    weight = generator.hidden_in.weight
    block = generator.blocks[0]
    assert isinstance(block, Block)
    x_bnpd = torch.randn(1, layout.num_layers, layout.positions_per_layer, config.d_model).to(weight.dtype)
    c_bld = torch.randn(1, condition_tokens, config.d_model).to(weight.dtype)
    shape = (layout.num_layers, layout.num_tokens, layout.columns, condition_tokens)
    angles = block_rotary(config.head_dim, *shape, weight.device)
    with Traffic() as clear:
        expected = block(x_bnpd, c_bld, angles, None)
    fast = FastGenerator(generator)
    fast.pack(weight.dtype)
    stages, keys = fast.stages(0, layout, condition_tokens, weight.dtype, weight.device)

    def run(x: Tensor) -> None:
        stages.mix_layers_(x)
        stages.mix_positions_(x)
        stages.answer_(x, stages.read(c_bld, keys, None))

    run(x_bnpd.clone())  # the workspace is there from the second call on
    came = x_bnpd.clone()
    with Traffic() as spared:
        run(came)
    update, other = (each.double() - x_bnpd.double() for each in (expected, came))
    return clear, spared, float((other - update).norm() / update.norm())
