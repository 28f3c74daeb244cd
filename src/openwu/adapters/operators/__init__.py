"""Operators: what an adapter's numbers do to a module's output. One file for each kind, one line in `registry.py`.

| operator | output of a module y = W x + c | factors of a target |
|---|---|---|
| `lora` | `y + s B (A x)` | `lora_A` `[b, (E,) r, in]`, `lora_B` `[b, (E,) out, r]` |
| `scale` | `y (1 + s g)` | `gain` g `[b, out]` |
| `offset` | `y + s o` | `offset` o `[b, out]` |
| `scale_offset` | `y (1 + s g) + s o` | `gain`, `offset` |
| `rotation` | pairs of channels times 1 + s (p + iq) | `turns` (p, q) `[b, out / 2, 2]` |
| `dora` | `m (W + s B A) / |W + s B A| x + c`, m = |W| (1 + s g) | `lora_A`, `lora_B`, `magnitude` g `[b, out]` |
| `basis_diagonal` | `y + s B0 diag(m) (A0 x)` | `middle` m `[b, r]`; shared `basis_A`, `basis_B` |
| `basis_matrix` | `y + s B0 M (A0 x)` | `middle` M `[b, r, r]`; shared `basis_A`, `basis_B` |
| `basis_mixture` | `y + s sum_i m_i B_i (A_i x)` | `middle` m `[b, N]`; shared `basis_A`, `basis_B` |
| `prefix` | `y + s sum_i v_i exp(k_i x + b_i) / (1 + sum_j exp(k_j x + b_j))` for each head | `prefix_keys`, ... |
| `lora+offset`, ... | the sum of the operators' changes | those of all |

s is the adapter's scale. One module has one target, so one operator (which may be several, joined by "+"); modules of
one adapter may have different ones. Zeros in an operator's `linear` factors leave the base's output as it is, bit for
bit; strength multiplies these factors; a sum of adapters adds up their changes, each measured from the base's output.
`shared` factors are parameters of the generator, `[1, ...]` in every adapter.

Shapes: b samples, E experts, r rank, in / out the widths of a module (channels of a convolution's output).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from openwu.adapters.site import PlainSite
from openwu.errors import OpenwuError, TargetError
from openwu.registry import OPERATORS, resolve
from openwu.types import FactorRules, Target

COMBINED = "openwu.adapters.operators.combined:Combined"
"""What applies several operators, "lora+offset" for example; imported late, since it is made of this module's."""


class Operator(FactorRules):
    """One way of changing a module's output. A subclass has no state; what a scope holds is in its site."""

    folds: bool = True
    """Whether weights can hold the change, so that an adapter can be merged into them."""

    @abstractmethod
    def site(self, target: Target, module: nn.Module) -> PlainSite:
        """The hook that applies the factors on a module; TargetError for a module of another type or other widths."""

    @abstractmethod
    def inner_products(self, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Tensor:
        """<change i, change j> of a target's factors, without their scales: `[b1, b2]` float64."""

    def low_rank(self, _: Mapping[str, Tensor], /) -> dict[str, Tensor] | None:
        """LoRA's factors of the same change, for an operator that has them in another form; None for others."""
        return None

    def stacked(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {
            name: common(name, [part[name] for part in parts])
            if name in self.shared
            else torch.cat([part[name] for part in parts])
            for name in parts[0]
        }

    def scaled(self, factors: Mapping[str, Tensor], strength: Tensor) -> dict[str, Tensor]:
        scaled = dict(factors)
        for name in self.linear:
            part = factors[name]
            if part.element_size() == 1:  # float8 knows no products
                part = part.to(torch.bfloat16)
            scaled[name] = part * strength.reshape(-1, *[1] * (part.ndim - 1)).to(part)
        return scaled


def common(name: str, tensors: Sequence[Tensor]) -> Tensor:
    """Return the one tensor that all of these are; TargetError where they differ."""
    if all(each is tensors[0] or torch.equal(each, tensors[0]) for each in tensors[1:]):
        return tensors[0]
    raise TargetError(
        f"{name}: expected the same shared numbers in every adapter, got different ones: they come from different "
        "generators; use openwu.adapters.operators.basis.multiplied_out of each"
    )


def operator_of(name: str) -> Operator:
    """Find an operator by its name, or of several joined by "+"; OpenwuError for one that does not exist."""
    if "+" in name:
        return resolve(COMBINED)(tuple(name.split("+")))  # type: ignore[no-any-return]
    if name not in OPERATORS:
        raise OpenwuError(
            f"operator: expected one of {', '.join(OPERATORS)}, got {name!r}; correct the name, or add the operator to "
            "openwu.registry.OPERATORS"
        )
    operator = resolve(OPERATORS[name])()
    assert isinstance(operator, Operator)
    return operator
