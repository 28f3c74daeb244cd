"""Edits shown by example: what the base reads of them, and what they leave as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from openwu.backbones.embedded.condition import SHOWN
from openwu.backbones.embedded.instruction import InstructionEncoder
from openwu.data.suite.photographs import Photograph
from openwu.editor.editor import Editor
from openwu.errors import OpenwuError
from openwu.training.embedded.model import EmbeddedConfig, EmbeddedModel
from openwu.training.embedded.wordless import learn_wordless
from openwu.types import Condition, LoadingOptions

Scene = Callable[..., NDArray[np.uint8]]


@pytest.fixture(scope="module")
def config(embedded_config: EmbeddedConfig) -> EmbeddedConfig:
    return embedded_config.with_examples(d_model=32, head_dim=16, dim_accumulation=2, blocks=1)


@pytest.fixture
def model(config: EmbeddedConfig) -> EmbeddedModel:
    """Random weights where training starts from zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = EmbeddedModel(config)
        model.generator.init_weights(0.3)
        torch.nn.init.normal_(model.backbone.pixels.out.weight, std=0.02)
        torch.nn.init.normal_(model.instruction.table.weight)
    assert model.instruction.wordless is not None
    torch.nn.init.normal_(model.instruction.wordless, generator=torch.Generator().manual_seed(1))
    return model.requires_grad_(False)


def test_no_words_have_tokens_of_their_own(model: EmbeddedModel, embedded_config: EmbeddedConfig) -> None:
    wordless = model.instruction.wordless
    assert wordless is not None
    tokens = model.instruction(["", "make it brighter", "  "])
    assert torch.equal(tokens[0], wordless)
    assert torch.equal(tokens[2], wordless)
    plain = InstructionEncoder(embedded_config.instruction)
    plain.load_state_dict({key: value for key, value in model.instruction.state_dict().items() if key != "wordless"})
    assert torch.equal(plain(["", "make it brighter", "  "])[1], tokens[1])
    assert not torch.equal(plain([""])[0], wordless)


def test_examples_and_their_branch_come_together(config: EmbeddedConfig, embedded_config: EmbeddedConfig) -> None:
    assert config.without_examples() == embedded_config
    assert EmbeddedConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="wordless"):
        replace(config, instruction=embedded_config.instruction)
    with pytest.raises(ValueError, match="branches"):
        replace(config, generator=embedded_config.generator)
    with pytest.raises(ValueError, match="branches"):
        replace(config, condition=embedded_config.condition)


def test_a_branch_leaves_the_blocks_alone(model: EmbeddedModel) -> None:
    pairs, text = torch.rand(2, 1, 2, 3, 40, 30, generator=torch.Generator().manual_seed(0)), model.instruction([""])
    adapter = model.adapt_shown(pairs, text.expand(2, -1, -1))
    assert adapter.targets == model.generator.targets
    for name, factors in adapter.factors.items():
        assert all(bool(each.any()) == name.startswith("pixels.") for each in factors.values()), name
    assert not torch.equal(adapter.factors["pixels.out"]["lora_B"][0], adapter.factors["pixels.out"]["lora_B"][1])
    with pytest.raises(ValueError, match="branch"):
        model.generator(Condition(torch.zeros(1, 3, model.config.condition.width), branch="other"))


def test_words_are_read_beside_an_example(model: EmbeddedModel) -> None:
    pairs, photo = torch.rand(1, 1, 2, 3, 40, 30), torch.rand(1, 3, 20, 20)
    text = model.instruction(["", "make it brighter"])
    seen = [
        model.condition.shown(pairs.unbind(1), text[:1]).tokens,
        model.condition.shown(pairs.unbind(1), text[1:]).tokens,
        model.condition.shown(pairs.unbind(1), text[:1], photo).tokens,
    ]
    assert not torch.allclose(seen[0], seen[1])
    assert seen[2].shape[1] == seen[0].shape[1] + model.config.condition.num_picture_tokens


def test_the_base_sees_the_photograph_alone(
    model: EmbeddedModel, tmp_path: Path, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another example changes the result, and nothing that the base computes before its first adapter."""
    model.save_pretrained(tmp_path / "model", torch.float32)
    editor = Editor.from_pretrained(tmp_path / "model", loading=LoadingOptions(dtype=torch.float32))
    photo, before = Image.fromarray(scene(40, 24)), Image.fromarray(scene(32, 32, seed=3))
    bright, dark = (before.point([min(255, value * part // 4) for value in range(256)] * 3) for part in (6, 2))
    base: Any = editor.backbone
    seen: list[Tensor] = []
    first: nn.Module = base.network.embed
    first.register_forward_hook(lambda _, __, output: seen.append(output.clone()))
    edited = [
        editor.edit([photo], example=[(before, after)], allow_out_of_scope=True).photo.pixels
        for after in (bright, dark)
    ]
    assert not np.array_equal(*edited)
    assert len(seen) == 4  # each time the example's own picture, to see what is reproduced, and then the photo
    assert torch.equal(seen[1], seen[3])
    assert seen[0].shape != seen[1].shape


def test_words_mean_what_they_meant(model: EmbeddedModel, config: EmbeddedConfig) -> None:
    """The parts for examples change no adapter that is asked for in words."""
    plain = EmbeddedModel(config.without_examples())
    own = plain.state_dict()
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if key in own})
    picture, text = torch.rand(1, 3, 24, 24), model.instruction(["make it brighter"])
    first, second = (each.adapt(picture, text).state_dict() for each in (model, plain))
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_wordless_tokens_learn_to_change_nothing(model: EmbeddedModel, scene: Scene) -> None:
    photographs = [Photograph("one", (torch.from_numpy(scene(80, 72)),))]
    assert model.instruction.wordless is not None
    before = learn_wordless(model, photographs, seed=0, steps=1)
    after = learn_wordless(model, photographs, seed=0, steps=25)
    assert after < before
    assert not model.instruction.wordless.requires_grad
    with pytest.raises(OpenwuError, match="wordless=True"):
        learn_wordless(EmbeddedModel(model.config.without_examples()), photographs, seed=0)


def test_branches_that_do_not_fit_are_named(config: EmbeddedConfig) -> None:
    generator = config.generator
    branch = generator.branches[SHOWN]
    with pytest.raises(OpenwuError, match="rank and alpha"):
        replace(generator, branches={SHOWN: replace(branch, alpha=branch.alpha + 1)})
    other = replace(branch.groups[0], name="elsewhere")
    with pytest.raises(OpenwuError, match="groups: expected some of the generator's own"):
        replace(generator, branches={SHOWN: replace(branch, groups=(other,))})
    with pytest.raises(OpenwuError, match="no branches of a branch"):
        replace(generator, branches={SHOWN: replace(branch, branches={"deeper": branch})})
