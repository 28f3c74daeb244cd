"""A request never reaches another one's rows, whatever its adapter holds: NaN, infinity, numbers that overflow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from adapter_cases import ROUTING, Mixture, StackedMixture, mixture_targets, stacked_targets
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from openwu.adapters.inject import attach
from openwu.kernels.low_rank import contained
from openwu.types import Adapter, Target

SAMPLES, TOKENS = 3, 4


@dataclass(frozen=True)
class Case:
    """A model, its targets, and how it is attached to."""

    build: Callable[[], nn.Module]
    targets: Sequence[Target]
    picture: bool = False
    options: dict[str, Any] | None = None


def conv(size: int) -> Case:
    return Case(
        lambda: nn.Sequential(nn.Conv2d(8, 8, size)), [Target("0", 8 * size * size, 8, kernel=(size, size))], True
    )


CASES = {
    "linear": Case(lambda: nn.Sequential(nn.Linear(8, 16)), [Target("0", 8, 16)]),
    "convolution": conv(3),
    "pointwise": conv(1),
    "experts": Case(
        lambda: nn.Sequential(Mixture(8, 8)), mixture_targets(8, 8, prefix="0.experts"), options={"routing": ROUTING}
    ),
    "stacked": Case(lambda: nn.Sequential(StackedMixture(8, 8)), stacked_targets(8, 8, prefix="0.experts")),
    "unaligned": Case(lambda: nn.Sequential(StackedMixture(6, 5)), stacked_targets(6, 5, prefix="0.experts")),
    "augmented": Case(
        lambda: nn.Sequential(StackedMixture(8, 8)),
        stacked_targets(8, 8, prefix="0.experts"),
        options={"spare_columns": 16},
    ),
    "scale_offset": Case(
        lambda: nn.Sequential(nn.Linear(8, 16)), [Target("0", 8, 16, operator="scale_offset")]
    ),
    "scale_offset of a convolution": Case(
        lambda: nn.Sequential(nn.Conv2d(8, 8, 3)), [Target("0", 72, 8, operator="scale_offset")], True
    ),
}  # fmt: skip
SPOILS: dict[str, Callable[[Tensor], object]] = {
    "NaN": lambda part: part.fill_(torch.nan),
    "one NaN": lambda part: part.view(-1)[0].fill_(torch.nan),
    "infinity": lambda part: part.fill_(-torch.inf),
    "overflow": lambda part: part.fill_(torch.finfo(part.dtype).max),
}


def random_adapter(case: Case, dtype: torch.dtype) -> Adapter:
    draw = torch.Generator().manual_seed(0)
    factors = {
        target.name: {
            name: torch.randn(shape, generator=draw).mul(0.3).to(dtype)
            for name, shape in target.shapes(SAMPLES, 2).items()
        }
        for target in case.targets
    }
    return Adapter(tuple(case.targets), factors, 0.7)


def spoiled(adapter: Adapter, sample: int, spoil: str, factor: int) -> Adapter:
    """The adapter with one factor of every target spoiled in one sample."""
    factors = {name: {key: part.clone() for key, part in parts.items()} for name, parts in adapter.factors.items()}
    for parts in factors.values():
        chosen = list(parts.values())[factor]
        SPOILS[spoil](chosen[sample])
    return replace(adapter, factors=factors)


@settings(max_examples=120, deadline=None)
@given(
    name=st.sampled_from(sorted(CASES)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    stored=st.sampled_from([None, torch.float32]),
    rows=st.lists(st.integers(-1, SAMPLES - 1), min_size=2, max_size=5).filter(lambda rows: len(set(rows)) > 1),
    spoil=st.sampled_from(sorted(SPOILS)),
    factor=st.integers(0, 1),
    packed=st.booleans(),
)
@torch.no_grad()
def test_rows_of_others_are_what_they_are_without_the_broken_adapter(
    name: str, dtype: torch.dtype, stored: torch.dtype | None, rows: list[int], spoil: str, factor: int, packed: bool
) -> None:
    """Bit for bit: those of sound samples as beside a sound neighbour, those without an adapter as the base's.

    A product with spare columns is a wider one, which may round otherwise than the base's: there, rows without an
    adapter equal the base's to rounding.
    """
    case = CASES[name]
    torch.manual_seed(0)
    model = case.build().to(dtype)
    bad = next(sample for sample in rows if sample >= 0)
    sound = random_adapter(case, stored or dtype)
    broken = spoiled(sound, bad, spoil, factor)
    segments = None
    if case.picture:
        x = torch.randn(len(rows), 8, 6, 6).to(dtype)
    else:
        x = torch.randn(len(rows), TOKENS, case.targets[0].in_dim).to(dtype)
        if packed:
            segments, x = [TOKENS] * len(rows), x.flatten(0, 1)[None]
    base, found = model(x), []
    with attach(model, case.targets, **(case.options or {})) as handle:
        for adapter in (sound, broken):
            with handle.applied(adapter, rows, segments=segments):
                y = model(x)
            found.append(y.view(len(rows), -1))
        assert torch.equal(model(x), base)
    for row, sample in enumerate(rows):
        if sample < 0:
            assert torch.equal(found[1][row], found[0][row])
            expected = base.view(len(rows), -1)[row]
            if name == "augmented":
                torch.testing.assert_close(found[1][row], expected)
            else:
                assert torch.equal(found[1][row], expected)
        elif sample != bad:
            assert found[0][row].isfinite().all()
            assert torch.equal(found[1][row], found[0][row])
        elif spoil in ("NaN", "infinity"):
            assert not found[1][row].isfinite().all()


SUMMED_BY_ZEROS = {"experts", "unaligned"}
"""Where all tokens meet every sample's A: its gradient sums over others' tokens, times zero, which NaN survives."""


@pytest.mark.parametrize("name", sorted(set(CASES) - {"augmented"} - SUMMED_BY_ZEROS))
def test_gradients_of_others_do_not_see_the_broken_adapter(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = case.build().requires_grad_(False)
    sound = random_adapter(case, torch.float32)
    shape = (3, 8, 6, 6) if case.picture else (3, TOKENS, case.targets[0].in_dim)
    x, found = torch.randn(shape), []
    with attach(model, case.targets, **(case.options or {})) as handle:
        for adapter in (sound, spoiled(sound, 1, "NaN", 1)):
            for part in adapter.state_dict().values():
                part.requires_grad_()
            with handle.applied(adapter, [0, 1, -1]):
                loss = model(x)[0].square().sum()
            parts = list(adapter.state_dict().values())
            found.append([grad[0] for grad in torch.autograd.grad(loss, parts, materialize_grads=True)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_what_is_not_finite_moves_from_b_to_a() -> None:
    a, b = torch.ones(3, 2, 4), torch.ones(3, 5, 2)
    assert all(map(torch.equal, contained(a, b), (a, b)))
    b[1, 2, 1] = -torch.inf
    clean_a, clean_b = contained(a, b)
    assert clean_a.isnan().flatten(1).all(1).tolist() == [False, True, False]
    assert clean_b.isfinite().all()
    assert torch.equal(clean_b[0], b[0])
