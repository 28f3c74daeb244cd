"""Compare the updates of adapters: inner products, relative standard deviation, variances within and across tasks.

A LoRA's update is scale * B A, not its raw factors: B and A can be turned against one another without changing B A.

Shapes: b samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from openwu.adapters.operators import operator_of
from openwu.adapters.site import DENSE, Site
from openwu.types import LORA, Adapter


def inner_products(first: Adapter, second: Adapter | None = None) -> Tensor:
    """<update i, update j> over all targets: `[b1, b2]` float64; what an update is, its operator says."""
    second = first if second is None else second
    total = torch.zeros(first.batch, second.batch, dtype=torch.float64)
    for target in first.targets:
        name = target.name
        total += operator_of(target.operator).inner_products(first.factors[name], second.factors[name]).to(total)
    return total * (first.scale * second.scale)


def relative_std(adapter: Adapter) -> float:
    """How much updates differ between samples: their standard deviation over their root mean square; 0 is collapse."""
    products = inner_products(adapter.detach())
    square = float(products.diagonal().mean())
    return (max(0.0, square - float(products.mean())) / square) ** 0.5 if square > 0 else 0.0


def relative_norms(adapter: Adapter, sites: Sequence[Site]) -> Tensor:
    """Frobenius norm of each low-rank update over that of the weight it is added to: `[sites, b]`, float32.

    sites: those of the handle. Above 1 an update outweighs what the base had learned there. Operators without a weight
    update, quantised weights and offloaded ones, whose numbers are elsewhere between passes, are left out.
    """
    found = []
    for site in sites:
        weight = site.slots[0].parameter
        own = [target for target in site.targets if target.operator == LORA and target.name in adapter.factors]
        if weight is None or weight.dtype not in DENSE or weight.is_meta or not own:
            continue
        factors = [(operator_of(target.operator), adapter.factors[target.name]) for target in own]
        square = sum(operator.inner_products(each, each).diagonal().cpu() for operator, each in factors)
        assert isinstance(square, Tensor)
        size = float(torch.linalg.vector_norm(weight.detach(), dtype=torch.float32))
        found.append(square.clamp(min=0).sqrt().float() * (abs(adapter.scale) / max(size, 1e-30)))
    return torch.stack(found) if found else torch.zeros(0, adapter.batch)


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
