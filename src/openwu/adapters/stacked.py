"""Apply LoRA to experts whose weights are stacked in one tensor, by grouped matrix products.

A target `<container>.<weight>` with E experts adapts the parameter of that name, `[E, out, in]` or, where the container
stores it transposed (GPT-OSS), `[E, in, out]`. The container computes it in `products[<weight>]`, a `GroupedProduct` of
`kernels.grouped`, and there the hook sits: it receives the tokens sorted by expert. Within an expert they ascend, so
tokens of one request lie side by side, and the (expert, request) groups of the update need no second permutation.
Containers of transformers get their products from `backbones.causal_lm.experts`.

Shapes: T tokens, S routed rows, E experts, b samples, n rows of the batch (or segments), r rank, g = E or E * n groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from openwu.adapters.active import Active
from openwu.adapters.site import Site, Slot, check_device
from openwu.errors import TargetError
from openwu.kernels import dispatch
from openwu.kernels.grouped import GroupedProduct, Routed, group_ends
from openwu.types import Target


class StackedSite(Site):
    """One weight of all experts: x `[S, in]` sorted by expert, A `[g, r, in]`, B `[g, out, r]`."""

    def __init__(self, target: Target, module: GroupedProduct | None, container: nn.Module, transposed: bool) -> None:
        """`module` is None where the container computes everything in one piece, so that merging is all one can do."""
        super().__init__(target.name, container if module is None else module, (target,))
        self.makes_output = type(module) is GroupedProduct
        if module is None:
            self.unreachable = (
                f"{type(container).__name__} computes its experts in one piece, so that no hook can reach this weight; "
                "call openwu.backbones.causal_lm.experts.group_experts(model) before attach, which mixtures that use "
                "transformers' experts interface allow, or merge the adapter"
            )
        self.transposed = transposed
        self.container = container
        self._parameter = container.get_parameter(target.name.rpartition(".")[2])
        self._a: Tensor | None = None
        self._b: Tensor | None = None
        self._rows: int | None = None
        self._run_t: Tensor | None = None

    @property
    def slots(self) -> tuple[Slot, ...]:
        return (Slot(self.path, self.container, self.path.rpartition(".")[2]),)

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
        delta = active.scale * torch.bmm(b[0].to(wide), a[0].to(wide))
        return (delta.mT if self.transposed else delta,)

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


def stacked_sites(held: nn.Module, targets: Sequence[Target]) -> list[StackedSite] | None:
    """The sites of a container that stacks its experts; None for one that has a module for each."""
    parameters = dict(held.named_parameters(recurse=False))
    if not any(target.name.rpartition(".")[2] in parameters for target in targets):
        return None
    products = vars(held)["_modules"].get("products")
    found: list[StackedSite] = []
    for target in targets:
        weight = target.name.rpartition(".")[2]
        product = products[weight] if isinstance(products, nn.ModuleDict) and weight in products else None
        if not isinstance(product, GroupedProduct):
            product = None
        shape = tuple(parameters[weight].shape) if weight in parameters else None
        found.append(StackedSite(target, product, held, _transposed(target, shape, product, held)))
    return found


def _transposed(target: Target, shape: tuple[int, ...] | None, product: GroupedProduct | None, held: nn.Module) -> bool:
    """Whether a parameter is `[E, in, out]`: its product says so, or its shape, or transformers' attribute."""
    usual, turned = (target.experts, target.out_dim, target.in_dim), (target.experts, target.in_dim, target.out_dim)
    stored = product.transposed if product is not None else vars(held).get("is_transposed")
    if stored is None and shape == usual == turned:
        raise TargetError(
            f"{target.name}: a weight {shape} may be stored [experts, out, in] or [experts, in, out], and "
            f"{type(held).__name__} does not say which; set its attribute is_transposed"
        )
    if shape == usual and not stored:
        return False
    if shape == turned and stored in (None, True):
        return True
    layout, expected = ("[experts, in, out]", turned) if stored else ("[experts, out, in]", usual)
    raise TargetError(
        f"{target.name}: expected a stacked weight {layout} {expected}, got {shape or 'no such parameter'}"
    )
