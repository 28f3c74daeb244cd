"""C5: a layer of experts with one adapter, against PEFT's `target_parameters`, which adds B A to all weights."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from openwu.adapters.inject import attach
from openwu.bench.apply_parts import RANK, ExpertsLayer, gate, load_peft, overhead, random_adapter
from openwu.bench.row import Row, interleaved
from openwu.types import Adapter

TOLERANCE = 1e-5


@torch.no_grad()
def measure(quick: bool) -> Row:
    """Row C5: whole layers' times, since PEFT's way replaces the weights rather than adding to the outputs."""
    dim, hidden, experts, top_k, tokens, repeats = (64, 32, 8, 2, 32, 5) if quick else (256, 128, 64, 8, 512, 9)
    torch.manual_seed(0)
    layer = ExpertsLayer(dim, hidden, experts, top_k).requires_grad_(False)
    other = ExpertsLayer(dim, hidden, experts, top_k).requires_grad_(False)
    other.load_state_dict(layer.state_dict())
    plain = ExpertsLayer(dim, hidden, experts, top_k).requires_grad_(False)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(1, tokens, dim)
    adapter = random_adapter(layer.targets(), 1, dtype=x.dtype, seed=0)
    theirs = peft_layer(other, adapter)
    with attach(layer, adapter.targets) as handle:

        def ours() -> Tensor:
            with handle.applied(adapter):
                return layer(x)  # type: ignore[no-any-return]

        error = gate("C5", ours(), theirs(x), TOLERANCE, plain(x))
        timed = interleaved({"base": lambda: plain(x), "ours": ours, "peft": lambda: theirs(x)}, repeats)
    return Row(
        "C5",
        "experts layer, one adapter: time against PEFT target_parameters",
        timed["peft"].median / timed["ours"].median,
        "x",
        1.3,
        sides=timed,
        error=error,
        details={
            "dim": dim,
            "hidden": hidden,
            "experts": experts,
            "top_k": top_k,
            "tokens": tokens,
            "rank": RANK,
            "dtype": "float32",
            "overhead of ours in seconds": overhead(timed["ours"], timed["base"]),
            "overhead of PEFT in seconds": overhead(timed["peft"], timed["base"]),
        },
    )


def peft_layer(layer: ExpertsLayer, adapter: Adapter) -> nn.Module:
    """PEFT around `layer` with the only sample of `adapter`."""
    peft = load_peft()
    names = [target.name for target in adapter.targets]
    config = peft.LoraConfig(
        r=adapter.rank, lora_alpha=adapter.scale * adapter.rank, target_modules=[], target_parameters=names
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of experts' parameters in general: what it warns of is checked by the gate
        wrapped = peft.get_peft_model(layer, config)
    parts = {
        module.parameter_name: module
        for module in wrapped.modules()
        if isinstance(module, peft.tuners.lora.ParamWrapper)
    }
    for name, (a, b) in adapter.pairs.items():
        part = parts[name.rpartition(".")[2]]
        # PEFT's layout: A [E * r, in] by expert, B [out, r * E] with the expert running fastest.
        part.lora_A["default"].weight.data.copy_(a[0].flatten(0, 1))
        part.lora_B["default"].weight.data.copy_(b[0].permute(1, 2, 0).flatten(1))
    return wrapped.eval()  # type: ignore[no-any-return]
