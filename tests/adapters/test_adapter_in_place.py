"""Updates are written into a module's output where nobody else can have it, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapter_cases import random_adapter
from torch import Tensor, nn

from openwu.adapters.inject import attach
from openwu.types import Adapter, Target

TARGET = Target("0", 6, 5)
ROWS = [1, -1, 0]


class ResultCache(nn.Linear):
    """Returns a tensor that it keeps."""

    held: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.held = super().forward(x)
        return self.held


class Passing(nn.Linear):
    """Returns its input itself where W x is equal to it."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return x[..., :5] if torch.equal(y, x[..., :5]) else y


def adapted(layer: nn.Linear, x: Tensor, adapter: Adapter, rows: list[int] | None = None) -> Tensor:
    model = nn.Sequential(layer)
    with attach(model, [TARGET]) as handle, handle.applied(adapter, rows):
        y: Tensor = model(x)
    return y


def formula(layer: nn.Linear, x: Tensor, adapter: Adapter, rows: list[int]) -> Tensor:
    a, b = adapter.pairs["0"]
    return torch.stack(
        [
            layer(own) + (adapter.scale * (own @ a[sample].T) @ b[sample].T if sample >= 0 else 0)
            for own, sample in zip(x, rows, strict=True)
        ]
    )


@pytest.mark.parametrize("inner", [(), (4,), (2, 3)])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_outputs_and_gradients_are_those_of_the_formula(
    inner: tuple[int, ...], batch: int, mode: type[torch.no_grad]
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 5).double().requires_grad_(False)
    adapter = random_adapter([TARGET], batch, trained=True)
    rows = ROWS if batch > 1 else [0] * 3
    x = torch.randn(3, *inner, 6, dtype=torch.float64)
    expected = formula(layer, x, adapter, rows)
    before = x.clone()
    with mode():
        came = adapted(layer, x, adapter, ROWS if batch > 1 else None)
        plain = adapted(layer, x, adapter.detach(), ROWS if batch > 1 else None)
    for each in (came, plain):
        torch.testing.assert_close(each, expected, rtol=1e-10, atol=1e-10, check_dtype=True)
    assert torch.equal(x, before)
    assert came.requires_grad == (mode is torch.enable_grad)
    if came.requires_grad:
        dy = torch.randn_like(expected)
        one, other = (torch.autograd.grad(y, adapter.pairs["0"], dy) for y in (came, expected))
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def kept_by_hook(layer: nn.Linear) -> Callable[[], Tensor]:
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda _, __, y: seen.append(y))
    return lambda: seen[0]


def kept_by_forward(layer: nn.Linear) -> Callable[[], Tensor]:
    seen: list[Tensor] = []
    own = layer.forward

    def forward(x: Tensor) -> Tensor:
        seen.append(own(x))
        return seen[0]

    layer.forward = forward  # type: ignore[method-assign]
    return lambda: seen[0]


@pytest.mark.parametrize(
    ("kind", "keep"),
    [(nn.Linear, kept_by_hook), (nn.Linear, kept_by_forward), (ResultCache, lambda layer: lambda: layer.held)],
)
@torch.no_grad()
def test_what_somebody_else_has_stays_as_it_was(kind: type[nn.Linear], keep: Any) -> None:
    torch.manual_seed(0)
    layer = kind(6, 5)
    adapter = random_adapter([TARGET], 2, dtype=torch.float32)
    x = torch.randn(3, 4, 6)
    expected, plain = formula(layer, x, adapter, ROWS), nn.functional.linear(x, layer.weight, layer.bias)
    kept = keep(layer)
    came = adapted(layer, x, adapter, ROWS)
    torch.testing.assert_close(came, expected)
    torch.testing.assert_close(kept(), plain)


@torch.no_grad()
def test_hooks_of_all_modules_see_the_output_as_it_was() -> None:
    layer, seen = nn.Linear(6, 5), list[tuple[Tensor, Tensor]]()
    hook = nn.modules.module.register_module_forward_hook(lambda _, __, y: seen.append((y, y.clone())))
    try:
        adapted(layer, torch.randn(3, 4, 6), random_adapter([TARGET], 3, dtype=torch.float32))
    finally:
        hook.remove()
    assert torch.equal(*seen[0])


@torch.no_grad()
def test_an_input_that_is_passed_on_stays_as_it_was() -> None:
    x = torch.randn(3, 4, 6)
    before = x.clone()
    layer = Passing(6, 5, bias=False)
    layer.weight.copy_(torch.eye(5, 6))
    came = adapted(layer, x, random_adapter([TARGET], 3, dtype=torch.float32))
    assert torch.equal(x, before)
    assert not torch.equal(came, x[..., :5])


@torch.no_grad()
def test_it_reads_no_old_memory() -> None:
    torch.manual_seed(0)
    layer, adapter, x = nn.Linear(6, 5), random_adapter([TARGET], 3, dtype=torch.float32), torch.randn(3, 4, 6)
    first = adapted(layer, x, adapter)
    for _ in range(5):
        poison = [torch.full((size,), torch.nan) for size in (60, 60, 24, 72)]
        del poison
        assert torch.equal(adapted(layer, x, adapter), first)
    assert first.isfinite().all()
