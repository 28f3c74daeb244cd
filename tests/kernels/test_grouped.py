"""Grouped products against one product per row in float64; how a mixture's tokens are sorted and combined."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from openwu.kernels.grouped import GroupedProduct, Routed, group_ends, grouped_product, has_grouped_mm, looped_product

few = settings(max_examples=30, deadline=None)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


@few
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    widths=st.tuples(st.sampled_from([1, 3, 4, 8, 12]), st.sampled_from([1, 4, 7, 8])),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_grouped_product(lengths: list[int], widths: tuple[int, int], dtype: torch.dtype) -> None:
    group_s = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    x, weight = draw(len(group_s), widths[0], dtype=dtype), draw(len(lengths), widths[1], widths[0], dtype=dtype)
    ends = group_ends(group_s, len(lengths))
    assert ends.tolist() == torch.tensor(lengths).cumsum(0).tolist()
    exact = torch.bmm(weight.double()[group_s], x.double()[:, :, None])[:, :, 0]
    dy = torch.randn_like(exact)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    expected = [exact, *torch.autograd.grad(exact, (x, weight), dy)]
    for product in (grouped_product, looped_product):
        y = product(x, weight, ends)
        came = [y, *torch.autograd.grad(y, (x, weight), dy.to(dtype))]
        for one, other in zip(came, expected, strict=True):
            assert one.dtype == dtype
            torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=4 * tolerance)


def test_gradients_and_inputs_of_any_layout() -> None:
    x, weight = draw(6, 8), draw(2, 4, 8)
    ends = torch.tensor([2, 6], dtype=torch.int32)
    assert has_grouped_mm(x, weight)
    expected = torch.autograd.grad(looped_product(x, weight, ends).sum(), (x, weight))
    torch.testing.assert_close(torch.autograd.grad(grouped_product(x, weight, ends).sum(), (x, weight)), expected)
    turned = x.detach().t().contiguous().t().requires_grad_()
    grads = torch.autograd.grad(grouped_product(turned, weight, ends).t().contiguous().sum(), (turned, weight))
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize(
    ("x", "weight", "fast"),
    [
        (draw(2, 4), draw(1, 8, 4), True),
        (draw(2, 3), draw(1, 8, 3), False),
        (draw(2, 4), draw(1, 6, 4), False),
        (draw(2, 8, dtype=torch.bfloat16), draw(1, 8, 8, dtype=torch.bfloat16), True),
        (draw(2, 4, dtype=torch.bfloat16), draw(1, 8, 4, dtype=torch.bfloat16), False),
        (draw(2, 8, dtype=torch.bfloat16), draw(1, 8, 8), False),
        (draw(2, 4, dtype=torch.float64), draw(1, 8, 4, dtype=torch.float64), False),
        (draw(2, 4).to("meta"), draw(1, 8, 4).to("meta"), False),
    ],
)
def test_where_torch_has_a_grouped_product(x: Tensor, weight: Tensor, fast: bool) -> None:
    assert has_grouped_mm(x, weight) == fast


@few
@given(
    chosen=st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2, unique=True), min_size=1, max_size=7),
)
def test_routed_rows_ascend_and_combine(chosen: list[list[int]]) -> None:
    chosen_tk = torch.tensor(chosen)
    routed = Routed.of(chosen_tk, 4)
    pairs = sorted((expert, token) for token, experts in enumerate(chosen) for expert in experts)
    assert list(zip(routed.expert_s.tolist(), routed.token_s.tolist(), strict=True)) == pairs
    assert routed.ends.tolist() == [sum(expert <= e for expert, _ in pairs) for e in range(4)]
    y, weights = draw(len(pairs), 3), draw(len(chosen), 2)
    combined = routed.combine(y, weights)
    for token, experts in enumerate(chosen):
        parts = [weights[token, k] * y[pairs.index((expert, token))] for k, expert in enumerate(experts)]
        torch.testing.assert_close(combined[token], sum(parts, torch.zeros(3)))


def test_a_routed_product_does_not_wait_for_the_device() -> None:
    """Fake tensors have no values: whatever asks for one on the host fails."""
    with FakeTensorMode():
        x, weight, weights = (torch.randn(shape, dtype=torch.bfloat16) for shape in [(5, 8), (3, 8, 8), (5, 2)])
        routed = Routed.of(torch.randint(3, (5, 2)), 3)
        assert routed.combine(GroupedProduct()(x[routed.token_s], weight, routed), weights).shape == (5, 8)
        with pytest.raises(DataDependentOutputException):
            looped_product(x[routed.token_s], weight, routed.ends)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 5])
def test_compiled_products(dtype: torch.dtype, width: int) -> None:
    torch._dynamo.reset()
    x, weight = draw(6, width, dtype=dtype), draw(3, 8, width, dtype=dtype)
    compiled = torch.compile(grouped_product, backend="aot_eager", fullgraph=True)
    for ends in (torch.tensor([2, 2, 6], dtype=torch.int32), torch.tensor([0, 5, 6], dtype=torch.int32)):
        came, expected = compiled(x, weight, ends), looped_product(x, weight, ends)
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(came, expected, **tolerance)
        dy = torch.randn_like(expected)
        torch.testing.assert_close(
            torch.autograd.grad(came, (x, weight), dy), torch.autograd.grad(expected, (x, weight), dy), **tolerance
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_lies_behind_a_row_does_not_matter(dtype: torch.dtype) -> None:
    """A part of a larger tensor whose rest is no number, at widths where torch's own product reads on."""
    sizes = torch.tensor([100, 30, 0, 60])
    ends = sizes.cumsum(0).to(torch.int32)
    for width in (80, 144):
        larger = torch.full((int(sizes.sum()), width + 16), float("nan"), dtype=dtype)
        x = larger[:, :width]
        x.copy_(torch.randn(x.shape))
        weight = torch.randn(len(sizes), 16, width).to(dtype)
        torch.testing.assert_close(
            grouped_product(x, weight, ends), grouped_product(x.clone().contiguous(), weight, ends)
        )


def test_a_tail_is_put_behind_an_input_that_has_room_and_nothing_is_copied() -> None:
    product, routed = GroupedProduct(), Routed.of(torch.randint(3, (5, 2)), 3)
    product.spare_columns = 4
    tail = torch.randn(10, 4)
    made = [lambda: product.gather(torch.randn(5, 8), routed), lambda: product.multiply(*torch.randn(2, 10, 8))]
    for make in made:
        x = make()
        assert x.shape == (10, 8)
        expected = torch.cat([x, tail], 1)
        wide = product.append_columns(x, tail)
        assert wide.data_ptr() == x.data_ptr()
        assert torch.equal(wide, expected)
    foreign = torch.randn(10, 12)
    kept = foreign.clone()
    assert torch.equal(product.append_columns(foreign[:, :8], tail), torch.cat([kept[:, :8], tail], 1))
    assert torch.equal(foreign, kept)
