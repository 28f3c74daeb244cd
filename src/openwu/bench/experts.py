"""C3: a layer of experts, what the adapter costs: grouped products against a loop over experts, on the same base.

Both sides hook the same grouped products of the base, so that only the adapter's path differs.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from openwu.adapter.inject import attach
from openwu.bench.apply_parts import ExpertsLayer, LoopedUpdate, gate, overhead, random_adapter, times_lower
from openwu.bench.row import Row, Timing, interleaved
from openwu.types import Adapter

TOLERANCE = 1e-5


@torch.no_grad()
def measure(quick: bool) -> Row:
    """Row C3. The value is the lower of the two ratios: one adapter for all, and one for each of 8 requests."""
    dim, hidden, experts, top_k, length, repeats = (64, 32, 16, 4, 16, 5) if quick else (256, 128, 64, 8, 64, 9)
    torch.manual_seed(0)
    layer = ExpertsLayer(dim, hidden, experts, top_k).requires_grad_(False)
    x = torch.randn(8, length, dim)
    ratios: dict[str, float] = {}
    sides: dict[str, Timing] = {}
    error = 0.0
    for batch in (1, 8):
        adapter = random_adapter(layer.targets(), batch, dtype=x.dtype, seed=batch)
        with attach(layer, adapter.targets) as handle, handle.applied(adapter):
            grouped = layer(x)
        error = max(error, gate("C3", grouped, looped(layer, adapter, x), TOLERANCE, layer(x)))
        with attach(layer, adapter.targets) as handle:

            def ours(adapter: Adapter = adapter) -> Tensor:
                with handle.applied(adapter):
                    return layer(x)  # type: ignore[no-any-return]

            timed = interleaved({"base": lambda: layer(x), "ours": ours}, repeats)
        timed |= {
            f"loop_{name}": timing
            for name, timing in interleaved(
                {"base": lambda: layer(x), "loop": partial(looped, layer, adapter, x)}, repeats
            ).items()
        }
        costs = overhead(timed["ours"], timed["base"]), overhead(timed["loop_loop"], timed["loop_base"])
        ratios[f"{batch} adapters"] = times_lower(*costs, resolution=0.01 * timed["base"].median)
        sides |= {f"{name}, {batch} adapters": timing for name, timing in timed.items()}
    return Row(
        "C3",
        "experts layer: overhead of grouped products against a loop over experts",
        min(ratios.values()),
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
            LoopedUpdate(*adapter.weights[f"experts.{name}"], adapter.scale, rows=len(x))
        )
        for name in ("gate_up_proj", "down_proj")
    ]
    try:
        y: Tensor = layer(x)
    finally:
        for hook in hooks:
            hook.remove()
    return y
