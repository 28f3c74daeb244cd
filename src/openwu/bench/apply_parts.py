"""What the rows about applying adapters share: layers of experts, random adapters, gates, overheads.

Shapes: T tokens, k experts per token, E experts, d width, h hidden width of an expert, b samples.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openwu.bench.row import Timing
from openwu.errors import OpenwuError
from openwu.kernels.grouped import GroupedProduct, Routed
from openwu.types import Adapter, Target

RANK = 16
SCALE = 0.5


class Router(nn.Module):
    """The k experts of the largest scores: x `[T, d]` -> indices `[T, k]`. All chosen experts count alike.

    Scores are float32, as usual, so that batches of another size choose the same.
    """

    def __init__(self, dim: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.scores = nn.Linear(dim, experts, bias=False)
        self.top_k = top_k

    def forward(self, x: Tensor) -> Tensor:
        chosen: Tensor = F.linear(x.float(), self.scores.weight.float()).topk(self.top_k).indices
        return chosen


class StackedExperts(nn.Module):
    """Weights of all experts in one tensor, as in transformers: gate_up_proj `[E, 2h, d]`, down_proj `[E, d, h]`."""

    def __init__(self, dim: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * hidden, dim) / dim**0.5)
        self.down_proj = nn.Parameter(torch.randn(experts, dim, hidden) / hidden**0.5)
        self.products = nn.ModuleDict({name: GroupedProduct() for name in ("gate_up_proj", "down_proj")})

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        routed = Routed.of(chosen, len(self.gate_up_proj))
        first, last = (self.products[name] for name in ("gate_up_proj", "down_proj"))
        assert isinstance(first, GroupedProduct)
        assert isinstance(last, GroupedProduct)
        gate, up = first(first.gather(x, routed), self.gate_up_proj, routed).chunk(2, -1)
        down = last(last.multiply(F.silu(gate), up), self.down_proj, routed)
        return routed.combine(down, torch.full_like(chosen, 1, dtype=x.dtype) / chosen.shape[1])


class ExpertsLayer(nn.Module):
    """A router and its stacked experts: x `[n, length, d]` -> the same shape."""

    def __init__(self, dim: int, hidden: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.router = Router(dim, experts, top_k)
        self.experts = StackedExperts(dim, hidden, experts)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        mixed: Tensor = self.experts(flat, self.router(flat))
        return mixed.view(x.shape)

    def targets(self) -> list[Target]:
        experts = self.experts
        return [
            Target(f"experts.{name}", weight.shape[2], weight.shape[1], len(weight))
            for name, weight in (("gate_up_proj", experts.gate_up_proj), ("down_proj", experts.down_proj))
        ]


class LoopedUpdate:
    """The update of stacked experts as one loop over experts and samples: a hook for a `GroupedProduct`.

    What an implementation does that walks through the experts. It may wait for the device, and does so once per weight.
    """

    def __init__(self, a: Tensor, b: Tensor, scale: float, rows: int) -> None:
        self.a, self.b, self.scale, self.rows = a, b, scale, rows

    def __call__(self, _: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        x, routed = args[0], args[2]
        y = y.clone()
        samples = routed.token_s // (len(routed.place_tk) // self.rows)
        start = 0
        for expert, end in enumerate(routed.ends.tolist()):
            if end == start:
                continue
            for sample in range(len(self.a)):
                own: slice | Tensor = slice(start, end)
                if len(self.a) > 1:
                    own = start + (samples[start:end] == sample).nonzero()[:, 0]
                y[own] += self.scale * (x[own] @ self.a[sample, expert].t()) @ self.b[sample, expert].t()
            start = end
        return y


def random_adapter(
    targets: Sequence[Target], batch: int, *, rank: int = RANK, dtype: torch.dtype, seed: int
) -> Adapter:
    """A and B of random numbers, so that neither side can skip anything."""
    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for target in targets:
        a_shape, b_shape = target.shapes(batch, rank).values()
        a = torch.randn(a_shape, generator=draw) / target.in_dim**0.5
        weights[target.name] = (a.to(dtype), torch.randn(b_shape, generator=draw).mul(0.1).to(dtype))
    return Adapter.from_pairs(targets, weights, SCALE)


def gate(row: str, came: Tensor, expected: Tensor, tolerance: float, base: Tensor | None = None) -> float:
    """The relative difference of two results; OpenwuError where it is too large or nothing was adapted."""
    error = float((came - expected).float().norm() / expected.float().norm())
    if not error <= tolerance:
        raise OpenwuError(f"{row}: both sides should agree to {tolerance:.0e}, but they differ by {error:.1e}")
    if base is not None and float((expected - base).float().norm() / base.float().norm()) < 10 * tolerance:
        raise OpenwuError(f"{row}: the adapter changes hardly anything, so that a side could leave it out unseen")
    return error


def overhead(adapted: Timing, base: Timing) -> float:
    """Seconds that the adapter costs: median of the differences between measurements made one after the other."""
    return statistics.median(a - b for a, b in zip(adapted.seconds, base.seconds, strict=True))


def times_lower(ours: float, theirs: float, resolution: float) -> float:
    """How many times lower our overhead is. One below what can be told from noise counts as `resolution` seconds."""
    return theirs / max(ours, resolution)


def load_peft() -> ModuleType:
    """PEFT, or an OpenwuError that says how to get it."""
    try:
        import peft
    except ImportError as error:
        raise OpenwuError("benchmark: this row compares with PEFT; pip install 'peft>=0.17'") from error
    found: ModuleType = peft
    return found
