"""An adapter kept for later: an `Adapter` enters, equal ones leave, each with memory of its own.

Tensors of one dtype and shape lie in one, so that a copy for the next caller takes one copy and one split for each kind
of tensor, of which an adapter has few, and nothing for each tensor.

Shapes: b samples, m tensors of one kind.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from openwu.types import Adapter, Target


@dataclass(frozen=True)
class PackedAdapter:
    """What `of` took from an adapter; it shares no memory with it."""

    kinds: tuple[Tensor, ...]
    """One tensor `[m * b, ...]` on the CPU for each dtype and shape `[b, ...]`"""
    places: tuple[tuple[int, ...], ...]
    """For each of `kinds`: which m tensors of the adapter lie in it, counted A, B, A, B, ... by target"""
    names: tuple[str, ...]
    targets: tuple[Target, ...]
    scale: float
    instructions: tuple[str, ...]
    batch: int

    @classmethod
    def of(cls, adapter: Adapter) -> PackedAdapter:
        """Whatever device, layout in memory and gradients the adapter has."""
        places: dict[tuple[torch.dtype, torch.Size], list[int]] = {}
        # Not as inference tensors, wherever this is called: those who get a copy may train on it.
        with torch.inference_mode(False), torch.no_grad():
            parts = [part for pair in adapter.weights.values() for part in pair]
            for place, part in enumerate(parts):
                places.setdefault((part.dtype, part.shape), []).append(place)
            kinds = tuple(
                torch.cat([parts[place].detach().cpu() for place in own]).contiguous() for own in places.values()
            )
        own_places = tuple(tuple(own) for own in places.values())
        rest = tuple(adapter.weights), adapter.targets, adapter.scale, adapter.instructions, adapter.batch
        return cls(kinds, own_places, *rest)

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.kinds)

    def adapter(self) -> Adapter:
        """A copy on the CPU, without gradients, that may be changed in place and trained on."""
        found: dict[int, Tensor] = {}
        with torch.inference_mode(False):
            for kind, places in zip(self.kinds, self.places, strict=True):
                # "unsafe": to autograd each part is a tensor of its own, and may change in place without the others.
                found.update(zip(places, torch.unsafe_split(kind.clone(), self.batch), strict=True))
        weights = {name: (found[2 * i], found[2 * i + 1]) for i, name in enumerate(self.names)}
        # Without its checks: they were made of what was packed, and would take as long as the copy.
        adapter = object.__new__(Adapter)
        known = {"targets": self.targets, "weights": weights, "scale": self.scale, "instructions": self.instructions}
        vars(adapter).update(known)
        return adapter
