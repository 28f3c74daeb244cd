"""Bases whose text encoder sees pictures: what holds for every base, and their own pipelines as reference."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from typing import Any

import base_cases
import numpy as np
import pytest
import torch
from base_cases import (
    FAST,
    MULTIMODAL,
    PIXELS,
    adapter,
    backbone,
    generator,
    noisy,
    nothing,
    picture,
    requests,
    targets_of,
)
from test_backbone_bases import (  # noqa: F401  (they run here with this file's bases)
    test_an_adapter_changes_the_picture_and_none_leaves_it,
    test_each_request_of_a_batch_has_its_own_adapter_seed_and_picture,
    test_every_target_receives_gradient,
    test_hooks_equal_merged_weights,
    test_pictures_of_several_shapes_cannot_train_together,
    test_progress_counts_every_step_of_every_call,
    test_the_training_prediction_is_what_the_pipeline_computes,
)
from torch import nn

from openwu import attach, extras
from openwu.backbones import backbone_class
from openwu.conditions.denoiser_states import DenoiserStates
from openwu.editor.editor import Editor
from openwu.editor.requests import EditRequest
from openwu.errors import OpenwuError, TargetError
from openwu.types import BaseRequest, SamplingOptions

QWEN = ("qwen-image-edit", "qwen-image-edit-plus")

DEAD = r"transformer_blocks\.2\.(attn\.(add_q_proj|to_add_out)|txt_mlp\..*)"
"""What the last of the three blocks makes of the text alone, which nothing reads."""


@pytest.fixture(params=MULTIMODAL)
def base(request: pytest.FixtureRequest) -> Any:
    return backbone(request.param)


@pytest.fixture(params=QWEN)
def qwen(request: pytest.FixtureRequest) -> Any:
    return backbone(request.param)


@pytest.fixture
def plus() -> Any:
    return backbone("qwen-image-edit-plus")


def linear_maps(base: Any) -> set[str]:
    return {
        name
        for name, module in base.denoiser.named_modules()
        if isinstance(module, nn.Linear) and "transformer_blocks." in name and not re.search("norm|_mod", name)
    }


def test_targets_are_the_linear_maps_without_modulation_and_without_dead_ones(base: Any) -> None:
    dead = {
        name for name in linear_maps(base) if type(base).__name__ != "LongCatImageEdit" and re.fullmatch(DEAD, name)
    }
    assert len(dead) in (0, 4)
    assert {target.name for target in targets_of(base)} == linear_maps(base) - dead


def test_what_is_left_out_is_dead(qwen: Any) -> None:
    """Changing them does not change the prediction."""
    asked = requests(1)
    batch = qwen.latent_batch(asked, [torch.full((3, 64, 64), 0.3)])
    x_t, time = noisy(batch), torch.tensor([0.5])
    before = qwen.predict(batch, x_t, time)
    dead = sorted(linear_maps(qwen) - {target.name for target in targets_of(qwen)})
    assert len(dead) == 4
    for name in dead:
        weight = qwen.denoiser.get_submodule(name).weight
        kept = weight.detach().clone()
        weight.data.mul_(3)
        assert torch.equal(qwen.predict(batch, x_t, time), before), name
        weight.data.copy_(kept)


def test_a_condition_reads_prompt_and_pictures_and_a_batch_is_its_samples(base: Any) -> None:
    asked = [requests(2)[0], BaseRequest((picture(3), picture(4, 128, 64)), "a longer instruction")]
    together = base.condition(asked)
    (_, width), (name, more) = base.condition_widths.items()
    assert (together.tokens.shape[2], together.more[name].tokens.shape[2]) == (width, more)
    for i, request in enumerate(asked):
        alone = base.condition([request])
        torch.testing.assert_close(together.tokens[i][together.mask[i]], alone.tokens[0], rtol=0, atol=1e-6)
        mask = together.more[name].mask[i]
        torch.testing.assert_close(together.more[name].tokens[i][mask], alone.more[name].tokens[0])
    assert together.more[name].mask.sum(1).tolist() == [16, 16 + (16 if base.multiple == 32 else 20)]
    first = base.condition([asked[0]])
    for other in (BaseRequest((picture(9),), asked[0].instruction), BaseRequest(asked[0].pictures, "make it cold")):
        assert not torch.equal(base.condition([other]).tokens, first.tokens), "the prompt holds both"


def test_a_generator_learns_through_the_base(base: Any) -> None:
    """End to end on one batch with the same noise: the loss falls, and nothing of the base moves."""
    batch = base.latent_batch(requests(2), [torch.full((3, 64, 64), 0.1), torch.full((3, 64, 64), 0.9)])
    assert {len(each) for each in batch.inputs.values()} == {2}, "a batch can be cut by samples"
    noise, time = noisy(batch), torch.tensor([0.6, 0.6])
    x_t = 0.4 * batch.target + 0.6 * noise
    before = {name: value.clone() for name, value in base.denoiser.state_dict().items()}
    model = generator(base, b_init_std=0.01)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    with attach(base.denoiser, model.targets) as handle:
        for _ in range(12):
            with handle.applied(model(batch.condition)):
                loss = (base.predict(batch, x_t, time) - (noise - batch.target)).square().mean()
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0], losses
    assert all(torch.equal(value, before[name]) for name, value in base.denoiser.state_dict().items())


def test_gradients_are_the_same_where_the_base_computes_its_blocks_again(base: Any) -> None:
    """Gradient checkpointing, without which bases of this size do not train."""
    batch = base.latent_batch(requests(2), [torch.full((3, 64, 64), 0.3)] * 2)
    x_t, time = noisy(batch), torch.tensor([0.5, 0.2])
    gradients, runs = [], 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    watch = base.denoiser.get_submodule("transformer_blocks.0.attn.to_q").register_forward_hook(count)
    for again in (False, True):
        weights = adapter(base, 2)
        parts = [part.requires_grad_() for pair in weights.pairs.values() for part in pair]
        (base.denoiser.enable_gradient_checkpointing if again else base.denoiser.disable_gradient_checkpointing)()
        try:
            with attach(base.denoiser, weights.targets) as handle, handle.applied(weights):
                base.predict(batch, x_t, time).square().mean().backward()
        finally:
            base.denoiser.disable_gradient_checkpointing()
        gradients.append([part.grad for part in parts])
    watch.remove()
    assert runs == 1 + 2
    for plain, repeated in zip(*gradients, strict=True):
        torch.testing.assert_close(repeated, plain, rtol=1e-5, atol=1e-8)


def test_a_block_s_states_serve_as_a_condition(base: Any) -> None:
    encoder = DenoiserStates(base, "transformer_blocks.1")
    together, alone = encoder.condition(requests(2)), encoder.condition(requests(2)[1:])
    assert together.tokens.shape[2] == encoder.condition_widths["states"] == 32
    assert together.mask is not None
    torch.testing.assert_close(together.tokens[1][together.mask[1]], alone.tokens[0], rtol=0, atol=1e-5)


def test_the_editor_gives_every_request_of_a_batch_its_own_adapter(base: Any) -> None:
    editor = Editor(base, generator(base), sampling=FAST)
    photo = picture(1, 60, 60)
    asked = [
        EditRequest([photo], "blur", seed=1),
        EditRequest([photo, picture(2)], "warm", strength=0.5, seed=2),
        EditRequest([photo], "warm", seed=1),
    ]
    try:
        together = editor.edit_batch(asked)
        for request, result in zip(asked, together, strict=True):
            alone = editor.edit(request.images, request.instruction, strength=request.strength, seed=request.seed)
            assert result.image.size == (60, 60)
            assert np.abs(np.asarray(result.image, np.int32) - np.asarray(alone.image)).max() <= 1
    finally:
        editor.handle.detach()


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The pipelines work on a megapixel, whatever their input; here on 64 x 64."""
    for name in MULTIMODAL:
        module = importlib.import_module(type(backbone(name).pipeline).__module__)
        size = (64, 64, None) if name == "qwen-image-edit" else (64, 64)
        monkeypatch.setattr(module, "calculate_dimensions", lambda *_, size=size: size)
    return


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_pictures_are_those_of_the_base_s_own_pipeline(base: Any, guidance: float) -> None:
    """Given the same prompts: other than those, nothing here differs from the library."""
    asked = BaseRequest((picture(1), picture(2)), "make it warm", seed=5)
    (ours,) = base.generate([asked], SamplingOptions(steps=3, pixels=PIXELS, guidance=guidance), nothing)
    read = asked.pictures[: base.pictures_read]
    positive, negative = (base.encode_prompt(text, read)[None] for text in (asked.instruction, base.negative_prompt))
    common: dict[str, Any] = {
        "image": list(read), "num_inference_steps": 3, "output_type": "pt",
        "generator": [torch.Generator().manual_seed(5)],
    }  # fmt: skip
    pipeline = base.pipeline
    if type(base).__name__ == "LongCatImageEdit":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                pipeline, "_encode_prompt", lambda prompt, _: positive if prompt == ["make it warm"] else negative
            )
            made = pipeline(prompt=asked.instruction, guidance_scale=guidance, **common | {"image": read[0]})
    else:
        masks = [torch.ones(states.shape[:2], dtype=torch.long) for states in (positive, negative)]
        unasked = {"negative_prompt_embeds": negative, "negative_prompt_embeds_mask": masks[1]} if guidance > 1 else {}
        made = pipeline(
            prompt_embeds=positive, prompt_embeds_mask=masks[0], true_cfg_scale=guidance, **unasked, **common
        )
    torch.testing.assert_close(ours, made.images[0], rtol=0, atol=1e-5)


