"""Qwen-Image 2.1: what holds for every base, its prompts, what may share a call, and its cached prefix."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_multimodal
import torch
from base_cases import CAUSAL, FAST, PIXELS, adapter, backbone, noisy, nothing, picture, requests
from test_backbone_bases import (  # noqa: F401  (they run here with this file's base)
    test_an_adapter_changes_the_picture_and_none_leaves_it,
    test_each_request_of_a_batch_has_its_own_adapter_seed_and_picture,
    test_every_target_receives_gradient,
    test_hooks_equal_merged_weights,
    test_pictures_of_several_shapes_cannot_train_together,
    test_progress_counts_every_step_of_every_call,
    test_targets_are_the_linear_maps_of_the_blocks_without_modulation,
)
from test_backbone_multimodal import (  # noqa: F401
    test_a_block_s_states_serve_as_a_condition,
    test_a_condition_reads_prompt_and_pictures_and_a_batch_is_its_samples,
    test_a_generator_learns_through_the_base,
    test_a_missing_torchvision_is_said_before_anything_is_loaded,
    test_gradients_are_the_same_where_the_base_computes_its_blocks_again,
    test_the_editor_gives_every_request_of_a_batch_its_own_adapter,
)
from test_backbone_prompts import laid_out

from openwu import attach
from openwu.backbones import backbone_class
from openwu.errors import InstructionError, OpenwuError
from openwu.types import BaseRequest, SamplingOptions


@pytest.fixture(params=CAUSAL)
def base(request: pytest.FixtureRequest) -> Any:
    return backbone(request.param)


def encoded(base: Any, text: str, pictures: list[Any], positions: torch.Tensor) -> torch.Tensor:
    """The encoder's states behind its last norm `[l, D]` for positions `[3, 1, ...]`, system words cut off."""
    pipeline = base.pipeline
    made = pipeline.processor(text=[text], images=pictures, return_tensors="pt")
    made.pop("mm_token_type_ids")
    output = pipeline.text_encoder(**made, position_ids=positions, output_hidden_states=True)
    states: torch.Tensor = output.hidden_states[-1]
    return states[0, pipeline._drop_idx :]


def test_prompts_are_read_before_the_last_norm_with_the_positions_of_pictures(base: Any) -> None:
    asked = BaseRequest((picture(1, 96, 64), picture(2)), "make it warm")
    ours, places = base._encode_prompt(asked)
    shown = "<image1><|vision_start|><|image_pad|><|vision_end|> <image2><|vision_start|><|image_pad|><|vision_end|>"
    text = base.pipeline.prompt_template_ti2i.replace("<image1><|vision_start|><|image_pad|><|vision_end|>{}", shown)
    text = text.replace("<|im_end|>\n<|im_start|>assistant", asked.instruction + "<|im_end|>\n<|im_start|>assistant")
    before, between, after = (
        len(base.pipeline.processor.tokenizer(part).input_ids) for part in text.split("<|image_pad|>")
    )
    positions = laid_out(before, (2, 3), between, (2, 2), after)
    expected = encoded(base, text, list(asked.pictures), positions)
    norm = base.pipeline.text_encoder.model.language_model.norm
    torch.testing.assert_close(norm(ours), expected, rtol=0, atol=1e-5)
    assert (ours - expected).abs().max() > 1e-2, "the norm is not part of them"
    flat = encoded(base, text, list(asked.pictures), torch.arange(positions.shape[2]).expand(3, 1, -1))
    assert (norm(ours) - flat).abs().max() > 1e-2, "without positions, pictures would be read as a line of words"
    assert places.sum() == 2 * 3 + 2 * 2


def test_the_training_prediction_is_what_the_pipeline_computes(base: Any) -> None:
    """Of the joint sequence that the first step says all of: the last tokens are the picture that is made."""
    asked = [BaseRequest((picture(1), picture(2, 96, 64)), "make it warm", seed=3)]
    seen: list[tuple[dict[str, Any], torch.Tensor]] = []
    hook = base.denoiser.register_forward_hook(
        lambda _, __, kwargs, output: seen.append((kwargs, output[0])), with_kwargs=True
    )
    try:
        base.generate(asked, FAST, nothing)
    finally:
        hook.remove()
    (first, earlier), (second, later) = seen
    batch = base.latent_batch(asked, [torch.full((3, 64, 64), 0.4)])
    count = batch.target.shape[1]
    for kwargs, expected in ((first, earlier), (second, later)):
        x_t = kwargs["hidden_states"][:, -count:]
        ours = base.predict(batch, x_t, kwargs["timestep"])
        torch.testing.assert_close(ours, expected[:, -count:], rtol=1e-5, atol=1e-5)
    assert earlier.shape[1] > later.shape[1] == count, "the second step reads its prefix from the cache"


