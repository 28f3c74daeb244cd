"""Conditions with segments of several widths, and groups whose layers stand at paths of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from openwu.config import ConfigError, GeneratorConfig, LayerGroup, PlainTarget
from openwu.generator.inference.fast import FastGenerator, FastOptions
from openwu.generator.model import ParameterGenerator
from openwu.types import Condition, Segment

GROUPS = (
    LayerGroup("", 2, (PlainTarget("fc", 6, 8),), "narrow", paths=("down.0", "up.1.block")),
    LayerGroup("mid.", 2, (PlainTarget("fc", 8, 8),), "middle"),
)


def config(**more: Any) -> GeneratorConfig:
    fields: dict[str, Any] = {
        "rank": 2, "alpha": 2, "token_dim": 8, "input_dim": 5, "d_model": 16, "head_dim": 8, "dim_accumulation": 1,
        "num_pg_layers": 1, "groups": GROUPS, "more_inputs": {"pictures": 7, "sound": 3},
    }  # fmt: skip
    return GeneratorConfig(**{**fields, **more})


def generator(**more: Any) -> ParameterGenerator:
    torch.manual_seed(0)
    return ParameterGenerator(config(**more), b_init_std=0.5)


def condition(batch: int = 2) -> Condition:
    draws = torch.Generator().manual_seed(1)

    def tokens(length: int, width: int) -> torch.Tensor:
        return torch.randn(batch, length, width, generator=draws)

    mask = torch.ones(batch, 4, dtype=torch.bool)
    mask[-1, 2:] = False
    return Condition(tokens(3, 5), None, {"sound": Segment(tokens(2, 3)), "pictures": Segment(tokens(4, 7), mask)})


def flat(adapter: Any) -> torch.Tensor:
    return torch.cat([part.flatten(1) for pair in adapter.pairs.values() for part in pair], dim=1)


def test_each_segment_matters_and_has_a_projection_of_its_own() -> None:
    module, asked = generator(), condition()
    before = flat(module(asked))
    for name in ("pictures", "sound"):
        segment = asked.more[name]
        changed = replace(asked, more={**asked.more, name: replace(segment, tokens=segment.tokens + 1)})
        assert not torch.allclose(flat(module(changed)), before)
    flat(module(asked)).square().sum().backward()
    for projection in module.more_in.values():
        assert projection.weight.grad is not None
        assert bool((projection.weight.grad.abs() > 0).any())


def test_segments_stand_one_after_another_in_the_config_s_order() -> None:
    """The same numbers as one segment of the projected tokens, read without any projection."""
    module, asked = generator(), condition(1)
    c = torch.cat(
        [
            module.hidden_in(asked.tokens),
            module.more_in["pictures"](asked.more["pictures"].tokens[:, :2]),
            module.more_in["sound"](asked.more["sound"].tokens),
        ],
        dim=1,
    )
    plain = generator(more_inputs={}, input_dim=16)
    state = {
        name: value for name, value in module.state_dict().items() if not name.startswith(("hidden_in", "more_in"))
    }
    plain.load_state_dict({**state, "hidden_in.weight": torch.eye(16), "hidden_in.bias": torch.zeros(16)})
    torch.testing.assert_close(flat(module(asked)), flat(plain(c)), rtol=1e-5, atol=1e-6)


def test_a_sample_s_adapter_does_not_depend_on_the_padding_beside_it() -> None:
    module, asked = generator(), condition()
    alone = Condition(
        asked.tokens[1:],
        None,
        {"sound": Segment(asked.more["sound"].tokens[1:]), "pictures": Segment(asked.more["pictures"].tokens[1:, :2])},
    )
    torch.testing.assert_close(flat(module(asked))[1:], flat(module(alone)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [FastOptions(), FastOptions(chunk_bytes=1), FastOptions(keep_first_block=False)])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_fast_path_reads_segments_and_their_masks(options: FastOptions, batch: int) -> None:
    """`batch` 1: one sample whose mask has a gap; its padding holds numbers that nothing may read."""
    module, asked = generator().double().requires_grad_(False), condition(batch).to(torch.float64)
    expected = flat(module(asked))
    fast = FastGenerator(module, options)
    torch.testing.assert_close(flat(fast(asked)), expected, rtol=1e-12, atol=1e-13)
    pictures = asked.more["pictures"]
    assert pictures.mask is not None
    loud = torch.where(pictures.mask[:, :, None], pictures.tokens, 1e6)
    padded = replace(asked, more={**asked.more, "pictures": replace(pictures, tokens=loud)})
    fast.workspace.poison()
    torch.testing.assert_close(flat(fast(padded)), expected, rtol=1e-12, atol=1e-13)
    unmasked = replace(asked, more={**asked.more, "pictures": replace(pictures, mask=None)})
    assert not torch.allclose(flat(fast(unmasked))[-1], expected[-1])
    torch.testing.assert_close(flat(fast(unmasked)), flat(module(unmasked)), rtol=1e-12, atol=1e-13)


def test_it_is_saved_and_loaded_whole(tmp_path: Path) -> None:
    module = generator()
    module.save_pretrained(tmp_path / "saved")
    loaded = ParameterGenerator.from_pretrained(tmp_path / "saved")
    assert loaded.config == module.config
    assert torch.equal(flat(loaded(condition())), flat(module(condition())))


def test_targets_have_the_paths_of_their_layers() -> None:
    assert [target.name for target in generator().targets] == ["down.0.fc", "up.1.block.fc", "mid.0.fc", "mid.1.fc"]


def test_nothing_changes_for_a_generator_without_more_inputs() -> None:
    """The same draws and names as before there were segments."""
    plain = generator(more_inputs={})
    assert "more_inputs" not in plain.config.to_dict()
    assert not [name for name in plain.state_dict() if "more_in" in name]
    torch.manual_seed(0)
    ParameterGenerator(config(more_inputs={}), b_init_std=0.5)
    after_plain = torch.rand(1)
    torch.manual_seed(0)
    ParameterGenerator(config(), b_init_std=0.5)
    assert not torch.equal(torch.rand(1), after_plain), "further projections draw numbers of their own"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"more": {}}, r"expected the further segments \['pictures', 'sound'\], got \[\]"),
        ({"more": {"sound": Segment(torch.zeros(2, 2, 4))}}, "expected the further segments"),
    ],
)
def test_segments_that_are_missing_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generator()(replace(condition(), **change))


def test_segments_of_wrong_shapes_are_named() -> None:
    asked = condition()
    wide = {**asked.more, "sound": Segment(torch.zeros(2, 2, 4))}
    with pytest.raises(ValueError, match=r"condition sound: expected \[b, L, 3\] .* got \[2, 2, 4\]"):
        generator()(replace(asked, more=wide))
    fewer = {**asked.more, "sound": Segment(torch.zeros(1, 2, 3))}
    with pytest.raises(ValueError, match="as many samples in every segment"):
        generator()(replace(asked, more=fewer))


def test_a_condition_moves_and_casts_with_all_its_segments() -> None:
    cast = condition().to(torch.bfloat16)
    assert {cast.tokens.dtype, *(segment.tokens.dtype for segment in cast.more.values())} == {torch.bfloat16}
    assert cast.more["pictures"].mask is not None
    assert cast.more["pictures"].mask.dtype == torch.bool


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"paths": ["a"]}, "paths: expected 2, one per layer, got 1"),
        ({"paths": "a.b"}, "paths: expected a list of paths, got 'a.b'"),
        ({"paths": ["a", "b..c"]}, "paths: expected a dotted path, got 'b..c'"),
        ({"paths": ["a", "b"], "prefix": "blocks."}, "paths: expected an empty prefix"),
    ],
)
def test_paths_that_cannot_be_are_refused(group: dict[str, Any], message: str) -> None:
    data = config().to_dict()
    data["groups"][0] |= group
    with pytest.raises(ConfigError, match=message):
        GeneratorConfig.from_dict(data)


@pytest.mark.parametrize("wrong", [{"pictures": 0}, {"a.b": 3}, ["pictures"], {"pictures": True}])
def test_more_inputs_that_cannot_be_are_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="more_inputs"):
        GeneratorConfig.from_dict({**config().to_dict(), "more_inputs": wrong})


def test_a_group_with_paths_is_never_the_released_form() -> None:
    single = LayerGroup("", 2, (PlainTarget("fc", 6, 8),), paths=("a", "b"))
    assert not config(groups=(single,)).is_released_form
    assert GeneratorConfig.from_dict(config(groups=(single,)).to_dict()).groups == (single,)
