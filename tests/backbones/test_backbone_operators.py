"""Bases from diffusers with generators of other operators than LoRA: trained through the base."""

from __future__ import annotations

from dataclasses import replace

import base_cases
import pytest
import torch

from openwu.editor.compatibility import attach_generator
from openwu.generator.model import ParameterGenerator


@pytest.mark.parametrize("name", ["instruct-pix2pix", "flux-kontext"])
def test_a_generator_of_gains_and_offsets_learns_through_a_base(name: str) -> None:
    """Two requests of one batch want different pictures."""
    base = base_cases.backbone(name)
    config = base_cases.generator(base).config
    groups = tuple(group.with_operator("scale_offset") for group in config.groups)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        generator = ParameterGenerator(replace(config, groups=groups), b_init_std=0.1)
    before, after = base_cases.losses_of_training(base, generator, base_cases.requests(), steps=10)
    assert after < before
    with attach_generator(base, generator, name) as handle:
        assert {target.operator for target in handle.targets} == {"scale_offset"}
    assert generator.layout.adapter_size < base_cases.generator(base).layout.adapter_size / 3
