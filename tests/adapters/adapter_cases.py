"""Models and adapters that the tests of this folder share: a mixture of experts, a small model, random adapters.

Shapes: b samples, n rows, T tokens, k experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openwu.adapters.experts import ExpertRouting
from openwu.kernels.grouped import GroupedProduct, Routed
from openwu.types import Adapter, Target

ROUTING = ExpertRouting(router="gate", indices=itemgetter(1))


def random_adapter(
    targets: Sequence[Target],
    batch: int,
    *,
    rank: int = 2,
    scale: float = 0.5,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    trained: bool = False,
) -> Adapter:
    """Leaf tensors A and B of every target, both far from zero."""
    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for target in targets:
        a, b = (torch.randn(shape, generator=draw, dtype=dtype) for shape in target.shapes(batch, rank).values())
        weights[target.name] = (a.requires_grad_(trained), b.requires_grad_(trained))
    return Adapter.from_pairs(tuple(targets), weights, scale)


class Gate(nn.Module):
    """Top-k softmax router: `[n, length, d]` -> weights and expert indices, both `[T, k]`."""

    def __init__(self, dim: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.wg = nn.Linear(dim, experts, bias=False)
        self.top_k = top_k

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, indices = self.wg(x.flatten(0, -2)).softmax(-1).topk(self.top_k)
        return weights / weights.sum(-1, keepdim=True), indices


class FusedExpert(nn.Module):
    """up * silu(gate), then down; up and gate in one projection."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_and_up_proj = nn.Linear(dim, 2 * hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.gate_and_up_proj(x).chunk(2, -1)
        return self.down_proj(up * F.silu(gate))


class PlainExpert(nn.Module):
    """The same with a linear module for each weight."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.w3(x) * F.silu(self.w1(x)))


class Mixture(nn.Module):
    """Shared MLP plus routed experts; an expert without tokens is not called."""

    def __init__(
        self, dim: int = 6, hidden: int = 5, experts: int = 4, top_k: int = 2, expert: type[nn.Module] = FusedExpert
    ) -> None:
        super().__init__()
        self.gate = Gate(dim, experts, top_k)
        self.experts = nn.ModuleList([expert(dim, hidden) for _ in range(experts)])
        self.shared_mlp = expert(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.gate(x)
        tokens = x.flatten(0, -2)
        combined = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            token, slot = (indices == index).nonzero(as_tuple=True)
            if len(token):
                combined = combined.index_add(0, token, weights[token, slot, None] * expert(tokens[token]))
        return combined.view(x.shape) + self.shared_mlp(x)


class StackedMixture(nn.Module):
    """Routed experts with stacked weights, computed by grouped products: `gate_up_proj` is `[gate; up]`."""

    def __init__(self, dim: int = 6, hidden: int = 5, experts: int = 4, top_k: int = 2) -> None:
        super().__init__()
        self.gate = Gate(dim, experts, top_k)
        self.experts = StackedExperts(dim, hidden, experts)

    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.gate(x)
        return self.experts(x.flatten(0, -2), indices, weights).view(x.shape)


class StackedExperts(nn.Module):
    """As in transformers: `[T, d]`, expert indices and weights `[T, k]` -> `[T, d]`."""

    def __init__(self, dim: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * hidden, dim) / dim**0.5)
        self.down_proj = nn.Parameter(torch.randn(experts, dim, hidden) / hidden**0.5)
        self.products = nn.ModuleDict({name: GroupedProduct() for name in ("gate_up_proj", "down_proj")})

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        routed = Routed.of(chosen, len(self.gate_up_proj))
        first, last = self.products["gate_up_proj"], self.products["down_proj"]
        gate, up = first(first.gather(x, routed), self.gate_up_proj, routed).chunk(2, -1)
        down = last(last.multiply(F.silu(gate), up), self.down_proj, routed)
        return routed.combine(down, weights)


def stacked_targets(dim: int = 6, hidden: int = 5, experts: int = 4, prefix: str = "experts") -> list[Target]:
    return [
        Target(f"{prefix}.gate_up_proj", dim, 2 * hidden, experts),
        Target(f"{prefix}.down_proj", hidden, dim, experts),
    ]


def mixture_targets(dim: int = 6, hidden: int = 5, experts: int = 4, prefix: str = "experts") -> list[Target]:
    return [
        Target(f"{prefix}.w1", dim, hidden, experts),
        Target(f"{prefix}.w2", hidden, dim, experts),
        Target(f"{prefix}.w3", dim, hidden, experts),
    ]


class Small(nn.Module):
    """A linear module and two convolutions: image `[n, 3, 8, 8]` -> `[n, 5, 4, 4]`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.middle = nn.Sequential(nn.Linear(4, 4), nn.SiLU())
        self.last = nn.Conv2d(4, 5, 1, stride=2)

    def forward(self, image: Tensor) -> Tensor:
        hidden = self.first(image)
        return self.last(self.middle(hidden.movedim(1, -1)).movedim(-1, 1))


SMALL_TARGETS = (
    Target("first", 27, 4, kernel=(3, 3)),
    Target("middle.0", 4, 4),
    Target("last", 4, 5, kernel=(1, 1)),
)


def small_model(dtype: torch.dtype = torch.float64) -> Small:
    torch.manual_seed(0)
    return Small().to(dtype).requires_grad_(False)


def relative_error(came: Tensor, expected: Tensor) -> float:
    return float((came.detach() - expected.detach()).norm() / expected.detach().norm())
