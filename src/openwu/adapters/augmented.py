"""Stacked experts by augmented products: fuse the LoRA into the grouped GEMM by widening K.

    y = W x + scale B (A x) = [W | scale B] [x, A x]

The weights lie in memory with spare columns beside each row; a scope writes scale B there, and the product that the
base computes anyway reads a few columns more. Against an update of its own (`stacked.py`), no result is read and
written again, and there is one grouped product less. Several requests share the spare columns: each has its own, and
A x is zero in those of the others, so that the groups stay the experts'.

Nothing is merged: W's numbers are never written. Where A, B or W are trained, a scope takes `stacked.py`'s way, and so
do adapters for which there are too few spare columns.

Shapes: S routed rows, E experts, b samples, r rank, c = b * r columns in use (rounded up), room >= c.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from openwu.adapters.active import Active
from openwu.adapters.site import check_device
from openwu.adapters.stacked import StackedSite
from openwu.errors import TargetError
from openwu.kernels.grouped import GroupedProduct, Routed
from openwu.kernels.low_rank import contained

COLUMNS = 16
"""Rooms and columns in use are multiples of it, so that rows stay whole multiples of what grouped products want."""


class AugmentedSite(StackedSite):
    """One weight of all experts, `[E, out, in]`, with room beside it."""

    module: GroupedProduct

    def __init__(self, plain: StackedSite, spare_columns: int) -> None:
        """Of a site without spare columns."""
        product = plain.module if isinstance(plain.module, GroupedProduct) else None
        super().__init__(plain.targets[0], product, plain.container, plain.transposed)
        target, weight = self.targets[0], self._parameter
        if plain.transposed:
            raise TargetError(
                f"{target.name}: spare columns need weights [experts, out, in], got [experts, in, out]; attach without "
                "spare_columns"
            )
        if not weight.is_floating_point() or type(weight) is not nn.Parameter or weight.is_meta:
            raise TargetError(
                f"{target.name}: room for adapters needs plain floating-point weights in memory, got "
                f"{type(weight).__name__} in {weight.dtype} on {weight.device}; attach without room"
            )
        self._room = _rounded(spare_columns)
        self._wide: Tensor | None = None
        """`[E, out, in + room]`"""
        self._tail_a: Tensor | None = None
        """`[E, c, in]`, all samples' A side by side; None where the scope is `stacked.py`'s"""
        self._place_n: Tensor | None = None
        """Which of the samples in the room every row of the batch has, -1 for none; None: all have the only one"""
        self._used, self._rank = 0, 0

    def install(self) -> list[RemovableHandle]:
        """Lay the weight out anew: one more copy of this weight for a moment, `spare_columns` columns more for good."""
        weight = self._parameter.data
        with torch.inference_mode(mode=False):  # the room is written to in every scope, of whatever mode
            wide = weight.new_zeros(*weight.shape[:2], weight.shape[2] + self._room)
            wide[..., : weight.shape[2]] = weight
            self._wide, self._parameter.data = wide, wide[..., : weight.shape[2]]
        return [*super().install(), self.module.register_forward_pre_hook(self._widen)]

    def uninstall(self) -> None:
        """The weight lies as it lay before, unless somebody has put another in its place."""
        wide, self._wide = self._wide, None
        if wide is not None and self._parameter.data_ptr() == wide.data_ptr():
            self._parameter.data = self._parameter.data.contiguous()

    def adapt(self, y: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """y as it came, where the product has added the update already."""
        return y if self._tail_a is not None else super().adapt(y, args, kwargs)

    def take(self, active: Active) -> None:
        a, b = active.pair(self.path)
        used: tuple[int, ...] = tuple(range(active.batch))
        if active.rows is not None:
            used = tuple(sorted({sample for sample in active.rows if sample >= 0}))
            if len(used) < active.batch:
                chosen = torch.tensor(used, dtype=torch.int64)
                a, b = a.index_select(0, chosen.to(a.device)), b.index_select(0, chosen.to(b.device))
        rank, width = a.shape[2:]
        columns = _rounded(len(used) * rank)
        wide = self._wide
        in_room = wide is not None and self._parameter.data_ptr() == wide.data_ptr() and 0 < columns <= self._room
        if not in_room or (torch.is_grad_enabled() and (active.trained or self._parameter.requires_grad)):
            super().take(active)
            return
        assert wide is not None
        check_device(self.path, b, wide)
        with torch.no_grad():
            free = wide[..., width : width + columns]
            # [b, E, out, r], the order of B
            own = free[..., : len(used) * rank].view(*wide.shape[:2], len(used), rank).permute(2, 0, 1, 3)
            torch.mul(b if b.dtype == own.dtype else b.to(own.dtype), active.scale, out=own)
            if not active.uniform:  # every routed row is multiplied with the B of all samples
                a, finite = contained(a, own)
                if finite is not own:
                    own.copy_(finite)
            self._tail_a = a.transpose(0, 1).flatten(1, 2)
            if columns > len(used) * rank:
                free[..., len(used) * rank :] = 0
                self._tail_a = F.pad(self._tail_a, (0, 0, 0, columns - len(used) * rank))
        if not active.uniform:
            rows = tuple(range(active.batch)) if active.rows is None else active.rows
            place = {sample: number for number, sample in enumerate(used)}
            self._place_n = torch.tensor([place.get(sample, -1) for sample in rows], device=a.device)
            self._rows, self._rank = len(rows), rank
            self._run_t = None if active.segments is None else active.segments.of_token
        self.module.spare_columns = self._used = columns

    def drop(self) -> None:
        super().drop()
        self._tail_a = self._place_n = self._rows = None
        self.module.spare_columns = 0

    def _widen(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """x `[S, in]`, weight `[E, out, in]` -> `[x, A x]` and `[W | scale B]`."""
        a, wide = self._tail_a, self._wide
        if not self.active or a is None:
            return None
        assert wide is not None
        if torch.is_grad_enabled() and (self._trained or self._parameter.requires_grad):
            raise TargetError(
                f"{self.path}: the `applied` scope was entered without gradients, and the model runs with them inside; "
                "enter it under torch.enable_grad(), or attach without room"
            )
        x, _, routed = args
        check_device(self.path, a, x)
        tail = self.module.product(x, a.to(x.dtype), routed)
        if self._place_n is not None:
            tail = tail.masked_fill(self._foreign(routed), 0)
        width = x.shape[1]
        return self.module.append_columns(x, tail), wide[..., : width + self._used], routed

    def _foreign(self, routed: Routed) -> Tensor:
        """`[S, c]` bool: all columns but those of a routed row's own sample."""
        assert self._place_n is not None
        place_s = self._place_n[self._row_of(routed)]
        place_c = torch.arange(self._used, device=place_s.device) // self._rank
        return place_s[:, None] != place_c


def _rounded(columns: int) -> int:
    return -(-columns // COLUMNS) * COLUMNS
