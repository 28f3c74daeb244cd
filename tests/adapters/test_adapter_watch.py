"""A weight that is multiplied outside of its module's call is found in the first call of the model."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from adapter_cases import random_adapter
from torch import Tensor, nn
from torch.nn import functional as F

from openwu.adapters.inject import attach
from openwu.adapters.merge import merged_copy
from openwu.errors import TargetError
from openwu.types import Target

X = torch.randn(3, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TARGET = Target("inner", 16, 16)

OUTSIDE: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "forward": lambda inner, x: inner.forward(x),
    "class forward": lambda inner, x: nn.Linear.forward(inner, x),
    "linear": lambda inner, x: F.linear(x, inner.weight, inner.bias),
    "operator": lambda inner, x: x @ inner.weight.T,
    "reflected": lambda inner, x: (inner.weight @ x.transpose(1, 2)).transpose(1, 2),
    "einsum": lambda inner, x: torch.einsum("nld,od->nlo", x, inner.weight),
    "einsum of a list": lambda inner, x: torch.einsum("nld,od->nlo", [x, inner.weight]),
    "copy in another dtype": lambda inner, x: (x.float() @ inner.weight.float().t()).double(),
    "stacked": lambda inner, x: F.linear(x, torch.cat([inner.weight, inner.weight]))[..., :16],
    "in parts": lambda inner, x: torch.cat([F.linear(x, part) for part in inner.weight.chunk(2)], dim=-1),
    "keyword": lambda inner, x: torch.matmul(x, other=inner.weight),
}
HARMLESS: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "dtype": lambda inner, x: x.to(inner.weight.dtype).to(inner.weight.device),
    "norm": lambda inner, x: x * inner.weight.norm(),
    "shape": lambda inner, x: x @ torch.eye(inner.weight.shape[0], dtype=x.dtype),
}


class Model(nn.Module):
    """Calls `inner` as a module, and uses it another way as well."""

    def __init__(self, other: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(16, 16, dtype=torch.float64)
        self.other = other
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.inner, torch.relu(self.inner(x)))


@pytest.mark.parametrize("way", OUTSIDE)
def test_products_outside_of_the_call_are_refused(way: str) -> None:
    model = Model(OUTSIDE[way])
    adapter = random_adapter([TARGET], 1)
    with attach(model, [TARGET]) as handle:
        refused = pytest.raises(TargetError, match=r"(?s)merge the adapter.*inner: torch's")
        with refused, handle.applied(adapter):
            model(X)
    if way != "keyword":  # whose weight is not transposed
        assert not torch.allclose(merged_copy(model, adapter)(X), model(X))


@pytest.mark.parametrize("way", HARMLESS)
def test_what_does_not_multiply_is_no_fault(way: str) -> None:
    model = Model(HARMLESS[way])
    adapter = random_adapter([TARGET], 1)
    with attach(model, [TARGET]) as handle, handle.applied(adapter):
        found = model(X)
    if way != "norm":  # which depends on the adapter when it is merged
        torch.testing.assert_close(found, merged_copy(model, adapter)(X))


def test_a_weight_that_two_modules_hold_may_be_multiplied_by_the_other() -> None:
    twin = nn.Linear(16, 16, dtype=torch.float64).requires_grad_(False)
    model = Model(lambda _, x: torch.as_tensor(twin(x)))
    model.add_module("twin", twin)
    twin.weight = model.inner.weight
    with attach(model, [TARGET]) as handle, handle.applied(random_adapter([TARGET], 1)):
        model(X)


def test_the_watch_ends_with_the_first_whole_call() -> None:
    model = Model(lambda inner, x: inner(x))
    adapter = random_adapter([TARGET], 3)
    with attach(model, [TARGET]) as handle:
        watched = []

        def noted(inner: nn.Linear, x: Tensor) -> Tensor:
            watched.append(torch._C._len_torch_function_stack())
            return torch.as_tensor(inner(x))

        model.other = noted
        before = model(X)  # outside of a scope
        with handle.applied(adapter):
            first = model(X)
            assert torch.equal(first, model(X))
        with handle.applied(adapter):
            assert torch.equal(first, model(X))
        assert torch.equal(before, model(X))
        assert watched == [0, 1, 0, 0, 0]
    for module in (model, model.inner):
        assert not {**module._forward_hooks, **module._forward_pre_hooks}


def test_an_error_inside_the_call_leaves_no_mode_behind() -> None:
    def fails(inner: nn.Linear, x: Tensor) -> Tensor:
        raise RuntimeError("broken")

    model = Model(fails)
    handle = attach(model, [TARGET])
    with pytest.raises(RuntimeError, match="broken"), handle.applied(random_adapter([TARGET], 1)):
        model(X)
    assert torch._C._len_torch_function_stack() == 0
    assert not model.inner._forward_pre_hooks
    handle.detach()
    assert not {**model._forward_hooks, **model._forward_pre_hooks}


def test_a_step_of_training_is_as_before() -> None:
    model = Model(lambda inner, x: inner(x))
    adapter = random_adapter([TARGET], 3, trained=True)
    factors = list(adapter.factors["inner"].values())
    steps = []
    with attach(model, [TARGET]) as handle:
        for _ in range(2):
            with handle.applied(adapter):
                loss = model(X).square().sum()
                steps.append((loss.detach(), *torch.autograd.grad(loss, factors)))
    assert all(torch.equal(*pair) for pair in zip(*steps, strict=True))


def test_copies_and_pickles_of_the_model_work() -> None:
    model = nn.Sequential(nn.Linear(16, 16, dtype=torch.float64))
    with attach(model, [Target("0", 16, 16)]) as handle:
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # the project's own objects
            assert torch.equal(twin(X), model(X))
            with handle.applied(random_adapter([Target("0", 16, 16)], 1)):
                assert not torch.equal(twin(X), model(X))


def test_a_call_that_fails_and_is_caught_inside_the_scope_is_watched_again() -> None:
    broken = [True]

    def once(inner: nn.Linear, x: Tensor) -> Tensor:
        if broken.pop() if broken else False:
            raise RuntimeError("broken")
        return inner.forward(x)

    model = Model(once)
    handle = attach(model, [TARGET])
    scope = handle.applied(random_adapter([TARGET], 1))
    scope.__enter__()
    with pytest.raises(RuntimeError):
        model(X)
    model(X)
    with pytest.raises(TargetError, match="merge the adapter"):
        scope.__exit__(None, None, None)


def test_code_that_was_compiled_before_is_compiled_anew() -> None:
    model = Model(lambda inner, x: inner(x))
    compiled: Any = torch.compile(model.inner, backend="eager")
    model.other = lambda _, x: compiled(x)
    model(X)
    adapter = random_adapter([TARGET], 1)
    with attach(model, [TARGET]) as handle:
        for _ in range(3):
            with handle.applied(adapter):
                found = model(X)
            torch.testing.assert_close(found, merged_copy(Model(lambda inner, x: inner(x)), adapter)(X))


def test_parts_that_are_compiled_are_watched_too() -> None:
    model = Model(lambda _, x: part(x))
    part = torch.compile(lambda x: F.linear(x, model.inner.weight), backend="eager")
    handle = attach(model, [TARGET])
    with pytest.raises(TargetError, match="merge the adapter"), handle.applied(random_adapter([TARGET], 1)):
        model(X)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_part_compiles_at_the_second_call(fullgraph: bool) -> None:
    counter = torch._dynamo.testing.CompileCounter()
    model = Model(lambda _, x: part(x))
    part = torch.compile(lambda x: model.inner(x), backend=counter, fullgraph=fullgraph)
    adapter = random_adapter([TARGET], 1)
    expected = merged_copy(Model(lambda inner, x: inner(x)), adapter)(X)
    with attach(model, [TARGET]) as handle:
        for graphs in (0, 1, 1):
            with handle.applied(adapter):
                torch.testing.assert_close(model(X), expected)
            assert counter.frame_count == graphs


def test_first_calls_in_two_threads_leave_compiling_on() -> None:
    models = [Model(lambda inner, x: inner(x)) for _ in range(2)]
    barrier, failed = threading.Barrier(2), []

    def run(model: Model) -> None:
        model.other = lambda inner, x: (barrier.wait(10), inner(x))[1]
        try:
            with attach(model, [TARGET]) as handle, handle.applied(random_adapter([TARGET], 1)):
                model(X)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    graphs: list[object] = []

    def backend(graph: Any, _: object) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compile(torch.relu, backend=backend)(X)
    torch.compile(lambda x: torch.relu(x) + 1, backend=backend)(X)
    assert graphs
