"""Inner products and variances of adapters' updates, which are what adapters do, whatever factors say so.

Enters: a batch of adapters, and the task of each. Leaves: numbers about the updates scale * B A, computed without
forming them. Raw factors say nothing: B and A can be turned against one another without changing B A.

Shapes: b samples, E experts, r and s LoRA ranks, n the width of a factor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from openwu.types import Adapter


def inner_products(first: Adapter, second: Adapter | None = None) -> Tensor:
    """<update i, update j> over all targets: `[b1, b2]` float64.

    <B1 A1, B2 A2> = sum over ranks of (B1^T B2) * (A1 A2^T).
    """
    second = first if second is None else second
    total = torch.zeros(first.batch, second.batch, dtype=torch.float64)
    for name, (a1, b1) in first.weights.items():
        a2, b2 = second.weights[name]
        across = _cross(a1, a2)  # [E, b1, r, b2, s]
        down = _cross(b1.transpose(-1, -2), b2.transpose(-1, -2))
        total += (across * down).sum(dim=(0, 2, 4)).to(total)
    return total * (first.scale * second.scale)


def relative_std(adapter: Adapter) -> float:
    """How much updates differ between samples: their standard deviation over their root mean square; 0 is collapse."""
    products = inner_products(adapter.detach())
    square = float(products.diagonal().mean())
    return (max(0.0, square - float(products.mean())) / square) ** 0.5 if square > 0 else 0.0


def task_variances(adapter: Adapter, tasks: Sequence[str]) -> dict[str, float]:
    """Variance of updates within and across tasks, as parts of their mean square, and the first over the second.

    Half the mean squared distance of two samples' updates: `within` over pairs of one task, `across` over pairs of two.
    Equal when adapters do not depend on the task; `within` 0 when they depend on nothing else. What the batch has no
    pairs for is left out.
    """
    if len(tasks) != adapter.batch:
        raise ValueError(f"tasks: expected one for each of {adapter.batch} samples, got {len(tasks)}")
    products = inner_products(adapter.detach())
    own = products.diagonal()
    halved = (own[:, None] + own[None, :]).div(2) - products  # [b, b] half the squared distances
    same = torch.tensor([[one == other for other in tasks] for one in tasks])
    pairs = torch.ones_like(same).triu(1)
    found = {name: halved[pairs & kind] for name, kind in (("within", same), ("across", ~same))}
    size = max(float(own.mean()), 1e-30)
    variances = {name: max(0.0, float(each.mean())) / size for name, each in found.items() if len(each)}
    if variances.get("across", 0.0) > 0 and "within" in variances:
        variances["within_over_across"] = variances["within"] / variances["across"]
    return variances


def _cross(x: Tensor, y: Tensor) -> Tensor:
    """x `[b1, (E,) r, n]`, y `[b2, (E,) s, n]` -> products of all rows `[E or 1, b1, r, b2, s]`."""
    x, y = (each if each.ndim == 4 else each[:, None] for each in (x.double(), y.double()))
    experts = x.shape[1]
    rows = [each.transpose(0, 1).reshape(experts, -1, each.shape[-1]) for each in (x, y)]
    product = rows[0] @ rows[1].transpose(1, 2)
    return product.view(experts, x.shape[0], x.shape[2], y.shape[0], y.shape[2])
