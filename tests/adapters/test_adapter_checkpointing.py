"""Gradient checkpointing: the adapter is there when blocks are recomputed, or the backward pass fails."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from adapter_cases import SMALL_TARGETS, StackedMixture, random_adapter, small_model, stacked_targets
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from openwu.adapters.inject import attach
from openwu.errors import TargetError
from openwu.types import Adapter, Target

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def checkpointed(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The loss, with everything between x and the output recomputed in backward."""
    y: Tensor = checkpoint(model, x, use_reentrant=False)
    return y.square().sum()


def gradients(loss: Tensor, adapter: Adapter) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(adapter.state_dict().values())))


def test_gradients_equal_those_without_checkpointing() -> None:
    model = small_model()
    adapter = random_adapter(SMALL_TARGETS, 2, trained=True)
    with attach(model, SMALL_TARGETS) as handle, handle.applied(adapter):
        expected = gradients(model(X).square().sum(), adapter)
        came = gradients(checkpointed(model, X), adapter)
    for one, other in zip(came, expected, strict=True):
        assert torch.equal(one, other)


def test_recomputation_in_a_thread_of_autograd() -> None:
    """On accelerators autograd recomputes in its own threads; here the whole backward pass runs in another one."""
    model = small_model()
    adapter = random_adapter(SMALL_TARGETS, 2, trained=True)
    with attach(model, SMALL_TARGETS) as handle, handle.applied(adapter):
        expected = gradients(model(X).square().sum(), adapter)
        loss, came = checkpointed(model, X), []
        thread = threading.Thread(target=lambda: came.extend(gradients(loss, adapter)))
        thread.start()
        thread.join()
    for one, other in zip(came, expected, strict=True):
        assert torch.equal(one, other)


def test_compiled_blocks_may_be_recomputed() -> None:
    model = small_model()
    adapter = random_adapter(SMALL_TARGETS, 2, trained=True)
    with attach(model, SMALL_TARGETS) as handle, handle.applied(adapter):
        expected = gradients(model(X).square().sum(), adapter)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        loss, came = checkpointed(compiled, X), []
        thread = threading.Thread(target=lambda: came.extend(gradients(loss, adapter)))
        thread.start()
        thread.join()
    for one, other in zip(came, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_backward_after_the_scope_fails() -> None:
    model = small_model()
    adapter = random_adapter(SMALL_TARGETS, 2, trained=True)
    with attach(model, SMALL_TARGETS) as handle:
        with handle.applied(adapter):
            loss = checkpointed(model, X)
        with pytest.raises(CheckpointError, match="different number of tensors"):
            loss.backward()


def test_backward_in_a_later_scope_fails() -> None:
    model = small_model()
    adapters = [random_adapter(SMALL_TARGETS, 2, seed=seed, trained=True) for seed in range(2)]
    with attach(model, SMALL_TARGETS) as handle:
        with handle.applied(adapters[0]):
            loss = checkpointed(model, X)
        with pytest.raises(TargetError, match=r"ran outside of this `applied` scope"), handle.applied(adapters[1]):
            loss.backward()


class Blocks(nn.Module):
    """A convolution and stacked experts, each recomputed in backward, with activations in place."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.conv, self.linear, self.mixture = nn.Conv2d(3, 8, 1), nn.Linear(8, 8), StackedMixture(8, 8)
        self.act = nn.ReLU(inplace=True)
        self.reentrant = reentrant

    def first(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x)).flatten(2).mT

    def second(self, x: Tensor) -> Tensor:
        return self.mixture(self.act(self.linear(x)))

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.first, self.second):
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


BLOCKS = {
    "lora": [Target("conv", 3, 8), Target("linear", 8, 8), *stacked_targets(8, 8, prefix="mixture.experts")],
    "scale_offset": [Target(n, i, 8, operator="scale_offset") for n, i in (("conv", 3), ("linear", 8))],
}


def blocks_and_adapters(kind: str, *, reentrant: bool = False, trained: bool = True) -> tuple[nn.Module, list[Adapter]]:
    torch.manual_seed(0)
    model = Blocks(reentrant).double().requires_grad_(False)
    adapters = []
    for _ in range(2):
        factors = {
            target.name: {
                name: torch.randn(shape, dtype=torch.float64).requires_grad_(trained)
                for name, shape in target.shapes(2, 2).items()
            }
            for target in BLOCKS[kind]
        }
        adapters.append(Adapter(tuple(BLOCKS[kind]), factors, 0.5))
    return model, adapters


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_two_adapters_in_one_backward_pass_are_refused(kind: str, trained: bool) -> None:
    """The first pass would be recomputed with the second adapter: gradients of factors, or of the input alone."""
    model, adapters = blocks_and_adapters(kind, trained=trained)
    x, losses = X.clone().requires_grad_(not trained), []
    wanted = [x] if not trained else [adapters[0].factors["linear"][n] for n in adapters[0].factors["linear"]]
    with attach(model, BLOCKS[kind]) as handle:
        for adapter in adapters:
            with handle.applied(adapter):
                losses.append(model(x).square().sum())
                if len(losses) == 2:
                    with pytest.raises(TargetError, match=r"in another `applied` scope than that of its forward"):
                        torch.autograd.grad(sum(losses), wanted)


@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_two_scopes_with_a_backward_pass_each(kind: str) -> None:
    model, adapters = blocks_and_adapters(kind)
    with attach(model, BLOCKS[kind]) as handle:
        for adapter in adapters:
            with handle.applied(adapter):
                came = gradients(model(X).square().sum(), adapter)
                expected = gradients(model.second(model.first(X)).square().sum(), adapter)
            for one, other in zip(came, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("trained", [True, False])
def test_reentrant_checkpointing_is_refused(trained: bool) -> None:
    model, adapters = blocks_and_adapters("lora", reentrant=True, trained=trained)
    x = X.clone().requires_grad_()
    with attach(model, BLOCKS["lora"]) as handle:
        with pytest.raises(TargetError, match="use_reentrant=False"), handle.applied(adapters[0]):
            model(x)
        with handle.applied(adapters[0]), torch.no_grad():
            model.second(model.first(x))
        with torch.no_grad(), handle.applied(adapters[0]):
            model(x)


def test_backward_after_the_scope_is_fine_without_checkpointing() -> None:
    model = small_model()
    adapter = random_adapter(SMALL_TARGETS, 2, trained=True)
    with attach(model, SMALL_TARGETS) as handle:
        with handle.applied(adapter):
            expected = gradients(model(X).square().sum(), adapter)
        with handle.applied(adapter):
            loss = model(X).square().sum()
    assert all(torch.equal(one, other) for one, other in zip(gradients(loss, adapter), expected, strict=True))
