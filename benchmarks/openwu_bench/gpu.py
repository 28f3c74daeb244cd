"""G1 to G4: the generator at released size, and adapters on one GPU; all need a CUDA device and say so without one.

In a rehearsal (`openwu_bench.measurement.rehearsal`) they run on the CPU at tiny sizes, to show that they run.

G1 is the share of the machine's floor (the cost model's FLOPs at the rate of a measured large product) that the fast
path reaches, G4 its peak memory against the reference path's. G2 and G3 apply adapters at the sizes of the released
system: hidden 4096, 64 experts of 3072, 8 chosen per token, rank 16, bfloat16; times include a synchronisation. Where
Triton kernels are available, G1 and G2 are also timed without them. The parts run on any device at any size.
"""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from openwu.adapters.inject import attach
from openwu.config import GeneratorConfig
from openwu.errors import OpenwuError
from openwu.generator.inference.fast import FastGenerator, FastOptions
from openwu.generator.inference.products import fp8
from openwu.generator.model import ParameterGenerator
from openwu.kernels.autotune import CHOICES, available, without_kernels
from openwu.types import Adapter, Target
from openwu_bench.adapters import RANK, ExpertsLayer, adapted, gate, looped, overhead, random_adapter
from openwu_bench.generator import adapter_error, generator_flops, released_config, small_config
from openwu_bench.measurement import Row, Timing, interleaved, rehearsed

GENERATOR_TOLERANCE = 0.1
"""Largest relative difference (norms) of a generated tensor in bfloat16, after all blocks."""
FP8_GOAL = 1.35
TOLERANCE = 2e-2
"""Of bfloat16 results that were rounded in another order."""

Output = TypeVar("Output")


@dataclass(frozen=True)
class Sizes:
    """How large everything is, and where it runs."""

    config: GeneratorConfig
    lengths: tuple[int, ...]
    """Condition tokens."""
    product: int
    """Side of the large product whose rate is the machine's limit."""
    dim: int
    hidden: int
    experts: int
    top_k: int
    tokens: tuple[int, ...]
    """Of an experts layer's input."""
    tokens_each: int
    """Of every sample in a batch of adapters."""


RELEASED = Sizes(released_config(), (1024, 6144, 12288), 8192, 4096, 3072, 64, 8, (1, 64, 1024, 4096, 8192), 1024)
TINY = Sizes(small_config(d_model=64, layers=2, targets=1, blocks=1), (3, 9), 32, 64, 32, 4, 2, (1, 16), 8)
"""Of a rehearsal."""


def sizes_here() -> Sizes:
    """The released sizes; tiny ones in a rehearsal."""
    return TINY if rehearsed() else RELEASED


@dataclass(frozen=True)
class Paths:
    """Four ways to generate one adapter from the same weights and condition."""

    reference: Callable[[], Adapter]
    fast: Callable[[], Adapter]
    fast_plain: Callable[[], Adapter]
    """Without Triton kernels."""
    fp8: Callable[[], Adapter]

    @classmethod
    def of(cls, generator: ParameterGenerator, length: int) -> Paths:
        """Draw a condition of `length` tokens."""
        weight = generator.hidden_in.weight
        condition = torch.randn(1, length, generator.config.input_dim, device=weight.device).to(weight.dtype)
        fast = partial(FastGenerator(generator), condition)
        quantised = partial(FastGenerator(generator, FastOptions(make=fp8)), condition)
        return cls(without_kernels(lambda: generator(condition)), fast, without_kernels(fast), quantised)


@torch.no_grad()
def measure_speed(quick: bool) -> Row:
    """Measure row G1; `quick` takes the shortest condition only."""
    device, sizes = cuda_device("G1"), sizes_here()
    generator = random_generator(sizes.config, device)
    lengths = sizes.lengths[:1] if quick else sizes.lengths
    return speed_row(generator, lengths, matmul_rate(device, sizes.product), 2 if quick else 5)


@torch.no_grad()
def measure_memory(quick: bool) -> Row:
    """Measure row G4; `quick` takes the shortest condition only."""
    device, sizes = cuda_device("G4"), sizes_here()
    generator = random_generator(sizes.config, device)
    peaks: dict[str, float] = {}
    worst = 0.0
    for length in sizes.lengths[:1] if quick else sizes.lengths:
        paths = Paths.of(generator, length)
        found = {"reference": cuda_peak(paths.reference, device), "fast": cuda_peak(paths.fast, device)}
        peaks |= {f"L {length} {side}: GB": size / 1e9 for side, size in found.items()}
        worst = max(worst, found["fast"] / found["reference"])
    title = "peak memory of the released generator, weights included, against the plain reference"
    return Row("G4", title, worst, "x", 0.65, at_least=False, details=peaks)


