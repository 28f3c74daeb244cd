"""Parts of the rows about applying adapters: experts layers, random adapters, correctness gates, overheads.

Shapes: T tokens, k experts per token, E experts, d width, h hidden width of an expert, b samples.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openwu.adapters.inject import AdapterHandle
from openwu.errors import OpenwuError
from openwu.kernels.grouped import GroupedProduct, Routed
from openwu.types import Adapter, Target
from openwu_bench.measurement import Timing

RANK = 16
SCALE = 0.5


class Router(nn.Module):
    """Choose the k experts with the largest scores: x `[T, d]` -> indices `[T, k]`.

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
    """Experts with stacked weights, as in transformers: gate_up_proj `[E, 2h, d]`, down_proj `[E, d, h]`.

    All chosen experts have the same weight.
    """

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
    """Router and stacked experts: x `[n, length, d]` -> the same shape."""

    def __init__(self, dim: int, hidden: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.router = Router(dim, experts, top_k)
        self.experts = StackedExperts(dim, hidden, experts)
        self.requires_grad_(False)

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
    """Low-rank update of stacked experts as a loop over experts and samples: a forward hook of a `GroupedProduct`.

    The naive reference. It waits for the device once per weight.
    """

    def __init__(self, a: Tensor, b: Tensor, scale: float, rows: int) -> None:
        self.a, self.b, self.scale, self.rows = a, b, scale, rows

    def __call__(self, _: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        x, routed = args[0], args[2]
        y = y.clone()
        samples = routed.token_s // (len(routed.row_tk) // self.rows)
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


def looped(layer: ExpertsLayer, adapter: Adapter, x: Tensor) -> Tensor:
    """Run the layer with every expert's update added in a loop."""
    hooks = [
        layer.experts.products[name].register_forward_hook(
            LoopedUpdate(*adapter.pairs[f"experts.{name}"], adapter.scale, rows=len(x))
        )
        for name in ("gate_up_proj", "down_proj")
    ]
    try:
        y: Tensor = layer(x)
    finally:
        for hook in hooks:
            hook.remove()
    return y


def adapted(
    handle: AdapterHandle, layer: Callable[[Tensor], Tensor], adapter: Adapter, x: Tensor
) -> Callable[[], Tensor]:
    """Return a function that runs the layer with the adapter, entering the scope included."""

    def run() -> Tensor:
        with handle.applied(adapter):
            return layer(x)

    return run


def random_adapter(
    targets: Sequence[Target], batch: int, *, rank: int = RANK, dtype: torch.dtype, seed: int
) -> Adapter:
    """Return an adapter whose A and B are random numbers, so that neither side can skip anything."""
    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for target in targets:
        a_shape, b_shape = target.shapes(batch, rank).values()
        a = torch.randn(a_shape, generator=draw) / target.in_dim**0.5
        weights[target.name] = (a.to(dtype), torch.randn(b_shape, generator=draw).mul(0.1).to(dtype))
    return Adapter.from_pairs(targets, weights, SCALE)


def gate(row: str, actual: Tensor, expected: Tensor, tolerance: float, base: Tensor | None = None) -> float:
    """Return the relative difference of two results; raise OpenwuError where it is too large.

    With the result of the `base` alone, also raise where the adapter changes hardly anything.
    """
    error = float((actual - expected).float().norm() / expected.float().norm())
    if not error <= tolerance:
        raise OpenwuError(f"{row}: both sides should agree to {tolerance:.0e}, but they differ by {error:.1e}")
    if base is not None and float((expected - base).float().norm() / base.float().norm()) < 10 * tolerance:
        raise OpenwuError(f"{row}: the adapter changes hardly anything, so that a side could leave it out unseen")
    return error


def overhead(adapted: Timing, base: Timing) -> float:
    """Return the seconds that the adapter costs: the median difference of measurements taken in pairs."""
    return statistics.median(a - b for a, b in zip(adapted.seconds, base.seconds, strict=True))


def times_lower(ours: float, theirs: float, resolution: float) -> float:
    """Return how many times lower our overhead is; one below `resolution` seconds is noise and counts as that."""
    return theirs / max(ours, resolution)


def load_peft() -> ModuleType:
    """Import PEFT, or raise an OpenwuError that says how to install it."""
    try:
        import peft
    except ImportError as error:
        raise OpenwuError("benchmark: this row compares with PEFT; pip install 'peft>=0.17'") from error
    found: ModuleType = peft
    return found
