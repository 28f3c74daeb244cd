"""Linear modules: y `[n, ..., out]` of `nn.Linear` and its subclasses (quantised ones too) enters, `y + scale * B (A x)` leaves."""

from __future__ import annotations

from torch import Tensor, nn

from openwu.adapter.site import PairSite
from openwu.errors import TargetError
from openwu.ops import dispatch
from openwu.types import Adapter, Target


class LinearSite(PairSite):
    """x `[n, ..., in]`, A `[n or 1, r, in]`, B `[n or 1, out, r]`."""

    def __init__(self, target: Target, module: nn.Linear) -> None:
        check_linear(target.name, module, target.in_dim, target.out_dim)
        super().__init__(target.name, module, target)

    def update(self, y: Tensor, x: Tensor) -> Tensor:
        a, b = self.pair(y, x)
        return dispatch.add_linear(y, x, a, b, self.scale)

    def weight_delta(self, adapter: Adapter) -> Tensor:
        a, b = adapter.weights[self.target.name]
        return product(a[0], b[0], adapter.scale)


def check_linear(path: str, module: nn.Linear, in_dim: int, out_dim: int) -> None:
    if (module.in_features, module.out_features) != (in_dim, out_dim):
        raise TargetError(
            f"{path}: expected a linear module {in_dim} -> {out_dim}, got {module.in_features} -> {module.out_features}"
        )


def product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * B A `[out, in]` of A `[r, in]` and B `[out, r]`, rounded no earlier than in float32."""
    wide = a.double() if a.dtype.itemsize == 8 else a.float()
    return scale * (b.to(wide.dtype) @ wide)
