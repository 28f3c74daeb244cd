"""recipes/embedded.py at tiny sizes: one training from nothing makes a model that edits by words and by example."""

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

from openwu.backbones.embedded.sentence import SentenceConfig, SentenceReader
from openwu.editor.editor import Editor
from openwu.errors import OpenwuError
from openwu.training.config import StageConfig
from openwu.training.embedded.config import STAGES, EmbeddedRecipe
from openwu.training.embedded.instruction_stages import PhrasesStage
from openwu.training.embedded.model import EmbeddedConfig, EmbeddedModel
from openwu.training.embedded.run import new_model, starting_model, train, trainings_of_words
from openwu.training.loop import train_stage
from openwu.training.run import load_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "embedded.py"


def shortened(config: StageConfig | None, size: int, side: int) -> StageConfig:
    """The stage's own settings at three steps."""
    assert config is not None
    return replace(config, steps=3, shapes=((size, side),), warmup=1)


def tiny_reader(recipe: EmbeddedRecipe) -> SentenceReader:
    return SentenceReader(SentenceConfig(recipe.model.instruction.labels, width=20, num_layers=1, buckets=64))


@pytest.fixture
def whole(
    embedded_config: EmbeddedConfig,
    scene: Callable[..., NDArray[np.uint8]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> EmbeddedRecipe:
    monkeypatch.setattr("openwu.training.embedded.wordless.STEPS", 2)
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed, name in enumerate(("a.jpg", "b.jpg", "life_by_aitzol_berasategi.jpg")):
        Image.fromarray(scene(96, 80, seed)).save(folder / name, quality=95)
    found = load_recipe(RECIPE, [])
    assert isinstance(found, EmbeddedRecipe)
    return replace(
        found,
        model=embedded_config.with_examples(d_model=32, head_dim=16, dim_accumulation=2, blocks=1),
        instruction=shortened(found.instruction, 8, 0),
        phrases=shortened(found.phrases, 8, 0),
        base=shortened(found.base, 2, 24),
        generator=shortened(found.generator, 2, 24),
        examples=shortened(found.examples, 2, 24),
        shared=shortened(found.shared, 2, 24),
        side=64,
        photographs=str(folder),
        bf16=False,
        evaluate_every=0,
        checkpoint_every=2,
        export=None,
    )


def test_the_recipe_has_every_stage_and_all_that_later_trainings_found() -> None:
    found = load_recipe(RECIPE, [])
    assert isinstance(found, EmbeddedRecipe)
    assert found.known == found.stages == STAGES
    assert found.start is None
    assert found.model.condition.examples
    assert found.instruction.ema > 0
    assert found.cameras > 0


def test_one_training_makes_the_whole_model(whole: EmbeddedRecipe, tmp_path: Path, photo: Image.Image) -> None:
    run = tmp_path / "run"
    for _ in STAGES:
        train(whole, run, stop_after=2)  # one stage after another is interrupted and goes on
    train(whole, run)
    at_once = tmp_path / "at_once"
    train(whole, at_once)
    made, same = (EmbeddedModel.from_pretrained(each / "model") for each in (run, at_once))
    assert all(torch.equal(same.state_dict()[name], value) for name, value in made.state_dict().items())
    assert (run / "model/shared/adapter_model.safetensors").exists()
    begun = new_model(whole).state_dict()
    changed = {name for name, value in made.state_dict().items() if not torch.equal(begun[name].half().float(), value)}
    for part in ("instruction.table", "instruction.phrases", "instruction.wordless", "backbone.blocks"):
        assert any(name.startswith(part) for name in changed), part
    for part in ("condition.example", "condition.layers", "generator.branches.shown", "generator.blocks"):
        assert any(name.startswith(part) for name in changed), part

    editor = Editor.from_pretrained(run / "model")
    assert editor.edit(photo, "make it brighter", allow_out_of_scope=True).image.size == photo.size
    before = photo.resize((48, 34))  # of which both sides are those of an example, at least
    pairs = [(before, Image.eval(before, lambda value: value // 2))]
    shown = editor.edit(photo, example=pairs, allow_out_of_scope=True)
    assert shown.image.size == photo.size
    assert shown.reproduced is not None


def test_the_baseline_by_itself_leaves_the_model_as_it_was(whole: EmbeddedRecipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(whole, run, stages=tuple(name for name in STAGES if name != "shared"))
    before = EmbeddedModel.from_pretrained(run / "model").state_dict()
    assert bool(before["instruction.wordless"].any())
    train(whole, run, stages=("shared",))
    after = EmbeddedModel.from_pretrained(run / "model").state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    elsewhere = tmp_path / "elsewhere"  # From a finished model: nothing but the baseline is written.
    for _ in range(2):  # Started again, a finished training writes it again.
        train(replace(whole, start=str(run / "model"), stages=("shared",)), elsewhere)
    assert [file.parent.name for file in (elsewhere / "model").rglob("*.safetensors")] == ["shared"]
    part = tmp_path / "part"  # So is a model of which one part went on; its base has tokens for no words of its own.
    train(replace(whole, start=str(run / "model"), stages=("base",)), part)
    gone_on = EmbeddedModel.from_pretrained(part / "model").state_dict()
    changed = {name for name, value in before.items() if not torch.equal(gone_on[name], value)}
    assert {name.partition(".")[0] for name in changed} == {"backbone", "instruction"}
    assert "instruction.wordless" in changed
    assert bool(gone_on["instruction.wordless"].any())
    half = replace(whole, start=str(run / "model"), stages=("base", "generator"), export=str(tmp_path / "exported"))
    train(half, tmp_path / "half", stages=("base",))  # One stage of several: nothing is written before the last.
    assert not (tmp_path / "exported").exists()
    train(half, tmp_path / "half", stages=("generator",))
    assert (tmp_path / "exported/config.json").exists()
    with pytest.raises(OpenwuError, match="stages: expected some of this recipe's"):
        train(replace(whole, phrases=None), run, stages=("phrases",))


def test_pictures_from_nothing_keep_what_reads_words(whole: EmbeddedRecipe, tmp_path: Path) -> None:
    start = tmp_path / "start"
    model = new_model(replace(whole, seed=5))
    model.base.sentences = SentenceReader(
        SentenceConfig(whole.model.instruction.labels, width=20, num_layers=1, buckets=64)
    )
    model.save_pretrained(start)
    anew = replace(whole, start=str(start), only_words=True, stages=("base", "generator", "examples"))
    train(anew, tmp_path / "run")
    begun, made = (EmbeddedModel.from_pretrained(folder) for folder in (start, tmp_path / "run/model"))
    assert made.base.sentences is not None
    words = {name: value for name, value in begun.instruction.state_dict().items() if name != "wordless"}
    assert all(torch.equal(made.instruction.state_dict()[name], value) for name, value in words.items())
    assert bool(made.instruction.wordless is not None and made.instruction.wordless.any())
    fresh = starting_model(anew)[0].state_dict()
    again = new_model(whole).state_dict()  # Nothing of the start's pictures: the initial weights are the seed's.
    assert all(torch.equal(fresh[name], value) for name, value in again.items() if not name.startswith("instruction."))
    trainings = json.loads((tmp_path / "run/model/provenance.json").read_text(encoding="utf-8"))
    assert trainings["recipe"]["only_words"]
    assert trainings["words"] == []  # Nobody trained the start's.
    assert "then" not in trainings


def test_what_is_told_of_words_is_kept() -> None:
    told = {
        "seconds": {"instruction": 1, "base": 1},
        "then": [
            {"seconds": 3, "recipe": {"wording": {}}},
            {"seconds": {"base": 1, "examples": 2}, "recipe": {"instruction": {}}},
            {"seconds": {"sentence": 1}},
        ],
    }
    found = trainings_of_words(told)
    assert found == [{"seconds": told["seconds"]}, told["then"][0], told["then"][2]]
    assert trainings_of_words({"seconds": {"base": 1}, "words": found}) == found
    assert trainings_of_words({}) == []


def test_a_start_without_examples_keeps_its_sentence_reader(whole: EmbeddedRecipe, tmp_path: Path) -> None:
    model = EmbeddedModel(whole.model.without_examples())
    model.base.sentences = SentenceReader(
        SentenceConfig(whole.model.instruction.labels, width=20, num_layers=1, buckets=64)
    )
    model.save_pretrained(tmp_path)
    grown, _ = starting_model(replace(whole, start=str(tmp_path), stages=("examples",)))
    assert grown.base.sentences is not None


@pytest.mark.parametrize(
    "change",
    [
        {"start": None},
        {"stages": ("base", "generator")},
        {"stages": ("instruction", "base", "generator", "examples")},
    ],
)
def test_words_alone_ask_for_a_start_and_every_picture_stage(whole: EmbeddedRecipe, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="only_words: expected a start that reads words, and stages"):
        replace(
            whole, **{"start": "somewhere", "only_words": True, "stages": ("base", "generator", "examples"), **change}
        )


def test_the_linear_reader_by_itself_leaves_all_tokens(whole: EmbeddedRecipe) -> None:
    model = new_model(whole)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert whole.phrases is not None
    stage = PhrasesStage(model, 0, 8)
    train_stage(stage, whole.phrases)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"instruction.phrases.weight"}
