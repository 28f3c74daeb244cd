"""Benchmarks: two ways to do the same enter, their times side by side leave. `ROWS` lists them.

A row is a function `measure(quick: bool) -> Row` that first checks that both sides agree, then times them in turn.
"""

from __future__ import annotations

ROWS: dict[str, str] = {
    "C3": "openwu.bench.experts:measure",
    "C4": "openwu.bench.mixed_batch:measure",
    "C5": "openwu.bench.peft_experts:measure",
    "C6": "openwu.bench.compiled:measure",
    "G2": "openwu.bench.apply_gpu:measure_experts",
    "G3": "openwu.bench.apply_gpu:measure_batch",
}
"""Name of a row -> "module:function" that measures it. One line adds a row."""
