"""Rows sorted by group: against the formula and the reference, written into the output or not, and never where that may
be seen."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from openwu.kernels import dispatch
from openwu.kernels import low_rank as grouped

few = settings(max_examples=30, deadline=None)
SCALE = 0.75


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


def case(sizes: list[int], widths: tuple[int, int], rank: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """y, x, A and B; the group of every row; where each group's rows end."""
    rows, groups = sum(sizes), len(sizes)
    tensors = [draw(rows, widths[1]), draw(rows, widths[0], seed=1), draw(groups, rank, widths[0], seed=2)]
    group_t = torch.repeat_interleave(torch.arange(groups), torch.tensor(sizes))
    return [*tensors, draw(groups, widths[1], rank, seed=3)], group_t, torch.tensor(sizes).cumsum(0).int()


def formula(y: Tensor, x: Tensor, a: Tensor, b: Tensor, group_t: Tensor) -> Tensor:
    y, x, a, b = (each.double() for each in (y, x, a, b))
    return y + SCALE * torch.einsum("tor,tri,ti->to", b[group_t], a[group_t], x)


@few
@given(
    sizes=st.lists(st.sampled_from([0, 1, 3, 40, 99]), min_size=1, max_size=5).filter(any),
    widths=st.sampled_from([(8, 4), (4, 12), (16, 16), (5, 8), (8, 7)]),
    rank=st.integers(1, 5),
)
def test_every_group_has_its_own_factors(sizes: list[int], widths: tuple[int, int], rank: int) -> None:
    """Groups with no rows, few and many; widths 5 and 7 are left to the reference."""
    (y, x, a, b), group_t, ends = case(sizes, widths, rank)
    expected, before = formula(y, x, a, b, group_t), y.clone()
    kept = dispatch.add_sorted(y, x, a, b, SCALE, group_t, ends)
    assert torch.equal(y, before)  # only where it is said that y may be written over
    written = dispatch.add_sorted(y, x, a, b, SCALE, group_t, ends, in_place=True)
    assert (written is y) == grouped.fits(y, x, a)
    for came in (kept, written):
        torch.testing.assert_close(came.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [4, 2 * grouped.ROWS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_and_strided_outputs(dtype: torch.dtype, rows: int) -> None:
    (y, x, a, b), group_t, ends = case([rows, 0, 2 * rows], (8, 16), 2)
    expected = formula(y, x, a, b, group_t)
    for stored in (dtype, torch.float32):
        wide = torch.full((3 * rows, 32), torch.nan, dtype=dtype)  # NaN beside what is written must stay there
        wide[:, :16] = y
        came = dispatch.add_sorted(
            wide[:, :16], x.to(dtype), a.to(stored), b.to(stored), SCALE, group_t, ends, in_place=True
        )
        assert came.dtype == dtype
        error = (came.double() - expected).norm() / expected.norm()
        assert error < {torch.float32: 1e-6}.get(dtype, 1e-2)
        assert wide[:, 16:].isnan().all()


@pytest.mark.parametrize("rows", [3, grouped.ROWS])
def test_it_reads_no_old_memory(rows: int) -> None:
    (y, x, a, b), group_t, ends = case([rows, 0, 3 * rows, 2], (16, 12), 4)

    def run() -> Tensor:
        return dispatch.add_sorted(y.clone(), x, a, b, SCALE, group_t, ends, in_place=True)

    first = run()
    for _ in range(5):
        poison = [torch.full((size,), torch.nan) for size in (len(y) * 12, len(y) * 4, len(y) * 16, rows * 12)]
        del poison
        assert torch.equal(run(), first)
    assert first.isfinite().all()


@pytest.mark.parametrize("rows", [3, 2 * grouped.ROWS])
@pytest.mark.parametrize("place", range(4))
def test_nothing_is_written_over_where_there_are_gradients(place: int, rows: int) -> None:
    tensors, group_t, ends = case([rows, rows], (4, 8), 4)
    tensors[place].requires_grad_()
    y, x, a, b = tensors
    before = y.detach().clone()
    came = dispatch.add_sorted(y, x, a, b, SCALE, group_t, ends, in_place=True)
    assert came is not y
    assert torch.equal(y.detach(), before)
    expected = formula(y, x, a, b, group_t)
    torch.testing.assert_close(came.double(), expected, rtol=1e-4, atol=1e-4)
    (one,), (other,) = (torch.autograd.grad(each.square().sum(), tensors[place]) for each in (came, expected))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        assert dispatch.add_sorted(y, x, a, b, SCALE, group_t, ends, in_place=True) is y
