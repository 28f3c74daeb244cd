"""Who may use an applied adapter: threads, tasks, coroutines, generators, copies, transforms; and several handles."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import io
import pickle
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import torch
from adapter_cases import random_adapter
from torch import Tensor, nn

from openwu.adapters.inject import AdapterHandle, attach
from openwu.errors import TargetError
from openwu.types import Adapter, Target

TARGETS = [Target("0", 6, 5)]
X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
SUSPENDED = r"the generator .* is suspended inside an `applied` scope"


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5)).requires_grad_(False)


@pytest.fixture
def handle(model: nn.Module) -> Iterator[AdapterHandle]:
    with attach(model, TARGETS) as attached:
        yield attached


def adapter(batch: int = 1) -> Adapter:
    return random_adapter(TARGETS, batch, dtype=torch.float32)


def applied(model: nn.Module, handle: AdapterHandle) -> Tensor:
    with handle.applied(adapter()):
        y: Tensor = model(X)
    return y


def test_another_task_is_refused_and_the_own_one_goes_on(model: nn.Module, handle: AdapterHandle) -> None:
    expected = applied(model, handle)

    async def inside() -> None:
        with handle.applied(adapter()):
            for _ in range(3):
                assert torch.equal(model(X), expected)
                await asyncio.sleep(0)

    async def outside() -> None:
        with pytest.raises(TargetError, match="another thread or task"):
            model(X)

    async def both() -> None:
        await asyncio.gather(inside(), outside())

    asyncio.run(both())
    applied(model, handle)


def test_tasks_and_threads_of_asyncio_that_a_scope_starts_are_inside(model: nn.Module, handle: AdapterHandle) -> None:
    expected = applied(model, handle)

    async def child() -> Tensor:
        await asyncio.sleep(0)
        y: Tensor = model(X)
        return y

    async def parent() -> None:
        with handle.applied(adapter()):
            for y in (*await asyncio.gather(child(), child()), await asyncio.to_thread(model, X)):
                assert torch.equal(y, expected)

    asyncio.run(parent())


def test_a_task_left_over_from_an_earlier_scope_is_outside_of_the_next(model: nn.Module, handle: AdapterHandle) -> None:
    async def left_over(go: asyncio.Event) -> None:
        await go.wait()
        with pytest.raises(TargetError, match="another thread or task"):
            model(X)

    async def main() -> None:
        go = asyncio.Event()
        with handle.applied(adapter()):
            task = asyncio.create_task(left_over(go))
            model(X)
        with handle.applied(adapter()):
            model(X)
            go.set()
            await asyncio.sleep(0)
            await task

    asyncio.run(main())


def test_the_caller_of_a_suspended_generator_is_refused(model: nn.Module, handle: AdapterHandle) -> None:
    expected = applied(model, handle)

    def steps() -> Iterator[Tensor]:
        with handle.applied(adapter()):
            yield model(X)
            yield model(X)

    def delegating() -> Iterator[Tensor]:
        yield from steps()

    @torch.no_grad()
    def decorated() -> Iterator[Tensor]:
        with handle.applied(adapter()):
            yield model(X)
            yield model(X)

    def managed() -> Iterator[Tensor]:
        with scope(handle):
            yield model(X)
            yield model(X)

    def stacked() -> Iterator[Tensor]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(handle.applied(adapter()))
            yield model(X)
            yield model(X)

    for kind in (steps, delegating, decorated, managed, stacked):
        running = kind()
        assert torch.equal(next(running), expected)
        with pytest.raises(TargetError, match=SUSPENDED):
            model(X)
        assert torch.equal(next(running), expected)
        running.close()
        assert torch.equal(applied(model, handle), expected)
    for y in list(steps()):
        assert torch.equal(y, expected)


def test_the_caller_of_a_suspended_asynchronous_generator_is_refused(model: nn.Module, handle: AdapterHandle) -> None:
    async def steps() -> AsyncIterator[Tensor]:
        with handle.applied(adapter()):
            yield model(X)

    async def main() -> None:
        async for _ in steps():
            with pytest.raises(TargetError, match=SUSPENDED):
                model(X)

    asyncio.run(main())


@contextlib.contextmanager
def scope(handle: AdapterHandle) -> Iterator[None]:
    with handle.applied(adapter()):
        yield


def test_generators_that_are_context_managers_work(model: nn.Module, handle: AdapterHandle) -> None:
    expected = applied(model, handle)

    @contextlib.contextmanager
    @torch.no_grad()
    def wrapped() -> Iterator[None]:
        with scope(handle):
            yield

    @contextlib.asynccontextmanager
    async def asynchronous() -> AsyncIterator[None]:
        with handle.applied(adapter()):
            await asyncio.sleep(0)
            yield

    async def main() -> None:
        async with asynchronous():
            await asyncio.sleep(0)
            assert torch.equal(model(X), expected)

    for manager in (lambda: scope(handle), wrapped):
        with manager():
            assert torch.equal(model(X), expected)
    asyncio.run(main())


@pytest.mark.parametrize(
    "take",
    [copy.deepcopy, pickle.dumps, lambda model: torch.save(model, io.BytesIO())],
)
def test_copies_inside_a_scope_are_refused(
    take: Callable[[nn.Module], object], model: nn.Module, handle: AdapterHandle
) -> None:
    with handle.applied(adapter()):
        model(X)
        with pytest.raises(TargetError, match="copy, pickle or save the model outside of its scope"):
            take(model)
    take(model)


@pytest.mark.parametrize("take", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_handle_is_not_copied(take: Callable[[object], object], handle: AdapterHandle) -> None:
    with pytest.raises(TargetError, match=r"attach\(\) to the copy"):
        take(handle)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_a_scripted_model_is_refused(model: nn.Module, handle: AdapterHandle) -> None:
    with pytest.raises(TargetError, match=r"torch\.jit\.script does not take a model with adapter hooks"):
        torch.jit.script(model)
    handle.detach()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
@pytest.mark.parametrize("grad", [True, False])
def test_function_transforms(grad: bool, model: nn.Module, handle: AdapterHandle) -> None:
    x = torch.randn(3, 2, 6)
    a, b = adapter().pairs["0"]
    weight = model[0].weight + adapter().scale * b[0] @ a[0]
    with torch.set_grad_enabled(grad), handle.applied(adapter()):
        torch.testing.assert_close(torch.func.vmap(model)(x), model(x))
        _, tangent = torch.func.jvp(model, (x,), (x,))
        torch.testing.assert_close(tangent, x @ weight.T)
    with (
        pytest.raises(TargetError, match=r"torch\.func\.vmap takes the batch axis away"),
        handle.applied(adapter(2)),
    ):
        torch.func.vmap(model)(x)


def test_handles_on_other_modules_of_one_model_live_together() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).requires_grad_(False)
    one, other = [Target("0", 6, 6)], [Target("1", 6, 6)]
    adapters = [random_adapter(each, 2, seed=seed, dtype=torch.float32) for seed, each in enumerate((one, other))]
    whole = Adapter((*one, *other), {**adapters[0].factors, **adapters[1].factors}, adapters[0].scale)
    with attach(model, whole.targets) as handle, handle.applied(whole):
        expected = model(X)
    with attach(model, one) as first, attach(model, other) as second:
        with pytest.raises(TargetError, match="1 of the 2 modules already carry adapter hooks, 0 among them"):
            attach(nn.Sequential(model[0], nn.Linear(6, 6)), whole.targets)
        with first.applied(adapters[0]):
            alone = model(X)
            with second.applied(adapters[1]):
                torch.testing.assert_close(model(X), expected)
            assert torch.equal(model(X), alone)