def test_references_enter_edit_plus_and_only_the_condition_of_others(base: Any) -> None:
    photo = picture(1)
    one, other = (BaseRequest((photo, picture(seed)), "take its colours") for seed in (2, 3))
    same = torch.equal(base.generate([one], FAST, nothing)[0], base.generate([other], FAST, nothing)[0])
    assert same == (base.pictures_read == 1)
    assert not torch.equal(
        base.condition([one]).more["pictures"].tokens, base.condition([other]).more["pictures"].tokens
    )


def test_requests_with_as_many_references_share_a_call_and_others_do_not(plus: Any) -> None:
    seen: list[list[int]] = []

    def rows(owners: Any) -> Any:
        seen.append(list(owners))
        return nothing(owners)

    asked = [*requests(2), BaseRequest((picture(1), picture(2)), "mix"), BaseRequest((picture(3), picture(4)), "blend")]
    together = plus.generate(asked, FAST, rows)
    assert seen == [[0, 1], [2, 3]]
    for request, made in zip(asked, together, strict=True):
        torch.testing.assert_close(made, plus.generate([request], FAST, nothing)[0], rtol=0, atol=5e-5)
    with pytest.raises(OpenwuError, match="expected as many references, of one shape each"):
        plus.latent_batch(asked[1:3], [torch.zeros(3, 64, 64)] * 2)
    batch = plus.latent_batch(asked[2:], [torch.zeros(3, 64, 64)] * 2)
    assert batch.inputs["shapes"].tolist() == [[[4, 4]] * 3] * 2


