"""Bases whose text encoder sees pictures: what holds for every base, their prompts, their own pipelines as reference.

What a prompt's states must be is asked of the text encoder itself, with the positions that its processor's token types
give, and with positions written down here.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from typing import Any

import base_cases
import pytest
import torch
from base_cases import FAST, MULTIMODAL, PIXELS, adapter, backbone, generator, nothing, picture, requests, targets_of
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

from openwu import attach
from openwu.backbone import backbone_class, loading, multimodal
from openwu.errors import InstructionError, OpenwuError, TargetError
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


@pytest.fixture
def longcat() -> Any:
    return backbone("longcat-image-edit")


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
    """Changing it changes nothing that the base says."""
    asked = requests(1)
    batch = qwen.latent_batch(asked, [torch.full((3, 64, 64), 0.3)])
    given, time = torch.randn(batch.target.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])
    before = qwen.predict(batch, given, time)
    dead = sorted(linear_maps(qwen) - {target.name for target in targets_of(qwen)})
    assert len(dead) == 4
    for name in dead:
        weight = qwen.denoiser.get_submodule(name).weight
        kept = weight.detach().clone()
        weight.data.mul_(3)
        assert torch.equal(qwen.predict(batch, given, time), before), name
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
    noise, time = torch.randn(batch.target.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0.6, 0.6])
    given = 0.4 * batch.target + 0.6 * noise
    before = {name: value.clone() for name, value in base.denoiser.state_dict().items()}
    model = generator(base, b_init_std=0.01)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    with attach(base.denoiser, model.targets) as handle:
        for _ in range(12):
            with handle.applied(model(batch.condition)):
                loss = (base.predict(batch, given, time) - (noise - batch.target)).square().mean()
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0], losses
    assert all(torch.equal(value, before[name]) for name, value in base.denoiser.state_dict().items())


def by_processor(base: Any, text: str, pictures: list[Any], types: bool) -> torch.Tensor:
    """The encoder's states `[l, D]` of what the pipeline's processor makes, with or without its token types."""
    pipeline = base.pipeline
    made = pipeline.processor(text=[text], images=pictures, return_tensors="pt")
    if not types:
        made.pop("mm_token_type_ids")
    states: torch.Tensor = pipeline.text_encoder(**made, output_hidden_states=True).hidden_states[-1]
    return states[0, pipeline.prompt_template_encode_start_idx :]


def test_prompts_have_the_positions_of_pictures(qwen: Any) -> None:
    count = 1 if qwen.pictures_read else 2
    pictures = [picture(1, 80, 48), picture(2)][:count]
    ours = qwen.prompt("make it warm", pictures)
    text = qwen.template("make it warm", count)
    torch.testing.assert_close(ours, by_processor(qwen, text, pictures, types=True), rtol=0, atol=1e-6)
    flat = by_processor(qwen, text, pictures, types=False)
    assert (ours - flat).abs().max() > 1e-2, "without token types, pictures would be read as a line of words"


def test_the_pipeline_alone_would_read_pictures_as_a_line_of_words(qwen: Any) -> None:
    """What is to be mended here; where this fails, the pipeline's own encoding serves again."""
    states, _ = qwen.pipeline.encode_prompt(["make it warm"], [picture(1, 80, 48)])
    text = qwen.template("make it warm", 1)
    torch.testing.assert_close(
        states[0], by_processor(qwen, text, [picture(1, 80, 48)], types=False), rtol=0, atol=1e-6
    )


def laid_out(*parts: int | tuple[int, int]) -> torch.Tensor:
    """Positions `[3, 1, l]`: a number is so many words, a pair is rows and columns of a picture."""
    columns: list[tuple[int, int, int]] = []
    start = 0
    for part in parts:
        if isinstance(part, int):
            columns += [(start + i,) * 3 for i in range(part)]
            start += part
        else:
            columns += [(start, start + y, start + x) for y in range(part[0]) for x in range(part[1])]
            start += max(part)
    return torch.tensor(columns).T[:, None]


def test_positions_are_those_of_the_paper(qwen: Any) -> None:
    """Section 2.1 of the Qwen2-VL report: what follows a picture is counted on from its larger side."""
    text = "ab<|image_pad|>c<|image_pad|>defg"
    filled, patched = multimodal.with_picture_tokens(
        qwen.pipeline.processor.image_processor, text, [picture(1, 112, 56), picture(2, 56, 84)]
    )
    assert filled.count("<|image_pad|>") == 2 * 4 + 3 * 2
    tokens = qwen.pipeline.tokenizer([filled], return_tensors="pt").input_ids
    positions = multimodal.rotary_positions(
        qwen.pipeline.text_encoder, tokens, torch.ones_like(tokens), patched["image_grid_thw"]
    )
    assert torch.equal(positions, laid_out(2, (2, 4), 1, (3, 2), 4))


