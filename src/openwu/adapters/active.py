"""Take the adapter of one scope apart for the sites: the factors of every input row, zeros for rows without an adapter.

Shapes: b samples of the adapter, n rows of a module's input (or runs of tokens, where requests of different lengths are
packed in one sequence), T tokens, E experts, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from openwu.adapters.scope import Scope
from openwu.kernels.low_rank import contained
from openwu.types import LORA_A, LORA_B, Adapter, Target


@dataclass(frozen=True)
class PackedSequences:
    """Runs of tokens in a packed sequence, one after another, each with the adapter of one sample."""

    lengths: tuple[int, ...]
    ends: Tensor
    """`[n]` int32: where each run ends"""
    of_token: Tensor
    """`[T]` run of every token"""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> PackedSequences:
        each = torch.tensor(lengths)
        of_token = torch.repeat_interleave(torch.arange(len(lengths)), each)
        return cls(tuple(lengths), each.cumsum(0).to(device, torch.int32), of_token.to(device))

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True)
class Active:
    """The adapter of one scope, taken apart for the sites."""

    factors: Mapping[str, Mapping[str, Tensor]]
    """target name -> factor name -> `[b, ...]`"""
    scale: float
    batch: int
    rows: tuple[int, ...] | None
    """Sample of every input row, -1 for none; None: as many rows as samples, or any number of rows for one sample."""
    segments: PackedSequences | None
    """Where `rows` are runs of tokens rather than entries of the batch."""
    trained: bool
    """Whether gradients flow into the factors."""
    in_order: bool
    """Whether every sample has one row, in order, so that factors need no indexing."""
    scale_tensor: Tensor
    """`scale` for compiled code, which takes a number for a constant and would compile anew for every other one"""
    scope: Scope | None = None
    """None for merging, which runs nothing."""
    _of_experts: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    """LoRA target -> (A `[b, r, in]`, B `[b, out, r]`) of every expert"""

    @classmethod
    def of(
        cls,
        adapter: Adapter,
        rows: tuple[int, ...] | None = None,
        segments: PackedSequences | None = None,
        scope: Scope | None = None,
    ) -> Active:
        trained = any(part.requires_grad for parts in adapter.factors.values() for part in parts.values())
        in_order = rows is None or rows == tuple(range(adapter.batch))
        first = next(iter(adapter.factors[adapter.targets[0].name].values()))
        wide = torch.float64 if first.dtype == torch.float64 else torch.float32
        scale = torch.scalar_tensor(adapter.scale, dtype=wide, device=first.device)
        return cls(adapter.factors, adapter.scale, adapter.batch, rows, segments, trained, in_order, scale, scope)

    def only(self, name: str, parts: Sequence[str]) -> Active:
        """The same scope with some of one target's factors, for a site that is made of others."""
        held = self.factors[name]
        return self.with_factors({name: {part: held[part] for part in parts}})

    def with_factors(self, factors: Mapping[str, Mapping[str, Tensor]]) -> Active:
        """The same scope with other factors."""
        return replace(self, factors=factors, _of_experts={})

    @property
    def uniform(self) -> bool:
        """Whether all rows have the same sample."""
        return self.batch == 1 if self.rows is None else len(set(self.rows)) == 1

    @property
    def num_rows(self) -> int | None:
        """Rows that a module's input should have; None: any number, since all have the only sample."""
        return len(self.rows) if self.rows is not None else None if self.batch == 1 else self.batch

    def pair(self, name: str, expert: int | None = None) -> tuple[Tensor, Tensor]:
        """A LoRA target's A and B, or those of one of its experts: A `[b, r, in]` and B `[b, out, r]`."""
        parts = self.factors[name]
        if expert is None:
            return parts[LORA_A], parts[LORA_B]
        if name not in self._of_experts:
            a, b = parts[LORA_A], parts[LORA_B]
            if not self.uniform:
                a, b = contained(a, b)
            # One unbind for all experts: its gradient is one stack, where E indexings have E gradients of full size.
            self._of_experts[name] = list(zip(a.unbind(1), b.unbind(1), strict=True))
        return self._of_experts[name][expert]

    def pair_per_row(self, target: Target, expert: int | None = None) -> tuple[Tensor, Tensor]:
        """`pair` with one entry per input row, or with a single one where `uniform`."""
        a, b = self.pair(target.name, expert)
        return (a, b) if self.in_order else (self._chosen(a), self._chosen(b))

    def per_row(self, target: Target) -> tuple[Tensor, ...]:
        """A target's factors, in their order, with one entry per input row, or with a single one where `uniform`."""
        parts = self.factors[target.name]
        if self.in_order:
            return tuple(parts.values())
        shared = target.rules.shared
        return tuple(part if name in shared else self._chosen(part) for name, part in parts.items())

    def _chosen(self, part: Tensor) -> Tensor:
        """A factor `[b, ...]` as `[n or 1, ...]`; rows without an adapter get zeros, whatever other samples hold."""
        assert self.rows is not None
        if self.uniform and self.rows[0] >= 0:
            return part[self.rows[0] : self.rows[0] + 1]
        index = torch.as_tensor(self.rows[:1] if self.uniform else self.rows)
        chosen = part.index_select(0, index.clamp(min=0).to(part.device))
        if -1 not in self.rows:
            return chosen
        # Not only the factors that a change is linear in: zero times another sample's infinity is no zero.
        return chosen.masked_fill_((index < 0).to(part.device).view(-1, *[1] * (chosen.ndim - 1)), 0)
