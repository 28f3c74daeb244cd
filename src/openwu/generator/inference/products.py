"""Pack a block's weights for inference: queries, keys and values of one input become one product; fp8 as an option.

A `PackedBlock` holds detached copies of a `Block`'s weights in the dtype of the computation.

Shapes: d width, i inputs and o outputs of a product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from openwu.errors import OpenwuError
from openwu.generator.blocks import Attention, Block, RMSNorm

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
SMALLEST_SCALE = 1e-12
"""Keeps rows of zeros from dividing by zero."""
ALIGNED = 16
"""Both sides of a weight must be multiples of it for the 8-bit product; others keep their dtype."""
CAPABILITY = (8, 9)


def quantised(x_ri: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in float8 and their scales `[r, 1]` in float32: x is about rows * scales."""
    scales_r1 = (x_ri.abs().amax(dim=1, keepdim=True).float() / LARGEST).clamp_(min=SMALLEST_SCALE)
    return (x_ri / scales_r1).to(FLOAT8), scales_r1


class Fp8:
    """A product whose factors have 8 bits and whose result has bfloat16's precision."""

    def __init__(self, weight_oi: Tensor, bias_o: Tensor) -> None:
        if weight_oi.is_cuda and torch.cuda.get_device_capability(weight_oi.device) < CAPABILITY:
            found = torch.cuda.get_device_capability(weight_oi.device)
            raise OpenwuError(
                f"8-bit products: expected a GPU of compute capability {CAPABILITY} or later, got {found}; "
                "leave them off"
            )
        self.out_features = weight_oi.shape[0]
        self.weight_oi, self.scales_o1 = quantised(weight_oi)
        self.bias_o = bias_o.to(torch.bfloat16)

    def into(self, x_ri: Tensor, out_ro: Tensor) -> Tensor:
        rows, scales_r1 = quantised(x_ri)
        result = torch._scaled_mm(
            rows, self.weight_oi.t(), scales_r1, self.scales_o1.t(), bias=self.bias_o, out_dtype=torch.bfloat16
        )
        return out_ro.copy_(result)


def fp8(weight_oi: Tensor, bias_o: Tensor) -> Fp8 | Dense:
    """A product in 8 bits where the weight's shape allows it; for `FastOptions.make`."""
    aligned = all(side % ALIGNED == 0 for side in weight_oi.shape)
    return Fp8(weight_oi, bias_o) if aligned else Dense(weight_oi, bias_o)


class Product(Protocol):
    """y = x W^T + bias."""

    out_features: int

    def into(self, x_ri: Tensor, out_ro: Tensor) -> Tensor:
        """Write the product of rows x to `out_ro`, and return it."""
        ...


class Dense:
    """A product in the dtype of its weights."""

    def __init__(self, weight_oi: Tensor, bias_o: Tensor) -> None:
        self.weight_io = weight_oi.t()
        self.bias_o = bias_o
        self.out_features = weight_oi.shape[0]

    def into(self, x_ri: Tensor, out_ro: Tensor) -> Tensor:
        return torch.addmm(self.bias_o, x_ri, self.weight_io, out=out_ro)


class SideBySide:
    """Several products of one input, which write the columns of one result: no copy of their weights is joined."""

    def __init__(self, parts: Sequence[Product]) -> None:
        self.parts = parts
        self.out_features = sum(part.out_features for part in parts)

    def into(self, x_ri: Tensor, out_ro: Tensor) -> Tensor:
        columns = torch.split_with_sizes(out_ro, [part.out_features for part in self.parts], dim=1)
        for part, out in zip(self.parts, columns, strict=True):
            part.into(x_ri, out)
        return out_ro


JOINED_BYTES = 64 * 2**20
"""Weights of one input are copied side by side up to this size; large ones fill a machine by themselves."""


class MakeProduct(Protocol):
    """Makes a product of a weight `[o, i]` and a bias `[o]`."""

    def __call__(self, weight_oi: Tensor, bias_o: Tensor, /) -> Product: ...


@dataclass(frozen=True)
class Norm:
    """An RMSNorm's weight, at least in float32."""

    weight_d: Tensor
    eps: float

    @classmethod
    def of(cls, norm: RMSNorm) -> Norm:
        weight = norm.weight.detach()
        assert norm.eps is not None
        return cls(weight.to(torch.promote_types(weight.dtype, torch.float32)), norm.eps)


@dataclass(frozen=True)
class PackedBlock:
    """The products of one block, by the order in which they are used."""

    norm1: Norm
    qkv_layers: Product
    out_layers: Product
    norm2: Norm
    qkv_positions: Product
    out_positions: Product
    norm3: Norm
    queries: Product
    keys_values: Product
    out_cross: Product
    norm4: Norm
    fc1: Product
    fc2: Product

    @classmethod
    def of(
        cls, block: Block, dtype: torch.dtype, make: MakeProduct = Dense, joined_bytes: int = JOINED_BYTES
    ) -> PackedBlock:
        """`make`: what computes the products; the default in `dtype`."""

        def joined(*maps: nn.Linear) -> Product:
            # Not copied where they have the dtype already.
            weights = [each.weight.detach().to(dtype) for each in maps]
            biases = [each.bias.detach().to(dtype) for each in maps]
            if len(maps) == 1 or sum(weight.nbytes for weight in weights) > joined_bytes:
                parts = [make(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
                return parts[0] if len(parts) == 1 else SideBySide(parts)
            return make(torch.cat(weights), torch.cat(biases))

        def qkv(attention: Attention) -> Product:
            return joined(attention.W_q, attention.W_k, attention.W_v)

        cross = block.self_attn_cross
        return cls(
            norm1=Norm.of(block.norm1),
            qkv_layers=qkv(block.self_attn_n),
            out_layers=joined(block.self_attn_n.W_o),
            norm2=Norm.of(block.norm2),
            qkv_positions=qkv(block.self_attn_hw),
            out_positions=joined(block.self_attn_hw.W_o),
            norm3=Norm.of(block.norm3),
            queries=joined(cross.W_q),
            keys_values=joined(cross.W_k, cross.W_v),
            out_cross=joined(cross.W_o),
            norm4=Norm.of(block.norm4),
            fc1=joined(block.feed_forward.fc1),
            fc2=joined(block.feed_forward.fc2),
        )
