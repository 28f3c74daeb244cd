"""Targets <-> tokens: where every generated number of every target stands in the generator's sequence.

In go LoRA factors by target name and out come parameter tokens (`pack`), or the reverse (`unpack`). Pure arithmetic on
shapes; nothing here has weights.

Shapes: b samples, n base layers of a group, r LoRA rank, t token_dim, E experts, A_dim / B_dim input and output width
of a target, nA / nB tokens of all A / all B of one base layer, h = nA + nB, hw sequence positions of one base layer.
A target's A `[(E,) r, A_dim]` (or B `[(E,) B_dim, r]`) is flattened row by row, padded with zeros to whole tokens of
r * t numbers, and cut. In one base layer stand A of every target in order, then B of every target in order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from openwu.config import GeneratorConfig, LayerGroup
from openwu.types import Target

LoraWeights = Mapping[str, tuple[Tensor, Tensor]]
"""Target name -> (A `[b, (E,) r, A_dim]`, B `[b, (E,) B_dim, r]`)."""


@dataclass(frozen=True)
class GroupLayout:
    """The tokens of one group of identical base layers."""

    name: str
    layers: tuple[tuple[Target, ...], ...]
    """The targets of each base layer, with full paths; all layers have the same widths in the same order."""
    rank: int
    token_dim: int
    dim_accumulation: int

    @classmethod
    def of(cls, group: LayerGroup, config: GeneratorConfig) -> GroupLayout:
        layers = tuple(
            tuple(
                Target(group.layer_path(layer) + name, in_dim, out_dim, experts)
                for name, in_dim, out_dim, experts in group.weights()
            )
            for layer in range(group.num_layers)
        )
        return cls(group.name, layers, config.rank, config.token_dim, config.dim_accumulation)

    @property
    def targets(self) -> tuple[Target, ...]:
        return tuple(target for layer in self.layers for target in layer)

    @property
    def num_layers(self) -> int:
        """n"""
        return len(self.layers)

    @property
    def tokens_a(self) -> tuple[int, ...]:
        """How many tokens A of each target of one layer takes."""
        return tuple(self._tokens(target.shapes(1, self.rank)[0]) for target in self.layers[0])

    @property
    def tokens_b(self) -> tuple[int, ...]:
        """How many tokens B of each target of one layer takes."""
        return tuple(self._tokens(target.shapes(1, self.rank)[1]) for target in self.layers[0])

    @property
    def num_tokens_a(self) -> int:
        """nA"""
        return sum(self.tokens_a)

    @property
    def num_tokens_b(self) -> int:
        """nB"""
        return sum(self.tokens_b)

    @property
    def num_tokens(self) -> int:
        """h = nA + nB, tokens of one base layer."""
        return self.num_tokens_a + self.num_tokens_b

    @property
    def columns(self) -> int:
        """r / a, sequence positions of one token."""
        return self.rank // self.dim_accumulation

    @property
    def positions_per_layer(self) -> int:
        """hw = h * (r / a), sequence positions of one base layer."""
        return self.num_tokens * self.columns

    @property
    def num_positions(self) -> int:
        """n * hw"""
        return self.num_layers * self.positions_per_layer

    @property
    def adapter_size(self) -> int:
        """Generated numbers per sample, padding not counted."""
        return sum(prod(shape) for target in self.targets for shape in target.shapes(1, self.rank))

    def pack(self, weights: LoraWeights) -> tuple[Tensor, Tensor]:
        """A tokens `[b, n, nA, r, t]` and B tokens `[b, n, nB, r, t]` of the factors of all targets."""
        tokens_a = [[self._cut(weights[target.name][0]) for target in layer] for layer in self.layers]
        tokens_b = [[self._cut(weights[target.name][1]) for target in layer] for layer in self.layers]
        return _stack(tokens_a), _stack(tokens_b)

    def unpack(self, tokens_a: Tensor, tokens_b: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """The factors of all targets, out of A tokens `[b, n, nA, r, t]` and B tokens `[b, n, nB, r, t]`.

        Views of contiguous tokens, no copies. Split and unbind, not slices: their backward joins the parts once, where
        a slice's backward would fill the whole sequence with zeros for every target.
        """
        weights = {}
        for layer, layer_a, layer_b in zip(self.layers, tokens_a.unbind(1), tokens_b.unbind(1), strict=True):
            parts_a = torch.split_with_sizes(layer_a, self.tokens_a, dim=1)
            parts_b = torch.split_with_sizes(layer_b, self.tokens_b, dim=1)
            for target, part_a, part_b in zip(layer, parts_a, parts_b, strict=True):
                shape_a, shape_b = target.shapes(len(tokens_a), self.rank)
                weights[target.name] = (_joined(part_a, shape_a), _joined(part_b, shape_b))
        return weights

    def _tokens(self, shape: Sequence[int]) -> int:
        return -(-prod(shape) // (self.rank * self.token_dim))

    def _cut(self, weight: Tensor) -> Tensor:
        """`[b, ...]` -> `[b, tokens, r, t]`"""
        flat = weight.flatten(1)
        padding = -flat.shape[1] % (self.rank * self.token_dim)
        return F.pad(flat, (0, padding)).reshape(len(flat), -1, self.rank, self.token_dim)


@dataclass(frozen=True)
class GeneratorLayout:
    """The tokens of every group; groups never see one another's tokens."""

    groups: tuple[GroupLayout, ...]

    @classmethod
    def of(cls, config: GeneratorConfig) -> GeneratorLayout:
        return cls(tuple(GroupLayout.of(group, config) for group in config.groups))

    @property
    def targets(self) -> tuple[Target, ...]:
        """Every adapted weight: group by group, layer by layer, in mapping order."""
        return tuple(target for group in self.groups for target in group.targets)

    @property
    def num_positions(self) -> int:
        """Sequence positions of one sample over all groups."""
        return sum(group.num_positions for group in self.groups)

    @property
    def adapter_size(self) -> int:
        """Generated numbers per sample, padding not counted."""
        return sum(group.adapter_size for group in self.groups)


def _stack(tokens: Sequence[Sequence[Tensor]]) -> Tensor:
    """Layers of targets of `[b, tokens, r, t]` -> `[b, n, all tokens, r, t]`."""
    return torch.stack([torch.cat(list(layer), dim=1) for layer in tokens], dim=1)


def _joined(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """`[b, tokens, r, t]` -> the factor of this shape, its padding dropped."""
    return tokens.flatten(1)[:, : prod(shape[1:])].reshape(shape)
