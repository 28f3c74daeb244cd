"""torch.compile: hooks are in the graph, adapters of equal shapes share it, gradients and errors come through."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from adapter_cases import SMALL_TARGETS, random_adapter, small_model
from torch import Tensor
from torch._dynamo.utils import counters

from openwu.adapter.inject import attach
from openwu.errors import TargetError
from openwu.types import Adapter

X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def gradients(y: Tensor, adapter: Adapter) -> list[Tensor]:
    return list(torch.autograd.grad(y.square().sum(), list(adapter.state_dict().values())))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_adapters_of_equal_shapes_share_one_graph(backend: str) -> None:
    model = small_model()
    with attach(model, SMALL_TARGETS) as handle:
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        for seed in range(20):
            adapter = random_adapter(SMALL_TARGETS, 3, seed=seed, trained=True)
            with handle.applied(adapter):
                y, expected = compiled(X), model(X)
            torch.testing.assert_close(y, expected)
            for came, wanted in zip(gradients(y, adapter), gradients(expected, adapter), strict=True):
                torch.testing.assert_close(came, wanted)
        assert graphs() == 1
        torch.testing.assert_close(compiled(X), model(X))
        assert graphs() == 2
        with handle.applied(random_adapter(SMALL_TARGETS, 3, seed=20, trained=True)):
            compiled(X)
        assert graphs() == 2


def test_rows_and_single_adapters_compile() -> None:
    model = small_model()
    with attach(model, SMALL_TARGETS) as handle:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for seed in range(3):
            for batch, rows in [(1, None), (2, [0, 1, -1])]:
                with handle.applied(random_adapter(SMALL_TARGETS, batch, seed=seed), rows):
                    torch.testing.assert_close(compiled(X), model(X))
        assert graphs() == 2


def test_targets_not_reached_by_compiled_code_are_named() -> None:
    model = small_model()
    compiled = torch.compile(model, backend="eager")
    compiled(X)
    with attach(model, SMALL_TARGETS) as handle:
        adapter = random_adapter(SMALL_TARGETS, 3)
        with pytest.raises(TargetError, match=r"after torch\.compile do not run"), handle.applied(adapter):
            compiled(X)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_rows_that_do_not_fit_are_refused_in_compiled_code(fullgraph: bool) -> None:
    model = small_model()
    with attach(model, SMALL_TARGETS) as handle:
        compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
        with handle.applied(random_adapter(SMALL_TARGETS, 3)):
            compiled(X)
        kind = torch._dynamo.exc.Unsupported if fullgraph else TargetError
        with pytest.raises(kind), handle.applied(random_adapter(SMALL_TARGETS, 2)):
            compiled(X)


def in_thread(work: Callable[[], object]) -> BaseException | None:
    errors: list[BaseException] = []

    def caught() -> None:
        try:
            work()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=caught)
    thread.start()
    thread.join()
    return errors[0] if errors else None


@pytest.mark.parametrize("fullgraph", [False, True])
def test_threads_share_compiled_code_but_not_a_scope(fullgraph: bool) -> None:
    model, adapter = small_model(), random_adapter(SMALL_TARGETS, 3)

    def scope() -> None:
        with handle.applied(adapter):
            torch.testing.assert_close(compiled(X), model(X))

    with attach(model, SMALL_TARGETS) as handle:
        compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
        scope()
        assert in_thread(scope) is None
        scope()
        assert graphs() == 1
        with handle.applied(adapter):
            error = in_thread(lambda: compiled(X))
            assert isinstance(error, torch._dynamo.exc.Unsupported if fullgraph else TargetError)
            torch.testing.assert_close(compiled(X), model(X))
        assert in_thread(scope) is None
