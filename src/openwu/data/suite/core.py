"""Sub-tasks of the edit suite: an `Edit` makes a `Pair` (input and target) from a `Scene` (a photograph and noise).

Sub-tasks exist only to make training and test pairs; an edited file holds what the network computes.

Shapes: h, w sides of the photograph; p, q sides of the reference picture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from openwu.backbones.embedded.network import place_planes

LITTLE, NORMAL, STRONG = 0.5, 1.0, 1.5
"""Strengths that words ask for: "a little", no such word, "strongly"."""


@dataclass(frozen=True)
class Scene:
    """A clean photograph with the noise and random draws that a pair is made of."""

    source: Tensor
    """A clean photograph `[3, h, w]` in 0..1."""
    noise: Tensor
    """Standard normal noise `[1, h, w]`, seen by the model: added grain, rain and scratches are functions of it."""
    generator: torch.Generator
    """Draws what varies from sample to sample, such as the amount of damage to repair."""
    strength: float = NORMAL
    """Strength of the edit."""
    second: Tensor | None = None
    """A clean photograph of something else `[3, p, q]`, from which a reference edit makes its reference."""

    @property
    def place(self) -> Tensor:
        """The position of every pixel `[2, h, w]`: y and x from -1 to 1."""
        return place_planes(*self.source.shape[-2:])

    def uniform(self, low: float, high: float) -> float:
        """Draw a number of this scene."""
        return low + (high - low) * float(torch.rand((), generator=self.generator))

    def normal_like(self, x: Tensor) -> Tensor:
        """Draw standard normal noise that the model does not see."""
        return torch.randn(x.shape, generator=self.generator)


@dataclass(frozen=True)
class Pair:
    """A training or test pair: input and target."""

    picture: Tensor
    """The input `[3, h, w]`."""
    target: Tensor
    """The edited picture `[3, h, w]`."""
    reference: Tensor | None = None
    """The second picture of the request `[3, p, q]`, where there is one."""


@dataclass(frozen=True)
class Edit:
    """One sub-task: how its pairs are made, and its properties."""

    name: str
    family: str
    make: Callable[[Scene], Pair]
    opposite: str | None = None
    """The sub-task that asks for the contrary."""
    limit: float = STRONG
    """Strength beyond which the edit does not go: a repair cannot be more than complete."""
    graded: bool = True
    """Whether the edit exists in degrees; "a little inverted" is nothing that anyone asks for."""
    exact: bool = False
    """Whether the target is a function of tone and colour alone: a model can come close to it."""
    needs_reference: bool = False
    """Whether the request has a second picture."""
    natural: bool = False
    """Whether the answer is what colours naturally are: its photographs are not recoloured for variety."""

    def make_pair(self, scene: Scene) -> Pair:
        """Make a scene's pair, in 0..1. At strength 0, where some operators are undefined, the target is the input."""
        if self.needs_reference and scene.second is None:
            raise ValueError(f"{self.name}: expected a scene with a second photograph, got none")
        pair = self.make(replace(scene, strength=scene.strength or NORMAL))
        picture = pair.picture.clamp(0, 1)
        return Pair(picture, pair.target.clamp(0, 1) if scene.strength else picture, pair.reference)


Change = Callable[[Tensor, float], Tensor]
"""(photograph `[3, h, w]`, strength) -> changed photograph"""


def forward(change: Change) -> Callable[[Scene], Pair]:
    """Make pairs whose input is the photograph and whose target is a fixed change of it."""
    return lambda scene: Pair(scene.source, change(scene.source, scene.strength))


def whole(change: Callable[[Tensor], Tensor]) -> Callable[[Scene], Pair]:
    """Make pairs as `forward` does, for a change without degrees of its own: the strength blends it in."""
    return lambda scene: Pair(scene.source, blend(scene.source, change(scene.source).clamp(0, 1), scene.strength))


def repair(damage: Callable[[Scene], Tensor]) -> Callable[[Scene], Pair]:
    """Make pairs of a damaged photograph and the photograph itself, or at lower strength a blend of both."""

    def make(scene: Scene) -> Pair:
        damaged = damage(scene).clamp(0, 1)
        return Pair(damaged, blend(damaged, scene.source, min(1.0, scene.strength)))

    return make


def blend(x: Tensor, y: Tensor, amount: float | Tensor) -> Tensor:
    """Blend y into x: x + amount * (y - x)."""
    return x + amount * (y - x)
