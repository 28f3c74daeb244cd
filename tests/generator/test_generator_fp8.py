"""Products in 8 bits: against a product of rounded factors in float64, odd rows, zeros, and the generator's error."""

from __future__ import annotations

import pytest
import torch

from openwu.errors import OpenwuError
from openwu.generator.inference.fast import FastGenerator, FastOptions
from openwu.generator.inference.products import LARGEST, Dense, Fp8, fp8, quantised
from openwu.generator.model import ParameterGenerator
from openwu_bench.generator import adapter_error, small_config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 33])
def test_product_is_that_of_the_rounded_factors(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # Rows and outputs of very different size, which one scale for all would lose.
    x = (torch.randn(rows, 32) * torch.logspace(-3, 3, rows)[:, None]).to(dtype)
    weight = (torch.randn(48, 32) * torch.logspace(-2, 2, 48)[:, None]).to(dtype)
    bias = torch.randn(48).to(dtype)
    out = torch.full((rows, 48), float("nan"), dtype=dtype)
    came = Fp8(weight, bias).into(x, out)
    assert came is out
    factors = [q.double() * scale.double() for q, scale in (quantised(x), quantised(weight))]
    expected = factors[0] @ factors[1].t() + bias.double()
    size = factors[0].norm(dim=1)[:, None] * factors[1].norm(dim=1) + bias.double().abs()
    assert float(((came.double() - expected).abs() / size).max()) < 1e-2
    exact = x.double() @ weight.double().t() + bias.double()
    assert 1e-3 < float((came.double() - exact).norm() / exact.norm()) < 0.06


def test_scales_use_the_whole_range_and_survive_zeros() -> None:
    rows, scales = quantised(torch.tensor([[0.0, 0.0], [1.0, -2.0], [3e4, 1e-3]]))
    assert bool(rows.float().isfinite().all())
    assert rows.float().abs().amax(1).tolist() == [0.0, LARGEST, LARGEST]
    assert bool((scales > 0).all())


def test_shapes_that_do_not_fit_keep_their_dtype() -> None:
    assert isinstance(fp8(torch.randn(32, 16), torch.randn(32)), Fp8)
    assert isinstance(fp8(torch.randn(32, 24), torch.randn(32)), Dense)
    assert isinstance(fp8(torch.randn(40, 16), torch.randn(40)), Dense)


def test_old_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnOldGpu(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    weight = torch.randn(16, 16).as_subclass(OnOldGpu)  # type: ignore[arg-type]
    with pytest.raises(OpenwuError, match=r"expected a GPU of compute capability \(8, 9\) or later, got \(8, 0\)"):
        Fp8(weight, torch.randn(16))


def test_the_adapter_differs_by_a_few_percent() -> None:
    torch.manual_seed(0)
    generator = ParameterGenerator(small_config(d_model=64, layers=2, targets=1, blocks=2)).bfloat16()
    condition = torch.randn(2, 9, generator.config.input_dim)
    fast = FastGenerator(generator, FastOptions(make=fp8))
    with torch.no_grad():
        expected = generator(condition)
    assert 0.002 < adapter_error(fast(condition), expected) < 0.1
