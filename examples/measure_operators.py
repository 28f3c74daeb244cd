"""Print what adapters of every operator hold and cost: counted at a large size, measured at a small one.

    python examples/measure_operators.py

Counted: a base whose LoRA adapter of rank 16 has 0.72 billion numbers. Measured: bytes of one adapter in the cache, and
a batch of 8 requests with 8 adapters against the base alone and against 8 calls with one adapter each, as ratios.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from openwu import Adapter, attach
from openwu.adapters.operators.cost import adapter_cost
from openwu.editor.cache import PackedAdapter
from openwu.types import Target

OPERATORS = ("lora", "dora", "lora+offset", "scale_offset", "scale", "offset", "rotation")
OPERATORS += ("basis_diagonal", "basis_matrix", "basis_mixture", "prefix")
WIDTH, RANK, MAPS = 4096, 16, 5493
"""5493 maps of 4096 x 4096 at rank 16: 0.72 billion numbers."""
SMALL, LAYERS, REQUESTS, TOKENS, REPEATS = 256, 6, 8, 64, 7


def random_adapter(targets: list[Target], batch: int) -> Adapter:
    factors = {
        target.name: {name: 0.01 * torch.randn(shape) for name, shape in target.shapes(batch, RANK).items()}
        for target in targets
    }
    return Adapter(tuple(targets), factors, 1.0)


def medians(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Processor seconds of each call, taken in turn, so that a busy machine hits all alike."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(REPEATS + 1):
        for name, call in calls.items():
            began = time.process_time()
            call()
            if repeat:
                taken[name].append(time.process_time() - began)
    return {name: statistics.median(each) for name, each in taken.items()}


def measured(operator: str) -> tuple[int, float, float]:
    """Bytes of one packed adapter; a mixed batch against the base alone, and against one request after another."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(SMALL, SMALL) for _ in range(LAYERS))).requires_grad_(False)
    targets = [Target(str(layer), SMALL, SMALL, operator=operator) for layer in range(LAYERS)]
    adapter, x = random_adapter(targets, REQUESTS), torch.randn(REQUESTS, TOKENS, SMALL)
    alone = [adapter.select([i]) for i in range(REQUESTS)]
    handle = attach(model, targets)

    def together() -> None:
        with handle.applied(adapter):
            model(x)

    def in_turn() -> None:
        for i, each in enumerate(alone):
            with handle.applied(each):
                model(x[i : i + 1])

    with torch.no_grad():
        taken = medians({"base": lambda: model(x), "together": together, "in turn": in_turn})
    return PackedAdapter.of(alone[0]).nbytes, taken["together"] / taken["base"], taken["together"] / taken["in turn"]


def main() -> None:
    torch.set_num_threads(1)
    head = ("operator", "numbers", "bytes", "shared", "bytes, of LoRA's", "time, of the base's", "time, of 8 calls'")
    sys.stdout.write(f"| {' | '.join(head)} |\n{'|---' * len(head)}|\n")
    lora = measured("lora")[0]
    for operator in OPERATORS:
        cost = adapter_cost([Target("map", WIDTH, WIDTH, operator=operator)], RANK)
        packed, base, turn = measured(operator)
        numbers, size, shared = (MAPS * each / 1e6 for each in (cost.numbers, cost.bytes_per_request, cost.shared))
        sys.stdout.write(f"| `{operator}` | {numbers:,.2f} M | {size:,.1f} MB | {shared:,.0f} M | {packed / lora:.3f}")
        sys.stdout.write(f" | {base:.2f} | {turn:.2f} |\n")


if __name__ == "__main__":
    main()
