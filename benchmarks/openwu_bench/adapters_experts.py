"""C3 and C5: what an adapter costs on an experts layer, against a loop over experts and against PEFT."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch import nn

from openwu.adapters.inject import attach
from openwu.types import Adapter
from openwu_bench.adapters import (
    RANK,
    ExpertsLayer,
    adapted,
    gate,
    load_peft,
    looped,
    overhead,
    random_adapter,
    times_lower,
)
from openwu_bench.measurement import Row, Timing, interleaved

TOLERANCE = 1e-5
VARIANTS = {"1 adapter, spare columns": (1, RANK), "1 adapter": (1, 0), "8 adapters": (8, 0)}
"""Name -> different adapters in the batch, spare columns beside the weights."""
JUDGED = ("1 adapter, spare columns", "8 adapters")


@torch.no_grad()
def measure_loop(quick: bool) -> Row:
    """Measure row C3: overhead of grouped products against a loop over experts, on the same base.

    Both sides hook the same grouped products of the base, so that only the adapter's path differs. The value is the
    lower of two ratios: one adapter for all requests, with spare columns, and one for each of 8 requests, without:
    eight would fill half a row's width. `spare_columns` copies the base's weights: ours is then compared with that
    base, the loop always with the original.
    """
    dim, hidden, experts, top_k, length, repeats = (64, 32, 16, 4, 16, 5) if quick else (256, 128, 64, 8, 64, 15)
    torch.manual_seed(0)
    layer = ExpertsLayer(dim, hidden, experts, top_k)
    x = torch.randn(8, length, dim)
    base = partial(layer, x)
    ratios: dict[str, float] = {}
    sides: dict[str, Timing] = {}
    error = 0.0
    for name, (batch, spare_columns) in VARIANTS.items():
        adapter = random_adapter(layer.targets(), batch, dtype=x.dtype, seed=batch)
        loop = partial(looped, layer, adapter, x)
        timed = interleaved({"loop's base": base, "loop": loop}, repeats)
        expected, plain = loop(), base()
        with attach(layer, adapter.targets, spare_columns=spare_columns) as handle:
            ours = adapted(handle, layer, adapter, x)
            error = max(error, gate("C3", ours(), expected, TOLERANCE, plain))
            timed |= interleaved({"base": base, "ours": ours}, repeats)
        costs = overhead(timed["ours"], timed["base"]), overhead(timed["loop"], timed["loop's base"])
        ratios[name] = times_lower(*costs, resolution=0.01 * timed["base"].median)
        sides |= {f"{side}, {name}": timing for side, timing in timed.items()}
    title = "experts layer: overhead of grouped products against a loop over experts"
    details: dict[str, Any] = {"dim": dim, "hidden": hidden, "experts": experts, "top_k": top_k, "tokens": 8 * length}
    details |= {"dtype": "float32", "ratios": ratios}
    return Row("C3", title, min(ratios[name] for name in JUDGED), "x", 2.0, sides=sides, error=error, details=details)


@torch.no_grad()
def measure_peft(quick: bool) -> Row:
    """Measure row C5: a layer with one adapter against PEFT's `target_parameters`, which adds B A to all weights.

    Times are of whole layers, since PEFT replaces the weights rather than adding to the outputs.
    """
    dim, hidden, experts, top_k, tokens, repeats = (64, 32, 8, 2, 32, 5) if quick else (256, 128, 64, 8, 512, 9)
    torch.manual_seed(0)
    layer, other, plain = (ExpertsLayer(dim, hidden, experts, top_k) for _ in range(3))
    other.load_state_dict(layer.state_dict())
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(1, tokens, dim)
    adapter = random_adapter(layer.targets(), 1, dtype=x.dtype, seed=0)
    base, theirs = partial(plain, x), partial(peft_layer(other, adapter), x)
    with attach(layer, adapter.targets) as handle:
        ours = adapted(handle, layer, adapter, x)
        error = gate("C5", ours(), theirs(), TOLERANCE, base())
        timed = interleaved({"base": base, "ours": ours, "peft": theirs}, repeats)
    details: dict[str, Any] = {"dim": dim, "hidden": hidden, "experts": experts, "top_k": top_k, "tokens": tokens}
    details |= {"rank": RANK}
    details |= {"dtype": "float32", "overhead of ours in seconds": overhead(timed["ours"], timed["base"])}
    details |= {"overhead of PEFT in seconds": overhead(timed["peft"], timed["base"])}
    title = "experts layer, one adapter: time against PEFT target_parameters"
    ratio = timed["peft"].median / timed["ours"].median
    return Row("C5", title, ratio, "x", 1.3, sides=timed, error=error, details=details)


def peft_layer(layer: ExpertsLayer, adapter: Adapter) -> nn.Module:
    """Wrap `layer` in PEFT with the only sample of `adapter`."""
    peft = load_peft()
    names = [target.name for target in adapter.targets]
    config = peft.LoraConfig(
        r=adapter.rank, lora_alpha=adapter.scale * adapter.rank, target_modules=[], target_parameters=names
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of experts' parameters in general: the gate checks what it warns of
        wrapped = peft.get_peft_model(layer, config)
    wrappers = [module for module in wrapped.modules() if isinstance(module, peft.tuners.lora.ParamWrapper)]
    by_name = {module.parameter_name: module for module in wrappers}
    for name, (a, b) in adapter.pairs.items():
        wrapper = by_name[name.rpartition(".")[2]]
        # PEFT's layout: A [E * r, in] by expert, B [out, r * E] with the expert running fastest.
        wrapper.lora_A["default"].weight.data.copy_(a[0].flatten(0, 1))
        wrapper.lora_B["default"].weight.data.copy_(b[0].permute(1, 2, 0).flatten(1))
    return wrapped.eval()  # type: ignore[no-any-return]
