"""Recipes for large bases that choose what the generator reads: trained, found again in its folder, edited with."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import base_cases
import large_cases
import pytest
import tiny_pipelines
import torch
import transformers

import openwu
from openwu.backbones import backbone_class
from openwu.backbones.diffusers.loading import part_numbers
from openwu.backbones.diffusers.pipeline import PipelineBackbone
from openwu.conditions.part_states import PartStates
from openwu.conditions.segments import Segments
from openwu.errors import OpenwuError, TargetError
from openwu.files.headers import read_header
from openwu.training.bases.pipelines import new_config, train_pipeline
from openwu.training.config import PipelineRun
from openwu.training.memory import ENCODING, TRAINING, training_plan
from openwu.training.run import load_recipe

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
    train_pipeline(recipe, tmp_path / "run")
    model = tmp_path / "run" / "model"
    found = json.loads((model / "config.json").read_text())
    parts = found["_condition"].get("parts", [found["_condition"]])
    assert [{**part, **asked} for part, asked in zip(parts, chosen, strict=True)] == parts
    assert (found["input_dim"], found.get("more_inputs", {})) == WIDTHS[choice]
    train_pipeline(replace(recipe, cache=""), tmp_path / "asked")
    one, other = large_cases.weights(tmp_path / "run"), large_cases.weights(tmp_path / "asked")
    assert all(torch.equal(value, other[key]) for key, value in one.items()), "cached or asked in every step"
    editor = openwu.Editor.from_pretrained(
        "flux-kontext",
        base=base,
        generator=model,
        loading=openwu.LoadingOptions(device="cpu"),
        sampling=base_cases.FAST,
    )
    assert set(editor.encoder.condition_widths.values()) == {found["input_dim"], *found.get("more_inputs", {}).values()}
    assert editor.edit(tmp_path / "pairs" / "0.png", "make it dark").image.size == (64, 64)


def test_a_choice_on_the_command_line_and_a_wrong_one() -> None:
    file = large_cases.RECIPES / "flux_kontext.py"
    made = load_recipe(file, [f"condition=({PROBE!r},)"])
    assert isinstance(made, PipelineRun)
    assert made.condition == (PROBE,)
    with pytest.raises(
        OpenwuError, match=r"override condition: condition: expected encoders such as .* got \{'name': 'cl"
    ):
        load_recipe(file, ["condition=({'name': 'clip'},)"])


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (({**PROBE, "module": "transformer_block.1"},), r"module: .*near it are transformer_blocks"),
        (
            ({**LAYER, "module": "encoder.blocks.0"},),
            r"of text_encoder_2, got 'encoder\.blocks\.0'; near it are encoder",
        ),
        (
            ({"name": "base"}, {**LAYER, "module": ""}),
            r"expected the path of a module of text_encoder_2, got ''",
        ),
        (
            ({**LAYER, "part": "text_encoder_3"},),
            r"got 'text_encoder_3'; it has .*text_encoder, text_encoder_2",
        ),
        (({**LAYER, "part": "vae"},), r"part: expected the name of an encoder .* got 'vae'; it has"),
    ],
)
def test_names_that_the_base_does_not_have_are_told_before_it_is_loaded(
    choice: Any, message: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = large_cases.write_pairs(tmp_path / "pairs")
    monkeypatch.setattr(PipelineBackbone, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    wrong = large_cases.recipe("flux_kontext", base, pairs, condition=choice)
    with pytest.raises(TargetError, match=message):
        train_pipeline(wrong, tmp_path / "run")
    assert not (tmp_path / "run" / "cache").exists()


def test_a_part_that_cannot_be_made_hollow_is_asked_later(base: Path, tmp_path: Path) -> None:
    """transformers may not make every model from its config alone; then names wait until it is loaded."""
    copy = Path(shutil.copytree(base, tmp_path / "base"))
    index = json.loads((copy / "model_index.json").read_text())
    index["text_encoder_2"][1] = "NoSuchModel"
    (copy / "model_index.json").write_text(json.dumps(index))
    hollow: Any = backbone_class("flux-kontext").hollow(copy)  # type: ignore[attr-defined]
    encoder = PartStates(hollow, "text_encoder_2", "anything")
    assert encoder.settings["module"] == "anything"
    loaded: Any = backbone_class("flux-kontext").from_pretrained(base)
    with pytest.raises(TargetError, match=r"got 'encoder\.blok\.0'; near it are encoder\.block\.0"):
        PartStates(loaded, "text_encoder_2", "encoder.blok.0")


def test_siglip2_is_loaded_once_and_counted_before(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_pipelines.siglip2(tmp_path / "siglip2")
    held = sum(math.prod(shape) for _, shape in read_header(folder / "model.safetensors").values())
    loads: list[Any] = []
    real = transformers.Siglip2Model.from_pretrained

    def counting(*args: Any, **how: Any) -> Any:
        loads.append(args)
        return real(*args, **how)

    monkeypatch.setattr(transformers.Siglip2Model, "from_pretrained", counting)
    hollow: Any = backbone_class("flux-kontext").hollow(base)  # type: ignore[attr-defined]
    both = Segments(hollow, [{"name": "base"}, {"name": "siglip2", "weights": str(folder)}])
    # Computed in float32; the one number of the file that is no weight of a pass counts, too.
    assert both.own_bytes == 4 * held
    assert loads == []
    recipe = large_cases.recipe("flux_kontext", base, tmp_path / "none", condition=({"name": "siglip2"},))
    config = new_config(recipe, hollow)
    numbers, cuda = part_numbers(base), torch.device("cuda")
    less = training_plan(recipe, config, numbers, "transformer", cuda)
    more = training_plan(recipe, config, numbers, "transformer", cuda, reader=both.own_bytes)
    assert sum(more.phases[ENCODING].values()) - sum(less.phases[ENCODING].values()) == 4 * held
    assert more.phases[TRAINING] == less.phases[TRAINING], "dropped once all pairs are encoded"
    kept = training_plan(replace(recipe, encoders="keep"), config, numbers, "transformer", cuda, reader=both.own_bytes)
    assert kept.phases[TRAINING]["condition encoder"] == 4 * held
    pairs = large_cases.write_pairs(tmp_path / "pairs", ((64, 64),) * 4)
    chosen = ({"name": "siglip2", "weights": str(folder)},)
    recipe = large_cases.recipe("flux_kontext", base, pairs, condition=chosen)
    train_pipeline(replace(recipe, generator=replace(recipe.generator, steps=1)), tmp_path / "run")
    assert len(loads) == 1
    assert "condition encoder 0.00 GB" in capsys.readouterr().err
