"""Gradient checkpointing: the adapter is there when blocks are recomputed, or the backward pass fails."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from adapter_cases import SMALL_TARGETS, random_adapter, small_model
from torch import Tensor
from torch.utils.checkpoint import CheckpointError, checkpoint

from openwu.adapters.inject import attach
from openwu.errors import TargetError
from openwu.types import Adapter

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


def test_backward_after_the_scope_is_fine_without_checkpointing() -> None:
    model = small_model()
    adapter = random_adapter(SMALL_TARGETS, 2, trained=True)
    with attach(model, SMALL_TARGETS) as handle:
        with handle.applied(adapter):
            expected = gradients(model(X).square().sum(), adapter)
        with handle.applied(adapter):
            loss = model(X).square().sum()
    assert all(torch.equal(one, other) for one, other in zip(gradients(loss, adapter), expected, strict=True))
