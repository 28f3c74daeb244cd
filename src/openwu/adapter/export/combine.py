"""Modules with ranks and scales of their own enter, one `Adapter` with one rank and one scale leaves.

Smaller ranks are filled up with zeros, which changes nothing. The scale that most modules have becomes the adapter's;
the others' ratio to it goes into their B, rounded once in B's dtype.

Shapes: E experts, r rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from openwu.adapter.export.fit import folded
from openwu.errors import CheckpointError
from openwu.types import Adapter, Target


@dataclass(frozen=True)
class Update:
    """The low-rank update of one weight, `scale * B A`."""

    a: Tensor
    """[(E,) r, in]"""
    b: Tensor
    """[(E,) out, r]"""
    scale: float
    kernel: tuple[int, int] | None = None

    @classmethod
    def of(cls, name: str, a: Tensor, b: Tensor, scale: float) -> Update:
        """Of tensors as files hold them: A `[r, in]` or `[r, in, kh, kw]`, B `[out, r]` or `[out, r, 1, 1]`."""
        kernel = (a.shape[2], a.shape[3]) if a.ndim == 4 else None
        plain = a.ndim in (2, 4) and b.ndim in (2, 4) and b.shape[2:].numel() == 1
        if not plain or a.shape[0] != b.shape[1] or not a.shape[0]:
            raise CheckpointError(
                f"{name}: expected A [r, in] or [r, in, kh, kw] and B [out, r] or [out, r, 1, 1], "
                f"got {tuple(a.shape)} and {tuple(b.shape)}"
            )
        return cls(a.flatten(1), b.flatten(1), scale, kernel)

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    def target(self, name: str) -> Target:
        """The weight that it updates."""
        experts = self.a.shape[0] if self.a.ndim == 3 else None
        return Target(name, self.a.shape[-1], self.b.shape[-2], experts, self.kernel)


def combine(updates: Mapping[str, Update]) -> Adapter:
    """One sample's adapter of the updates, target name -> update, in their order."""
    if not updates:
        raise CheckpointError("expected the LoRA of at least one module, got none")
    for name, update in updates.items():
        if not (update.a.is_floating_point() and update.b.is_floating_point()):
            raise CheckpointError(f"{name}: expected floating-point numbers, got {update.a.dtype} and {update.b.dtype}")
    scale = Counter(update.scale for update in updates.values()).most_common(1)[0][0]
    if scale == 0:
        # Of alpha 0 nothing can be a ratio.
        scale = 1.0
    rank = max(update.rank for update in updates.values())
    weights = {}
    for name, update in updates.items():
        more = rank - update.rank
        a, b = update.a, folded(update.b, update.scale / scale)
        weights[name] = (F.pad(a, (0, 0, 0, more))[None], F.pad(b, (0, more))[None])
    return Adapter(tuple(update.target(name) for name, update in updates.items()), weights, scale)
