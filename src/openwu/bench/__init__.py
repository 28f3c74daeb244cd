"""Benchmarks: two ways to do the same enter, their times side by side leave. `ROWS` and `GROWTHS` list them.

A row is a function `measure(quick: bool) -> Row` that first checks that both sides agree, then times them in turn. A
growth is a function `measure(quick: bool) -> Growth`, or the plain data that `Growth.read` takes: cost against size.
"""

from __future__ import annotations

ROWS: dict[str, str] = {
    "C1": "openwu.bench.generator_speed:measure",
    "C2": "openwu.bench.generator_bytes:measure",
    "C3": "openwu.bench.experts:measure",
    "C4": "openwu.bench.mixed_batch:measure",
    "C5": "openwu.bench.peft_experts:measure",
    "C6": "openwu.bench.compiled:measure",
    "C7": "openwu.bench.edit:measure",
    "C8": "openwu.bench.cached:measure",
    "G1": "openwu.bench.generator_gpu:measure_speed",
    "G2": "openwu.bench.apply_gpu:measure_experts",
    "G3": "openwu.bench.apply_gpu:measure_batch",
    "G4": "openwu.bench.generator_gpu:measure_memory",
}
"""Name of a row -> "module:function" that measures it. One line adds a row."""

GROWTHS: dict[str, str] = {
    "generator-condition": "openwu.bench.generator_growth:measure_condition",
    "generator-targets": "openwu.bench.generator_growth:measure_targets",
    "generator-layers": "openwu.bench.generator_growth:measure_layers",
    "generator-width": "openwu.bench.generator_growth:measure_width",
    "generator-pieces": "openwu.bench.generator_growth:measure_pieces",
    "apply-rank": "openwu.bench.apply_growth:measure_rank",
    "apply-adapters": "openwu.bench.apply_growth:measure_adapters",
    "apply-experts": "openwu.bench.apply_growth:measure_experts",
    "edit-size": "openwu.bench.edit:measure_size",
    "edit-batch": "openwu.bench.edit:measure_batch",
}
"""Name of a curve -> "module:function" that measures it. One line adds a curve."""
