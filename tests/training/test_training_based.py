"""A generator learns through a large base: the loss falls, the base does not change, and what it is told is dropped."""

from __future__ import annotations

from typing import Any

import base_cases
import pytest
import tiny_pipelines
import torch

from openwu.backbones import backbone_class
from openwu.errors import OpenwuError, TargetError
from openwu.training.bases.pipelines import backbone_stage, objective_of
from openwu.training.objectives import Diffusion, FlowMatching
from openwu.types import LatentBatch

TARGETS = [torch.full((3, 64, 64), 0.2), torch.full((3, 64, 64), 0.9)]


@pytest.mark.parametrize("name", ["instruct-pix2pix", "instruct-pix2pix-xl", "flux-kontext", "flux2-dev"])
def test_the_loss_falls_through_the_frozen_base(name: str) -> None:
    base = base_cases.backbone(name)
    batch = base.latent_batch(base_cases.requests(2), TARGETS)
    generator = base_cases.generator(base, b_init_std=1e-2)
    before = {key: value.clone() for key, value in base.denoiser.state_dict().items()}
    stage = backbone_stage(base, generator, lambda _: batch, validation=batch)
    try:
        start = stage.evaluate().scalars["validation"]
        optimizer = torch.optim.Adam(generator.parameters(), lr=3e-3)
        # Of what the tiny XL base says little passes through its transformer blocks: it learns slower.
        for step in range(36 if name.endswith("xl") else 12):
            optimizer.zero_grad()
            with stage.loss(step) as loss:
                torch.autograd.backward(loss)
            optimizer.step()
        end = stage.evaluate().scalars["validation"]
    finally:
        stage.handle.detach()
    assert end < 0.97 * start, (start, end)
    assert all(torch.equal(value, before[key]) for key, value in base.denoiser.state_dict().items())
    assert all(parameter.grad is not None for parameter in generator.more_in.parameters()), "pictures are read"


def test_the_objective_is_the_base_s_own() -> None:
    assert objective_of(base_cases.backbone("flux-kontext")) == FlowMatching()
    base = base_cases.backbone("instruct-pix2pix")
    objective = objective_of(base)
    assert isinstance(objective, Diffusion)
    assert objective.predicts == "epsilon"
    assert torch.equal(objective.alphas_cumprod, base.pipeline.scheduler.alphas_cumprod)


def test_a_latent_batch_noised_by_the_objective_is_what_the_scheduler_makes() -> None:
    """Our noisy latents against the pipeline's own scheduler, for a diffusion."""
    base = base_cases.backbone("instruct-pix2pix")
    batch = base.latent_batch(base_cases.requests(2), TARGETS)
    objective = objective_of(base)
    question = objective.sample(batch.target, torch.Generator().manual_seed(3))
    assert question.x_t is not None
    assert question.time is not None
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_config(base.pipeline.scheduler.config)
    expected = scheduler.add_noise(batch.target, question.target, question.time)
    torch.testing.assert_close(question.x_t, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", base_cases.NAMES)
def test_every_tensor_of_a_latent_batch_has_a_row_per_sample(name: str) -> None:
    batch = base_cases.backbone(name).latent_batch(base_cases.requests(2), TARGETS)
    assert {len(tensor) for tensor in (batch.target, *batch.inputs.values())} == {2}


def test_targets_are_the_vae_s_latents_scaled_as_the_denoiser_sees_them() -> None:
    for name in ("instruct-pix2pix", "flux-kontext"):
        base = base_cases.backbone(name)
        batch = base.latent_batch(base_cases.requests(2), TARGETS)
        vae = base.pipeline.vae
        latents = vae.encode(2 * torch.stack(TARGETS) - 1).latent_dist.mode()
        shift = vae.config.shift_factor or 0.0
        latents = (latents - shift) * vae.config.scaling_factor
        if name == "flux-kontext":
            latents = base.pipeline._pack_latents(latents, 2, 4, 8, 8)
        torch.testing.assert_close(batch.target, latents)


def test_instruct_pix2pix_drops_texts_and_pictures_as_it_was_trained() -> None:
    base = base_cases.backbone("instruct-pix2pix")
    one = base.latent_batch(base_cases.requests(1), TARGETS[:1])
    many = LatentBatch(
        one.target.expand(4000, -1, -1, -1),
        {name: value.expand(4000, *[-1] * (value.ndim - 1)) for name, value in one.inputs.items()},
        one.condition,
    )
    dropped = base.drop_conditions(many, torch.Generator().manual_seed(0))
    empty, _ = base.text_states([""])
    no_text = (dropped.inputs["text"] == empty).flatten(1).all(1)
    no_picture = (dropped.inputs["source"] == 0).flatten(1).all(1)
    for share in (no_text & ~no_picture, no_picture & ~no_text, no_text & no_picture):
        assert share.float().mean().item() == pytest.approx(0.05, abs=0.012)
    kept = ~no_text & ~no_picture
    assert torch.equal(dropped.inputs["source"][kept][0], one.inputs["source"][0])
    assert dropped.condition is one.condition
    flow = base_cases.backbone("flux-kontext")
    batch: Any = object()
    assert flow.drop_conditions(batch, torch.Generator()) is batch


@pytest.mark.parametrize("zeros", [True, False])
def test_the_xl_base_without_its_text_is_told_what_its_pipeline_tells_it(zeros: bool) -> None:
    base = base_cases.backbone("instruct-pix2pix-xl")
    one = base.latent_batch(base_cases.requests(1), TARGETS[:1])
    many = LatentBatch(
        one.target.expand(400, -1, -1, -1),
        {name: value.expand(400, *[-1] * (value.ndim - 1)) for name, value in one.inputs.items()},
        one.condition,
    )
    kept = base.pipeline.config.force_zeros_for_empty_prompt
    base.pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
    try:
        dropped = base.drop_conditions(many, torch.Generator().manual_seed(0)).inputs
        _, text, _, vector = base.pipeline.encode_prompt("what", device="cpu", do_classifier_free_guidance=True)
    finally:
        base.pipeline.register_to_config(force_zeros_for_empty_prompt=kept)
    lost = (dropped["text"] == text).flatten(1).all(1)
    assert lost.float().mean().item() == pytest.approx(0.1, abs=0.05)
    assert torch.equal(lost, (dropped["vector"] == vector).all(1)), "both of the text's parts, or none"
    assert torch.equal(dropped["text"][~lost][0], one.inputs["text"][0])
    assert (dropped["source"] == 0).flatten(1).all(1).float().mean().item() == pytest.approx(0.1, abs=0.05)
    assert torch.equal(dropped["sizes"], many.inputs["sizes"])


def test_what_the_xl_base_is_not() -> None:
    pipeline = tiny_pipelines.instruct_pix2pix_xl(is_cosxl_edit=True)
    with pytest.raises(OpenwuError, match="expected one on Stable Diffusion XL, got CosXL Edit"):
        backbone_class("instruct-pix2pix-xl")(pipeline)  # type: ignore[call-arg]


def test_a_generator_of_another_base_cannot_be_trained_on() -> None:
    base = base_cases.backbone("flux-kontext")
    with pytest.raises(TargetError, match="made for another base"):
        backbone_stage(base, base_cases.generator(base_cases.backbone("instruct-pix2pix")), lambda _: None)  # type: ignore[arg-type,return-value]
