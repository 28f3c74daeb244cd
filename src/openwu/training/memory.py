"""Plan the memory of a training through a large base, and the cost of a generator, from configs alone.

Nothing is loaded for it: operations are counted by torch on the meta device. Positions decide what a generator costs:
every target, rank and token width adds some. Weights, gradients and optimiser are counted exactly; what a pass keeps
for its backward is estimated from the linear layers of the base and the blocks of the generator (34 bytes per position
and width in 16 bits: Korthikanti et al. 2022, eq. 1).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from openwu.config import GeneratorConfig
from openwu.generator.layout import GeneratorLayout
from openwu.generator.model import ParameterGenerator
from openwu.kernels.memory import MemoryPlan, gigabytes
from openwu.kernels.modules import without_weights
from openwu.training.config import PipelineRun
from openwu.types import Condition, Segment

FLOAT = 4
"""Bytes of a float32."""
KEPT = 34 / 2
"""Numbers that a transformer block keeps for its backward, per position and width."""
PIXELS_PER_TOKEN = 16 * 16
TEXT_TOKENS = 512
"""Tokens of a prompt, roughly."""

ENCODING, TRAINING = "encoding", "training"
"""The plan's phases: encoding the pairs into the cache, and training on it."""
ADVICE = (
    "make the generator smaller (d_model, blocks), let the cache replace the encoders (encoders=drop), or choose a "
    "smaller base"
)
"""What to do if the weights do not fit."""
PASSES = 3
"""An update costs about three forward passes: one forward, two backward."""
PROBE = 1024
"""Side of the matrices by which a device's speed is measured."""
TOKENS = 256
"""Condition tokens where none are given."""
WARNING = (
    "the weights fit, but with a pass's activations the training may not; set pixels, rank or the requests of "
    "generator.shapes lower, or generator.accumulate higher"
)


def training_plan(
    recipe: PipelineRun,
    config: GeneratorConfig,
    numbers: Mapping[str, int],
    denoiser: str,
    device: torch.device,
    pictures: int = 1,
    *,
    saved: int = 0,
    reader: int = 0,
) -> MemoryPlan:
    """Count what `device` must hold while pairs are encoded (with a cache) and while the generator trains.

    `numbers`: parameters of every part of the base; `denoiser`: its name there; `pictures`: the most in a request;
    `saved`: bytes that quantising the denoiser saves; `reader`: bytes of a condition encoder's own weights.
    """
    size = 2 if recipe.bf16 else FLOAT
    base = numbers[denoiser] * size - saved
    encoders = (sum(numbers.values()) - numbers[denoiser]) * size
    on_cpu = device.type == "cpu"
    stay = not recipe.cache or recipe.encoders == "keep" or (on_cpu and recipe.encoders == "cpu")
    probed = any(chosen["name"] == "denoiser-states" for chosen in recipe.condition)
    with without_weights():
        own = FLOAT * ParameterGenerator(config).num_parameters
    reading = {"encoders": encoders} | ({"condition encoder": reader} if reader else {})
    phases = {}
    if recipe.cache:
        phases[ENCODING] = reading | ({"denoiser": base} if on_cpu or probed else {})
    phases[TRAINING] = (
        {"denoiser": base}
        | (reading if stay else {})
        | {"generator": own, "its gradients": own, "its optimiser": 2 * own}
        | ({"its EMA weights": own} if recipe.generator.ema else {})
    )
    rows = -(-recipe.generator.shapes[0][0] // recipe.generator.accumulate)
    layout = GeneratorLayout.of(config)
    return MemoryPlan(
        phases,
        {
            "adapters and their gradients": 2 * rows * layout.adapter_size * size,
            "denoiser": rows * size * _denoiser_numbers(recipe, config, pictures),
            "generator": rows * FLOAT * _generator_numbers(recipe, config, layout),
        },
    )


def _denoiser_numbers(recipe: PipelineRun, config: GeneratorConfig, pictures: int) -> int:
    """Estimate what one row keeps: inputs and outputs of linear layers; checkpointed, of one block and all inputs."""
    tokens = recipe.pixels // PIXELS_PER_TOKEN * (1 + pictures) + TEXT_TOKENS
    layers = [(group.num_layers, list(group.weights())) for group in config.groups]
    each = [sum(weight.in_dim + weight.out_dim for weight in weights) for _, weights in layers]
    if not recipe.checkpoint_base:
        return tokens * sum(count * size for (count, _), size in zip(layers, each, strict=True))
    return tokens * (max(each) + sum(count * weights[0].in_dim for count, weights in layers))


def _generator_numbers(recipe: PipelineRun, config: GeneratorConfig, layout: GeneratorLayout) -> int:
    """Estimate what one row of the generator keeps; with checkpointing, one group's block and all blocks' inputs."""
    largest = max(group.num_positions for group in layout.groups)
    if recipe.checkpoint_generator:
        return int(config.d_model * (KEPT * largest + config.num_pg_layers * layout.num_positions))
    return int(config.d_model * KEPT * config.num_pg_layers * layout.num_positions)


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
    with without_weights():
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
