"""Transformer blocks of the parameter generator: attention along both axes, cross-attention, feed-forward.

Shapes: b samples, n base layers, p positions of one base layer (hw), L condition tokens (l in suffixes), d width,
m heads, D = d / m head width (e in suffixes). In `Attention`: s sequences, q queries, k keys. A suffix names the axes:
x_bnpd is `[b, n, p, d]`.

Dtypes: the residual stream x keeps the dtype that it enters with, under autocast too. A branch is computed in the
weights' dtype (or autocast's), and its result is cast to x's dtype before it is added. Left to itself, autocast would
widen the stream: torch >= 2.12 computes rms_norm in float32 there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openwu.kernels import dispatch
from openwu.kernels.rotary import apply_rotary_real

NORM_EPS = 1e-6
ROTARY_THETA = 10_000.0
FEED_FORWARD_FACTOR = 4


class Rotary(NamedTuple):
    """Cosines and sines of the angles that turn a head's D / 2 consecutive pairs, by position."""

    cos: Tensor
    """[positions, D/2], or [s, positions, D/2] where every sequence has its own"""
    sin: Tensor

    def at(self, positions: Tensor) -> Rotary:
        """The angles at these positions (any shape), as rows of this table."""
        return Rotary(self.cos[positions], self.sin[positions])


class BlockRotary(NamedTuple):
    """The four tables that a block needs."""

    layers: Rotary
    positions: Rotary
    cross_queries: Rotary
    cross_keys: Rotary


def rotary(width: int, *axes: Tensor) -> Rotary:
    """Angles for heads of `width`, which the axes share evenly: each turns its part of the head by its own position.

    An axis of width D turns its pair k by position * theta^(-2k/D) (RoFormer, arXiv 2104.09864, Eq. 15). In float64:
    float32 angles at positions in the thousands are off by more than 1e-4.
    """
    axis_width = width // len(axes)
    even = torch.arange(0, axis_width, 2, dtype=torch.float64, device=axes[0].device)
    frequencies = ROTARY_THETA ** (-even / axis_width)
    angles = torch.cat([positions.to(torch.float64)[..., None] * frequencies for positions in axes], dim=-1)
    return Rotary(angles.cos(), angles.sin())


