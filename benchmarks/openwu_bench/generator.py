"""C1 and the generator's curves: time of the fast path on a CPU against the reference path and the cost model.

Shapes: n base layers, p positions of one base layer, T = n * p, L condition tokens, d width, t token_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from openwu.config import GeneratorConfig, GroupedTarget, LayerGroup, PlainTarget
from openwu.errors import OpenwuError
from openwu.generator.inference.fast import FastGenerator, FastOptions
from openwu.generator.layout import GeneratorLayout
from openwu.generator.model import ParameterGenerator
from openwu.types import Adapter
from openwu_bench.measurement import Curve, Point, Row, interleaved

CONDITION_TOKENS = 256
GOAL = 1.1
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}
"""Largest relative difference (norms) of a tensor of the adapter."""
COST_MODEL = "by the operations of the cost model"


def small_config(*, d_model: int = 256, layers: int = 8, targets: int = 2, blocks: int = 4) -> GeneratorConfig:
    """Return a config with, by default, n = 8 base layers of p = 384 positions (192 per target), d = 256, 4 blocks."""
    # A of 24 tokens and B of 24 tokens of 16 x 128 numbers, 4 positions each.
    each = tuple(PlainTarget(f"proj{number}", 3072, 3072) for number in range(targets))
    return GeneratorConfig(16, 16, 128, 256, d_model, 64, 4, blocks, (LayerGroup("layers.", layers, each),))


def released_config() -> GeneratorConfig:
    """Return the released checkpoint's size: 8.1 billion parameters, 722,993,152 generated numbers."""
    experts = (PlainTarget("w1", 4096, 3072), PlainTarget("w2", 3072, 4096), PlainTarget("w3", 4096, 3072))
    targets = (
        PlainTarget("self_attn.qkv_proj", 4096, 6144),
        PlainTarget("self_attn.o_proj", 4096, 4096),
        PlainTarget("mlp.shared_mlp.gate_and_up_proj", 4096, 6144),
        PlainTarget("mlp.shared_mlp.down_proj", 3072, 4096),
        GroupedTarget("mlp.experts", 64, experts),
    )
    return GeneratorConfig(16, 64, 1024, 4096, 4096, 128, 4, 24, (LayerGroup("model.layers.", 32, targets),))


def generator_flops(
    config: GeneratorConfig, condition_tokens: int, *, first_block_kept: bool = False
) -> dict[str, int]:
    """Return the FLOPs of one request by part; a multiply-add counts as two, elementwise work as none.

    `first_block_kept`: without the part of the first block that does not depend on the condition.
    """
    d, length, blocks = config.d_model, condition_tokens, config.num_pg_layers
    self_mixing = blocks - 1 if first_block_kept else blocks
    flops = dict.fromkeys(("layers", "positions", "attention", "cross", "condition", "feed_forward", "projections"), 0)
    flops["projections"] += 2 * length * config.input_dim * d
    for group in GeneratorLayout.of(config).groups:
        n, p = group.num_layers, group.positions_per_layer
        rows = n * p
        flops["layers"] += self_mixing * (8 * rows * d * d + 4 * rows * n * d)
        flops["positions"] += self_mixing * 8 * rows * d * d
        flops["attention"] += self_mixing * 4 * rows * p * d
        flops["cross"] += (self_mixing + blocks) * 2 * rows * d * d
        flops["condition"] += blocks * (4 * rows * length * d + 4 * length * d * d)
        flops["feed_forward"] += blocks * 16 * rows * d * d
        flops["projections"] += 2 * rows * d * config.token_dim
    return flops


def measure(quick: bool) -> Row:
    """Measure row C1: how many times faster the fast path is than the reference path in float32.

    `quick` takes two base layers and two blocks, and few repeats.
    """
    return speed_row(small_config(layers=2, blocks=2), 3) if quick else speed_row(small_config(), 9)


