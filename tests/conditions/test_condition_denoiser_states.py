"""Hidden states of a denoiser as a condition, chosen by the name that the generator's config holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import base_cases
import pytest
import torch

from openwu.conditions import make_encoder
from openwu.conditions.denoiser_states import DenoiserStates
from openwu.editor.compatibility import encoder_for, generator_config
from openwu.editor.editor import Editor
from openwu.errors import CheckpointError, TargetError
from openwu.generator.model import ParameterGenerator

MODULES = {
    "flux-kontext": "transformer_blocks.1",
    "instruct-pix2pix": "mid_block.attentions.0.transformer_blocks.0",
}


@pytest.fixture(params=MODULES)
def encoder(request: pytest.FixtureRequest) -> DenoiserStates:
    return DenoiserStates(base_cases.backbone(request.param), MODULES[request.param])


def test_states_are_the_module_s_output_in_a_whole_run(encoder: DenoiserStates) -> None:
    """The same run to its end, with a hook of the test's own."""
    base: Any = encoder.base
    (request,) = base_cases.requests(1)
    seen: list[Any] = []
    hook = base.denoiser.get_submodule(encoder.settings["module"]).register_forward_hook(
        lambda _, __, output: seen.append(output)
    )
    batch = base.latent_batch([request], [torch.ones(3, 64, 64)])
    noise = torch.randn(batch.target.shape, generator=torch.Generator().manual_seed(request.seed))
    time = torch.tensor([1.0]) if base.alphas_cumprod is None else torch.tensor([999])
    base.predict(batch, noise, time)
    hook.remove()
    expected = torch.cat(seen[0], dim=1) if isinstance(seen[0], tuple) else seen[0]
    torch.testing.assert_close(encoder.condition([request]).tokens, expected)
    assert encoder.condition_widths == {"states": expected.shape[2]}


def test_they_follow_picture_text_and_seed_and_leave_no_hook(encoder: DenoiserStates) -> None:
    first, other = base_cases.requests(2)
    states = encoder.condition([first]).tokens
    for changed in (
        base_cases.BaseRequest(other.pictures, first.instruction, first.seed),
        base_cases.BaseRequest(first.pictures, other.instruction, first.seed),
        base_cases.BaseRequest(first.pictures, first.instruction, 99),
    ):
        tokens = encoder.condition([changed]).tokens
        assert tokens.shape != states.shape or not torch.allclose(tokens, states)
    assert not encoder._module._forward_hooks


def test_the_generator_s_config_names_its_encoder(tmp_path: Path) -> None:
    base = base_cases.backbone("flux-kontext")
    config = generator_config(
        base, encoder=DenoiserStates(base, "transformer_blocks.1", time=0.5), rank=4, alpha=4, token_dim=32, d_model=32,
        head_dim=16, dim_accumulation=2, num_pg_layers=1,
    )  # fmt: skip
    ParameterGenerator(config, b_init_std=0.3).save_pretrained(tmp_path / "generator")
    loaded = ParameterGenerator.from_pretrained(tmp_path / "generator")
    encoder = encoder_for(loaded.config, base, "flux-kontext")
    assert isinstance(encoder, DenoiserStates)
    assert encoder.settings == {"module": "transformer_blocks.1", "time": 0.5}
    editor = Editor(base, loaded, sampling=base_cases.FAST)
    try:
        assert editor.edit(base_cases.picture(1), "make it warm").image.size == (64, 64)
    finally:
        editor.handle.detach()


def test_what_cannot_be_an_encoder() -> None:
    base = base_cases.backbone("flux-kontext")
    with pytest.raises(TargetError, match=r"got 'transformer_blocks.7'; near it are .*transformer_blocks\.1"):
        DenoiserStates(base, "transformer_blocks.7")
    with pytest.raises(TargetError, match="time: expected a number from 0"):
        DenoiserStates(base, "transformer_blocks.1", time=2)
    with pytest.raises(TargetError, match=r"expected one that returns tokens \[b, L, d\], time_text_embed returns"):
        DenoiserStates(base, "time_text_embed").condition(base_cases.requests(1))
    with pytest.raises(CheckpointError, match=r"expected an encoder of base, .*, siglip2, got 'clip'"):
        make_encoder({"name": "clip"}, base)
    with pytest.raises(CheckpointError, match="settings it does not take"):
        make_encoder({"name": "denoiser-states", "layer": 3}, base)
