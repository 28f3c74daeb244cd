"""Generators that benchmarks speak of, and what they should cost: a config goes in, floating point operations come out.

Shapes: n base layers, p positions of one base layer, T = n * p, L condition tokens, d width, t token_dim.
"""

from __future__ import annotations

from openwu.config import GeneratorConfig, GroupedTarget, LayerGroup, PlainTarget
from openwu.generator.layout import GeneratorLayout


def small_config(*, d_model: int = 256, layers: int = 8, targets: int = 2, blocks: int = 4) -> GeneratorConfig:
    """By default n = 8 base layers of p = 384 positions, d = 256, 4 blocks; p is 192 for each of the targets."""
    # A of 24 tokens and B of 24 tokens of 16 x 128 numbers, 4 positions each.
    each = tuple(PlainTarget(f"proj{number}", 3072, 3072) for number in range(targets))
    return GeneratorConfig(16, 16, 128, 256, d_model, 64, 4, blocks, (LayerGroup("layers.", layers, each),))


def released_config() -> GeneratorConfig:
    """The size of the released checkpoint: 8.1 billion parameters, 722,993,152 generated numbers."""
    experts = (PlainTarget("w1", 4096, 3072), PlainTarget("w2", 3072, 4096), PlainTarget("w3", 4096, 3072))
    targets = (
        PlainTarget("self_attn.qkv_proj", 4096, 6144),
        PlainTarget("self_attn.o_proj", 4096, 4096),
        PlainTarget("mlp.shared_mlp.gate_and_up_proj", 4096, 6144),
        PlainTarget("mlp.shared_mlp.down_proj", 3072, 4096),
        GroupedTarget("mlp.experts", 64, experts),
    )
    return GeneratorConfig(16, 64, 1024, 4096, 4096, 128, 4, 24, (LayerGroup("model.layers.", 32, targets),))


def generator_flops(
    config: GeneratorConfig, condition_tokens: int, *, first_block_kept: bool = False
) -> dict[str, int]:
    """Multiplications and additions of one request, by part; a multiply-add counts as two, elementwise work as none.

    `first_block_kept`: without the part of the first block that does not depend on the condition.
    """
    d, length, blocks = config.d_model, condition_tokens, config.num_pg_layers
    begun = blocks - 1 if first_block_kept else blocks
    found = dict.fromkeys(("layers", "positions", "attention", "cross", "condition", "feed_forward", "projections"), 0)
    found["projections"] += 2 * length * config.input_dim * d
    for group in GeneratorLayout.of(config).groups:
        n, p = group.num_layers, group.positions_per_layer
        rows = n * p
        found["layers"] += begun * (8 * rows * d * d + 4 * rows * n * d)
        found["positions"] += begun * 8 * rows * d * d
        found["attention"] += begun * 4 * rows * p * d
        found["cross"] += (begun + blocks) * 2 * rows * d * d
        found["condition"] += blocks * (4 * rows * length * d + 4 * length * d * d)
        found["feed_forward"] += blocks * 16 * rows * d * d
        found["projections"] += 2 * rows * d * config.token_dim
    return found
