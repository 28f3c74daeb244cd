"""Recipes for large bases that choose what the generator reads: trained, found again in its folder, edited with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import base_cases
import large_cases
import pytest
import tiny_pipelines
import torch

import openwu
from openwu.backbone.pipeline import PipelineBackbone
from openwu.errors import OpenwuError, TargetError
from openwu.training.large import train_based
from openwu.training.recipe import BasedRecipe, load_recipe

LAYER = {"name": "part-states", "part": "text_encoder_2", "module": "encoder.block.0"}
PROBE = {"name": "denoiser-states", "module": "transformer_blocks.1"}
CHOICES: dict[str, tuple[dict[str, Any], ...]] = {
    "probe": (PROBE,),
    "segments": ({"name": "base"}, LAYER),
    "siglip2": ({"name": "siglip2", "revision": None},),
}
WIDTHS: dict[str, tuple[int, dict[str, int]]] = {
    "probe": (32, {}),
    "segments": (16, {"part0_pictures": 19, "part1_states": 16}),
    "siglip2": (16, {"pictures": 25}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return large_cases.saved("flux_kontext", tmp_path_factory.mktemp("kontext"))


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PipelineBackbone, "condition_pixels", 64 * 64)


@pytest.mark.parametrize("choice", CHOICES)
def test_a_chosen_condition_is_trained_and_edited_with(choice: str, base: Path, tmp_path: Path) -> None:
    pairs = large_cases.write_pairs(tmp_path / "pairs", ((64, 64),) * 4)
    chosen = CHOICES[choice]
    if choice == "siglip2":
        chosen = ({**chosen[0], "weights": str(tiny_pipelines.siglip2(tmp_path / "siglip2"))},)
    recipe = large_cases.recipe("flux_kontext", base, pairs, condition=chosen)
    recipe = replace(recipe, generator=replace(recipe.generator, steps=2))
    train_based(recipe, tmp_path / "run")
    model = tmp_path / "run" / "model"
    found = json.loads((model / "config.json").read_text())
    parts = found["_condition"].get("parts", [found["_condition"]])
    assert [{**part, **asked} for part, asked in zip(parts, chosen, strict=True)] == parts
    assert (found["input_dim"], found.get("more_inputs", {})) == WIDTHS[choice]
    train_based(replace(recipe, cache=""), tmp_path / "asked")
    one, other = large_cases.weights(tmp_path / "run"), large_cases.weights(tmp_path / "asked")
    assert all(torch.equal(value, other[key]) for key, value in one.items()), "cached or asked in every step"
    editor = openwu.Editor.from_pretrained(
        "flux-kontext", base=base, generator=model, device="cpu", options=base_cases.FAST
    )
    assert set(editor.encoder.condition_widths.values()) == {found["input_dim"], *found.get("more_inputs", {}).values()}
    assert editor.edit(tmp_path / "pairs" / "0.png", "make it dark").image.size == (64, 64)


def test_a_choice_on_the_command_line_and_wrong_ones(base: Path, tmp_path: Path) -> None:
    file = large_cases.RECIPES / "flux_kontext.py"
    made = load_recipe(file, [f"condition=({PROBE!r},)"])
    assert isinstance(made, BasedRecipe)
    assert made.condition == (PROBE,)
    with pytest.raises(
        OpenwuError, match=r"override condition: condition: expected encoders such as .* got \{'name': 'cl"
    ):
        load_recipe(file, ["condition=({'name': 'clip'},)"])
    pairs = large_cases.write_pairs(tmp_path / "pairs")
    wrong = large_cases.recipe("flux_kontext", base, pairs, condition=({**PROBE, "module": "transformer_block.1"},))
    with pytest.raises(TargetError, match=r"module: .*near it are transformer_blocks"):
        train_based(wrong, tmp_path / "run")
    assert not (tmp_path / "run" / "cache").exists(), "before anything was loaded"
