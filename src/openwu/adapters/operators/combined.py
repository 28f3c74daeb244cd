"""Several operators on one module, by a name such as `lora+offset`: their changes of the base's output add up.

Every change is measured from the base's output, as in a sum of adapters, so the order does not matter: `lora+scale` is
`y + s B (A x) + s g y`, without a product of the two. Factors of all operators stand side by side, and must have
different names. Merging adds up the changes of each parameter.

Shapes: b samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from openwu.adapters.active import Active
from openwu.adapters.operators import Operator, operator_of
from openwu.adapters.site import PlainSite, Slot
from openwu.errors import OpenwuError
from openwu.types import Factor, Target


class Combined(Operator):
    """The sum of the changes of several operators."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._operators = tuple(operator_of(name) for name in names)
        if len(set(names)) < len(names) or "" in names:
            raise OpenwuError(f"operator: expected different names joined by '+', got {'+'.join(names)!r}")
        self.linear = tuple(name for each in self._operators for name in each.linear)
        self.shared = tuple(name for each in self._operators for name in each.shared)
        self.folds = all(each.folds for each in self._operators)
        self.rank_factor = next((each.rank_factor for each in self._operators if each.rank_factor), None)

    def factors(self, target: Target, rank: int, /) -> tuple[Factor, ...]:
        held = [factor for part in self._parts(target) for factor in part.factors(rank)]
        if twice := [name for name, count in Counter(factor.name for factor in held).items() if count > 1]:
            raise OpenwuError(
                f"operator: {'+'.join(self._names)!r}: expected operators with factors of different names, got "
                f"{', '.join(twice)} twice; leave one of them out"
            )
        return tuple(sorted(held, key=lambda factor: factor.kind == "shared"))  # stable: shared ones come last

    def summed(self, parts: Sequence[Mapping[str, Tensor]], ratios: Sequence[float]) -> dict[str, Tensor]:
        totals = [operator.summed(parts, ratios) for operator in self._operators]
        return {name: next(total[name] for total in totals if name in total) for name in parts[0]}

    def site(self, target: Target, module: nn.Module) -> CombinedSite:
        target.factors(1)
        return CombinedSite(
            target,
            module,
            [operator_of(part.operator).site(part, module) for part in self._parts(target)],
        )

    def inner_products(self, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Tensor:
        """Of each operator's change by itself."""
        return torch.stack([operator.inner_products(one, other) for operator in self._operators]).sum(0)

    def _parts(self, target: Target) -> list[Target]:
        return [replace(target, operator=name) for name in self._names]


class CombinedSite(PlainSite):
    """The sites of the operators on one module; this one holds the hook."""

    def __init__(self, target: Target, module: nn.Module, parts: Sequence[PlainSite]) -> None:
        super().__init__(module, target)
        self._parts = tuple(parts)
        self._own_forward = any(part._own_forward for part in parts)
        for part in self._parts:  # the others need the output as the module made it
            part.makes_output = False

    def load(self, active: Active) -> None:
        super().load(active)
        for part in self._parts:
            part.flattened, part.tokens_first = self.flattened, self.tokens_first
            part.load(active.only(self.path, [factor.name for factor in part.targets[0].factors(1)]))

    def clear(self) -> None:
        super().clear()
        for part in self._parts:
            part.clear()

    def update(self, y: Tensor, x: Tensor) -> Tensor:
        changed: Tensor = self._parts[0].update(y, x)
        for part in self._parts[1:]:
            changed = changed + (part.update(y, x) - y)
        return changed

    @property
    def slots(self) -> tuple[Slot, ...]:
        found = {slot.name: slot for part in self._parts for slot in part.slots}
        weight = f"{self.path}.weight"
        return (found.pop(weight), *found.values())

    def deltas(self, active: Active) -> tuple[Tensor, ...]:
        totals: dict[str, Tensor] = {}
        for part in self._parts:
            own = active.only(self.path, [factor.name for factor in part.targets[0].factors(1)])
            for slot, delta in zip(part.slots, part.deltas(own), strict=True):
                totals[slot.name] = totals[slot.name] + delta if slot.name in totals else delta
        return tuple(totals[slot.name] for slot in self.slots)
