"""Parts of a generator block for inference, which change the residual stream in place, piece by piece.

The same function as `blocks.Block` to rounding. Every intermediate result lies in a workspace of bounded size, which
pieces use one after another; on a CPU it stays in the caches. Queries, keys and values are one product, turned in
place; attention along base layers takes the stream's own layout as strides instead of a transposed copy.

Shapes: b samples, n base layers, p positions of one base layer, L condition tokens, d width, m heads, e head width;
a piece has k samples, n or l layers, p or q positions and r rows, all of them together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from openwu.generator.blocks import FEED_FORWARD_FACTOR
from openwu.generator.inference.products import Norm, PackedBlock, Product
from openwu.generator.inference.tables import RotaryTables, Workspace
from openwu.kernels import autotune as kernels
from openwu.kernels import dispatch
from openwu.kernels.attention import inference_attention
from openwu.kernels.threads import in_parallel

SMALLEST = 64
"""Rows below which a piece costs more to begin than it brings."""


@dataclass(frozen=True)
class Pieces:
    """How a stream is cut: at most about so many rows at once, at most so many base layers, and so many pieces."""

    rows: int
    layers: int | None = None
    least: int = 1
    """Pieces that there should be, for as many threads, unless they would get very small. Never how many threads there
    are: the cut decides how products round."""

    def of_layers(self, b: int, n: int, p: int) -> Iterator[tuple[slice, slice]]:
        """Samples and layers of pieces that lie in one piece in memory: some whole samples, or layers of one."""
        layers = max(1, self.rows // p)
        if b * n * p >= self.least * SMALLEST:
            layers = min(layers, -(-b * n // self.least))
        if self.layers is not None:
            layers = min(layers, self.layers)
        if layers < n:
            for sample in range(b):
                for start in range(0, n, layers):
                    yield slice(sample, sample + 1), slice(start, min(n, start + layers))
        else:
            samples = layers // n
            for start in range(0, b, samples):
                yield slice(start, min(b, start + samples)), slice(0, n)

    def of_positions(self, b: int, n: int, p: int) -> Iterator[tuple[slice, slice]]:
        """Samples and positions; all layers are in every piece."""
        yield from Pieces(self.rows, least=self.least).of_layers(b, p, n)

    def each(
        self, cut: Iterator[tuple[slice, slice]], work: Callable[[slice, slice], None], device: torch.device
    ) -> None:
        """Work on all pieces of a cut: on a CPU on threads of their own, each with a single thread of torch inside."""
        if device.type == "cpu":
            in_parallel([partial(work, *piece) for piece in cut])
            return
        for piece in cut:
            work(*piece)


@dataclass(frozen=True)
class Read:
    """The condition as one block reads it."""

    k_blme: Tensor
    v_blme: Tensor
    mask_b11l: Tensor | None


@dataclass(frozen=True)
class Stages:
    """One block's parts, over a workspace."""

    weights: PackedBlock
    rotary: RotaryTables
    head_dim: int
    dtype: torch.dtype
    """Of the products, not of the stream."""
    pieces: Pieces
    workspace: Workspace

    def mix_layers_(self, x_bnpd: Tensor) -> None:
        """x += attention along base layers."""
        b, n, p, d = x_bnpd.shape
        rotary = self.rotary.layers_n1e[:, None]

        def work(samples: slice, positions: slice) -> None:
            x = x_bnpd[samples, :, positions]
            shape = x.shape[:3]
            qkv = self._product(self.weights.qkv_layers, self._normed(x, self.weights.norm1), "wide")
            heads = qkv.view(*shape, -1, self.head_dim)
            q, k, v = _parts(self._turned(heads, 2 * d, rotary), 3)
            mixed = self._take("rms_norm", (*shape, d))
            for sample in range(shape[0]):
                # [n, q, m, e] -> [q, m, n, e], as strides
                part = inference_attention(*(each[sample].permute(1, 2, 0, 3) for each in (q, k, v)))
                mixed[sample] = part.permute(2, 0, 1, 3).flatten(-2)
            x += self._product(self.weights.out_layers, mixed.view(-1, d), "out").view(*shape, d)

        self.pieces.each(self.pieces.of_positions(b, n, p), work, x_bnpd.device)

    def mix_positions_(self, x_bnpd: Tensor) -> None:
        """x += attention along positions."""
        b, n, p, d = x_bnpd.shape

        def work(samples: slice, layers: slice) -> None:
            x = x_bnpd[samples, layers]
            qkv = self._product(self.weights.qkv_positions, self._normed(x, self.weights.norm2), "wide")
            heads = qkv.view(-1, p, 3 * d // self.head_dim, self.head_dim)
            q, k, v = _parts(self._turned(heads, 2 * d, self.rotary.positions_p1e), 3)
            mixed = inference_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
            x += self._mixed(mixed, self.weights.out_positions).view(x.shape)

        self.pieces.each(self.pieces.of_layers(b, n, p), work, x_bnpd.device)

    def read(self, c_bld: Tensor, turns_l1e: Tensor, mask_bl: Tensor | None) -> Read:
        """Keys and values of the condition; valid until the next block reads."""
        b, keys, d = c_bld.shape
        kv = self._product(self.weights.keys_values, c_bld.to(self.dtype).reshape(-1, d), "condition")
        heads = kv.view(b, keys, -1, self.head_dim)
        k, v = _parts(self._turned(heads, d, turns_l1e), 2)
        return Read(k, v, None if mask_bl is None else mask_bl[:, None, None, :])

    def queries(self, x_klpd: Tensor, layers: slice, out: str = "wide") -> Tensor:
        """What a piece asks the condition, `[k, l * p, m, e]`."""
        d = x_klpd.shape[-1]
        q = self._product(self.weights.queries, self._normed(x_klpd, self.weights.norm3), out)
        heads = q.view(*x_klpd.shape[:3], -1, self.head_dim)
        return self._turned(heads, d, self.rotary.cross_queries_np1e[layers]).flatten(1, 2)

    def answer_(self, x_bnpd: Tensor, condition: Read, asked_bqme: Tensor | None = None) -> None:
        """x += attention to the condition, then x += feed-forward. `asked_bqme`: queries if they are known."""
        b, n, p, _ = x_bnpd.shape

        def work(samples: slice, layers: slice) -> None:
            x = x_bnpd[samples, layers]
            known = slice(layers.start * p, layers.stop * p)
            q = self.queries(x, layers) if asked_bqme is None else asked_bqme[samples, known]
            mask = None if condition.mask_b11l is None else condition.mask_b11l[samples]
            k, v = condition.k_blme[samples], condition.v_blme[samples]
            mixed = inference_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
            update = self._mixed(mixed, self.weights.out_cross)
            hidden = self._product(self.weights.fc1, self._normed(x, self.weights.norm4, update), "wide")
            x += self._product(self.weights.fc2, F.silu(hidden, inplace=True), "out").view(x.shape)

        self.pieces.each(self.pieces.of_layers(b, n, p), work, x_bnpd.device)

    def _mixed(self, mixed_smqe: Tensor, out: Product) -> Tensor:
        """The heads' results, side by side, through a product: `[r, d]`."""
        rows = mixed_smqe.transpose(1, 2).flatten(-2)
        return self._product(out, rows.reshape(-1, rows.shape[-1]), "out")

    def _product(self, product: Product, x_ri: Tensor, out: str) -> Tensor:
        return product.into(x_ri, self._take(out, (len(x_ri), product.out_features)))

    def _normed(self, x: Tensor, norm: Norm, update: Tensor | None = None) -> Tensor:
        added = None if update is None else update.view(x.shape)
        return rms_norm(x, norm, self.dtype, self.workspace, added).view(-1, x.shape[-1])

    def _turned(self, heads: Tensor, width: int, rotary: Tensor) -> Tensor:
        """Turn the first `width` numbers of every row, heads `[..., m, e]`, in place."""
        turning = heads[..., : width // self.head_dim, :]
        wide = rotary.dtype.to_real()
        dispatch.apply_rotary_(turning, rotary, partial(self._take, "scratch", tuple(turning.shape), wide))
        return heads

    def _take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        return self.workspace.take(name, shape, dtype or self.dtype, self.rotary.layers_n1e.device)


def _parts(heads: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Heads `[..., parts * m, e]` -> so many views `[..., m, e]`."""
    *rows, heads_in_all, width = heads.shape
    return heads.view(*rows, parts, heads_in_all // parts, width).unbind(-3)


def rms_norm(x: Tensor, norm: Norm, dtype: torch.dtype, workspace: Workspace, update: Tensor | None = None) -> Tensor:
    """x += update where there is one; RMSNorm of x in `dtype`, contiguous, computed at least in float32."""
    if x.device.type in kernels.DEVICES:
        # torch's norm is one kernel there; on a CPU it is a chain of them over fresh memory.
        return dispatch.add_rms_norm_(x, update, norm.weight_d, norm.eps, dtype)
    if update is not None:
        x += update
    out = workspace.take("rms_norm", tuple(x.shape), dtype, x.device)
    wide = norm.weight_d.dtype
    result = out if dtype == wide else workspace.take("scratch", tuple(x.shape), wide, x.device)
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    inverse = size.square_().div_(x.shape[-1]).add_(norm.eps).rsqrt_()
    if x.dtype == wide:
        torch.mul(x, inverse, out=result)
    else:
        result.copy_(x).mul_(inverse)
    result.mul_(norm.weight_d)
    return out if result is out else out.copy_(result)


def row_bytes(d: int, dtype: torch.dtype) -> int:
    """Workspace per row of a piece: the normed row, the widest product, a branch's result, scratch for two rows."""
    scratch = 0 if dtype in (torch.float32, torch.float64) else 2 * d * torch.float32.itemsize
    return (2 + FEED_FORWARD_FACTOR) * d * dtype.itemsize + scratch
