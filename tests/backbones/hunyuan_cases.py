"""Widths of the released base and generator as docs/hunyuan-image-3.md counts them, and what they need in memory.

The base's are those that the released generator's mapping names; its embeddings, encoders and VAE are not among them.
"""

from __future__ import annotations

from typing import Any

import torch

from openwu.backbones.hunyuan_image_3.memory import FreeMemory, Headers, Needs, fits, needs
from openwu.config import GeneratorConfig
from openwu.generator.checkpoint import needed
from openwu.generator.model import ParameterGenerator

LAYERS, EXPERTS, WIDTH, QKV, HIDDEN = 32, 64, 4096, 6144, 3072
MAPPING: dict[str, Any] = {
    "self_attn.qkv_proj": (WIDTH, QKV),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.shared_mlp.gate_and_up_proj": (WIDTH, 2 * HIDDEN),
    "mlp.shared_mlp.down_proj": (HIDDEN, WIDTH),
}
WAYS: dict[str, Any] = {"bfloat16": None, "`--quantise 8bit`": "8bit", "`--quantise 4bit`": "4bit"}


def released_generator() -> GeneratorConfig:
    mapping: dict[str, Any] = {name: {"lora_A_dim": a, "lora_B_dim": b} for name, (a, b) in MAPPING.items()}
    experts = {"w1": (WIDTH, HIDDEN), "w2": (HIDDEN, WIDTH), "w3": (WIDTH, HIDDEN)}
    mapping["mlp.experts"] = {
        "type": "grouped",
        "num_experts": EXPERTS,
        "sub_weights": {name: {"lora_A_dim": a, "lora_B_dim": b} for name, (a, b) in experts.items()},
    }
    numbers = {"rank": 16, "alpha": 64, "token_dim": 1024, "output_dim": 1024, "input_dim": 4096, "d_model": 4096}
    numbers |= {"head_dim": 128, "dim_accumulation": 4, "num_base_model_layers": LAYERS, "num_pg_layers": 24}
    return GeneratorConfig.from_dict({**numbers, "prefix": "model.layers.", "pg_mapping": mapping})


def released_decoder() -> Headers:
    """Headers of the decoder's layers alone."""
    headers: dict[str, tuple[str, tuple[int, ...]]] = {}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        headers |= {f"{at}{name}.weight": ("BF16", (b, a)) for name, (a, b) in MAPPING.items()}
        headers[f"{at}mlp.gate.wg.weight"] = ("BF16", (EXPERTS, WIDTH))
        for expert in range(EXPERTS):
            headers[f"{at}mlp.experts.{expert}.gate_and_up_proj.weight"] = ("BF16", (2 * HIDDEN, WIDTH))
            headers[f"{at}mlp.experts.{expert}.down_proj.weight"] = ("BF16", (WIDTH, HIDDEN))
    return headers


def released_beside() -> int:
    config = released_generator()
    with torch.device("meta"):
        numbers = ParameterGenerator(config).num_parameters
    return needed(config, numbers, torch.bfloat16)


def released_needs() -> dict[str, Needs]:
    headers, reserve_bytes = released_decoder(), released_beside()
    return {way: needs(headers, quantise=how, reserve_bytes=reserve_bytes) for way, how in WAYS.items()}


def table() -> list[str]:
    """The rows of the page's table."""
    rows = []
    for way, need in released_needs().items():
        parts = [f"{size / 1e9:.1f}" for size in (need.weights, need.cache, need.reserve_bytes, need.total)]
        machines = [f"{count} x {size}" for size in (80, 141) for count in (_fewest(need, size),) if count]
        rows.append(f"| {way} | {' | '.join(parts)} | {', '.join(machines)} |")
    return rows


def _fewest(need: Needs, size: int) -> int:
    """How many GPUs of so many GB it takes."""
    return next(count for count in range(1, 65) if fits(need, FreeMemory((size * 10**9,) * count, None)))


if __name__ == "__main__":
    print("\n".join(table()))  # noqa: T201