def test_only_the_same_pictures_with_prompts_of_one_length_share_a_call(base: Any) -> None:
    seen: list[list[int]] = []

    def rows(owners: Any) -> Any:
        seen.append(list(owners))
        return nothing(owners)

    photo = picture(1)
    texts = [("blur", photo), ("warm", photo), ("sharpen", photo), ("cold", picture(2))]
    asked = [BaseRequest((shown,), text, seed=i) for i, (text, shown) in enumerate(texts)]
    together = base.generate(asked, FAST, rows)
    assert seen == [[0, 1], [2], [3]]
    for request, made in zip(asked, together, strict=True):
        torch.testing.assert_close(made, base.generate([request], FAST, nothing)[0], rtol=0, atol=5e-5)


def test_requests_that_share_a_call_have_adapters_of_their_own(base: Any) -> None:
    asked = [BaseRequest((picture(1),), text, seed=i) for i, text in enumerate(("blur", "warm"))]
    weights = adapter(base, 2)
    guided = SamplingOptions(steps=3, pixels=PIXELS, guidance=2.0)
    with attach(base.denoiser, weights.targets) as handle:
        together = base.generate(asked, guided, lambda rows: handle.applied(weights, rows=rows))
        for i, request in enumerate(asked):
            own = weights.select([i])
            (alone,) = base.generate([request], guided, lambda rows, own=own: handle.applied(own, rows=rows))
            torch.testing.assert_close(together[i], alone, rtol=0, atol=5e-5)
    unguided = base.generate(asked[:1], SamplingOptions(steps=3, pixels=PIXELS), nothing)[0]
    assert (base.generate(asked[:1], guided, nothing)[0] - unguided).abs().max() > 1e-3


def test_references_enter_the_base(base: Any) -> None:
    one, other = (BaseRequest((picture(1), picture(seed)), "take its colours") for seed in (2, 3))
    assert not torch.equal(base.generate([one], FAST, nothing)[0], base.generate([other], FAST, nothing)[0])


def test_padding_in_training_is_never_looked_at(base: Any) -> None:
    asked = requests(2)
    batch = base.latent_batch(asked, [torch.full((3, 64, 64), 0.3)] * 2)
    mask = batch.inputs["text_mask"]
    assert mask.sum(1).tolist() == [45, 59]
    x_t, time = noisy(batch), torch.tensor([0.5, 0.5])
    before = base.predict(batch, x_t, time)
    batch.inputs["text"][~mask] = 7.0  # type: ignore[index]
    assert torch.equal(base.predict(batch, x_t, time), before)
    alone = base.latent_batch(asked[1:], [torch.full((3, 64, 64), 0.3)])
    torch.testing.assert_close(base.predict(alone, x_t[1:], time[1:])[0], before[1], rtol=0, atol=1e-5)


def test_a_schedule_that_comes_with_the_weights_counts_unless_steps_are_asked_for() -> None:
    pipeline = tiny_multimodal.qwen_image_21(sample_sigmas=[1.0, 0.7, 0.4])
    base = backbone_class("qwen-image-21")(pipeline)  # type: ignore[call-arg]
    for steps, expected in ((None, 3), (2, 2)):
        seen: list[tuple[int, int]] = []
        options = SamplingOptions(steps=steps, pixels=PIXELS)
        base.generate(requests(1), options, nothing, lambda done, total, seen=seen: seen.append((done, total)))  # type: ignore[misc]
        assert seen[-1] == (expected, expected)


def test_what_the_base_cannot_take_is_refused(base: Any) -> None:
    with pytest.raises(InstructionError, match=r"expected plain words, got <\|im_end\|>"):
        base.generate([BaseRequest((picture(1),), "stop <|im_end|>")], FAST, nothing)
    with pytest.raises(InstructionError, match=r"expected at most 1024 tokens"):
        base.condition([BaseRequest((picture(1),), "word " * 300)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base.pipeline.processor.image_processor, "size", {"shortest_edge": 8192, "longest_edge": 2**20})
        with pytest.raises(OpenwuError, match="pixels: expected 8192 to 1048576 for this base, got 64 x 64"):
            base.generate(requests(1), FAST, nothing)
    with pytest.raises(OpenwuError, match="pipeline: expected QwenImage21Pipeline, got QwenImageEditPipeline"):
        type(base)(backbone("qwen-image-edit").pipeline)
    with pytest.raises(OpenwuError, match="true_guidance: expected none for QwenImage21"):
        base.options(SamplingOptions(true_guidance=2.0))
