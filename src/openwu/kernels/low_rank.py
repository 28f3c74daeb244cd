"""The low-rank update of rows that lie sorted by group, each group with its own A and B, as grouped matrix products.

Groups are the requests of a packed sequence, or (expert, request) in a mixture of experts. Same result as
`reference.add_routed`, which multiplies every row with every group's A.

Shapes: t rows, g groups, r LoRA rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from openwu.kernels.grouped import ALIGNMENT, grouped_product, has_grouped_mm


def add_linear(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float | Tensor, *, in_place: bool = False) -> Tensor:
    """Linear module: y `[n, ..., out]`, x `[n, ..., in]`, a `[n or 1, r, in]`, b `[n or 1, out, r]`.

    `in_place`: the result may be written into y; nothing may have gradients then.
    """
    if a.dtype != x.dtype:
        a = a.to(x.dtype)
    rows = a.shape[0]
    if rows == 1:
        return _add_up(y, x @ a[0].t(), b, scale, in_place)
    flat_x = x if x.ndim == 3 else x.reshape(rows, -1, x.shape[-1])
    return _add_up(y, torch.bmm(flat_x, a.transpose(1, 2)), b, scale, in_place)


def add_conv(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
) -> Tensor:
    """Convolution: y `[n, o, h', w']`, x `[n, c, h, w]`, a `[n or 1, r, c, kh, kw]`, b `[n or 1, o, r]`.

    A is a convolution like the module's own, B a 1x1 convolution. y keeps its memory format.
    """
    a = a.to(x.dtype)
    if a.shape[3:] == (1, 1) and padding in ((0, 0), "valid", "same"):
        down = _pointwise(x[:, :, :: stride[0], :: stride[1]], a.flatten(2))
    else:
        # One convolution per row: on a CPU several times faster, forward and backward, than one grouped convolution
        # or unfolded patches. `split`, not indexing: the gradient of n indexings writes n tensors as large as x.
        rows = (x,) if a.shape[0] == 1 else x.split_with_sizes([1] * len(x))
        parts = [
            F.conv2d(row, own[0], None, stride, padding, dilation)
            for row, own in zip(rows, a.split_with_sizes([1] * len(a)), strict=True)
        ]
        down = parts[0] if len(parts) == 1 else torch.cat(parts)
    if _channels_last(y):
        return _add_up(y.permute(0, 2, 3, 1), down.permute(0, 2, 3, 1), b, scale).permute(0, 3, 1, 2)
    b = b.to(y.dtype).expand(len(y), -1, -1)
    down, alpha = _scaled(down.to(y.dtype), scale)
    return torch.baddbmm(y.flatten(2), b, down.flatten(2), alpha=alpha).view(y.shape)


def add_routed(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float | Tensor, sample_t: Tensor) -> Tensor:
    """One expert's linear on routed tokens: y `[t, out]`, x `[t, in]`, a `[s, r, in]`, b `[s, out, r]`, sample_t `[t]`.

    A token of sample -1 is left alone. Every token goes through all s A's side by side, and what is not its own is
    set to zero before the B's: no shape depends on the routing, so nothing waits for the device. b must be finite (see
    `contained`), or one sample's would reach the tokens of all.
    """
    if b.dtype != y.dtype:
        a, b = contained(a, b.to(y.dtype))
    samples, rank = a.shape[:2]
    down = (x @ a.to(x.dtype).flatten(0, 1).t()).view(-1, samples, rank)
    own_ts = sample_t[:, None] == torch.arange(samples, device=sample_t.device)
    down = torch.where(own_ts[:, :, None], down, 0.0).flatten(1)
    down, alpha = _scaled(down.to(y.dtype), scale)
    return torch.addmm(y, down, b.transpose(1, 2).flatten(0, 1), alpha=alpha)


def contained(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return A and B with every B `[..., out, r]` finite: NaN and infinity move to the A `[..., r, in]` beside it.

    For products in which every token meets every sample's B, with zeros for those of others: 0 times infinity is NaN.
    Tokens of a sample whose B was not finite become NaN altogether.
    """
    if not b.numel():
        return a, b
    finite = torch.linalg.vector_norm(b.detach(), torch.inf, dim=(-2, -1), keepdim=True).isfinite()
    # To ask is free on a CPU and half of the cost; elsewhere it would wait for the device.
    if b.device.type == "cpu" and not torch.compiler.is_compiling() and bool(finite.all()):
        return a, b
    return torch.where(finite, a, torch.nan), torch.where(finite, b, 0)


