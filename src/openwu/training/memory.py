"""What a training through a large base needs of memory, before anything is loaded: configs enter, bytes leave.

Weights, gradients and optimiser are counted; what a pass keeps for its backward is a rough sum over the linear maps of
the base and the blocks of the generator (34 bytes a position and width in 16 bits: Korthikanti et al. 2022, eq. 1).

Shapes: b requests computed at a time, L tokens of the denoiser.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from openwu.config import GeneratorConfig
from openwu.errors import OpenwuError
from openwu.generator.layout import GeneratorLayout
from openwu.generator.model import ParameterGenerator
from openwu.training.config import PipelineRun

FLOAT = 4
"""Bytes of a number in float32."""
KEPT = 34 / 2
"""What a block keeps, as numbers of a position and width."""
PIXELS_A_TOKEN = 16 * 16
TEXT_TOKENS = 512
"""Of a prompt; roughly."""


@dataclass(frozen=True)
class Needs:
    """Bytes by what they are for."""

    encoding: Mapping[str, int]
    """Weights on the device while pairs are encoded; empty without a cache."""
    weights: Mapping[str, int]
    """On the device while the generator is trained: certain."""
    passing: Mapping[str, int]
    """What a pass adds: rough."""

    @property
    def certain(self) -> int:
        return max(sum(self.encoding.values()), sum(self.weights.values()))

    @property
    def total(self) -> int:
        return max(sum(self.encoding.values()), sum(self.weights.values()) + sum(self.passing.values()))

    def text(self, device: torch.device, free: int | None) -> str:
        """A line for each, and what the device has."""
        parts = {"to encode the pairs": self.encoding, "to train": self.weights, "a pass, roughly": self.passing}
        lines = [
            f"  {name}: {_gb(sum(part.values()))} ({', '.join(f'{what} {_gb(size)}' for what, size in part.items())})"
            for name, part in parts.items()
            if part
        ]
        has = "unknown" if free is None else f"{_gb(free)} free"
        return "\n".join([f"memory on {device}: about {_gb(self.total)} of {has}", *lines]) + "\n"

    def check(self, device: torch.device, free: int | None) -> str | None:
        """Raise OpenwuError for what cannot fit; a sentence for what may not."""
        if free is None or self.total <= free:
            return None
        least = f"{_gb(self.certain)} for weights, gradients and optimiser"
        less = (
            "make the generator smaller (d_model, blocks), let the cache take the encoders' place (encoders=drop), or "
            "choose a smaller base"
        )
        if self.certain > free:
            raise OpenwuError(f"memory: expected at least {least} on {device}, which has {_gb(free)} free; {less}")
        return (
            f"memory: {least} fit into {_gb(free)}, but about {_gb(self.total)} with a pass may not; set "
            "pixels, rank or the requests of generator.shapes lower, or generator.accumulate higher\n"
        )


def needs_of(
    recipe: PipelineRun,
    config: GeneratorConfig,
    numbers: Mapping[str, int],
    denoiser: str,
    device: torch.device,
    pictures: int = 1,
    *,
    saved: int = 0,
    reader: int = 0,
) -> Needs:
    """`numbers`: parameters of every part of the base; `denoiser`: its name there; `pictures`: most of a request.

    `saved`: bytes less of a quantised denoiser; `reader`: of a condition encoder's own weights.
    """
    size = 2 if recipe.bf16 else FLOAT
    base = numbers[denoiser] * size - saved
    encoders = (sum(numbers.values()) - numbers[denoiser]) * size
    here = device.type == "cpu"
    stay = not recipe.cache or recipe.encoders == "keep" or (here and recipe.encoders == "cpu")
    probed = any(chosen["name"] == "denoiser-states" for chosen in recipe.condition)
    encoding = {"encoders": encoders} | ({"denoiser": base} if here or probed else {}) if recipe.cache else {}
    with torch.device("meta"):
        own = FLOAT * ParameterGenerator(config).num_parameters
    own_reader = {"condition encoder": reader} if reader else {}
    encoding |= own_reader if recipe.cache else {}
    weights = {"denoiser": base} | ({"encoders": encoders, **own_reader} if stay else {})
    weights |= {"generator": own, "its gradients": own, "its optimiser": 2 * own}
    weights |= {"its moving average": own} if recipe.generator.ema else {}
    rows = -(-recipe.generator.shapes[0][0] // recipe.generator.accumulate)
    layout = GeneratorLayout.of(config)
    return Needs(
        encoding,
        weights,
        {
            "adapters and their gradients": 2 * rows * layout.adapter_size * size,
            "denoiser": rows * size * _denoiser_numbers(recipe, config, pictures),
            "generator": rows * FLOAT * _generator_numbers(recipe, config, layout),
        },
    )


def _denoiser_numbers(recipe: PipelineRun, config: GeneratorConfig, pictures: int) -> int:
    """What one row keeps: inputs and outputs of linear maps, or of one layer and the inputs of all others."""
    tokens = recipe.pixels // PIXELS_A_TOKEN * (1 + pictures) + TEXT_TOKENS
    layers = [(group.num_layers, list(group.weights())) for group in config.groups]
    each = [sum(weight.in_dim + weight.out_dim for weight in weights) for _, weights in layers]
    if not recipe.checkpoint_base:
        return tokens * sum(count * size for (count, _), size in zip(layers, each, strict=True))
    return tokens * (max(each) + sum(count * weights[0].in_dim for count, weights in layers))


def _generator_numbers(recipe: PipelineRun, config: GeneratorConfig, layout: GeneratorLayout) -> int:
    largest = max(group.num_positions for group in layout.groups)
    if recipe.checkpoint_generator:
        return int(config.d_model * (KEPT * largest + config.num_pg_layers * layout.num_positions))
    return int(config.d_model * KEPT * config.num_pg_layers * layout.num_positions)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size < 1e10 else f"{size / 1e9:.1f} GB"