def test_longcat_reads_quotations_by_letters_and_padding_at_position_one(longcat: Any) -> None:
    pipeline = longcat.pipeline
    instruction, length = 'write "no" on it', pipeline.tokenizer_max_length
    ours = longcat.prompt(instruction, [picture(1, 128, 64)])
    assert longcat._words(instruction) == pipeline.tokenizer(instruction).input_ids, "letters are tokens here"
    # Half of 128 x 64 becomes 56 x 28: two tokens, between the marks of the picture.
    head, words, tail = (
        pipeline.tokenizer(text).input_ids
        for text in (
            pipeline.prompt_template_encode_prefix.replace("<|image_pad|>", "<|image_pad|>" * 2),
            instruction,
            pipeline.prompt_template_encode_suffix,
        )
    )
    padding = length - len(words)
    tokens = torch.tensor([[*head, *words, *[pipeline.tokenizer.pad_token_id] * padding, *tail]])
    mask = torch.ones_like(tokens)
    start = len(head) + len(words)
    mask[:, start : start + padding] = 0
    positions = torch.ones(3, 1, tokens.shape[1], dtype=torch.long)
    positions[:, mask.bool()] = laid_out(len(head) - 3, (1, 2), 1 + len(words) + len(tail))[:, 0]
    half = picture(1, 128, 64).resize((64, 32), 1)
    seen = pipeline.text_processor.image_processor(images=[half], return_tensors="pt")
    made = {"input_ids": tokens, "attention_mask": mask, **seen, "output_hidden_states": True}
    cut = slice(head.index(pipeline.tokenizer.convert_tokens_to_ids("<|vision_start|>")), -len(tail))
    expected = pipeline.text_encoder(position_ids=positions, **made).hidden_states[-1][0, cut]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    flat = pipeline.text_encoder(**made).hidden_states[-1][0, cut]
    assert (ours - flat).abs().max() > 1e-2
    torch.testing.assert_close(pipeline._encode_prompt([instruction], [half])[0], flat, rtol=0, atol=1e-6)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The pipelines work on a megapixel, whatever they are given; here on 64 x 64."""
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
    said, unsaid = (base.prompt(text, read)[None] for text in (asked.instruction, base.unasked))
    common: dict[str, Any] = {
        "image": list(read), "num_inference_steps": 3, "output_type": "pt",
        "generator": [torch.Generator().manual_seed(5)],
    }  # fmt: skip
    pipeline = base.pipeline
    if type(base).__name__ == "LongCatImageEdit":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "_encode_prompt", lambda prompt, _: said if prompt == ["make it warm"] else unsaid)
            made = pipeline(prompt=asked.instruction, guidance_scale=guidance, **common | {"image": read[0]})
    else:
        masks = [torch.ones(states.shape[:2], dtype=torch.long) for states in (said, unsaid)]
        unasked = {"negative_prompt_embeds": unsaid, "negative_prompt_embeds_mask": masks[1]} if guidance > 1 else {}
        made = pipeline(prompt_embeds=said, prompt_embeds_mask=masks[0], true_cfg_scale=guidance, **unasked, **common)
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


def test_a_prompt_of_an_edit_plus_picture_shows_fewer_pixels_than_the_base_reads(plus: Any) -> None:
    """About 384 x 384; one that is smaller stays as it is."""
    processor = plus.pipeline.processor.image_processor
    large, small = (plus.prompt("blur", [picture(1, side, side)]).shape[0] for side in (448, 56))
    assert large - small == (384 // 28 + 1) ** 2 - 4
    assert processor(images=[picture(1, 448, 448)], return_tensors="pt")["image_grid_thw"].tolist() == [[1, 32, 32]]


def test_one_step_is_refused_where_the_schedule_divides_by_its_length(qwen: Any) -> None:
    with pytest.raises(OpenwuError, match="steps: expected at least 2 for this base"):
        qwen.generate(requests(1), SamplingOptions(steps=1, pixels=PIXELS), nothing)


def test_marks_and_long_instructions_are_refused(base: Any) -> None:
    with pytest.raises(InstructionError, match=r"expected plain words, got <\|image_pad\|>"):
        base.prompt("put <|image_pad|> here", [picture(1)])
    with pytest.raises(InstructionError, match=r"expected at most .* tokens for this base"):
        base.prompt("word " * 300, [picture(1)])
    with pytest.raises(ValueError, match="once for each of 1 pictures, got it 2 times"):
        multimodal.with_picture_tokens(
            backbone("qwen-image-edit").pipeline.processor.image_processor, "<|image_pad|>" * 2, [picture(1)]
        )


def test_a_missing_torchvision_is_said_before_anything_is_loaded(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(loading.importlib, "import_module", missing)
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
    zeroed = type(weights)(
        weights.targets,
        {name: (a, b if name in names else torch.zeros_like(b)) for name, (a, b) in weights.weights.items()},
        1.0,
    )
    asked = requests(1)
    with attach(qwen.denoiser, weights.targets) as handle:
        (made,) = qwen.generate(asked, FAST, lambda rows: handle.applied(zeroed, rows=rows))
    assert (made - qwen.generate(asked, FAST, nothing)[0]).abs().max() > 1e-3
