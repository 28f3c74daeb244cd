"""Products in 8 bits: a weight goes in, a product whose factors are rounded to float8_e4m3fn comes out.

Every row of x and every output of the weight has its own scale, its largest magnitude / 448 (the dtype's largest
number), found anew for each x. Sums are float32. An option: unlike the rest of the fast path it is not equal to
rounding of the generator's own dtype. A GPU needs compute capability 8.9; torch computes the same on a CPU.

Shapes: r rows, i inputs, o outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openwu.errors import OpenwuError
from openwu.generator.products import Dense

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
