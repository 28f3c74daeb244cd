"""Requests of different lengths packed in one sequence give what they give one by one: outputs and all gradients."""

from __future__ import annotations

import pytest
import torch
from adapter_cases import (
    ROUTING,
    SMALL_TARGETS,
    Mixture,
    StackedMixture,
    mixture_targets,
    random_adapter,
    small_model,
    stacked_targets,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from openwu.adapters.inject import attach
from openwu.errors import TargetError
from openwu.types import Adapter, Target

few = settings(max_examples=20, deadline=None)

MODELS = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(6, 6), nn.SiLU(), nn.Linear(6, 6)),
        [Target("0", 6, 6), Target("2", 6, 6)],
    ),
    "experts": (lambda: nn.Sequential(Mixture()), mixture_targets(prefix="0.experts")),
    "stacked": (lambda: nn.Sequential(StackedMixture()), stacked_targets(prefix="0.experts")),
}


def routing(kind: str) -> object:
    return ROUTING if kind == "experts" else None


def gradients(y: Tensor, x: Tensor, adapter: Adapter, dy: Tensor) -> tuple[Tensor, ...]:
    wanted = [x, *adapter.state_dict().values()]
    return torch.autograd.grad(y, wanted, dy, allow_unused=True, materialize_grads=True)


@few
@given(
    kind=st.sampled_from(sorted(MODELS)),
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any),
    rows=st.none() | st.lists(st.integers(-1, 1), min_size=4, max_size=4),
    lead=st.sampled_from([(), (1,)]),
    seed=st.integers(0, 99),
)
def test_packed_equals_one_by_one(
    kind: str, lengths: list[int], rows: list[int] | None, lead: tuple[int, ...], seed: int
) -> None:
    torch.manual_seed(seed)
    build, targets = MODELS[kind]
    model = build().double()
    rows = None if rows is None else rows[: len(lengths)]
    samples = list(range(len(lengths))) if rows is None else rows
    adapter = random_adapter(targets, len(lengths) if rows is None else 2, seed=seed, trained=True)
    x = torch.randn(sum(lengths), 6, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(x)
    with attach(model, targets, routing=routing(kind)) as handle:
        with handle.applied(adapter, rows, segments=lengths):
            together = model(x.view(*lead, *x.shape))
        assert together.shape == (*lead, *x.shape)
        parts = []
        for own, sample in zip(x.split(lengths), samples, strict=True):
            if not len(own) or sample < 0:
                parts.append(model(own[None])[0] if len(own) else own)
                continue
            with handle.applied(adapter.select([sample])):
                parts.append(model(own[None])[0])
        alone = torch.cat(parts)
    torch.testing.assert_close(together.view(x.shape), alone, rtol=1e-9, atol=1e-9)
    for one, other in zip(
        gradients(together.view(x.shape), x, adapter, dy), gradients(alone, x, adapter, dy), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [8, 3])
def test_the_grouped_products_of_packed_requests(dtype: torch.dtype, rank: int) -> None:
    """Widths for which torch has them, against one request after another."""
    torch.manual_seed(0)
    model, targets = nn.Sequential(nn.Linear(16, 24)).to(dtype), [Target("0", 16, 24)]
    adapter = random_adapter(targets, 3, rank=rank, dtype=dtype, trained=True)
    x, lengths = torch.randn(11, 16, dtype=dtype), [4, 0, 7]
    with attach(model, targets) as handle:
        with handle.applied(adapter, segments=lengths):
            together = model(x)
        parts = []
        for sample, own in enumerate(x.split(lengths)):
            with handle.applied(adapter.select([sample])):
                parts.append(model(own))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(together, torch.cat(parts), rtol=tolerance, atol=8 * tolerance)
    came, expected = (torch.autograd.grad(y.sum(), adapter.pairs["0"]) for y in (together, torch.cat(parts)))
    torch.testing.assert_close(came, expected, rtol=tolerance, atol=40 * tolerance)


@pytest.mark.parametrize(
    ("lengths", "rows", "message"),
    [
        ([], None, r"segments: expected a number of tokens for each of 2 segments, got \[\]"),
        ([3], None, r"each of 2 segments, got \[3\]"),
        ([3, -1], None, r"got \[3, -1\]"),
        ([3, 2], [0], r"each of 1 segments, got \[3, 2\]"),
        ([3, 1], None, r"0: the segments hold 4 tokens, but the module's input has shape \(5, 6\)"),
    ],
)
def test_segments_that_do_not_fit(lengths: list[int], rows: list[int] | None, message: str) -> None:
    model, targets = nn.Sequential(nn.Linear(6, 6)), [Target("0", 6, 6)]
    adapter = random_adapter(targets, 2, dtype=torch.float32)
    with (
        attach(model, targets) as handle,
        pytest.raises(TargetError, match=message),
        handle.applied(adapter, rows, segments=lengths),
    ):
        model(torch.randn(5, 6))


@pytest.mark.parametrize("kind", ["experts", "stacked"])
def test_experts_refuse_other_numbers_of_tokens(kind: str) -> None:
    build, targets = MODELS[kind]
    adapter = random_adapter(targets, 2, dtype=torch.float32)
    model = build()
    with attach(model, targets, routing=routing(kind)) as handle:
        with pytest.raises(TargetError, match="segments"), handle.applied(adapter, segments=[2, 2]):
            model(torch.randn(1, 5, 6))
        with pytest.raises(TargetError, match="equally many tokens"), handle.applied(adapter):
            model(torch.randn(1, 5, 6))


def test_a_convolution_has_no_segments() -> None:
    model = small_model()
    with (
        attach(model, SMALL_TARGETS) as handle,
        pytest.raises(TargetError, match="a convolution has none"),
        handle.applied(random_adapter(SMALL_TARGETS, 2), segments=[1, 2]),
    ):
        model(torch.randn(3, 3, 8, 8, dtype=torch.float64))
