"""An untrained associative generator for the language model of `language_cases`."""

from __future__ import annotations

import torch

from openwu.backbones.causal_lm.base import CausalLM
from openwu.generator.associative import AssociativeConfig, AssociativeGenerator
from openwu.memory.reading import NoteFormat

TARGETS = ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")


READER = {"model.layers.0.self_attn.q_proj": (16, 32), "model.layers.0.self_attn.v_proj": (16, 16)}


def written_for(
    base: CausalLM, targets: tuple[str, ...] = TARGETS, in_dim: int = 24, background_rank: int = 0
) -> AssociativeGenerator:
    reading = NoteFormat("model.layers.0", "", "{question}", chunk=16, base=base.digest).to_dict()
    config = AssociativeConfig(targets, in_dim, base.width, 4, 4, 4, 2, reading, background_rank, READER, 3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        generator = AssociativeGenerator(config, [20.0] * len(targets))
        for layer in generator.layers:
            torch.nn.init.normal_(layer.shared_b, std=0.3)
        for part in generator.reader_b:
            torch.nn.init.normal_(part, std=0.1)
    return generator
