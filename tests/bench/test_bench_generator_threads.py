"""C15 and C16 at small sizes: what is compared, and that nothing stays behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from openwu.errors import OpenwuError
from openwu_bench import generator_threads as bench
from openwu_bench.command import check_row


def test_the_limit_is_told_for_every_size() -> None:
    before = torch.get_num_threads()
    row = bench.measure_limit(quick=True)
    check_row(row, "C15")
    shares = row.details["share of the limit by size"]
    assert list(shares) == list(row.sides)
    assert len(shares) >= len(bench.QUICK_WIDTHS)
    assert all(share > 0 for share in shares.values())
    assert row.value in shares.values()
    assert torch.get_num_threads() == before


def test_one_thread_is_compared_with_two() -> None:
    row = bench.measure_busy(quick=True)
    check_row(row, "C16")
    assert row.value == row.sides["threads: 1"].median / row.sides["threads: 2"].median


def test_another_adapter_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    made = bench._generator

    def random(width: int) -> tuple[Any, int]:
        run, flops = made(width)
        return lambda: run().scaled(float(torch.rand(()))), flops

    monkeypatch.setattr(bench, "_generator", random)
    with pytest.raises(OpenwuError, match="C16: two threads gave another adapter"):
        bench.measure_busy(quick=True)