def _scaled(down: Tensor, scale: float | Tensor) -> tuple[Tensor, float]:
    """A x times the scale where that is a tensor, as in compiled code, and what is left to multiply with."""
    return (down * scale, 1.0) if isinstance(scale, Tensor) else (down, scale)


def _add_up(y: Tensor, down: Tensor, b: Tensor, scale: float | Tensor, in_place: bool = False) -> Tensor:
    """y `[n, ..., out]` + scale * b `[n or 1, out, r]` applied to down `[n, ..., r]`, in one matrix product."""
    # Nothing is asked of torch that would change nothing: of a small layer's update that would be half of the time.
    if b.dtype != y.dtype:
        b = b.to(y.dtype)
    if down.dtype != y.dtype:
        down = down.to(y.dtype)
    down, alpha = _scaled(down, scale)
    rows = b.shape[0]
    if rows == 1:
        flat_y, flat_down = y.reshape(-1, y.shape[-1]), down.reshape(-1, down.shape[-1])
        out = flat_y if in_place else None
        return torch.addmm(flat_y, flat_down, b[0].t(), alpha=alpha, out=out).view(y.shape)
    if y.ndim == 3:
        return torch.baddbmm(y, down, b.transpose(1, 2), alpha=alpha, out=y if in_place else None)
    flat_y, flat_down = y.reshape(rows, -1, y.shape[-1]), down.reshape(rows, -1, down.shape[-1])
    return torch.baddbmm(flat_y, flat_down, b.transpose(1, 2), alpha=alpha, out=flat_y if in_place else None).view(
        y.shape
    )


def _pointwise(x: Tensor, a: Tensor) -> Tensor:
    """x `[n, c, h, w]`, a `[n or 1, r, c]` -> `[n, r, h, w]`, in x's memory format."""
    if _channels_last(x):
        x_nhwc = x.permute(0, 2, 3, 1)
        if a.shape[0] == 1:
            return (x_nhwc @ a[0].t()).permute(0, 3, 1, 2)
        down = torch.bmm(x_nhwc.flatten(1, 2), a.transpose(1, 2))
        return down.view(*x_nhwc.shape[:3], -1).permute(0, 3, 1, 2)
    return torch.bmm(a.expand(len(x), -1, -1), x.flatten(2)).view(len(x), -1, *x.shape[2:])


def _channels_last(x: Tensor) -> bool:
    """Whether the channels of x `[n, c, h, w]` lie next to one another; a strided slice of such a tensor counts too."""
    return x.stride(1) == 1


ROWS = 32
"""Rows of a group, on average, from which on writing its update into the output by a product of its own is quicker."""


def add_grouped(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float | Tensor, ends: Tensor, *, in_place: bool = False
) -> Tensor:
    """y `[t, out]`, x `[t, in]`, a `[g, r, in]`, b `[g, out, r]`, ends `[g]` int32: where each group's rows end.

    `in_place`: y may be written over. It is where nothing has gradients, which saves a tensor of its size, and on a CPU
    for groups of many rows one more.
    """
    a, b = _padded(a.to(x.dtype), b.to(y.dtype))
    down, alpha = _scaled(grouped_product(x, a, ends).to(y.dtype), scale)
    in_place = in_place and not (torch.is_grad_enabled() and (y.requires_grad or down.requires_grad or b.requires_grad))
    # Only for plain tensors: of those that stand for others (fake, traced) nobody knows the groups' rows yet.
    if in_place and y.device.type == "cpu" and type(y) is Tensor and len(y) >= ROWS * len(ends):
        sizes = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
        groups = y.split_with_sizes(sizes), down.split_with_sizes(sizes), b.transpose(1, 2).unbind()
        for own, own_down, up in zip(*groups, strict=True):
            own.addmm_(own_down, up, alpha=alpha)
        return y
    up = grouped_product(down, b, ends)
    return torch.add(y, up, alpha=alpha, out=y if in_place else None)


def fits(y: Tensor, x: Tensor, a: Tensor) -> bool:
    """Whether torch has grouped products for both factors; the rank is padded to what they need."""
    rank = a.shape[-2] + _missing(a.shape[-2], min(x.element_size(), y.element_size()))
    return has_grouped_mm(x, x.new_empty(0, rank, x.shape[-1])) and has_grouped_mm(y, y.new_empty(0, y.shape[-1], rank))


def _padded(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A and B with zeros up to a rank that fills whole multiples of ALIGNMENT bytes in either dtype."""
    missing = _missing(a.shape[1], min(a.element_size(), b.element_size()))
    return (F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))) if missing else (a, b)


def _missing(rank: int, itemsize: int) -> int:
    return -rank % (ALIGNMENT // itemsize)
