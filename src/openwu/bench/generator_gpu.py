"""Rows G1 and G4: the generator at its released size, random weights, on one GPU.

Enters: nothing; the rows raise OpenwuError where there is no CUDA device. Leaves: G1, the share of the machine's floor
(the cost model's operations at the rate of a measured large product) that the fast path reaches, and G4, its peak
memory against the clear path's. Where kernels of ours may run, G1 also times the fast path without them; the clear path
has none. The parts run on any device at any size.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from openwu.bench.generator_sizes import generator_flops, released_config
from openwu.bench.generator_speed import adapter_error
from openwu.bench.row import Row, Timing, interleaved
from openwu.config import GeneratorConfig
from openwu.errors import OpenwuError
from openwu.generator.inference.fast import FastGenerator, FastOptions
from openwu.generator.inference.products import fp8
from openwu.generator.model import ParameterGenerator
from openwu.kernels.attention_choice import CHOICES, available, plainly
from openwu.types import Adapter

LENGTHS = (1024, 6144, 12288)
TOLERANCE = 0.1
"""Largest relative difference (norms) of a generated tensor in bfloat16, after all blocks."""
FP8_GOAL = 1.35


@dataclass(frozen=True)
class Paths:
    """The ways to compute one adapter, by one set of weights; one condition for all."""

    clear: Callable[[], Adapter]
    fast: Callable[[], Adapter]
    fast_plain: Callable[[], Adapter]
    """Without kernels of ours"""
    eight_bits: Callable[[], Adapter]

    @classmethod
    def of(cls, generator: ParameterGenerator, length: int) -> Paths:
        weight = generator.hidden_in.weight
        condition = torch.randn(1, length, generator.config.input_dim, device=weight.device).to(weight.dtype)
        fast = FastGenerator(generator)
        eight_bits = FastGenerator(generator, FastOptions(make=fp8))
        clear, ours = plainly(lambda: generator(condition)), lambda: fast(condition)
        return cls(clear, ours, plainly(ours), lambda: eight_bits(condition))


@torch.no_grad()
def measure_speed(quick: bool) -> Row:
    """Row G1; `quick` takes the shortest condition only."""
    device = cuda_device("G1")
    generator = random_generator(released_config(), device)
    return speed_row(generator, LENGTHS[:1] if quick else LENGTHS, matmul_rate(device, 8192), 2 if quick else 5)


@torch.no_grad()
def measure_memory(quick: bool) -> Row:
    """Row G4; `quick` takes the shortest condition only."""
    device = cuda_device("G4")
    generator = random_generator(released_config(), device)
    peaks: dict[str, float] = {}
    worst = 0.0
    for length in LENGTHS[:1] if quick else LENGTHS:
        paths = Paths.of(generator, length)
        found = {"clear": cuda_peak(paths.clear, device), "fast": cuda_peak(paths.fast, device)}
        peaks |= {f"L {length} {side}: GB": size / 1e9 for side, size in found.items()}
        worst = max(worst, found["fast"] / found["clear"])
    return Row(
        "G4",
        "peak memory of the released generator, weights included, against the plain reference",
        worst,
        "x",
        0.65,
        at_least=False,
        details=peaks,
    )


def cuda_device(row: str) -> torch.device:
    """The GPU; OpenwuError where there is none."""
    if not torch.cuda.is_available():
        raise OpenwuError(
            f"{row}: expected a CUDA device with about 80 GB of memory, got none; "
            "run it on such a machine, or leave it out"
        )
    return torch.device("cuda", torch.cuda.current_device())


def random_generator(config: GeneratorConfig, device: torch.device) -> ParameterGenerator:
    """In bfloat16, filled where it lies."""
    with torch.device("meta"):
        generator = ParameterGenerator(config).to(torch.bfloat16)
    generator = generator.to_empty(device=device)
    torch.manual_seed(0)
    generator.init_weights()
    return generator.requires_grad_(False)


def speed_row(generator: ParameterGenerator, lengths: Sequence[int], rate: float, repeats: int) -> Row:
    """G1 for a generator of any size; `rate`: operations per second of a large product."""
    device = generator.hidden_in.weight.device
    details: dict[str, Any] = {"large products: TFLOP/s": rate / 1e12}
    shares: list[float] = []
    sides: dict[str, Timing] = {}
    error = 0.0
    for length in lengths:
        paths = Paths.of(generator, length)
        error = max(error, adapter_error(paths.fast(), paths.clear()))
        if not error <= TOLERANCE:
            raise OpenwuError(f"G1: the two ways differ by {error:.2g} at L {length}; not measured")
        details[f"L {length}: relative error of 8 bits"] = adapter_error(paths.eight_bits(), paths.clear())
        runs = {"clear": paths.clear, "fast": paths.fast, "8 bits": paths.eight_bits}
        if available(device):
            runs["fast, plain torch"] = paths.fast_plain
        timings = interleaved({name: _waited(run, device) for name, run in runs.items()}, repeats)
        sides |= {f"L {length} {name}": timing for name, timing in timings.items()}
        # The whole cost, although the fast path keeps a part of the first block: the floor is that of the task.
        floor = sum(generator_flops(generator.config, length).values()) / rate
        shares.append(100 * floor / timings["fast"].median)
        details[f"L {length}: floor s"] = floor
        details[f"L {length}: clear / fast"] = _ratio(timings, "clear", "fast")
        details[f"L {length}: fast / 8 bits (goal {FP8_GOAL})"] = _ratio(timings, "fast", "8 bits")
        if available(device):
            details[f"L {length}: fast without / with kernels"] = _ratio(timings, "fast, plain torch", "fast")
            details["kernels"] = CHOICES.found()
        del paths, runs
    return Row(
        "G1",
        "released generator, random weights, against the floor of the machine's large products (the worst length)",
        min(shares),
        "%",
        80.0,
        sides=sides,
        error=error,
        details=details,
    )


def matmul_rate(device: torch.device, side: int, dtype: torch.dtype = torch.bfloat16) -> float:
    """Operations per second of a square product of this side, the best of ten."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    timing = interleaved({"product": _waited(lambda: a @ b, device)}, repeats=10, warmup=3)["product"]
    return 2 * side**3 / min(timing.seconds)


def cuda_peak(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes allocated during the second of two runs, everything that lay there before included."""
    run()
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def _ratio(timings: dict[str, Timing], over: str, under: str) -> float:
    return timings[over].median / timings[under].median


def _waited(run: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """The same, done when its work on the device is done."""

    def waited() -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return waited
