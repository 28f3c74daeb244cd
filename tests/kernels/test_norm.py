"""RMS normalisation against its formula, and that it leaves the dtype alone."""

from __future__ import annotations

import pytest
import torch

from openwu.kernels.norm import RMSNorm


def test_it_is_the_formula() -> None:
    norm = RMSNorm(6)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_input_keeps_its_dtype(dtype: torch.dtype, autocast: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert RMSNorm(4)(torch.randn(3, 4).to(dtype)).dtype == dtype
