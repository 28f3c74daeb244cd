"""C4: a dense layer and a batch in which requests have different adapters, against PEFT's `adapter_names`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from openwu.adapters.inject import AdapterHandle, attach
from openwu.bench.apply_parts import RANK, SCALE, gate, load_peft, overhead, random_adapter, times_lower
from openwu.bench.row import Row, Timing, interleaved
from openwu.types import Adapter, Target

TOLERANCE = 1e-5
BATCHES = {"8 requests, 8 adapters": (8, 8), "32 requests, 32 adapters": (32, 32), "32 requests, 8 adapters": (32, 8)}
"""Name -> requests in the batch and different adapters among them."""
JUDGED = tuple(BATCHES)[:2]


@torch.no_grad()
def measure(quick: bool) -> Row:
    """Row C4: 8 and 32 requests, each with its own adapter: the lower ratio. Shared adapters stand beside it."""
    dim, length, repeats = (64, 4, 5) if quick else (512, 16, 9)
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(dim, dim))
    target = Target("0", dim, dim)
    ratios: dict[str, float] = {}
    sides: dict[str, Timing] = {}
    error = 0.0
    for batch, (requests, count) in BATCHES.items():
        x = torch.randn(requests, length, dim)
        adapter = random_adapter([target], count, dtype=x.dtype, seed=count)
        rows = [row % count for row in range(requests)]
        mixed = peft_model(nn.Sequential(layer[0]), adapter)
        names = [f"request{row}" for row in rows]
        with attach(layer, [target]) as handle:

            def ours(
                handle: AdapterHandle = handle, adapter: Adapter = adapter, rows: Any = rows, x: Tensor = x
            ) -> Any:
                with handle.applied(adapter, rows):
                    return layer(x)

            def theirs(mixed: nn.Module = mixed, names: list[str] = names, x: Tensor = x) -> Any:
                return mixed(x, adapter_names=names)

            error = max(error, gate("C4", ours(), theirs(), TOLERANCE, layer(x)))
            plain = nn.Sequential(layer[0].__class__(dim, dim))
            plain.load_state_dict({"0.weight": layer[0].weight, "0.bias": layer[0].bias})
            timed = interleaved({"base": partial(plain, x), "ours": ours, "peft": theirs}, repeats)
        costs = overhead(timed["ours"], timed["base"]), overhead(timed["peft"], timed["base"])
        ratios[batch] = times_lower(*costs, resolution=0.01 * timed["base"].median)
        sides |= {f"{name}, {batch}": timing for name, timing in timed.items()}
    return Row(
        "C4",
        "dense layer, 8 and 32 requests with an adapter each: overhead against PEFT adapter_names",
        min(ratios[batch] for batch in JUDGED),
        "x",
        5.0,
        sides=sides,
        error=error,
        details={
            "dim": dim,
            "tokens per request": length,
            "rank": RANK,
            "dtype": "float32",
            "ratios": ratios,
        },
    )


def peft_model(model: nn.Module, adapter: Adapter) -> nn.Module:
    """PEFT around `model`, with one named adapter per sample: request0, request1, ..."""
    peft = load_peft()
    names = [target.name for target in adapter.targets]
    config = peft.LoraConfig(r=adapter.rank, lora_alpha=SCALE * adapter.rank, target_modules=names)
    wrapped = peft.get_peft_model(model, config, adapter_name="request0")
    for sample in range(1, adapter.batch):
        wrapped.add_adapter(f"request{sample}", config)
    for name, (a, b) in adapter.pairs.items():
        module = wrapped.base_model.model.get_submodule(name)
        for sample in range(adapter.batch):
            module.lora_A[f"request{sample}"].weight.data.copy_(a[sample])
            module.lora_B[f"request{sample}"].weight.data.copy_(b[sample])
    return wrapped.eval()  # type: ignore[no-any-return]
