"""A batch of different adapters gives what its samples give one by one: outputs, and gradients of x, A and B."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from adapter_cases import (
    ROUTING,
    FusedExpert,
    Mixture,
    PlainExpert,
    mixture_targets,
    random_adapter,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from openwu.adapters.inject import AdapterHandle, attach
from openwu.types import Adapter, Target

few = settings(max_examples=25, deadline=None)


def run(
    model: nn.Module, handle: AdapterHandle, adapter: Adapter, x: Tensor, dy: Tensor, rows: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """The output, and the gradients of x, A and B for the output gradient dy."""
    x = x.detach().requires_grad_()
    with handle.applied(adapter, rows):
        y = model(x)
    wanted = {"x": x} | adapter.state_dict()
    grads = torch.autograd.grad(y, list(wanted.values()), dy, allow_unused=True, materialize_grads=True)
    return {"y": y.detach()} | dict(zip(wanted, grads, strict=True))


def check_batch_equals_samples(model: nn.Module, handle: AdapterHandle, adapter: Adapter, x: Tensor) -> None:
    dy = torch.randn_like(model(x))
    together = run(model, handle, adapter, x, dy)
    alone = [run(model, handle, adapter.select([i]), x[i : i + 1], dy[i : i + 1]) for i in range(len(x))]
    for name, whole in together.items():
        torch.testing.assert_close(whole, torch.cat([one[name] for one in alone]), rtol=1e-9, atol=1e-9, msg=name)
    assert not torch.allclose(together["y"], model(x))


@few
@given(
    batch=st.integers(1, 4),
    inner=st.lists(st.integers(1, 3), max_size=2),
    widths=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    rank=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_linear(batch: int, inner: list[int], widths: tuple[int, int], rank: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(*widths)).double()
    targets = [Target("0", *widths)]
    adapter = random_adapter(targets, batch, rank=rank, seed=seed, trained=True)
    x = torch.randn(batch, *inner, widths[0], dtype=torch.float64)
    with attach(model, targets) as handle:
        check_batch_equals_samples(model, handle, adapter, x)


@few
@given(
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(5, 8), st.integers(5, 8)),
    kernel=st.sampled_from([1, 3, (3, 2)]),
    stride=st.sampled_from([1, 2, (2, 1)]),
    padding=st.sampled_from([0, 1, (1, 2)]),
    dilation=st.sampled_from([1, 2]),
    mode=st.sampled_from(["zeros", "reflect", "circular"]),
    channels_last=st.booleans(),
    seed=st.integers(0, 99),
)
def test_convolution(
    batch: int,
    size: tuple[int, int],
    kernel: int | tuple[int, int],
    stride: int | tuple[int, int],
    padding: int | tuple[int, int],
    dilation: int,
    mode: str,
    channels_last: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    conv = nn.Conv2d(2, 5, kernel, stride, padding, dilation, padding_mode=mode).double()
    model = nn.Sequential(conv)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(batch, 2, *size, dtype=torch.float64).contiguous(memory_format=memory_format)
    targets = [Target("0", conv.weight[0].numel(), 5)]
    with attach(model, targets) as handle:
        adapter = random_adapter(targets, batch, seed=seed, trained=True)
        check_batch_equals_samples(model, handle, adapter, x)
        with handle.applied(adapter):
            adapted, base = model(x), conv.forward(x)
        for layout in (torch.channels_last, torch.contiguous_format):
            assert adapted.is_contiguous(memory_format=layout) >= base.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_convolution_with_padding_by_name(padding: str, kernel: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, kernel, padding=padding)).double()
    targets = [Target("0", 2 * kernel * kernel, 3)]
    with attach(model, targets) as handle:
        adapter = random_adapter(targets, 2, trained=True)
        check_batch_equals_samples(model, handle, adapter, torch.randn(2, 2, 5, 7, dtype=torch.float64))


@few
@given(
    batch=st.integers(2, 4),
    length=st.integers(1, 5),
    experts=st.integers(2, 4),
    top_k=st.integers(1, 2),
    kind=st.sampled_from([FusedExpert, PlainExpert]),
    adapted=st.sets(st.sampled_from(["w1", "w2", "w3"]), min_size=1),
    seed=st.integers(0, 99),
)
def test_experts(
    batch: int, length: int, experts: int, top_k: int, kind: type[nn.Module], adapted: set[str], seed: int
) -> None:
    torch.manual_seed(seed)
    model = Mixture(experts=experts, top_k=top_k, expert=kind).double()
    targets = [t for t in mixture_targets(experts=experts) if t.name.removeprefix("experts.") in adapted]
    adapter = random_adapter(targets, batch, seed=seed, trained=True)
    x = torch.randn(batch, length, 6, dtype=torch.float64)
    with attach(model, targets, routing=ROUTING) as handle:
        check_batch_equals_samples(model, handle, adapter, x)


@few
@given(rows=st.lists(st.integers(-1, 2), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_rows_choose_the_sample_of_every_row(rows: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 6), Mixture(), nn.Unflatten(-1, (3, 2)), nn.Conv2d(4, 3, 1)).double()
    targets = [Target("0", 6, 6), *mixture_targets(prefix="1.experts"), Target("3", 4, 3)]
    adapter = random_adapter(targets, 3, seed=seed, trained=True)
    x = torch.randn(len(rows), 4, 6, dtype=torch.float64)
    dy = torch.randn_like(model(x))
    with attach(model, targets, routing=ROUTING) as handle:
        together = run(model, handle, adapter, x, dy, rows)
        for row, sample in enumerate(rows):
            own = slice(row, row + 1)
            if sample == -1:
                torch.testing.assert_close(together["y"][own], model(x[own]), rtol=1e-9, atol=1e-9)
            else:
                alone = run(model, handle, adapter.select([sample]), x[own], dy[own])
                torch.testing.assert_close(together["y"][own], alone["y"], rtol=1e-9, atol=1e-9)
                torch.testing.assert_close(together["x"][own], alone["x"], rtol=1e-9, atol=1e-9)
        unused = [sample for sample in range(3) if sample not in rows]
        assert all(not together[name][unused].any() for name in adapter.state_dict())


def test_guidance_blocks_tile() -> None:
    """`[cond | uncond]` of two requests: rows 0, 1 are conditional, rows 2, 3 their unconditional passes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4)).double()
    targets = [Target("0", 3, 4)]
    adapter = random_adapter(targets, 2)
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    with attach(model, targets) as handle:
        with handle.applied(adapter):
            conditional = model(x)
        with handle.applied(adapter, rows=torch.tensor([0, 1, 0, 1])):
            torch.testing.assert_close(model(torch.cat([x, x])), torch.cat([conditional, conditional]))
        with handle.applied(adapter, rows=[0, 1, -1, -1]):
            torch.testing.assert_close(model(torch.cat([x, x])), torch.cat([conditional, model[0].forward(x)]))


def test_one_adapter_serves_any_number_of_rows() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4)).double()
    targets = [Target("0", 3, 4)]
    adapter = random_adapter(targets, 1, trained=True)
    a, b = adapter.pairs["0"]
    with attach(model, targets) as handle:
        for shape in [(3,), (5, 3), (2, 4, 3), (2, 1, 2, 3)]:
            x = torch.randn(shape, dtype=torch.float64)
            with handle.applied(adapter):
                torch.testing.assert_close(model(x), model[0].forward(x) + 0.5 * x @ a[0].T @ b[0].T)
