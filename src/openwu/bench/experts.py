"""C3: a layer of experts, what the adapter costs: grouped products against a loop over experts, on the same base.

Both sides hook the same grouped products of the base, so that only the adapter's path differs. `spare_columns` lays the
base's weights out anew: ours is then compared with that base, the loop always with the base as it was.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from openwu.adapters.inject import AdapterHandle, attach
from openwu.bench.apply_parts import RANK, ExpertsLayer, LoopedUpdate, gate, overhead, random_adapter, times_lower
from openwu.bench.row import Row, Timing, interleaved
from openwu.types import Adapter

TOLERANCE = 1e-5
WAYS = {"1 adapter with room": (1, RANK), "1 adapter": (1, 0), "8 adapters": (8, 0)}
"""Name -> different adapters in the batch, columns of room beside the weights."""
JUDGED = ("1 adapter with room", "8 adapters")


@torch.no_grad()
def measure(quick: bool) -> Row:
    """Row C3. The value is the lower of two ratios, one adapter for all requests and one for each of 8.

    One adapter has room beside the weights; without room it stands beside it. Eight would fill half a row's width: they
    are applied without.
    """
    dim, hidden, experts, top_k, length, repeats = (64, 32, 16, 4, 16, 5) if quick else (256, 128, 64, 8, 64, 15)
    torch.manual_seed(0)
    layer = ExpertsLayer(dim, hidden, experts, top_k).requires_grad_(False)
    x = torch.randn(8, length, dim)
    ratios: dict[str, float] = {}
    sides: dict[str, Timing] = {}
    error = 0.0
    for name, (batch, spare_columns) in WAYS.items():
        adapter = random_adapter(layer.targets(), batch, dtype=x.dtype, seed=batch)
        with attach(layer, adapter.targets, spare_columns=spare_columns) as handle, handle.applied(adapter):
            grouped = layer(x)
        error = max(error, gate("C3", grouped, looped(layer, adapter, x), TOLERANCE, layer(x)))
        timed = interleaved({"base": lambda: layer(x), "loop": partial(looped, layer, adapter, x)}, repeats)
        timed = {f"loop's {side}" if side == "base" else side: timing for side, timing in timed.items()}
        with attach(layer, adapter.targets, spare_columns=spare_columns) as handle:

            def ours(adapter: Adapter = adapter, handle: AdapterHandle = handle) -> Tensor:
                with handle.applied(adapter):
                    return layer(x)  # type: ignore[no-any-return]

            timed |= interleaved({"base": lambda: layer(x), "ours": ours}, repeats)
        costs = overhead(timed["ours"], timed["base"]), overhead(timed["loop"], timed["loop's base"])
        ratios[name] = times_lower(*costs, resolution=0.01 * timed["base"].median)
        sides |= {f"{side}, {name}": timing for side, timing in timed.items()}
    return Row(
        "C3",
        "experts layer: overhead of grouped products against a loop over experts",
        min(ratios[name] for name in JUDGED),
        "x",
        2.0,
        sides=sides,
        error=error,
        details={
            "dim": dim,
            "hidden": hidden,
            "experts": experts,
            "top_k": top_k,
            "tokens": 8 * length,
            "dtype": "float32",
            "ratios": ratios,
        },
    )


def looped(layer: ExpertsLayer, adapter: Adapter, x: Tensor) -> Tensor:
    """The layer with every expert's update added in a loop."""
    hooks = [
        layer.experts.products[name].register_forward_hook(
            LoopedUpdate(*adapter.pairs[f"experts.{name}"], adapter.scale, rows=len(x))
        )
        for name in ("gate_up_proj", "down_proj")
    ]
    try:
        y: Tensor = layer(x)
    finally:
        for hook in hooks:
            hook.remove()
    return y
