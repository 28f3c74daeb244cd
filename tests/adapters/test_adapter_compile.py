"""torch.compile: hooks are in the graph, adapters of equal shapes share it, gradients and errors come through."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from adapter_cases import SMALL_TARGETS, StackedMixture, random_adapter, small_model, stacked_targets
from torch import Tensor, nn
from torch._dynamo.utils import counters

from openwu.adapters.inject import attach
from openwu.errors import TargetError
from openwu.types import Adapter, Target

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


def test_code_that_was_compiled_before_attach_is_compiled_anew() -> None:
    model = small_model()
    compiled = torch.compile(model, backend="eager")
    compiled(X)
    adapter = random_adapter(SMALL_TARGETS, 3)
    with attach(model, SMALL_TARGETS) as handle, handle.applied(adapter):
        found = compiled(X)
        torch.testing.assert_close(found, model(X))
    assert not torch.allclose(found, compiled(X))


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


TOKENS = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))


# torch._dynamo looks at the `.grad` of its inputs, and a generated A or B is no leaf; in training that is one warning.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("packed", [False, True])
def test_stacked_experts_share_one_graph_from_request_to_request(packed: bool) -> None:
    """20 adapters in turn, at other strengths; packed requests have other lengths each time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), StackedMixture(8, 8)).requires_grad_(False)
    targets = [Target("0", 8, 8), *stacked_targets(8, 8, prefix="1.experts")]
    with attach(model, targets) as handle:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for seed in range(20):
            adapter = random_adapter(targets, 2, seed=seed, dtype=torch.float32, trained=True)
            segments = [1 + seed % 11, 11 - seed % 11] if packed else None
            x = TOKENS.view(1, 12, 8) if packed else TOKENS
            adapter = adapter.scaled(0.1 * seed - 1)
            with handle.applied(adapter, segments=segments):
                y, expected = compiled(x), model(x)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
            if seed < 3:
                came, wanted = gradients(y, adapter), gradients(expected, adapter)
                torch.testing.assert_close(came, wanted, rtol=1e-3, atol=1e-3)
        assert graphs() == 1
        assert not counters["graph_break"]


def test_strength_does_not_recompile_and_every_rank_does_so_once() -> None:
    """torch takes sizes of what modules hold for constants: a rank compiles when it first comes, and never again."""
    model = small_model()
    with attach(model, SMALL_TARGETS) as handle:
        compiled = torch.compile(model, backend="eager", fullgraph=True)

        def run(rank: int, seed: int) -> int:
            adapter = random_adapter(SMALL_TARGETS, 3, rank=rank, seed=seed).scaled([0.5 * seed, 1.0, -seed])
            with handle.applied(adapter):
                torch.testing.assert_close(compiled(X), model(X))
            return graphs()

        assert [run(2, seed) for seed in range(4)] == [1] * 4
        assert [run(5, 4), run(5, 5), run(2, 6), run(5, 7)] == [2] * 4


@pytest.mark.parametrize("operator", ["lora", "scale_offset"])
def test_another_scale_does_not_recompile(operator: str) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(2), nn.Linear(36, 5)).double()
    targets = [Target("0", 36, 4, operator=operator), Target("2", 36, 5, operator=operator)]
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    factors = {t.name: {n: torch.randn(s).double() for n, s in t.shapes(2, 3).items()} for t in targets}
    with attach(model, targets) as handle:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for step in range(12):
            with handle.applied(Adapter(tuple(targets), factors, 0.1 * step - 0.5)):
                torch.testing.assert_close(compiled(x), model(x))
    assert graphs() == 1


def test_experts_of_another_scale_do_not_recompile() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(StackedMixture(8, 8))
    targets = stacked_targets(8, 8, prefix="0.experts")
    with attach(model, targets) as handle:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for scale in (0.5, 0.25, -1.0):
            with handle.applied(random_adapter(targets, 2, scale=scale, dtype=torch.float32)):
                torch.testing.assert_close(compiled(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-5)
    assert graphs() == 1
