"""Map the factors of every target to parameter tokens of the generator's sequence, and back.

`pack` turns factors by target name into parameter tokens, `unpack` does the reverse. Pure arithmetic on shapes; nothing
here has weights.

Shapes: b samples, n base layers of a group, r LoRA rank, t token_dim, E experts, A_dim / B_dim input and output width
of a target, nA / nB tokens of one base layer written by the one or the other output projection, h = nA + nB, hw
sequence positions of one base layer.

A token holds r * t numbers. In one base layer stand, in the order of the targets:
1. nA tokens: the factors of kind "A" (LoRA's A `[(E,) r, A_dim]`), each flattened row by row, padded with zeros to
   whole tokens, and cut;
2. nB tokens: the factors of kind "B" (LoRA's B `[(E,) B_dim, r]`), likewise; then the factors of kind "vector" (gains
   and offsets `[B_dim]`) of all targets one after another without padding between them, with zeros after the last one
   up to whole tokens. A vector alone would fill a small part of a token: 4096 of 16384 numbers in the released sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from openwu.config import GeneratorConfig, LayerGroup
from openwu.types import Factor, Target

Factors = Mapping[str, Mapping[str, Tensor]]
"""Target name -> factor name -> `[b, ...]`."""


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
                Target(group.layer_path(layer) + name, in_dim, out_dim, experts, operator=operator)
                for name, in_dim, out_dim, experts, operator in group.weights()
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

    @cached_property
    def factors(self) -> tuple[tuple[Factor, ...], ...]:
        """The factors of each target of one layer."""
        return tuple(target.factors(self.rank) for target in self.layers[0])

    @cached_property
    def tokens_a(self) -> tuple[int, ...]:
        """How many tokens each factor of kind "A" takes in one layer."""
        return tuple(self._tokens(size) for size in self._sizes("A"))

    @cached_property
    def tokens_b(self) -> tuple[int, ...]:
        """How many tokens each factor of kind "B" takes in one layer, and after them all vectors together."""
        vectors = self._sizes("vector")
        together = (self._tokens(sum(vectors)),) if vectors else ()
        return *(self._tokens(size) for size in self._sizes("B")), *together

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
        written = [factor for factors in self.factors for factor in factors if factor.kind != "shared"]
        return self.num_layers * sum(prod(factor.shape) for factor in written)

    @cached_property
    def shared(self) -> dict[str, Factor]:
        """Factors that are parameters of the generator, by "{number of the target in its layer}_{factor}"."""
        return {
            f"{place}_{factor.name}": factor
            for place, factors in enumerate(self.factors)
            for factor in factors
            if factor.kind == "shared"
        }

    def pack(self, factors: Factors) -> tuple[Tensor, Tensor]:
        """A tokens `[b, n, nA, r, t]` and B tokens `[b, n, nB, r, t]` of the factors of all targets."""
        tokens_a: list[list[Tensor]] = []
        tokens_b: list[list[Tensor]] = []
        for layer in self.layers:
            held: dict[str, list[Tensor]] = {"A": [], "B": [], "vector": []}
            for target, kinds in zip(layer, self.factors, strict=True):
                for factor in kinds:
                    if factor.kind == "shared":
                        continue
                    held[factor.kind].append(factors[target.name][factor.name].flatten(1))
            vectors = [torch.cat(held["vector"], dim=1)] if held["vector"] else []
            tokens_a.append([self._cut(flat) for flat in held["A"]])
            tokens_b.append([self._cut(flat) for flat in held["B"] + vectors])
        first = next(iter(factors[self.layers[0][0].name].values()))
        empty = first.new_zeros(len(first), 0, self.rank, self.token_dim)
        return _stack(tokens_a, empty), _stack(tokens_b, empty)

    def unpack(self, tokens_a: Tensor, tokens_b: Tensor, shared: Factors | None = None) -> dict[str, dict[str, Tensor]]:
        """The factors of all targets, out of A tokens `[b, n, nA, r, t]` and B tokens `[b, n, nB, r, t]`.

        `shared`: the generator's own `[1, ...]` for targets that have such factors.

        Views of contiguous tokens, no copies. Split and unbind, not slices: their backward joins the parts once, where
        a slice's backward would fill the whole sequence with zeros for every target.
        """
        factors: dict[str, dict[str, Tensor]] = {}
        vectors = self._sizes("vector")
        padding = self.tokens_b[-1] * self.rank * self.token_dim - sum(vectors) if vectors else 0
        for layer, layer_a, layer_b in zip(self.layers, tokens_a.unbind(1), tokens_b.unbind(1), strict=True):
            parts_a = list(torch.split_with_sizes(layer_a, self.tokens_a, dim=1))
            parts_b = list(torch.split_with_sizes(layer_b, self.tokens_b, dim=1))
            ordered = {"A": iter(parts_a), "B": iter(parts_b), "vector": iter(())}
            if vectors:
                ordered["vector"] = iter(parts_b[-1].flatten(1).split_with_sizes((*vectors, padding), dim=1))
            for target, kinds in zip(layer, self.factors, strict=True):
                factors[target.name] = {
                    factor.name: _joined(next(ordered[factor.kind]), (len(tokens_a), *factor.shape))
                    for factor in kinds
                    if factor.kind != "shared"
                }
                if shared is not None and target.name in shared:
                    factors[target.name] |= shared[target.name]
        return factors

    def _sizes(self, kind: str) -> list[int]:
        """How many numbers each factor of this kind has in one layer."""
        return [prod(factor.shape) for factors in self.factors for factor in factors if factor.kind == kind]

    def _tokens(self, size: int) -> int:
        return -(-size // (self.rank * self.token_dim))

    def _cut(self, flat: Tensor) -> Tensor:
        """`[b, numbers]` -> `[b, tokens, r, t]`"""
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


def _stack(tokens: Sequence[Sequence[Tensor]], empty: Tensor) -> Tensor:
    """Layers of targets of `[b, tokens, r, t]` -> `[b, n, all tokens, r, t]`; `empty`: no tokens."""
    return torch.stack([torch.cat([empty, *layer], dim=1) for layer in tokens], dim=1)


def _joined(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """`[b, ...]` -> the factor of this shape, its padding dropped."""
    return tokens.flatten(1)[:, : prod(shape[1:])].reshape(shape)
