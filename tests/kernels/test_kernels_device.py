"""Every kernel on a CUDA device against plain torch; with OPENWU_DEVICE=cpu the same code runs through without one."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from openwu.kernels import dispatch
from openwu.kernels.autotune import CHOICES, available, without_kernels

DEVICE = torch.device(os.environ.get("OPENWU_DEVICE", "cuda"))
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Of an element, and of its tensor's root mean square; see docs/performance.md."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"),
]
dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def same(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    tolerance = TOLERANCE[found.dtype]
    size = float(expected.float().square().mean().sqrt())
    torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance * size)


def tried(name: str) -> None:
    """The kernel compiled, ran and agreed: what failed is named as such."""
    if DEVICE.type == "cuda" and available(DEVICE):
        assert CHOICES.found().get(name, "not tried") not in ("failed", "not tried"), CHOICES.found()


@dtypes
@pytest.mark.parametrize("shape", [(2, 300, 8, 128), (1, 1, 1, 64), (3, 17, 5, 32)])
def test_rotary_embedding(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = draw(*shape, dtype=dtype)
    angles = draw(1, shape[1], 1, shape[3] // 2, seed=1)
    turns = torch.complex(angles.cos(), angles.sin())
    same(dispatch.apply_rotary(x, turns), without_kernels(lambda: dispatch.apply_rotary(x, turns))())
    tried("rotary embedding")


@dtypes
@pytest.mark.parametrize("shape", [(5, 4096), (1, 64), (300, 384)])
def test_norms(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, update, weight = draw(*shape), draw(*shape, dtype=dtype, seed=1), draw(shape[1], dtype=dtype, seed=2)
    same(*(run() for run in both(lambda: dispatch.rms_norm(x, weight, 1e-6, dtype))))
    found, expected = (run() for run in both(lambda: dispatch.add_rms_norm(x, update, weight, 1e-6, dtype)))
    for one, other in zip(found, expected, strict=True):
        same(one, other)
    in_place = [run() for run in both(lambda: dispatch.add_rms_norm_(x.clone(), update, weight, 1e-6, dtype))]
    same(*in_place)
    for name in ("RMSNorm", "residual addition and RMSNorm", "residual addition and RMSNorm in place"):
        tried(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", [(64, 0, 3), (1,), (100, 200, 7, 5)])
def test_low_rank_update_of_sorted_rows(dtype: torch.dtype, counts: tuple[int, ...]) -> None:
    rows, groups = sum(counts), len(counts)
    x, y = draw(rows, 256, dtype=dtype), draw(rows, 384, dtype=dtype, seed=1)
    a, b = draw(groups, 16, 256, dtype=dtype, seed=2) / 16, draw(groups, 384, 16, dtype=dtype, seed=3)
    group = torch.repeat_interleave(torch.arange(groups), torch.tensor(counts)).to(DEVICE)
    ends = torch.tensor(counts).cumsum(0).to(DEVICE, torch.int32)
    with torch.no_grad():
        same(*(run() for run in both(lambda: dispatch.add_sorted(y.clone(), x, a, b, 0.5, group, ends))))
    tried("low-rank update of sorted rows")


def both(run):  # type: ignore[no-untyped-def]
    """The run as it is, and in plain torch."""
    return run, without_kernels(run)
