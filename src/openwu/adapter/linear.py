"""Linear modules: y `[n, ..., out]` of an `nn.Linear` (quantised or not) enters, `y + scale * B (A x)` leaves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openwu.adapter.site import Active, PairSite
from openwu.errors import TargetError
from openwu.ops import dispatch
from openwu.types import Target


class LinearSite(PairSite):
    """x `[n, ..., in]`, A `[n or 1, r, in]`, B `[n or 1, out, r]`."""

    module: nn.Linear

    def __init__(self, target: Target, module: nn.Linear) -> None:
        check_widths(target.name, module, target.in_dim, target.out_dim)
        super().__init__(module, target)
        self.makes_output = type(module) is nn.Linear

    def update(self, y: Tensor, x: Tensor) -> Tensor:
        # Offloading moves a module's input inside its forward, after the hooks have seen it: follow the output.
        if x.device != y.device:
            x = x.to(y.device)
        a, b = self.pair(y, x)
        if self._run_t is None:
            return dispatch.add_linear(y, x, a, b, self.scale, in_place=self.may_write(y))
        assert self._ends is not None
        flat_x = x.reshape(-1, x.shape[-1])
        if len(flat_x) != len(self._run_t):
            raise TargetError(
                f"{self.path}: the segments hold {len(self._run_t)} tokens, but the module's input has shape "
                f"{tuple(x.shape)}"
            )
        flat_y = y.reshape(-1, y.shape[-1])
        if len(a) == 1:  # all segments have the same adapter
            return dispatch.add_linear(flat_y, flat_x, a, b, self.scale).view(y.shape)
        return dispatch.add_sorted(flat_y, flat_x, a, b, self.scale, self._run_t, self._ends).view(y.shape)

    def weight_delta(self, active: Active) -> Tensor:
        a, b = active.pair(self.path)
        return product(a, b, active.scale, self.module.weight.dtype)


def check_widths(path: str, module: nn.Linear, in_dim: int, out_dim: int) -> None:
    """Refuse a module of other widths than the target's."""
    if (module.in_features, module.out_features) != (in_dim, out_dim):
        raise TargetError(
            f"{path}: expected a linear module {in_dim} -> {out_dim}, got {module.in_features} -> {module.out_features}"
        )


def product(a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale * B A `[out, in]` of A `[1, r, in]` and B `[1, out, r]`, in `dtype`, A's dtype or float32, the widest."""
    wide = torch.promote_types(torch.promote_types(a.dtype, dtype), torch.float32)
    return scale * (b[0].to(wide) @ a[0].to(wide))
