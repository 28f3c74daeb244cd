"""The shared-LoRA baseline: one adapter for every request, trained like the generator.

Enters: targets, rank and scale. Leaves: an `Adapter` of one sample that all rows of a batch use.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from openwu.types import Adapter, Target


class SharedAdapter(nn.Module):
    """A and B of every target as plain parameters: A random, B zero, as LoRA starts (Hu et al. 2021, section 4.1)."""

    def __init__(self, targets: Sequence[Target], rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.targets = tuple(targets)
        self.scale = scale
        self.a = nn.ParameterList()
        self.b = nn.ParameterList()
        for target in self.targets:
            shape_a, shape_b = target.shapes(1, rank)
            self.a.append(nn.Parameter(torch.randn(shape_a, generator=generator) * target.in_dim**-0.5))
            self.b.append(nn.Parameter(torch.zeros(shape_b)))

    def forward(self) -> Adapter:
        weights = {target.name: (self.a[i], self.b[i]) for i, target in enumerate(self.targets)}
        return Adapter(self.targets, weights, self.scale)
