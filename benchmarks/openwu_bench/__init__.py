"""Benchmarks of openwu: every row checks that both sides agree, then times them alternately.

A row is a function `measure(quick: bool) -> Row`, a curve a function `measure(quick: bool) -> Curve`. One entry of
`ROWS` or `CURVES` adds one; `openwu bench` runs them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PlannedRow:
    """A row of the benchmark, described without running it: one that was never measured is reported as such."""

    theme: str
    """Names the result file."""
    title: str
    """What is measured, and what it is compared with."""
    goal: str
    measure: str
    """Function that measures it, as "module:function"."""


ROWS = {
    "C1": PlannedRow(
        "generator",
        "a small generator on the CPU, against a plain reference",
        "at least 1.1 x",
        "openwu_bench.generator:measure",
    ),
    "C2": PlannedRow(
        "generator",
        "bytes materialised per block, against the plain reference",
        "at most 0.45 x",
        "openwu_bench.generator_bytes:measure",
    ),
    "C3": PlannedRow(
        "adapters",
        "an experts layer, overhead of the adapter, against a loop over experts",
        "at least 2 x lower",
        "openwu_bench.adapters_experts:measure_loop",
    ),
    "C4": PlannedRow(
        "adapters",
        "a dense layer, 8 and 32 adapters in a batch, against PEFT",
        "overhead at least 5 x lower",
        "openwu_bench.adapters_dense:measure_mixed_batch",
    ),
    "C5": PlannedRow(
        "adapters",
        "an experts layer, one adapter, against PEFT",
        "at least 1.3 x",
        "openwu_bench.adapters_experts:measure_peft",
    ),
    "C6": PlannedRow(
        "adapters",
        "20 adapters in turn, compiled, against PEFT's hot swap",
        "at least 5 x, no recompilation",
        "openwu_bench.adapters_dense:measure_compiled",
    ),
    "C7": PlannedRow(
        "edit",
        "generating and applying an adapter, 1 megapixel, against the whole edit",
        "at most 25 %",
        "openwu_bench.editor:measure_share",
    ),
    "C8": PlannedRow(
        "edit",
        "an adapter from the cache, against generating it again",
        "at least 20 x",
        "openwu_bench.editor:measure_cache",
    ),
    "C9": PlannedRow(
        "edit",
        "an edit of 1 megapixel on two threads, against one",
        "at least 1.8 x",
        "openwu_bench.editor_threads:measure_threads",
    ),
    "C10": PlannedRow(
        "edit",
        "an edit of 1 megapixel on two threads with one core busy, against one thread",
        "at least 0.95 x",
        "openwu_bench.editor_threads:measure_busy",
    ),
    "C11": PlannedRow(
        "edit",
        "seconds for each megapixel, of 8 against of 1",
        "at most 1.1 x",
        "openwu_bench.editor_threads:measure_size",
    ),
    "C12": PlannedRow(
        "edit",
        "the first edit after loading, against later ones",
        "at most 1.3 x",
        "openwu_bench.editor_threads:measure_first",
    ),
    "C13": PlannedRow(
        "adapters",
        "another adapter for every call, against PEFT's set_adapter",
        "cost no higher",
        "openwu_bench.adapters_scope:measure_scope",
    ),
    "C14": PlannedRow(
        "adapters",
        "applied or merged as the rule says, around its crossover, against the better of both",
        "at most 1.25 x",
        "openwu_bench.adapters_scope:measure_crossover",
    ),
    "C15": PlannedRow(
        "generator",
        "the generator (d 512) on all threads, against the limit of the machine's products",
        "at least 70 %",
        "openwu_bench.generator_threads:measure_limit",
    ),
    "C16": PlannedRow(
        "generator",
        "the generator (d 512) on two threads with one core busy, against one thread",
        "at least 0.95 x",
        "openwu_bench.generator_threads:measure_busy",
    ),
    "G1": PlannedRow(
        "generator",
        "the generator at released size, against the device's limit",
        "at least 80 % of it",
        "openwu_bench.gpu:measure_speed",
    ),
    "G2": PlannedRow(
        "adapters",
        "one experts layer at released size, against no adapter",
        "at most 3 % more at 8192 tokens",
        "openwu_bench.gpu:measure_experts",
    ),
    "G3": PlannedRow(
        "adapters",
        "1 to 8 adapters in a batch, against one after another",
        "at most 10 % overhead at 8",
        "openwu_bench.gpu:measure_batch",
    ),
    "G4": PlannedRow(
        "generator",
        "peak memory of G1, against the plain reference",
        "at most 0.65 x",
        "openwu_bench.gpu:measure_memory",
    ),
    "G5": PlannedRow(
        "training",
        "an update of FLUX.2 [klein]'s generator at full size, memory against the plan",
        "at most 1.1 x",
        "openwu_bench.gpu_training:measure_klein",
    ),
    "G6": PlannedRow(
        "training",
        "an update of FLUX.1 Kontext's generator at full size, memory against the plan",
        "at most 1.1 x",
        "openwu_bench.gpu_training:measure_kontext",
    ),
    "G7": PlannedRow(
        "training",
        "an update of Qwen-Image-Edit's generator at full size, memory against the plan",
        "at most 1.1 x",
        "openwu_bench.gpu_training:measure_qwen",
    ),
    "G8": PlannedRow(
        "adapters",
        "a decoder layer at HunyuanImage-3's sizes, adapters on all its linear layers, against none",
        "at most 10 % more at 8192 tokens",
        "openwu_bench.gpu_training:measure_decoder_layer",
    ),
    "G9": PlannedRow(
        "training",
        "an update of the embedded model's generator, against the CPU",
        "at least 5 x",
        "openwu_bench.gpu_training:measure_embedded",
    ),
}
"""Name -> row. C rows run on a CPU, G rows on a GPU."""

CURVES = {
    "generator-condition": "openwu_bench.generator:measure_condition",
    "generator-targets": "openwu_bench.generator:measure_targets",
    "generator-layers": "openwu_bench.generator:measure_layers",
    "generator-width": "openwu_bench.generator:measure_width",
    "generator-pieces": "openwu_bench.generator:measure_pieces",
    "apply-rank": "openwu_bench.adapters_curves:measure_rank",
    "apply-adapters": "openwu_bench.adapters_curves:measure_adapters",
    "apply-experts": "openwu_bench.adapters_curves:measure_experts",
    "edit-size": "openwu_bench.editor:measure_size",
    "edit-batch": "openwu_bench.editor:measure_batch",
}
"""Name -> "module:function" that measures a curve."""


def needs_gpu(name: str) -> bool:
    """Whether a row runs on a GPU only."""
    return name in ROWS and name.startswith("G")
