"""C15 and C16: the generator of width 512 on the machine's threads, against its products' limit and one thread.

They want two cores that nothing else occupies. float32, the condition's part of the first block included.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from openwu.errors import OpenwuError
from openwu.generator.inference.fast import FastGenerator
from openwu.generator.model import ParameterGenerator
from openwu_bench.editor_threads import one_core_busy
from openwu_bench.generator import CONDITION_TOKENS, adapter_error, generator_flops, small_config
from openwu_bench.gpu import matmul_rate
from openwu_bench.measurement import Row, Timing, interleaved

LIMIT_GOAL, BUSY_GOAL = 70.0, 0.95
WIDTHS, QUICK_WIDTHS = (256, 512, 1024), (64, 128)
JUDGED, QUICK_JUDGED = 512, 128
PRODUCT, QUICK_PRODUCT = 2048, 256
REPETITIONS, QUICK_REPETITIONS = 5, 2
TOLERANCE = 1e-5


@torch.no_grad()
def measure_limit(quick: bool) -> Row:
    """Measure row C15: the floor (FLOPs at the rate of a large product on as many threads) / seconds, at width 512.

    Other widths and numbers of threads are in the details.
    """
    judged = QUICK_JUDGED if quick else JUDGED
    threads = os.cpu_count() or 1
    found: dict[str, Timing] = {}
    shares: dict[str, float] = {}
    before = torch.get_num_threads()
    try:
        for count in sorted({1, threads}):
            torch.set_num_threads(count)
            rate = matmul_rate(torch.device("cpu"), QUICK_PRODUCT if quick else PRODUCT, torch.float32)
            for width in QUICK_WIDTHS if quick else WIDTHS:
                run, flops = _generator(width)
                name = f"d {width}, threads: {count}"
                found |= interleaved({name: run}, QUICK_REPETITIONS if quick else REPETITIONS)
                shares[name] = 100 * flops / rate / found[name].median
    finally:
        torch.set_num_threads(before)
    title = f"the generator (d {judged}) on all threads, against the limit of the machine's products"
    details: dict[str, Any] = {"share of the limit by size": shares, "cores": threads}
    return Row("C15", title, shares[f"d {judged}, threads: {threads}"], "%", LIMIT_GOAL, sides=found, details=details)


@torch.no_grad()
def measure_busy(quick: bool) -> Row:
    """Measure row C16: seconds on one thread / seconds on two, with another process that occupies one core."""
    run, _ = _generator(QUICK_JUDGED if quick else JUDGED)
    before = torch.get_num_threads()

    def on(threads: int) -> Any:
        torch.set_num_threads(threads)
        return run()

    try:
        error = adapter_error(on(2), on(1))
        if not error <= TOLERANCE:
            raise OpenwuError(f"C16: two threads gave another adapter than one, by {error:.2g}")
        sides = {f"threads: {number}": partial(on, number) for number in (1, 2)}
        repetitions = QUICK_REPETITIONS if quick else REPETITIONS
        idle = interleaved(sides, repetitions)
        with one_core_busy():
            found = interleaved(sides, repetitions)
    finally:
        torch.set_num_threads(before)
    one, two = (timing.median for timing in found.values())
    quiet = [timing.median for timing in idle.values()]
    title = "the generator on two threads with one core busy, against one thread"
    details = {"without a busy core": quiet[0] / quiet[1], "cores": os.cpu_count()}
    return Row("C16", title, one / two, "x", BUSY_GOAL, sides=found, error=error, details=details)


def _generator(width: int) -> tuple[Callable[[], Any], int]:
    """Return a call of the fast path at this width, and the FLOPs that it computes."""
    config = small_config(d_model=width)
    torch.manual_seed(0)
    fast = FastGenerator(ParameterGenerator(config))
    flops = sum(generator_flops(config, CONDITION_TOKENS, first_block_kept=True).values())
    return partial(fast, torch.randn(1, CONDITION_TOKENS, config.input_dim)), flops
