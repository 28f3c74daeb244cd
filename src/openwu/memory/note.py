"""A remembered note: one adapter, and where it comes from; the text itself is not kept.

Shapes: b samples, r ranks, s shared ranks (the last ones of every factor, the same for all notes of a generator).
Targets with a rank of their own are those of the generator's reader LoRA: all of it is the same for all notes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openwu.errors import OpenwuError
from openwu.files.hashing import add_tensor, of_json
from openwu.types import LORA_A, LORA_B, Adapter

MAX_NORM = 1e5
"""Largest Frobenius norm of a note's change of one weight; what is above is no note of ours, or damaged."""


@dataclass(frozen=True)
class MemoryNote:
    """What a model remembers of one text."""

    adapter: Adapter = field(repr=False)
    """One sample."""
    tokens: int
    """Length of the text."""
    source: str
    """SHA-256 of the text."""
    base: str
    """Digest of the language model that read it."""
    generator: str
    """Digest of the generator that wrote it."""
    name: str = ""
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def __post_init__(self) -> None:
        if not self.norm <= MAX_NORM:
            raise OpenwuError(
                f"note: expected an adapter whose changes have a norm of at most {MAX_NORM:g}, got {self.norm:g}; "
                "remember the text again"
            )

    @property
    def norm(self) -> float:
        """Largest Frobenius norm of scale * B A among the adapted weights; infinite for numbers that are not finite."""
        norms = [_norm(a, b) * abs(self.adapter.scale) for a, b in self.adapter.pairs.values()]
        return max(norms) if all(map(math.isfinite, norms)) else math.inf

    @property
    def bytes(self) -> int:
        """Size of the adapter's numbers."""
        return sum(part.nbytes for part in self.adapter.state_dict().values())

    @property
    def digest(self) -> str:
        """Content address: hash of the adapter and of its provenance, without name and date."""
        digest = of_json([self.source, self.base, self.generator, self.adapter.scale])
        for name, tensor in self.adapter.state_dict().items():
            add_tensor(digest, name, tensor)
        return digest.hexdigest()

    def provenance(self) -> dict[str, Any]:
        """Return all but the adapter, as JSON values."""
        return {
            "tokens": self.tokens,
            "source": self.source,
            "base": self.base,
            "generator": self.generator,
            "created": self.created,
        }

    def save_pretrained(self, folder: str | Path, format: str = "peft", *, model: nn.Module | None = None) -> None:
        """Write the adapter for another library; see `Adapter.save_pretrained`."""
        self.adapter.save_pretrained(folder, format, model=model)


def joined(notes: Sequence[Adapter], strengths: Sequence[float], shared_rank: int) -> Adapter:
    """Join several notes into one adapter: their own ranks side by side, each at its strength; the shared ones once.

    Every adapter has one sample; the shared ranks are at the largest strength, at most 1. The reader LoRA stays whole:
    keys fit only where it is.
    """
    first, own = notes[0], [adapter.rank - shared_rank for adapter in notes]
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    shared = min(1.0, max(strengths))
    for target in first.targets:
        factors = [adapter.factors[target.name] for adapter in notes]
        if target.rank is not None:
            pairs[target.name] = factors[0][LORA_A], factors[0][LORA_B]
            continue
        a = [each[LORA_A][:, :rank] for each, rank in zip(factors, own, strict=True)]
        b = [each[LORA_B][..., :rank] * s for each, rank, s in zip(factors, own, strengths, strict=True)]
        a.append(factors[0][LORA_A][:, own[0] :])
        b.append(factors[0][LORA_B][..., own[0] :] * shared)
        pairs[target.name] = torch.cat(a, dim=1), torch.cat(b, dim=2)
    return Adapter.from_pairs(first.targets, pairs, first.scale)


def padded(adapters: Sequence[Adapter]) -> Adapter:
    """Stack adapters of different ranks into one batch; ranks of zeros fill up the smaller ones."""
    rank = max(adapter.rank for adapter in adapters)
    filled = []
    for adapter in adapters:
        pairs = {}
        for target in adapter.targets:
            a, b = adapter.pairs[target.name]
            missing = rank - adapter.rank if target.rank is None else 0
            pairs[target.name] = nn.functional.pad(a, (0, 0, 0, missing)), nn.functional.pad(b, (0, missing))
        filled.append(Adapter.from_pairs(adapter.targets, pairs, adapter.scale))
    return Adapter.stack(filled)


def _norm(a: Tensor, b: Tensor) -> float:
    """Return the Frobenius norm of B A `[1, out, in]` without forming it: <B^T B, A A^T>."""
    across, down = a.double() @ a.double().mT, b.double().mT @ b.double()
    return float((across * down).sum().clamp_min(0).sqrt())
