"""The generator's rows: the cost model at the released size, what counts as traffic, gates, and rows of tiny sizes."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from openwu.errors import OpenwuError
from openwu.generator.inference.fast import FastGenerator
from openwu.generator.layout import GeneratorLayout
from openwu.generator.model import ParameterGenerator
from openwu.kernels.attention import training_attention
from openwu_bench import CURVES, generator_bytes, gpu
from openwu_bench.generator import generator_flops, released_config, small_config, speed_row
from openwu_bench.generator_bytes import MemoryTraffic
from openwu_bench.measurement import Curve, Row


def test_sizes_are_those_that_rows_speak_of() -> None:
    (small,) = GeneratorLayout.of(small_config()).groups
    assert (small.num_layers, small.positions_per_layer) == (8, 384)
    (released,) = GeneratorLayout.of(released_config()).groups
    assert (released.num_positions, released.adapter_size) == (176_512, 722_993_152)
    assert small_config(d_model=512).d_model == 512


def test_released_cost_is_the_documented_one() -> None:
    costs = [sum(generator_flops(released_config(), length).values()) / 1e15 for length in (1024, 2048)]
    assert costs[1] - costs[0] == pytest.approx(0.0725, abs=0.002)
    assert costs[0] == pytest.approx(2.95 + 0.071, abs=0.03)
    kept = sum(generator_flops(released_config(), 1024, first_block_kept=True).values()) / 1e15
    assert (costs[0] - kept) / costs[0] == pytest.approx(0.02, abs=0.005)


@pytest.mark.parametrize("length", [1, 33])
def test_cost_model_counts_what_torch_counts(length: int) -> None:
    config = small_config(d_model=64, layers=3, targets=1, blocks=2)
    generator = ParameterGenerator(config)
    condition = torch.randn(1, length, config.input_dim)
    products = training_attention(torch.device("cpu"))  # the counter does not know the fused kernel
    with torch.no_grad(), products, FlopCounterMode(display=False) as counter:
        generator(condition)
    assert sum(generator_flops(config, length).values()) == counter.get_total_flops()
    fast = FastGenerator(generator)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # The counter sees its own thread alone.
    try:
        fast(condition)
        with training_attention(torch.device("cpu")), FlopCounterMode(display=False) as counter:
            fast(condition)
    finally:
        torch.set_num_threads(threads)
    assert sum(generator_flops(config, length, first_block_kept=True).values()) == counter.get_total_flops()


def test_traffic_counts_results_and_not_views() -> None:
    x = torch.randn(8, 16)
    out = torch.empty(8, 16)
    with torch.no_grad(), MemoryTraffic() as traffic:
        x.view(16, 8).t()[1:]
        torch.empty(100)
    assert (traffic.written, traffic.allocated) == (0, 400)
    with torch.no_grad(), MemoryTraffic() as traffic:
        torch.mul(x, 2, out=out)
        out[2:4].add_(1)
        F.silu(out)
        out.split(4, dim=1)
    assert (traffic.written, traffic.allocated) == ((128 + 32 + 128) * 4, 128 * 4)
    assert traffic.by_operation == {"aten::mul": 512, "aten::add_": 128, "aten::silu": 512}


def test_bytes_row_reaches_its_goal_and_says_what_it_leaves_out() -> None:
    row = generator_bytes.measure(quick=True)
    assert row.reached
    assert row.error < 1e-5
    assert row.value == row.details["float32: ratio allocated"] < row.details["float32: ratio written"] < 1
    assert row.details["bfloat16: ratio written"] < 1


def test_speed_row_times_both_sides() -> None:
    row = speed_row(small_config(d_model=64, layers=2, targets=1, blocks=2), repeats=2)
    assert set(row.sides) == {"reference", "fast", "fast, first block not kept"}
    assert row.value == row.sides["reference"].median / row.sides["fast"].median > 0
    assert row.error < 1e-5
    assert "d 64, n 2, hw 192, 2 blocks" in row.title


@pytest.mark.parametrize(
    "run",
    [
        lambda: generator_bytes.measure(quick=True),
        lambda: speed_row(small_config(d_model=64, layers=2, targets=1, blocks=2), repeats=1),
    ],
    ids=["bytes", "speed"],
)
def test_nothing_is_measured_where_the_sides_differ(run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: Tensor, *_: object) -> Tensor:
        return x

    monkeypatch.setattr("openwu.kernels.dispatch.apply_rotary_", wrong)
    with pytest.raises(OpenwuError, match=r"differ by .*; not measured"):
        run()


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure for minutes")
@pytest.mark.parametrize("measure", [gpu.measure_speed, gpu.measure_memory])
def test_gpu_rows_say_what_they_need(measure: Callable[[bool], Row]) -> None:
    with pytest.raises(OpenwuError, match=r"G[14]: expected a CUDA device with about 80 GB of memory, got none"):
        measure(True)


def test_gpu_speed_row_works_at_any_size_on_any_device() -> None:
    config = small_config(d_model=64, layers=2, targets=1, blocks=2)
    generator = gpu.random_generator(config, torch.device("cpu"))
    assert next(generator.parameters()).dtype == torch.bfloat16
    rate = gpu.matmul_rate(torch.device("cpu"), 32)
    assert rate > 0
    row = gpu.speed_row(generator, (3, 9), 1e9, repeats=1)
    assert len(row.sides) == 6
    floors = [row.details[f"L {length}: floor s"] for length in (3, 9)]
    assert floors[0] == sum(generator_flops(config, 3).values()) / 1e9 < floors[1]
    shares = [100 * floor / row.sides[f"L {length} fast"].median for floor, length in zip(floors, (3, 9), strict=True)]
    assert row.value == min(shares)
    assert 0 < row.details["L 3: relative error of fp8"] < 0.2


def test_gpu_speed_row_has_the_fast_path_without_kernels_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "available", lambda _: "triton 9")
    generator = gpu.random_generator(small_config(d_model=64, layers=2, targets=1, blocks=1), torch.device("cpu"))
    row = gpu.speed_row(generator, (3,), 1e9, repeats=1)
    sides = {name: timing.median for name, timing in row.sides.items()}
    assert set(sides) == {f"L 3 {name}" for name in ("reference", "fast", "fast, plain torch", "fp8")}
    ratio = sides["L 3 fast, plain torch"] / sides["L 3 fast"]
    assert row.details["L 3: fast without / with kernels"] == pytest.approx(ratio)


GENERATOR_CURVES = {name: path for name, path in CURVES.items() if name.startswith("generator-")}


@pytest.mark.parametrize("name", GENERATOR_CURVES)
def test_growth_is_measured_beside_the_cost_model(name: str) -> None:
    module, _, function = CURVES[name].partition(":")
    curve = getattr(importlib.import_module(module), function)(True)
    small, large = curve.points
    assert small.x < large.x
    assert large.predicted == small.predicted if name == "generator-pieces" else large.predicted > small.predicted
    assert Curve.from_json(json.loads(json.dumps(curve.to_json()))) == curve


def test_curves_of_the_generator_are_listed() -> None:
    assert set(GENERATOR_CURVES) == {
        f"generator-{what}" for what in ("condition", "targets", "layers", "width", "pieces")
    }
