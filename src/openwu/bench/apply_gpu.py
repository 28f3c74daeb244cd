"""G2 and G3: what applying adapters costs on a GPU. Both need a CUDA device and say so where there is none.

Sizes are those of the released system: hidden 4096, 64 experts of 3072, 8 chosen per token, rank 16, bfloat16. Times
are of whole calls with a synchronisation at the end. G2 has our side with room beside the weights (`adapter.augmented`)
and without it; without it, where kernels of ours may run, with and without those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from openwu.adapters.inject import AdapterHandle, attach
from openwu.bench.apply_parts import RANK, ExpertsLayer, gate, overhead, random_adapter
from openwu.bench.experts import looped
from openwu.bench.row import Row, Timing, interleaved
from openwu.errors import OpenwuError
from openwu.kernels.attention_choice import CHOICES, available, plainly
from openwu.types import Adapter, Target

DIM, HIDDEN, EXPERTS, TOP_K = 4096, 3072, 64, 8
TOLERANCE = 2e-2
"""Of bfloat16 results that were rounded in another order."""


@torch.no_grad()
def measure_experts(quick: bool) -> Row:
    """Row G2: one experts layer, one adapter; the value is the overhead, with room, at the largest number of tokens."""
    device = cuda("G2")
    layer = experts_layer(device)
    adapter = random_adapter(layer.targets(), 1, dtype=torch.bfloat16, seed=0).to(device)
    sides: dict[str, Timing] = {}
    shares: dict[str, dict[str, float]] = {}
    error = 0.0
    for tokens in (1, 1024) if quick else (1, 64, 1024, 4096, 8192):
        x = torch.randn(1, tokens, DIM, device=device, dtype=torch.bfloat16)
        base, loop = finished(partial(layer, x)), finished(partial(looped, layer, adapter, x))
        expected = loop()
        found = interleaved({"loop": loop}, 5 if quick else 10)
        for spare_columns in (RANK, 0):
            with attach(layer, adapter.targets, spare_columns=spare_columns) as handle:
                runs = {"ours": applied(handle, layer, adapter, x)}
                if not spare_columns and available(device):
                    runs["ours, plain torch"] = plainly(runs["ours"])
                error = max(error, *(gate("G2", run(), expected, TOLERANCE) for run in runs.values()))
                timed = interleaved({"base": base, **runs}, 5 if quick else 30, warmup=3)
            for name in runs:
                share = overhead(timed[name], timed["base"]) / timed["base"].median
                shares.setdefault(name + ", with room" * bool(spare_columns), {})[str(tokens)] = share
            found |= {name + ", with room" * bool(spare_columns): timing for name, timing in timed.items()}
        sides |= {f"{name}, {tokens} tokens": timing for name, timing in found.items()}
    judged = shares["ours, with room"]
    return Row(
        "G2",
        "one experts layer at released size: overhead of an adapter",
        100 * judged[max(judged, key=int)],
        "%",
        3.0,
        at_least=False,
        sides=sides,
        error=error,
        details={
            "device": torch.cuda.get_device_name(device),
            "rank": RANK,
            "overhead by tokens": shares,
            "kernels": CHOICES.found(),
        },
    )


@torch.no_grad()
def measure_batch(quick: bool) -> Row:
    """Row G3: 1 to 8 adapters in one batch, dense and experts; the value is the larger overhead at the last.

    The experts have room for all adapters beside their weights.
    """
    device = cuda("G3")
    dense = nn.Sequential(nn.Linear(DIM, DIM, bias=False)).to(device, torch.bfloat16)
    experts = experts_layer(device)
    sides: dict[str, Timing] = {}
    shares: dict[str, dict[str, float]] = {"dense": {}, "experts": {}}
    error = 0.0
    counts = (1, 2) if quick else (1, 2, 4, 8)
    for kind, layer, targets in (
        ("dense", dense, [Target("0", DIM, DIM)]),
        ("experts", experts, experts.targets()),
    ):
        for count in counts:
            x = torch.randn(count, 128 if quick else 1024, DIM, device=device, dtype=torch.bfloat16)
            adapter = random_adapter(targets, count, dtype=torch.bfloat16, seed=count).to(device)
            with attach(layer, targets, spare_columns=RANK * count if kind == "experts" else 0) as handle:
                ours = applied(handle, layer, adapter, x)
                alone = [applied(handle, layer, adapter.select([i]), x[i : i + 1]) for i in range(count)]
                one_by_one = finished(partial(joined, alone))
                error = max(error, gate("G3", ours(), one_by_one(), TOLERANCE))
                timed = interleaved(
                    {"base": finished(partial(layer, x)), "ours": ours, "one by one": one_by_one},
                    5 if quick else 30,
                    warmup=3,
                )
            shares[kind][str(count)] = overhead(timed["ours"], timed["base"]) / timed["base"].median
            sides |= {f"{kind}, {name}, {count} adapters": timing for name, timing in timed.items()}
    return Row(
        "G3",
        "different adapters in one batch, dense and experts: overhead",
        100 * max(share[str(counts[-1])] for share in shares.values()),
        "%",
        10.0,
        at_least=False,
        sides=sides,
        error=error,
        details={"device": torch.cuda.get_device_name(device), "rank": RANK, "overhead by adapters": shares},
    )


def cuda(row: str) -> torch.device:
    """The GPU, or an OpenwuError."""
    if not torch.cuda.is_available():
        raise OpenwuError(f"{row}: expected a CUDA device, found none; the rows C1 to C8 run on a CPU")
    return torch.device("cuda")


def experts_layer(device: torch.device) -> ExpertsLayer:
    torch.manual_seed(0)
    with torch.device(device):
        return ExpertsLayer(DIM, HIDDEN, EXPERTS, TOP_K).to(torch.bfloat16).requires_grad_(False)


def applied(handle: AdapterHandle, layer: nn.Module, adapter: Adapter, x: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with handle.applied(adapter):
            return layer(x)  # type: ignore[no-any-return]

    return finished(run)


def joined(runs: Sequence[Callable[[], Tensor]]) -> Tensor:
    return torch.cat([run() for run in runs])


def finished(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`run`, and wait for the device."""

    def waiting() -> Tensor:
        y = run()
        torch.cuda.synchronize()
        return y

    return waiting
