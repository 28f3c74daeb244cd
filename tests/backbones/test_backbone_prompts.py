"""Prompts of text and pictures for Qwen2.5-VL: their states, and above all the positions of pictures.

What a prompt's states must be is asked of the text encoder itself, with the positions that its processor's token types
give, and with positions written down here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from base_cases import MULTIMODAL, backbone, picture

from openwu.backbones.diffusers import multimodal
from openwu.errors import InstructionError


@pytest.fixture(params=("qwen-image-edit", "qwen-image-edit-plus"))
def qwen(request: pytest.FixtureRequest) -> Any:
    return backbone(request.param)


@pytest.fixture
def longcat() -> Any:
    return backbone("longcat-image-edit")


def by_processor(base: Any, text: str, pictures: list[Any], types: bool) -> torch.Tensor:
    """The encoder's states `[l, D]` of what the pipeline's processor makes, with or without its token types."""
    pipeline = base.pipeline
    made = pipeline.processor(text=[text], images=pictures, return_tensors="pt")
    if not types:
        made.pop("mm_token_type_ids")
    states: torch.Tensor = pipeline.text_encoder(**made, output_hidden_states=True).hidden_states[-1]
    return states[0, pipeline.prompt_template_encode_start_idx :]


def test_prompts_have_the_positions_of_pictures(qwen: Any) -> None:
    pictures = [picture(1, 80, 48), picture(2)][: qwen.pictures_read]
    ours = qwen.encode_prompt("make it warm", pictures)
    text = qwen.template("make it warm", len(pictures))
    torch.testing.assert_close(ours, by_processor(qwen, text, pictures, types=True), rtol=0, atol=1e-6)
    flat = by_processor(qwen, text, pictures, types=False)
    assert (ours - flat).abs().max() > 1e-2, "without token types, pictures would be read as a line of words"


def test_the_pipeline_alone_would_read_pictures_as_a_line_of_words(qwen: Any) -> None:
    """What is to be mended here; where this fails, the pipeline's own encoding serves again."""
    pictures = [picture(1, 80, 48), picture(2)][: qwen.pictures_read]
    states, _ = qwen.pipeline.encode_prompt(["make it warm"], pictures)
    text = qwen.template("make it warm", len(pictures))
    torch.testing.assert_close(states[0], by_processor(qwen, text, pictures, types=False), rtol=0, atol=1e-6)


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
    ours = longcat.encode_prompt(instruction, [picture(1, 128, 64)])
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


def test_a_prompt_of_an_edit_plus_picture_shows_fewer_pixels_than_the_base_reads() -> None:
    """About 384 x 384; one that is smaller stays as it is."""
    plus = backbone("qwen-image-edit-plus")
    processor = plus.pipeline.processor.image_processor
    large, small = (plus.encode_prompt("blur", [picture(1, side, side)]).shape[0] for side in (448, 56))
    assert large - small == (384 // 28 + 1) ** 2 - 4
    assert processor(images=[picture(1, 448, 448)], return_tensors="pt")["image_grid_thw"].tolist() == [[1, 32, 32]]


@pytest.mark.parametrize("name", MULTIMODAL)
def test_marks_and_long_instructions_are_refused(name: str) -> None:
    base = backbone(name)
    with pytest.raises(InstructionError, match=r"expected plain words, got <\|image_pad\|>"):
        base.encode_prompt("put <|image_pad|> here", [picture(1)])
    with pytest.raises(InstructionError, match=r"expected at most .* tokens for this base"):
        base.encode_prompt("word " * 300, [picture(1)])
    with pytest.raises(ValueError, match="once for each of 1 pictures, got it 2 times"):
        multimodal.with_picture_tokens(
            backbone("qwen-image-edit").pipeline.processor.image_processor, "<|image_pad|>" * 2, [picture(1)]
        )