def test_one_step_is_refused_where_the_schedule_divides_by_its_length(qwen: Any) -> None:
    with pytest.raises(OpenwuError, match="steps: expected at least 2 for this base"):
        qwen.generate(requests(1), SamplingOptions(steps=1, pixels=PIXELS), nothing)


def test_a_missing_torchvision_is_said_before_anything_is_loaded(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(extras.importlib, "import_module", missing)
    with pytest.raises(
        OpenwuError, match=r"needs the Python package 'torchvision'.*pip install 'openwu\[multimodal\]'"
    ):
        type(base).from_pretrained("somewhere/else")


def test_other_architectures_are_refused(base: Any) -> None:
    with pytest.raises(
        OpenwuError, match=r"pipeline: expected \w+Pipeline, got StableDiffusionInstructPix2PixPipeline"
    ):
        type(base)(backbone("instruct-pix2pix").pipeline)
    other = backbone_class("flux-kontext")
    with pytest.raises(OpenwuError, match="pipeline: expected FluxKontextPipeline, got"):
        other(base.pipeline)  # type: ignore[call-arg]
    with pytest.raises(TargetError), attach(base.denoiser, targets_of(backbone("flux2-klein"))):
        pass
    with pytest.raises(OpenwuError, match="image_guidance: expected none"):
        base.options(SamplingOptions(image_guidance=1.5))


def test_fused_projections_are_refused(qwen: Any) -> None:
    pipeline = base_cases.tiny_multimodal.qwen_image_edit()
    block = pipeline.transformer.transformer_blocks[0]
    block.attn.to_qkv = block.attn.to_q
    del block.attn.to_q
    del pipeline.transformer.transformer_blocks[1].attn.to_q
    with pytest.raises(TargetError, match=r"none of its blocks has attn.to_q; this release"):
        backbone_class("qwen-image-edit")(pipeline).layer_groups()  # type: ignore[call-arg]


def test_adapters_of_the_last_block_alone_reach_the_picture(qwen: Any) -> None:
    weights = adapter(qwen, 1, size=1.0)
    names = [target.name for target in weights.targets if "transformer_blocks.2." in target.name]
    assert len(names) == 8
    zeroed = type(weights).from_pairs(
        weights.targets,
        {name: (a, b if name in names else torch.zeros_like(b)) for name, (a, b) in weights.pairs.items()},
        1.0,
    )
    asked = requests(1)
    with attach(qwen.denoiser, weights.targets) as handle:
        (made,) = qwen.generate(asked, FAST, lambda rows: handle.applied(zeroed, rows=rows))
    assert (made - qwen.generate(asked, FAST, nothing)[0]).abs().max() > 1e-3
