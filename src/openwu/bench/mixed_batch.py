"""C4: a dense layer and a batch in which requests have different adapters, against PEFT's `adapter_names`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from openwu.adapter.inject import AdapterHandle, attach
from openwu.bench.apply_parts import RANK, SCALE, gate, load_peft, overhead, random_adapter, times_lower
from openwu.bench.row import Row, Timing, interleaved
from openwu.types import Adapter, Target

TOLERANCE = 1e-5
REQUESTS = 32


@torch.no_grad()
def measure(quick: bool) -> Row:
    """Row C4: 32 requests in a batch with 8 and with 32 different adapters; the value is the lower ratio."""
    dim, length, repeats = (64, 4, 5) if quick else (512, 16, 9)
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(dim, dim))
    target = Target("0", dim, dim)
    x = torch.randn(REQUESTS, length, dim)
    ratios: dict[str, float] = {}
    sides: dict[str, Timing] = {}
    error = 0.0
    for count in (8, REQUESTS):
        adapter = random_adapter([target], count, dtype=x.dtype, seed=count)
        rows = [row % count for row in range(REQUESTS)]
        mixed = peft_model(nn.Sequential(layer[0]), adapter)
        names = [f"request{row}" for row in rows]
        with attach(layer, [target]) as handle:

            def ours(handle: AdapterHandle = handle, adapter: Adapter = adapter, rows: Any = rows) -> Tensor:
                with handle.applied(adapter, rows):
                    return layer(x)  # type: ignore[no-any-return]

            def theirs(mixed: nn.Module = mixed, names: list[str] = names) -> Tensor:
                return mixed(x, adapter_names=names)  # type: ignore[no-any-return]

            error = max(error, gate("C4", ours(), theirs(), TOLERANCE, layer(x)))
            plain = nn.Sequential(layer[0].__class__(dim, dim))
            plain.load_state_dict({"0.weight": layer[0].weight, "0.bias": layer[0].bias})
            timed = interleaved({"base": partial(plain, x), "ours": ours, "peft": theirs}, repeats)
        costs = overhead(timed["ours"], timed["base"]), overhead(timed["peft"], timed["base"])
        ratios[f"{count} adapters"] = times_lower(*costs, resolution=0.01 * timed["base"].median)
        sides |= {f"{name}, {count} adapters": timing for name, timing in timed.items()}
    return Row(
        "C4",
        "dense layer, 8 and 32 adapters in a batch: overhead against PEFT adapter_names",
        min(ratios.values()),
        "x",
        5.0,
        sides=sides,
        error=error,
        details={
            "dim": dim,
            "requests": REQUESTS,
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
    for name, (a, b) in adapter.weights.items():
        module = wrapped.base_model.model.get_submodule(name)
        for sample in range(adapter.batch):
            module.lora_A[f"request{sample}"].weight.data.copy_(a[sample])
            module.lora_B[f"request{sample}"].weight.data.copy_(b[sample])
    return wrapped.eval()  # type: ignore[no-any-return]
