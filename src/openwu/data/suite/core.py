"""What a sub-task of the edit suite is.

Enters: a Scene, that is a clean photograph with the planes that the base model sees besides it. Leaves: a Pair, that is
what the model is given and what should come out. Sub-tasks exist only to make training and test pairs; what reaches an
edited file is what the network computes.

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
    """What a pair is made of."""

    source: Tensor
    """A clean photograph `[3, h, w]` in 0..1."""
    noise: Tensor
    """Standard normal noise `[1, h, w]`, seen by the model: added grain, rain and scratches are functions of it."""
    generator: torch.Generator
    """For what varies from sample to sample, such as how strong the damage is that shall be repaired."""
    strength: float = NORMAL
    """How much of the edit is asked for."""
    second: Tensor | None = None
    """A clean photograph of something else `[3, p, q]`, from which a reference edit makes its reference."""

    @property
    def place(self) -> Tensor:
        """Where every pixel lies `[2, h, w]`: y and x from -1 to 1."""
        return place_planes(*self.source.shape[-2:])

    def uniform(self, low: float, high: float) -> float:
        """A random number of this scene."""
        return low + (high - low) * float(torch.rand((), generator=self.generator))

    def normal_like(self, x: Tensor) -> Tensor:
        """Standard normal noise that the model does not see."""
        return torch.randn(x.shape, generator=self.generator)


@dataclass(frozen=True)
class Pair:
    """A training or test pair."""

    picture: Tensor
    """What the model is given `[3, h, w]`."""
    target: Tensor
    """What should come out `[3, h, w]`."""
    reference: Tensor | None = None
    """The second picture of the request `[3, p, q]`, where there is one."""


@dataclass(frozen=True)
class Edit:
    """One sub-task."""

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
        """The pair of a scene, in 0..1. At strength 0, where some operators are undefined, the target is the input."""
        if self.needs_reference and scene.second is None:
            raise ValueError(f"{self.name}: expected a scene with a second photograph, got none")
        pair = self.make(replace(scene, strength=scene.strength or NORMAL))
        picture = pair.picture.clamp(0, 1)
        return Pair(picture, pair.target.clamp(0, 1) if scene.strength else picture, pair.reference)


Change = Callable[[Tensor, float], Tensor]
"""(photograph `[3, h, w]`, strength) -> changed photograph"""


def forward(change: Change) -> Callable[[Scene], Pair]:
    """The input is the photograph, the target a fixed change of it."""
    return lambda scene: Pair(scene.source, change(scene.source, scene.strength))


def whole(change: Callable[[Tensor], Tensor]) -> Callable[[Scene], Pair]:
    """As `forward`, for a change that has no degrees of its own: the strength blends it in."""
    return lambda scene: Pair(scene.source, blend(scene.source, change(scene.source).clamp(0, 1), scene.strength))


def repair(damage: Callable[[Scene], Tensor]) -> Callable[[Scene], Pair]:
    """The input is a damaged photograph, the target the photograph itself, or at lower strength something between."""

    def make(scene: Scene) -> Pair:
        damaged = damage(scene).clamp(0, 1)
        return Pair(damaged, blend(damaged, scene.source, min(1.0, scene.strength)))

    return make


def blend(x: Tensor, y: Tensor, amount: float | Tensor) -> Tensor:
    """x + amount * (y - x)"""
    return x + amount * (y - x)
