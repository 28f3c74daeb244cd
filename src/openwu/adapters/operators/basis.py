"""Basis LoRA: `y + s B0 M (A0 x)` with A0 and B0 that the generator learns for all requests, and a generated middle M.

| operator | M | generated numbers of a target |
|---|---|---|
| `basis_diagonal` | diagonal | r |
| `basis_matrix` | whole | r * r |
| `basis_mixture` | of MEMBERS learned LoRAs, one generated weight each | MEMBERS |

An adapter holds the middle of every sample, and A0 and B0 once. For a linear module all samples share the products with
A0 and B0, and only the tiny middle differs. Multiplied out (`multiplied_out`) it is a LoRA, which is how files
of other tools hold it. Sums need the same A0 and B0, that is adapters of one generator.

Works on linear modules and on convolutions, not on experts.

Shapes: b samples, n rows of a module's input, N members, r rank, k ranks of all members (r where there is one).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn
from torch.nn import functional as F

from openwu.adapters.active import Active
from openwu.adapters.operators import Operator, common, operator_of
from openwu.adapters.operators.channels import summed_vectors
from openwu.adapters.operators.lora import Lora, product
from openwu.adapters.site import PlainSite
from openwu.types import LORA, LORA_A, LORA_B, Adapter, Factor, Target

MIDDLE, BASIS_A, BASIS_B = "middle", "basis_A", "basis_B"
MEMBERS = 8
"""N, learned LoRAs of rank r for each target of a mixture."""


class BasisDiagonal(Operator):
    """`y + s B0 diag(m) (A0 x)`: `middle` `[b, r]`, and shared `basis_A` `[1, r, in]`, `basis_B` `[1, out, r]`."""

    linear = (MIDDLE,)
    shared = (BASIS_A, BASIS_B)
    rank_factor = BASIS_A

    def factors(self, target: Target, rank: int, /) -> tuple[Factor, ...]:
        return (
            Factor(MIDDLE, self.middle_shape(rank), "vector"),
            Factor(BASIS_A, (rank, target.in_dim), "shared"),
            Factor(BASIS_B, (target.out_dim, rank), "shared"),
        )

    def summed(self, parts: Sequence[Mapping[str, Tensor]], ratios: Sequence[float]) -> dict[str, Tensor]:
        """Middles add up; TargetError where the parts have different bases."""
        shared = {name: common(name, [part[name] for part in parts]) for name in self.shared}
        return summed_vectors(self.linear, parts, ratios) | shared

    def low_rank(self, factors: Mapping[str, Tensor], /) -> dict[str, Tensor]:
        a, b = flat(factors[BASIS_A], factors[BASIS_B])
        middle, batch = factors[MIDDLE], len(factors[MIDDLE])
        return {LORA_A: a.expand(batch, -1, -1), LORA_B: self.times(b.to(middle), middle)}

    def site(self, target: Target, module: nn.Module) -> PlainSite:
        inner = Lora().site(target, module)
        return (
            BasisConvSite(target, module, inner, self)
            if isinstance(module, nn.Conv2d)
            else BasisLinearSite(target, module, inner, self)
        )

    def inner_products(self, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Tensor:
        return Lora().inner_products(self.low_rank(one), self.low_rank(other))

    def middle_shape(self, rank: int) -> tuple[int, ...]:
        """Shape of a sample's middle."""
        return (rank,)

    def times(self, rows: Tensor, middle: Tensor) -> Tensor:
        """rows `[n or 1, m, k]` times M of middle `[n or 1, ...]`: `[n, m, k]`; of a B, B0 M."""
        return rows * middle[:, None]

    def after(self, rows: Tensor, middle: Tensor) -> Tensor:
        """M applied to every row of rows `[n or 1, m, k]`."""
        return self.times(rows, middle)


