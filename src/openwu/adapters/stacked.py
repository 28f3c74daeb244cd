"""Mixtures whose experts are stacked in one tensor: a grouped product enters, the same with the updates leaves.

A target `<container>.<weight>` with E experts adapts the parameter of that name `[E, out, in]`. The container computes
it in `products[<weight>]`, a `GroupedProduct` of `compute.grouped`, and there the hook sits: it receives the tokens
sorted by expert. Within an expert they ascend, so tokens of one request lie side by side, and the (expert, request)
groups of the update need no second permutation. Containers of transformers get their products from
`backbone.grouped_experts`.

Shapes: T tokens, S routed rows, E experts, b samples, n rows of the batch (or segments), r rank, g = E or E * n groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from openwu.adapters.site import Active, Site, Slot, check_device
from openwu.errors import TargetError
from openwu.kernels import dispatch
from openwu.kernels.grouped import GroupedProduct, Routed, group_ends
from openwu.types import Target


class StackedSite(Site):
    """One weight of all experts: x `[S, in]` sorted by expert, A `[g, r, in]`, B `[g, out, r]`."""

    module: GroupedProduct

    def __init__(self, target: Target, module: GroupedProduct, container: nn.Module) -> None:
        super().__init__(target.name, module, (target,))
        self.makes_output = type(module) is GroupedProduct
        self._container = container
        self._parameter = container.get_parameter(target.name.rpartition(".")[2])
        self._a: Tensor | None = None
        self._b: Tensor | None = None
        self._rows: int | None = None
        self._run_t: Tensor | None = None

    @property
    def slots(self) -> tuple[Slot, ...]:
        return (Slot(self.path, self._container, self.path.rpartition(".")[2]),)

    def adapt(self, y: Tensor, args: tuple[Any, ...], _: Mapping[str, Any]) -> Tensor:
        """`GroupedProduct`'s output y `[S, out]` and its arguments."""
        x, routed = args[0], args[2]
        a, b = self._a, self._b
        assert a is not None
        assert b is not None
        check_device(self.path, a, y)
        y, x, a, b = self.marked(y, x, a, b)
        group_s, ends = routed.expert_s, routed.ends
        if self._rows is not None:
            group_s = group_s * self._rows + self._row_of(routed)
            ends = group_ends(group_s, len(a))
        return dispatch.add_sorted(y, x.to(y.device), a, b, self.scale, group_s, ends, in_place=self.may_write(y))

    def take(self, active: Active) -> None:
        a, b = active.pair_per_row(self.targets[0])  # [n, E, ...]
        self._rows = None if active.uniform else len(a)
        self._run_t = None if active.segments is None or active.uniform else active.segments.of_token
        self._a, self._b = a.transpose(0, 1).flatten(0, 1), b.transpose(0, 1).flatten(0, 1)

    def drop(self) -> None:
        self._a = self._b = self._run_t = None

    def deltas(self, active: Active) -> tuple[Tensor, ...]:
        a, b = active.pair(self.path)
        wide = torch.promote_types(torch.promote_types(a.dtype, self._parameter.dtype), torch.float32)
        return (active.scale * torch.bmm(b[0].to(wide), a[0].to(wide)),)

    def _row_of(self, routed: Routed) -> Tensor:
        """`[S]` row of the batch, or segment, that each routed row belongs to."""
        tokens, rows, run_t = len(routed.row_tk), self._rows, self._run_t
        assert rows is not None
        if run_t is not None:
            if len(run_t) != tokens:
                raise TargetError(f"{self.path}: the segments hold {len(run_t)} tokens, but {tokens} were routed")
            return run_t[routed.token_s]
        if tokens % rows:
            raise TargetError(
                f"{self.path}: expected equally many tokens for each of {rows} rows, but {tokens} were routed; pass "
                "applied(adapter, rows=...) with the sample of every row, or segments=... for packed sequences"
            )
        return routed.token_s // (tokens // rows)


def stacked_products(
    container: str, held: nn.Module, targets: Sequence[Target]
) -> list[tuple[Target, GroupedProduct]] | None:
    """Where the `targets` of a container that stacks its experts are computed; None where it has a module for each."""
    parameters = dict(held.named_parameters(recurse=False))
    if not any(target.name.rpartition(".")[2] in parameters for target in targets):
        return None
    products = getattr(held, "products", None)
    found: list[tuple[Target, GroupedProduct]] = []
    for target in targets:
        weight = target.name.rpartition(".")[2]
        expected = (target.experts, target.out_dim, target.in_dim)
        if weight not in parameters or tuple(parameters[weight].shape) != expected:
            came = tuple(parameters[weight].shape) if weight in parameters else "no such parameter"
            raise TargetError(f"{target.name}: expected a stacked weight [experts, out, in] {expected}, got {came}")
        product = products[weight] if isinstance(products, nn.ModuleDict) and weight in products else None
        if not isinstance(product, GroupedProduct):
            raise TargetError(
                f"{target.name}: {container} computes its experts in one piece, so that no hook can reach this weight; "
                "call openwu.backbones.causal_lm.experts.group_experts(model) before attach"
            )
        found.append((target, product))
    return found
