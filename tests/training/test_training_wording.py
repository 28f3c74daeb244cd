"""The instruction encoder goes on: what moves, what its frozen readers may rely on, and `openwu train`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openwu.training.config import StageConfig
from openwu.training.embedded.config import WordingRecipe
from openwu.training.embedded.instruction_stages import WordingStage
from openwu.training.embedded.model import EmbeddedModel
from openwu.training.embedded.run import train_wording
from openwu.training.loop import LoopConfig, train_stage
from openwu.training.micro_batch import MicroBatch
from openwu.training.record import PROVENANCE
from openwu.training.run import load_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "wording.py"


@pytest.fixture
def recipe(model_folder: Path) -> WordingRecipe:
    stage = StageConfig(steps=4, shapes=((8, 0),), learning_rate=3e-3, warmup=2)
    return WordingRecipe(
        name="tiny", wording=stage, start=str(model_folder), checkpoint_every=2, evaluate_every=4, log_every=2
    )


def model_of(recipe: WordingRecipe) -> EmbeddedModel:
    assert recipe.start is not None
    return EmbeddedModel.from_pretrained(recipe.start)


def test_understood_sentences_keep_their_tokens_and_others_are_drawn_to_what_is_typical(recipe: WordingRecipe) -> None:
    model = model_of(recipe)
    encoder = model.instruction
    torch.nn.init.normal_(encoder.centres)
    stage = WordingStage(recipe, model)
    sentences = ["make it darker", "warmer please", "把照片调亮"]
    read = encoder.read_words(sentences).detach()
    taken = encoder.label_log_probabilities(sentences).argmax(1)
    target = torch.where(torch.tensor([True, False, True]), taken, (taken + 1) % len(stage.labels))
    degrees = torch.tensor([1, 2, 0])
    expected = stage.expected(sentences, target, degrees)
    assert torch.equal(expected[[0, 2]], read[[0, 2]])
    torch.testing.assert_close(expected[1], (encoder.centres[target[1]] + encoder.degree_centres[2]).detach())
    with torch.no_grad():
        encoder.place.add_(1)  # what was expected does not move with what is trained
    assert torch.equal(stage.expected(sentences, target, degrees), expected)


def test_holding_keeps_tokens_nearer_to_what_was_expected(recipe: WordingRecipe, tmp_path: Path) -> None:
    config = replace(recipe.wording, steps=25, decay=0.0)
    loop = LoopConfig("{}", 100, 100, 100)
    away = {}
    for hold in (0.0, 10.0):
        model = model_of(recipe)
        stage = WordingStage(replace(recipe, hold=hold, dropped=0.0), model)
        train_stage(stage, config, loop, tmp_path / str(hold))
        drawn = stage.batch(3)
        tokens = model.instruction.read_rows(drawn.rows)
        away[hold] = float(
            (tokens.detach() - stage.expected(drawn.sentences, drawn.target, drawn.degrees)).square().mean()
        )
    assert away[10.0] < 0.7 * away[0.0]


def test_parts_of_a_batch_add_up(recipe: WordingRecipe) -> None:
    stage = WordingStage(recipe, model_of(recipe))
    totals = []
    for count in (1, 3):
        losses = []
        for index in range(count):
            with stage.loss(5, MicroBatch(index, count)) as loss:
                losses.append(float(loss.detach()))
        totals.append(sum(losses))
    assert totals[0] == pytest.approx(totals[1], abs=1e-5)


@pytest.mark.filterwarnings("ignore::openwu.training.retention.RetentionWarning")  # a few steps of a tiny encoder
def test_the_encoder_alone_changes_and_provenance_is_added_to(recipe: WordingRecipe, tmp_path: Path) -> None:
    train_wording(replace(recipe, export=str(tmp_path / "export")), tmp_path / "run")
    before, after = model_of(recipe).state_dict(), EmbeddedModel.from_pretrained(tmp_path / "export").state_dict()
    changed = {name.partition(".")[0] for name in before if not torch.equal(before[name].half().float(), after[name])}
    assert changed == {"instruction"}
    for typical in ("instruction.centres", "instruction.degree_centres"):
        assert torch.equal(before[typical].half().float(), after[typical])
    again = replace(recipe, start=str(tmp_path / "export"))
    train_wording(again, tmp_path / "again")
    stored = json.loads((tmp_path / "again" / "model" / PROVENANCE).read_text(encoding="utf-8"))
    assert [each["recipe"]["start"] for each in stored["then"]] == [recipe.start, again.start]
    assert all(each["sentences"] and each["seconds"]["wording"] >= 0 for each in stored["then"])


def test_the_recipe_of_the_shipped_weights(tmp_path: Path) -> None:
    made = load_recipe(RECIPE, ["wording.steps=2", f"start={tmp_path}"])
    assert isinstance(made, WordingRecipe)
    assert (made.wording.steps, made.start) == (2, str(tmp_path))