class BasisMatrix(BasisDiagonal):
    """`y + s B0 M (A0 x)`: `middle` `[b, r, r]`, and shared `basis_A` `[1, r, in]`, `basis_B` `[1, out, r]`."""

    def middle_shape(self, rank: int) -> tuple[int, ...]:
        return (rank, rank)

    def times(self, rows: Tensor, middle: Tensor) -> Tensor:
        return rows @ middle

    def after(self, rows: Tensor, middle: Tensor) -> Tensor:
        return rows @ middle.mT


class BasisMixture(BasisDiagonal):
    """`y + s sum_i m_i B_i (A_i x)`: `middle` `[b, N]`, shared `basis_A` `[1, N, r, in]` and `basis_B`."""

    def factors(self, target: Target, rank: int, /) -> tuple[Factor, ...]:
        return (
            Factor(MIDDLE, (MEMBERS,), "vector"),
            Factor(BASIS_A, (MEMBERS, rank, target.in_dim), "shared"),
            Factor(BASIS_B, (MEMBERS, target.out_dim, rank), "shared"),
        )

    def times(self, rows: Tensor, middle: Tensor) -> Tensor:
        return rows * middle.repeat_interleave(rows.shape[-1] // MEMBERS, dim=-1)[:, None]


class BasisLinearSite(PlainSite):
    """x `[n, ..., in]`; the middle is applied between products that all samples share."""

    module: nn.Linear

    def __init__(self, target: Target, module: nn.Module, inner: PlainSite, operator: BasisDiagonal) -> None:
        super().__init__(module, target)
        self._inner, self._operator = inner, operator

    def update(self, y: Tensor, x: Tensor) -> Tensor:
        x = x.to(y.device)
        middle, *bases = self.factors(y, x)
        a, b = flat(*bases)
        down = F.linear(x, a[0].to(x.dtype)).to(y.dtype)
        scaled = (self.scale * middle).to(y.dtype)
        rows = len(scaled)
        if self._run_t is not None and rows > 1:
            tokens = down.reshape(-1, down.shape[-1])
            self.check_runs(len(tokens), x)
            turned = self._operator.after(tokens[:, None], scaled.index_select(0, self._run_t))
        else:
            if self._run_t is not None:
                self.check_runs(down[..., 0].numel(), x)
            turned = self._operator.after(down.reshape(rows, -1, down.shape[-1]), scaled)
        return y + F.linear(turned.reshape(down.shape), b[0].to(y.dtype))

    def deltas(self, active: Active) -> tuple[Tensor, ...]:
        factors = self._operator.low_rank(active.factors[self.path])
        weight = self.module.weight
        return (product(factors[LORA_A], factors[LORA_B], active.scale, weight.dtype).view(weight.shape),)


class BasisConvSite(BasisLinearSite):
    """x `[n, in, h, w]`; a convolution takes the basis multiplied out, as LoRA of its site."""

    def load(self, active: Active) -> None:
        super().load(active)
        plain = self._operator.low_rank(active.factors[self.path])
        self._inner.load(active.with_factors({self.path: plain}))

    def clear(self) -> None:
        super().clear()
        self._inner.clear()

    def update(self, y: Tensor, x: Tensor) -> Tensor:
        adapted: Tensor = self._inner.update(y, x)
        return adapted


def multiplied_out(adapter: Adapter) -> Adapter:
    """Return the same change with LoRA for every target whose operator is LoRA in another form; the others stay."""
    targets: list[Target] = []
    factors: dict[str, Mapping[str, Tensor]] = {}
    for target in adapter.targets:
        plain = operator_of(target.operator).low_rank(adapter.factors[target.name])
        targets.append(target if plain is None else replace(target, operator=LORA))
        factors[target.name] = adapter.factors[target.name] if plain is None else plain
    return replace(adapter, targets=tuple(targets), factors=factors)


def flat(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A0 `[1, (N,) r, in]` and B0 `[1, (N,) out, r]` as `[1, k, in]` and `[1, out, k]`: members side by side."""
    return (a, b) if a.ndim == 3 else (a.flatten(1, 2), b.transpose(1, 2).flatten(2))