def cuda_device(row: str) -> torch.device:
    """Return the GPU, the CPU in a rehearsal; raise OpenwuError where there is none."""
    if rehearsed():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise OpenwuError(
            f"{row}: expected a CUDA device with about 80 GB of memory, got none; "
            "run it on such a machine, or leave it out: the rows C1 to C16 run on a CPU"
        )
    return torch.device("cuda", torch.cuda.current_device())


def random_generator(config: GeneratorConfig, device: torch.device) -> ParameterGenerator:
    """Return a generator in bfloat16 with random weights, initialised on the device."""
    with torch.device("meta"):
        generator = ParameterGenerator(config).to(torch.bfloat16)
    generator = generator.to_empty(device=device)
    torch.manual_seed(0)
    generator.init_weights()
    return generator.requires_grad_(False)


def speed_row(generator: ParameterGenerator, lengths: Sequence[int], rate: float, repeats: int) -> Row:
    """Measure G1 for a generator of any size; `rate`: FLOP/s of a large product."""
    device = generator.hidden_in.weight.device
    details: dict[str, Any] = {"large products: TFLOP/s": rate / 1e12}
    shares: list[float] = []
    sides: dict[str, Timing] = {}
    error = 0.0
    for length in lengths:
        paths = Paths.of(generator, length)
        error = max(error, adapter_error(paths.fast(), paths.reference()))
        if not error <= GENERATOR_TOLERANCE:
            raise OpenwuError(f"G1: the two ways differ by {error:.2g} at L {length}; not measured")
        details[f"L {length}: relative error of fp8"] = adapter_error(paths.fp8(), paths.reference())
        runs = {"reference": paths.reference, "fast": paths.fast, "fp8": paths.fp8}
        if available(device):
            runs["fast, plain torch"] = paths.fast_plain
        timings = interleaved({name: synchronised(run, device) for name, run in runs.items()}, repeats)
        sides |= {f"L {length} {name}": timing for name, timing in timings.items()}
        # The whole cost, although the fast path keeps a part of the first block: the floor is that of the task.
        floor = sum(generator_flops(generator.config, length).values()) / rate
        shares.append(100 * floor / timings["fast"].median)
        details[f"L {length}: floor s"] = floor
        details[f"L {length}: reference / fast"] = _ratio(timings, "reference", "fast")
        details[f"L {length}: fast / fp8 (goal {FP8_GOAL})"] = _ratio(timings, "fast", "fp8")
        if available(device):
            details[f"L {length}: fast without / with kernels"] = _ratio(timings, "fast, plain torch", "fast")
            details["kernels"] = CHOICES.found()
        del paths, runs
    title = "released generator, random weights, against the floor of the machine's large products (the worst length)"
    return Row("G1", title, min(shares), "%", 80.0, sides=sides, error=error, details=details)


def matmul_rate(device: torch.device, side: int, dtype: torch.dtype = torch.bfloat16) -> float:
    """Return the FLOP/s of a square product of this side, the best of ten."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    timing = interleaved({"product": synchronised(lambda: a @ b, device)}, repeats=10, warmup=3)["product"]
    return 2 * side**3 / timing.fastest


def cuda_peak(run: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes allocated during the second of two runs, everything else on the device included.

    In a rehearsal, of the whole process since it began.
    """
    run()
    gc.collect()
    if device.type != "cuda":
        run()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def synchronised(run: Callable[[], Output], device: torch.device) -> Callable[[], Output]:
    """Return `run` followed by waiting for the device."""

    def waiting() -> Output:
        result = run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return result

    return waiting


def _ratio(timings: Mapping[str, Timing], over: str, under: str) -> float:
    return timings[over].median / timings[under].median