def block_rotary(head_dim: int, layers: int, rows: int, columns: int, keys: int, device: torch.device) -> BlockRotary:
    """Tables of a group with n `layers`, h `rows` (tokens) and r / a `columns`, and of `keys` condition tokens."""
    layer = torch.arange(layers, device=device)
    position = torch.arange(rows * columns, device=device)
    every_layer = layer.repeat_interleave(len(position))
    return BlockRotary(
        layers=rotary(head_dim, layer),
        positions=rotary(head_dim, position // columns, position % columns),
        cross_queries=rotary(head_dim, every_layer, position.repeat(layers)),
        cross_keys=key_rotary(head_dim, rows, columns, keys, device),
    )


def key_rotary(head_dim: int, rows: int, columns: int, keys: int, device: torch.device) -> Rotary:
    """The table of the condition's tokens, for which both axes have the same position."""
    # Keys stand behind the larger of the two axes of the (token, column) grid, as in the released generator.
    key = torch.arange(keys, device=device) + max(rows, columns)
    return rotary(head_dim, key, key)


def rotate(x_sqme: Tensor, angles: Rotary) -> Tensor:
    """Turn each pair (x[2k], x[2k+1]) of every head; at least in float32, returned in x's dtype."""
    wide = torch.promote_types(x_sqme.dtype, torch.float32)
    cos, sin = angles.cos.to(wide).unsqueeze(-2), angles.sin.to(wide).unsqueeze(-2)
    if torch.compiler.is_exporting():
        return apply_rotary_real(x_sqme, cos, sin)
    return dispatch.apply_rotary(x_sqme, torch.complex(cos, sin))


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, whose result has the weight's dtype whatever comes in and whatever autocast does."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return dispatch.rms_norm(x, self.weight, NORM_EPS, self.weight.dtype)

    def after(self, x: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        """x + update in x's dtype, and its norm."""
        return dispatch.add_rms_norm(x, update, self.weight, NORM_EPS, self.weight.dtype)


class Attention(nn.Module):
    """Multi-head attention with rotary positions on queries and keys; scale 1 / sqrt(head_dim), no dropout."""

    def __init__(self, d_model: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.W_q = nn.Linear(d_model, d_model)
        self.W_k = nn.Linear(d_model, d_model)
        self.W_v = nn.Linear(d_model, d_model)
        self.W_o = nn.Linear(d_model, d_model)

    def forward(
        self, x_sqd: Tensor, context_skd: Tensor, rotary_q: Rotary, rotary_k: Rotary, key_mask_sk: Tensor | None = None
    ) -> Tensor:
        """[s, q, d]. `key_mask_sk`: bool, False where a key must not be seen."""
        heads = (-1, self.head_dim)
        q_sqme = rotate(self.W_q(x_sqd).unflatten(-1, heads), rotary_q)
        k_skme = rotate(self.W_k(context_skd).unflatten(-1, heads), rotary_k)
        v_skme = self.W_v(context_skd).unflatten(-1, heads)
        mask_s11k = None if key_mask_sk is None else key_mask_sk[:, None, None, :]
        mixed_smqe = F.scaled_dot_product_attention(
            q_sqme.transpose(1, 2), k_skme.transpose(1, 2), v_skme.transpose(1, 2), attn_mask=mask_s11k
        )
        out: Tensor = self.W_o(mixed_smqe.transpose(1, 2).flatten(-2))
        return out


class FeedForward(nn.Module):
    """fc2(silu(fc1(x))), hidden width 4 d."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_model, FEED_FORWARD_FACTOR * d_model)
        self.fc2 = nn.Linear(FEED_FORWARD_FACTOR * d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.silu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Attention along base layers, along positions and to the condition, then a feed-forward; pre-norm, residual."""

    def __init__(self, d_model: int, head_dim: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(d_model)
        self.self_attn_n = Attention(d_model, head_dim)
        self.norm2 = RMSNorm(d_model)
        self.self_attn_hw = Attention(d_model, head_dim)
        self.norm3 = RMSNorm(d_model)
        self.self_attn_cross = Attention(d_model, head_dim)
        self.norm4 = RMSNorm(d_model)
        self.feed_forward = FeedForward(d_model)

    def forward(self, x_bnpd: Tensor, c_bld: Tensor, angles: BlockRotary, mask_bl: Tensor | None) -> Tensor:
        x_bnpd = self.mix_layers(x_bnpd, angles)
        return self.mix_positions(x_bnpd, c_bld, angles, mask_bl)

    def mix_layers(self, x_bnpd: Tensor, angles: BlockRotary) -> Tensor:
        """The part that joins base layers: every position by itself."""
        b, _, p, _ = x_bnpd.shape
        # Contiguous: a linear map of a batch of transposed sequences would copy its weight for every sequence.
        along_layers = self.norm1(x_bnpd).transpose(1, 2).flatten(0, 1).contiguous()
        update = self.self_attn_n(along_layers, along_layers, angles.layers, angles.layers)
        out: Tensor = x_bnpd + update.unflatten(0, (b, p)).transpose(1, 2).to(x_bnpd.dtype)
        return out

    def mix_positions(self, x_bnpd: Tensor, c_bld: Tensor, angles: BlockRotary, mask_bl: Tensor | None) -> Tensor:
        """The parts that every base layer passes by itself: along its positions, to the condition, feed-forward."""
        b, n, p, _ = x_bnpd.shape
        along_positions = self.norm2(x_bnpd).flatten(0, 1)
        update = self.self_attn_hw(along_positions, along_positions, angles.positions, angles.positions)
        x_bnpd, everywhere = self.norm3.after(x_bnpd, update.unflatten(0, (b, n)))

        update = self.self_attn_cross(everywhere.flatten(1, 2), c_bld, angles.cross_queries, angles.cross_keys, mask_bl)
        x_bnpd, everywhere = self.norm4.after(x_bnpd, update.unflatten(1, (n, p)))

        out: Tensor = x_bnpd + self.feed_forward(everywhere).to(x_bnpd.dtype)
        return out
