"""An adapter kept for later: an `Adapter` enters, equal ones leave, each with memory of its own.

All tensors of a dtype lie in one, so that a copy for the next caller is one copy and not one for each of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from openwu.types import Adapter, Target


@dataclass(frozen=True)
class PackedAdapter:
    """What `of` took from an adapter; it shares no memory with it."""

    flat: tuple[Tensor, ...]
    """One tensor `[numbers]` on the CPU for each dtype"""
    places: tuple[tuple[int, ...], ...]
    """For each of `flat`: which tensors of the adapter lie in it, counted A, B, A, B, ... by target"""
    shapes: tuple[tuple[tuple[int, ...], ...], ...]
    """For each of `flat`: the shapes of those tensors"""
    sizes: tuple[tuple[int, ...], ...]
    """For each of `flat`: how many numbers they hold"""
    names: tuple[str, ...]
    targets: tuple[Target, ...]
    scale: float
    instructions: tuple[str, ...]

    @classmethod
    def of(cls, adapter: Adapter) -> PackedAdapter:
        """Whatever device, layout in memory and gradients the adapter has."""
        # Not as inference tensors, wherever this is called: those who get a copy may train on it.
        with torch.inference_mode(False), torch.no_grad():
            parts = [part for pair in adapter.weights.values() for part in pair]
            kinds = dict.fromkeys(part.dtype for part in parts)
            places = tuple(tuple(i for i, part in enumerate(parts) if part.dtype == kind) for kind in kinds)
            flat = tuple(torch.cat([parts[i].detach().cpu().flatten() for i in own]) for own in places)
        shapes = tuple(tuple(tuple(parts[i].shape) for i in own) for own in places)
        sizes = tuple(tuple(parts[i].numel() for i in own) for own in places)
        rest = tuple(adapter.weights), adapter.targets, adapter.scale, adapter.instructions
        return cls(flat, places, shapes, sizes, *rest)

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.flat)

    def adapter(self) -> Adapter:
        """A copy on the CPU, without gradients, that may be changed in place and trained on."""
        found: dict[int, Tensor] = {}
        with torch.inference_mode(False):
            for flat, places, shapes, sizes in zip(self.flat, self.places, self.shapes, self.sizes, strict=True):
                # "unsafe": to autograd each part is a tensor of its own, and may change in place without the others.
                split = torch.unsafe_split_with_sizes(flat.clone(), sizes)
                found |= {place: part.view(shape) for place, part, shape in zip(places, split, shapes, strict=True)}
        weights = {name: (found[2 * i], found[2 * i + 1]) for i, name in enumerate(self.names)}
        return Adapter(self.targets, weights, self.scale, self.instructions)
