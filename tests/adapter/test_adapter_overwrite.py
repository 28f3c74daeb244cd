"""Without gradients a linear module's output may be overwritten: the same numbers, and never what others still hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapter_cases import random_adapter
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from openwu.adapter.inject import attach
from openwu.types import Target

TARGET = Target("0", 6, 4)
ADAPTER = random_adapter([TARGET], 3, rank=2)


def made(kind: type[nn.Linear] = nn.Linear) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(kind(6, 4)).double().requires_grad_(False)


def expected(model: nn.Sequential, x: Tensor, samples: int = 3) -> Tensor:
    a, b = ADAPTER.weights["0"]
    own = [b[i % samples].double() @ a[i % samples].double() for i in range(len(x))]
    updates = torch.stack([row @ each.t() for row, each in zip(x, own, strict=True)])
    return x @ model[0].weight.t() + model[0].bias + ADAPTER.scale * updates


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("shape", [(3, 6), (3, 5, 6), (3, 2, 2, 6)])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_it_is_the_update_in_every_mode(mode: Callable[[], Any], shape: tuple[int, ...], samples: int) -> None:
    model, x = made(), torch.randn(shape, dtype=torch.float64)
    used = ADAPTER.select(range(samples)).to(torch.float64)
    with attach(model, [TARGET]) as handle, mode(), handle.applied(used):
        for _ in range(2):
            torch.testing.assert_close(model(x), expected(model, x, samples), rtol=1e-10, atol=1e-12)


class Kept(nn.Linear):
    """Remembers what it returned."""

    def forward(self, x: Tensor) -> Tensor:
        self.returned = super().forward(x)
        return self.returned


@pytest.mark.parametrize("how", ["module hook", "hook of all modules", "another class", "own forward"])
@torch.no_grad()
def test_what_somebody_else_saw_stays(how: str) -> None:
    model, x = made(Kept if how == "another class" else nn.Linear), torch.randn(3, 5, 6, dtype=torch.float64)
    seen: list[Tensor] = []
    bare = model(x).clone()

    def keep(_: nn.Module, __: Any, y: Tensor) -> None:
        seen.append(y)

    hooks = []
    if how == "module hook":
        hooks.append(model[0].register_forward_hook(keep))
    elif how == "hook of all modules":
        hooks.append(register_module_forward_hook(keep))
    elif how == "own forward":
        plainly = model[0].forward
        model[0].forward = lambda x: seen.append(plainly(x)) or seen[-1]
    with attach(model, [TARGET]) as handle, handle.applied(ADAPTER.to(torch.float64)):
        torch.testing.assert_close(model(x), expected(model, x), rtol=1e-10, atol=1e-12)
    for hook in hooks:
        hook.remove()
    held = model[0].returned if how == "another class" else seen[0]
    assert torch.equal(held, bare)


@torch.no_grad()
def test_no_second_output_is_made_where_nobody_else_can_see_the_first() -> None:
    model, x = made(), torch.randn(3, 5, 6, dtype=torch.float64)
    made_at: list[int] = []
    linear = nn.functional.linear

    def told(*inputs: Tensor) -> Tensor:
        y = linear(*inputs)
        made_at.append(y.data_ptr())
        return y

    with pytest.MonkeyPatch.context() as patch, attach(model, [TARGET]) as handle:
        patch.setattr(nn.functional, "linear", told)
        with handle.applied(ADAPTER.to(torch.float64)):
            assert model(x).data_ptr() == made_at[0]
