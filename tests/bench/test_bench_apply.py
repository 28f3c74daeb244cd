"""Rows about applying adapters: they run, their gates can fail, and what they count is what the formulas say."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from openwu.errors import OpenwuError
from openwu.types import Target
from openwu_bench import adapters_curves, adapters_dense, adapters_experts, adapters_scope, gpu
from openwu_bench.adapters import gate, overhead, times_lower
from openwu_bench.measurement import Row, Timing, rehearsal


def check(row: Row, tolerance: float = 1e-5) -> None:
    """Small sizes on a busy machine: an overhead may be below nothing, but it is a number."""
    assert math.isfinite(row.value)
    assert 0 <= row.error <= tolerance
    assert row.sides
    assert all(min(timing.seconds) > 0 for timing in row.sides.values())


def test_experts() -> None:
    check(adapters_experts.measure_loop(quick=True))


@pytest.mark.parametrize(
    "measure", [adapters_dense.measure_mixed_batch, adapters_experts.measure_peft, adapters_scope.measure_scope]
)
def test_rows_against_peft(measure: Callable[[bool], Row]) -> None:
    pytest.importorskip("peft")
    check(measure(True))


def test_the_crossover_has_a_choice_on_both_sides() -> None:
    row = adapters_scope.measure_crossover(quick=True)
    check(row)
    chosen = [name.rpartition(" ")[2] for name in row.details["chosen against the better"]]
    assert chosen[0] == "applied"
    assert chosen[-1] == "merged"
    assert row.value >= 1


@pytest.mark.slow
def test_compiled() -> None:
    pytest.importorskip("peft")
    row = adapters_dense.measure_compiled(quick=True)
    check(row)
    assert row.details["recompilations"]["ours"] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
@pytest.mark.parametrize("measure", [gpu.measure_experts, gpu.measure_batch])
def test_gpu_rows_need_a_gpu(measure: object) -> None:
    with pytest.raises(OpenwuError, match=r"G[23]: expected a CUDA device"):
        measure(quick=True)  # type: ignore[operator]


def test_gpu_rows_run_through() -> None:
    """Small, on the CPU in the device's place: their code and their gates, no figure."""
    with rehearsal():
        experts_row, batch_row = gpu.measure_experts(quick=True), gpu.measure_batch(quick=True)
    check(experts_row, gpu.TOLERANCE)
    check(batch_row, gpu.TOLERANCE)
    assert set(experts_row.details["overhead by tokens"]) == {"ours", "ours, spare columns"}


def test_a_side_that_leaves_out_samples_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters_dense, "peft_model", lambda model, _: Deaf(model))
    with pytest.raises(OpenwuError, match="C4: both sides should agree"):
        adapters_dense.measure_mixed_batch(quick=True)


class Deaf(nn.Module):
    """Ignores adapter names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor, **_: object) -> torch.Tensor:
        return self.model[0].forward(x)  # type: ignore[index, no-any-return, operator]


def test_gate() -> None:
    y = torch.ones(3)
    assert gate("C0", y, y, 1e-5, 2 * y) == 0
    with pytest.raises(OpenwuError, match=r"C0: .* differ by 1\.0e-01"):
        gate("C0", 1.1 * y, y, 1e-5)
    with pytest.raises(OpenwuError, match="changes hardly anything"):
        gate("C0", y, y, 1e-5, y)
    with pytest.raises(OpenwuError, match="differ by nan"):
        gate("C0", y * float("nan"), y, 1e-5)


def test_overhead_pairs_measurements() -> None:
    assert overhead(Timing((3.0, 30.0, 5.0)), Timing((1.0, 20.0, 4.0))) == 2
    assert times_lower(0.5, 2.0, resolution=0.1) == 4
    assert times_lower(-1.0, 2.0, resolution=0.5) == 4


def test_counted_work() -> None:
    """3 rows, rank 2, 5 -> 7: A and B are 2 * 12 numbers each way."""
    target = Target("0", 5, 7)
    assert adapters_curves.operations([target, target], rows=3, rank=2) == 2 * (2 * 3 * 2 * 12)
    assert adapters_curves.moved_bytes([target], rows=3, rank=2, groups=2) == 4 * (3 * (5 + 4 + 14) + 2 * 2 * 12)


def test_the_law_adds_up_what_was_measured_beside_the_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        adapters_curves, "interleaved", lambda *_, **__: {"add": Timing((1.0,))}
    )  # 2 * 3 * 7 * 4 bytes/s
    target = Target("0", 5, 7)
    point = adapters_curves._point(2, Timing((9.0,)), Timing((0.5,)), [target], base=3.0, rows=3, rank=2, groups=2)
    speed = 2 * 3 * 5 * 7 / 3.0
    assert point.predicted == pytest.approx(
        0.5
        + adapters_curves.operations([target], 3, 2) / speed
        + adapters_curves.moved_bytes([target], 3, 2, 2) / (2 * 3 * 7 * 4)
    )
    assert (point.x, point.measured.median) == (2, 9.0)


@pytest.mark.parametrize("name", ["rank", "adapters", "experts"])
def test_growth(name: str) -> None:
    curve = getattr(adapters_curves, f"measure_{name}")(quick=True)
    assert [point.x for point in curve.points] == {"rank": [4, 8], "adapters": [1, 2, 4], "experts": [4, 8]}[name]
    assert 0 < curve.factor < math.inf
