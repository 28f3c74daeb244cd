"""Conditions that a recipe chooses: one encoder, a layer of the base's text encoder, several as segments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import base_cases
import pytest
import torch

from openwu.conditions import chosen_encoder, describe_encoder, make_encoder
from openwu.conditions.part_states import PartStates
from openwu.editor.compatibility import encoder_for, generator_config
from openwu.errors import CheckpointError, OpenwuError, TargetError
from openwu.generator.model import ParameterGenerator

LAYER = {"name": "part-states", "part": "text_encoder_2", "module": "encoder.block.0"}
PROBE = {"name": "denoiser-states", "module": "transformer_blocks.1"}
BASE = {"name": "base"}


@pytest.fixture
def kontext() -> Any:
    return base_cases.backbone("flux-kontext")


def test_a_layer_of_the_text_encoder_says_what_it_says_when_the_base_asks(kontext: Any) -> None:
    requests = base_cases.requests(2)
    encoder = PartStates(kontext, "text_encoder_2", "encoder.block.0")
    together = encoder.condition(requests)
    seen: list[Any] = []
    hook = kontext.pipeline.text_encoder_2.encoder.block[0].register_forward_hook(
        lambda _, __, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    for i, request in enumerate(requests):
        seen.clear()
        kontext.text_states([request.instruction])
        assert together.mask is not None
        torch.testing.assert_close(together.tokens[i][together.mask[i]], seen[0][0])
    hook.remove()
    assert not torch.equal(*[each[: len(requests[0].instruction)] for each in together.tokens])
    assert encoder.condition_widths == {"states": 16}
    assert not kontext.pipeline.text_encoder_2._forward_pre_hooks


def test_padding_that_the_base_asks_about_is_no_token_of_the_condition() -> None:
    base = base_cases.backbone("flux2-klein")
    (request,) = base_cases.requests(1)
    encoder = PartStates(base, "text_encoder", "model.layers.9")
    _, mask = base.text_states([request.instruction])
    assert encoder.condition([request]).tokens.shape[:2] == (1, int(mask.sum()))


def test_segments_stand_side_by_side_and_are_made_again_from_a_generator_s_folder(kontext: Any, tmp_path: Path) -> None:
    requests = base_cases.requests(2)
    encoder = chosen_encoder([LAYER, BASE, PROBE], kontext)
    assert encoder is not None
    together = encoder.condition(requests)
    layer, own, probe = (make_encoder(each, kontext).condition(requests) for each in (LAYER, BASE, PROBE))
    assert torch.equal(together.tokens, layer.tokens)
    assert {name: each.tokens.shape for name, each in together.more.items()} == {
        "part1_text": own.tokens.shape,
        "part1_pictures": own.more["pictures"].tokens.shape,
        "part2_states": probe.tokens.shape,
    }
    assert torch.equal(together.more["part1_pictures"].tokens, own.more["pictures"].tokens)
    assert torch.equal(together.more["part2_states"].tokens, probe.tokens)
    assert encoder.asks_denoiser
    config = generator_config(
        kontext, encoder=encoder, rank=4, alpha=4, token_dim=32, d_model=32, head_dim=16, dim_accumulation=2,
        num_pg_layers=1,
    )  # fmt: skip
    generator = ParameterGenerator(config)
    assert {name: each.in_features for name, each in generator.more_in.items()} == {  # type: ignore[union-attr]
        "part1_text": 16, "part1_pictures": kontext.condition_widths["pictures"], "part2_states": 32,
    }  # fmt: skip
    generator.save_pretrained(tmp_path / "generator")
    loaded = ParameterGenerator.from_pretrained(tmp_path / "generator")
    again = encoder_for(loaded.config, kontext, "flux-kontext")
    assert describe_encoder(again) == {"name": "segments", "parts": [LAYER, BASE, {**PROBE, "time": 1.0}]}
    assert torch.equal(again.condition(requests).more["part2_states"].tokens, probe.tokens)
    for one, other in zip(
        generator(together).pairs.values(), loaded(again.condition(requests)).pairs.values(), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_the_base_alone_needs_no_encoder(kontext: Any) -> None:
    assert chosen_encoder([], kontext) is None
    assert chosen_encoder([BASE], kontext) is None
    assert isinstance(chosen_encoder([LAYER], kontext), PartStates)


@pytest.mark.parametrize(
    ("chosen", "error", "words"),
    [
        ({**LAYER, "part": "text_encoder_3"}, TargetError, "part: expected the name of an encoder .* 'text_encoder_3'"),
        ({**LAYER, "part": "vae", "module": "encoder"}, TargetError, "the base does not ask vae about a request"),
        ({**LAYER, "module": "encoder.block.9"}, OpenwuError, r"expected the path of a module .* near it are"),
        ({"name": "part-states", "part": "text_encoder"}, CheckpointError, "part-states: the generator's config"),
        ({"name": "segments", "parts": []}, CheckpointError, "parts: expected a list of encoders"),
        ({"name": "segments", "parts": [{"name": "clip"}]}, CheckpointError, "expected an encoder of base, "),
    ],
)
def test_choices_that_cannot_be(kontext: Any, chosen: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make_encoder(chosen, kontext).condition(base_cases.requests(1))