@torch.no_grad()
def measure_experts(quick: bool) -> Row:
    """Measure row G2: overhead of one adapter on one experts layer, with spare columns, at the most tokens.

    Without spare columns it is in the details, there also without Triton kernels.
    """
    device, sizes = cuda_device("G2"), sizes_here()
    layer = experts_layer(device)
    adapter = random_adapter(layer.targets(), 1, dtype=torch.bfloat16, seed=0).to(device)
    sides: dict[str, Timing] = {}
    shares: dict[str, dict[str, float]] = {}
    error = 0.0
    for tokens in sizes.tokens[::2] if quick else sizes.tokens:
        x = torch.randn(1, tokens, sizes.dim, device=device, dtype=torch.bfloat16)
        base = synchronised(partial(layer, x), device)
        loop = synchronised(partial(looped, layer, adapter, x), device)
        expected = loop()
        found = interleaved({"loop": loop}, 5 if quick else 10)
        for spare_columns, suffix in ((RANK, ", spare columns"), (0, "")):
            with attach(layer, adapter.targets, spare_columns=spare_columns) as handle:
                runs = {"ours": synchronised(adapted(handle, layer, adapter, x), device)}
                if not spare_columns and available(device):
                    runs["ours, plain torch"] = without_kernels(runs["ours"])
                error = max(error, *(gate("G2", run(), expected, TOLERANCE) for run in runs.values()))
                timed = interleaved({"base": base, **runs}, 5 if quick else 30, warmup=3)
            for name in runs:
                share = overhead(timed[name], timed["base"]) / timed["base"].median
                shares.setdefault(name + suffix, {})[str(tokens)] = share
            found |= {name + suffix: timing for name, timing in timed.items()}
        sides |= {f"{name}, {tokens} tokens": timing for name, timing in found.items()}
    by_tokens = shares["ours, spare columns"]
    value = 100 * by_tokens[max(by_tokens, key=int)]
    details = {"device": _name(device), "rank": RANK, "overhead by tokens": shares}
    details |= {"kernels": CHOICES.found()}
    title = "one experts layer at released size: overhead of an adapter"
    return Row("G2", title, value, "%", 3.0, at_least=False, sides=sides, error=error, details=details)


@torch.no_grad()
def measure_batch(quick: bool) -> Row:
    """Measure row G3: overhead of 1 to 8 adapters in one batch; the value is the larger of dense and experts at 8.

    The experts have spare columns for all adapters.
    """
    device, sizes = cuda_device("G3"), sizes_here()
    dense = nn.Sequential(nn.Linear(sizes.dim, sizes.dim, bias=False)).to(device, torch.bfloat16)
    experts = experts_layer(device)
    sides: dict[str, Timing] = {}
    shares: dict[str, dict[str, float]] = {"dense": {}, "experts": {}}
    error = 0.0
    counts = (1, 2) if quick else (1, 2, 4, 8)
    layers: dict[str, tuple[nn.Module, list[Target]]] = {
        "dense": (dense, [Target("0", sizes.dim, sizes.dim)]),
        "experts": (experts, experts.targets()),
    }
    for kind, (layer, targets) in layers.items():
        for count in counts:
            x = torch.randn(count, 128 if quick else sizes.tokens_each, sizes.dim, device=device, dtype=torch.bfloat16)
            adapter = random_adapter(targets, count, dtype=torch.bfloat16, seed=count).to(device)
            with attach(layer, targets, spare_columns=RANK * count if kind == "experts" else 0) as handle:
                each = [adapted(handle, layer, adapter.select([i]), x[i : i + 1]) for i in range(count)]
                runs: dict[str, Callable[[], Tensor]] = {
                    "base": partial(layer, x),
                    "ours": adapted(handle, layer, adapter, x),
                    "one by one": partial(_joined, each),
                }
                runs = {name: synchronised(run, device) for name, run in runs.items()}
                error = max(error, gate("G3", runs["ours"](), runs["one by one"](), TOLERANCE))
                timed = interleaved(runs, 5 if quick else 30, warmup=3)
            shares[kind][str(count)] = overhead(timed["ours"], timed["base"]) / timed["base"].median
            sides |= {f"{kind}, {name}, {count} adapters": timing for name, timing in timed.items()}
    value = 100 * max(share[str(counts[-1])] for share in shares.values())
    details = {"device": _name(device), "rank": RANK, "overhead by adapters": shares}
    title = "different adapters in one batch, dense and experts: overhead"
    return Row("G3", title, value, "%", 10.0, at_least=False, sides=sides, error=error, details=details)


def experts_layer(device: torch.device) -> ExpertsLayer:
    """Return an experts layer of the released size in bfloat16, with random weights."""
    torch.manual_seed(0)
    sizes = sizes_here()
    with torch.device(device):
        return ExpertsLayer(sizes.dim, sizes.hidden, sizes.experts, sizes.top_k).to(torch.bfloat16)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU in its place"


def _joined(runs: Sequence[Callable[[], Tensor]]) -> Tensor:
    return torch.cat([run() for run in runs])
