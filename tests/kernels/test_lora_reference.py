"""The reference update against the formula written row by row in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from openwu.kernels import dispatch

few = settings(max_examples=30, deadline=None)
SCALE = 0.75


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def check(came: Callable[[], Tensor], expected: Callable[[], Tensor], inputs: list[Tensor]) -> None:
    """Equal outputs, and equal gradients of every input."""
    one, other = came(), expected()
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    dy = torch.randn_like(other)
    came_grads, grads = (
        torch.autograd.grad(output, inputs, dy, allow_unused=True, materialize_grads=True) for output in (one, other)
    )
    torch.testing.assert_close(came_grads, grads, rtol=1e-10, atol=1e-10)


@few
@given(
    rows=st.integers(1, 4),
    inner=st.lists(st.integers(1, 3), max_size=2),
    sizes=st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 3)),
    shared=st.booleans(),
)
def test_linear(rows: int, inner: list[int], sizes: tuple[int, int, int], shared: bool) -> None:
    in_dim, out_dim, rank = sizes
    held = 1 if shared else rows
    y, x = draw(rows, *inner, out_dim), draw(rows, *inner, in_dim, seed=1)
    a, b = draw(held, rank, in_dim, seed=2), draw(held, out_dim, rank, seed=3)

    def expected() -> Tensor:
        pairs = [(a[0 if shared else i], b[0 if shared else i]) for i in range(rows)]
        return torch.stack([y[i] + SCALE * (x[i] @ a_i.T) @ b_i.T for i, (a_i, b_i) in enumerate(pairs)])

    check(lambda: dispatch.add_linear(y, x, a, b, SCALE), expected, [y, x, a, b])


@few
@given(
    rows=st.integers(1, 3),
    size=st.tuples(st.integers(5, 7), st.integers(5, 7)),
    kernel=st.sampled_from([(1, 1), (3, 3), (2, 3)]),
    stride=st.sampled_from([(1, 1), (2, 1), (2, 2)]),
    padding=st.sampled_from([(0, 0), (1, 2)]),
    dilation=st.sampled_from([(1, 1), (2, 1)]),
    shared=st.booleans(),
    channels_last=st.tuples(st.booleans(), st.booleans()),
)
def test_convolution(
    rows: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    shared: bool,
    channels_last: tuple[bool, bool],
) -> None:
    held = 1 if shared else rows
    x, a, b = draw(rows, 2, *size), draw(held, 3, 2, *kernel, seed=1), draw(held, 4, 3, seed=2)

    def delta(i: int) -> Tensor:
        own = 0 if shared else i
        down = F.conv2d(x[i : i + 1], a[own], None, stride, padding, dilation)
        return SCALE * F.conv2d(down, b[own][:, :, None, None])

    y = draw(rows, *delta(0).shape[1:], seed=3)
    formats = [torch.channels_last if flag else torch.contiguous_format for flag in channels_last]

    def came() -> Tensor:
        x_in, y_in = x.contiguous(memory_format=formats[0]), y.contiguous(memory_format=formats[1])
        out = dispatch.add_conv(y_in, x_in, a, b, SCALE, stride, padding, dilation)
        assert out.is_contiguous(memory_format=formats[1])
        return out

    check(came, lambda: y + torch.cat([delta(i) for i in range(rows)]), [y, x, a, b])


@few
@given(sample=st.lists(st.integers(-1, 2), max_size=6), rank=st.integers(1, 3))
def test_routed(sample: list[int], rank: int) -> None:
    tokens = len(sample)
    y, x = draw(tokens, 5), draw(tokens, 4, seed=1)
    a, b = draw(3, rank, 4, seed=2), draw(3, 5, rank, seed=3)

    def expected() -> Tensor:
        rows = [y[t] if s < 0 else y[t] + SCALE * b[s] @ (a[s] @ x[t]) for t, s in enumerate(sample)]
        return torch.stack(rows) if rows else y

    sample_t = torch.tensor(sample, dtype=torch.long)
    check(lambda: dispatch.add_routed(y, x, a, b, SCALE, sample_t), expected, [y, x, a, b])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_result_has_the_dtype_of_the_output(dtype: torch.dtype) -> None:
    y, x, a, b = draw(2, 6, 5), draw(2, 6, 4), draw(2, 3, 4), draw(2, 5, 3)
    exact = dispatch.add_linear(y, x, a, b, SCALE)
    for stored in (torch.float32, dtype):
        came = dispatch.add_linear(y.to(dtype), x.to(dtype), a.to(stored), b.to(stored), SCALE)
        assert came.dtype == dtype
        assert (came.double() - exact).norm() / exact.norm() < {torch.float32: 1e-6}.get(dtype, 1e-2)


def test_the_module_may_compute_in_another_dtype_than_its_input() -> None:
    y, x, a, b = draw(2, 6, 5).bfloat16(), draw(2, 6, 4).float(), draw(2, 3, 4), draw(2, 5, 3)
    assert dispatch.add_linear(y, x, a, b, SCALE).dtype == torch.bfloat16
    sample_t = torch.tensor([0, 1, 1, -1, 0, 1])
    assert dispatch.add_routed(y[0], x[0], a, b, SCALE, sample_t).dtype == torch.bfloat16
    image, pixels = draw(2, 5, 3, 3).bfloat16(), draw(2, 4, 3, 3).float()
    args = ((1, 1), (0, 0), (1, 1))
    assert dispatch.add_conv(image, pixels, a[..., None, None], b, SCALE, *args).dtype == torch.bfloat16