@torch.no_grad()
def speed_row(config: GeneratorConfig, repeats: int) -> Row:
    """Measure C1 for a generator of any size; bfloat16, and no kept first block, are in the details."""
    torch.manual_seed(0)
    generator = ParameterGenerator(config)
    condition = torch.randn(1, CONDITION_TOKENS, config.input_dim)
    layers, positions = config.groups[0].num_layers, generator.layout.groups[0].positions_per_layer
    details: dict[str, float] = {"GFLOP": sum(generator_flops(config, CONDITION_TOKENS).values()) / 1e9}
    for dtype in (torch.bfloat16, torch.float32):
        model = ParameterGenerator(config).to(dtype)
        model.load_state_dict(generator.state_dict())
        typed = condition.to(dtype)
        runs: dict[str, Callable[[], Adapter]] = {
            "reference": partial(model, typed),
            "fast": partial(FastGenerator(model), typed),
            "fast, first block not kept": partial(FastGenerator(model, FastOptions(keep_first_block=False)), typed),
        }
        error = adapter_error(runs["fast"](), runs["reference"]())
        if not error <= TOLERANCE[dtype]:
            raise OpenwuError(f"C1: the two ways differ by {error:.2g} in {dtype}; not measured")
        sides = interleaved(runs, repeats)
        name = str(dtype).removeprefix("torch.")
        details |= {f"{name} {side}: s": timing.median for side, timing in sides.items()}
        for side in ("fast", "fast, first block not kept"):
            details[f"{name} {side}: times faster"] = sides["reference"].median / sides[side].median
        details[f"{name}: relative error"] = error
    title = (
        f"generator (d {config.d_model}, n {layers}, hw {positions}, {config.num_pg_layers} blocks, "
        f"{CONDITION_TOKENS} condition tokens, float32), against the plain reference"
    )
    value = sides["reference"].median / sides["fast"].median
    return Row("C1", title, value, "x", GOAL, sides=sides, error=error, details=details)


def adapter_error(actual: Adapter, expected: Adapter) -> float:
    """Return the largest difference of a generated tensor, relative to its norm."""
    tensors = actual.state_dict()
    return max(
        float((tensors[key].double() - tensor.double()).norm() / tensor.double().norm())
        for key, tensor in expected.state_dict().items()
    )


@dataclass(frozen=True)
class Case:
    """A generator and its condition's length."""

    config: GeneratorConfig
    length: int = CONDITION_TOKENS
    options: FastOptions | None = None


def measure_condition(quick: bool) -> Curve:
    """Measure the fast path's time against the length of the condition."""
    cases = {length: Case(_config(quick), length) for length in _sizes((64, 256, 1024, 2048), quick)}
    return scaling(f"generator, length of the condition, {COST_MODEL}", "tokens", cases, quick)


def measure_targets(quick: bool) -> Curve:
    """Measure the fast path's time against the targets of a base layer, each of which has 192 positions."""
    cases = {count: Case(_config(quick, targets=count)) for count in _sizes((1, 2, 4), quick)}
    return scaling(f"generator, targets in every base layer, {COST_MODEL}", "targets", cases, quick)


def measure_layers(quick: bool) -> Curve:
    """Measure the fast path's time against the number of base layers."""
    cases = {count: Case(_config(quick, layers=count)) for count in _sizes((2, 4, 8, 16), quick)}
    return scaling(f"generator, base layers, {COST_MODEL}", "layers", cases, quick)


def measure_width(quick: bool) -> Curve:
    """Measure the fast path's time against the generator's width."""
    cases = {width: Case(_config(quick, d_model=width)) for width in _sizes((64, 128, 256, 512), quick)}
    return scaling(f"generator, width, {COST_MODEL}", "numbers", cases, quick)


def measure_pieces(quick: bool) -> Curve:
    """Measure the fast path's time against the workspace of one piece, which should change nothing."""
    cases = {
        size: Case(_config(quick), options=FastOptions(chunk_bytes=size * 2**20))
        for size in _sizes((1, 4, 16, 64), quick)
    }
    return scaling(f"generator, workspace of one piece, {COST_MODEL}", "MB", cases, quick)


def scaling(what: str, unit: str, cases: Mapping[int, Case], quick: bool) -> Curve:
    """Time the fast path in float32 on all cases alternately, and predict by the cost model."""
    torch.manual_seed(0)
    runs: dict[str, Callable[[], object]] = {}
    flops = {}
    for x, case in cases.items():
        fast = FastGenerator(ParameterGenerator(case.config), case.options)
        runs[str(x)] = partial(fast, torch.randn(1, case.length, case.config.input_dim))
        flops[x] = sum(generator_flops(case.config, case.length, first_block_kept=True).values())
    timings = interleaved(runs, repeats=2 if quick else 5)
    return Curve(what, unit, tuple(Point(x, timings[str(x)], flops[x]) for x in cases))


def _config(quick: bool, *, d_model: int | None = None, layers: int | None = None, targets: int = 1) -> GeneratorConfig:
    width, depth, blocks = (64, 2, 1) if quick else (256, 4, 2)
    return small_config(d_model=d_model or width, layers=layers or depth, targets=targets, blocks=blocks)


def _sizes(values: Sequence[int], quick: bool) -> Sequence[int]:
    return values[:2] if quick else values
