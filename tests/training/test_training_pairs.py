"""The embedded model goes on with pairs of one's own: what is drawn, what is held back, and `openwu train`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from openwu import cli
from openwu.backbones.embedded.network import place_planes
from openwu.data.pairs import Pairs, pairs_hashes, read_pairs, split_pairs
from openwu.errors import CheckpointError, DatasetError, OpenwuError
from openwu.training.config import StageConfig
from openwu.training.embedded.config import PairsRecipe
from openwu.training.embedded.model import EmbeddedModel
from openwu.training.embedded.own_pairs import OwnPairSampler, PairsStage
from openwu.training.embedded.rehearsal import photographs_of
from openwu.training.embedded.run import train_pairs
from openwu.training.loop import train_stage
from openwu.training.micro_batch import MicroBatch, take_rows
from openwu.training.retention import RetentionWarning
from openwu.training.run import load_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "own_pairs.py"
SIDE = 32

pytestmark = pytest.mark.filterwarnings("ignore:.* are lost on average")
"""The untrained model knows nothing that could be kept."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two tasks of three pairs: darker, and inverted with a reference."""
    folder, lines = tmp_path / "data", []
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(6):
        pixels = generator.integers(0, 256, (40 + i, 48, 3), dtype=np.uint8)
        target = pixels // 2 if i < 3 else 255 - pixels
        names = [f"{i}_in.png", f"{i}_out.png", f"{i}_ref.png"]
        for name, each in zip(names, (pixels, target, pixels[::-1]), strict=True):
            Image.fromarray(each).save(folder / name)
        entry = {"images": [names[0]], "instruction": "darker", "target": names[1], "task": "darken"}
        if i >= 3:
            entry |= {"images": [names[0], names[2]], "instruction": "negative", "task": "invert"}
        lines.append(json.dumps(entry))
    (folder / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def recipe(data: Path, model_folder: Path) -> PairsRecipe:
    stage = StageConfig(steps=4, shapes=((4, 16), (4, 32)), learning_rate=2e-3, warmup=2)
    return PairsRecipe(
        name="tiny", generator=stage, data=str(data), start=str(model_folder), side=SIDE, bf16=False,
        checkpoint_every=2, evaluate_every=2, log_every=1,
    )  # fmt: skip


def test_the_last_pairs_of_every_task_are_held_back(data: Path) -> None:
    pairs = read_pairs(data)
    training, held_back = split_pairs(pairs, 0.34)
    assert [pair.where for pair in held_back.pairs] == ["pairs.jsonl:3", "pairs.jsonl:6"]
    assert {*training.pairs, *held_back.pairs} == set(pairs.pairs)
    assert len(split_pairs(pairs, 0.0)[1]) == 0
    assert [len(part) for part in split_pairs(pairs, 0.99)] == [2, 4]
    assert len(split_pairs(Pairs(pairs.pairs[:1]), 0.5)[0]) == 1


def test_picture_and_target_are_cut_alike(data: Path) -> None:
    sampler = OwnPairSampler(read_pairs(data), ((6, 16), (6, 32)), SIDE, seed=3)
    batch = sampler.batch(0)
    assert (sampler.size(0), batch.whole.shape, batch.picture.shape) == (6, (6, 3, SIDE, SIDE), (6, 3, 16, 16))
    assert sorted(batch.names) == ["darken"] * 3 + ["invert"] * 3
    for i, name in enumerate(batch.names):
        # Halving and inverting commute with cutting and scaling, up to the rounding of bytes.
        target = batch.picture[i] / 2 if name == "darken" else 1 - batch.picture[i]
        torch.testing.assert_close(batch.target[i], target, atol=2.5 / 255, rtol=0)
        assert bool(batch.present[i]) == (name == "invert") == bool(batch.reference[i].any())
    assert torch.equal(batch.picture, batch.whole[:, :, :16, :16])
    assert torch.equal(batch.planes[0, 1:], place_planes(SIDE, SIDE)[:, :16, :16])
    again, other = sampler.batch(0), sampler.batch(2)
    assert torch.equal(again.picture, batch.picture)
    assert not torch.equal(other.picture, batch.picture)


def test_openwu_train_learns_pairs_and_the_model_edits(
    recipe: PairsRecipe, data: Path, model_folder: Path, tmp_path: Path
) -> None:
    """The recipe of the tree, made small on the command line."""
    small = [
        "generator.shapes=((4, 16),)", f"side={SIDE}", "generator.steps=2", "bf16=false", f"data={data}",
        f"start={model_folder}", "evaluate_every=1", "log_every=1",
    ]  # fmt: skip
    assert cli.main(["train", str(RECIPE), *small, "--output", str(tmp_path / "run")]) == 0
    before, after = (EmbeddedModel.from_pretrained(f) for f in (model_folder, tmp_path / "run" / "model"))
    assert after.config.instruction.labels == ("brighten", "darken", "blur", "invert", "out_of_scope")
    for name, value in before.state_dict().items():
        own = name in [
            f"instruction.{part}" for part in ("classify.weight", "classify.bias", "phrases.weight", "centres")
        ]
        assert own or torch.allclose(value, after.state_dict()[name], atol=1e-6, rtol=1e-3), name
    stored = json.loads((tmp_path / "run" / "model" / "provenance.json").read_text())
    provenance = stored["then"][-1]  # What the start said of itself keeps standing before it.
    assert provenance["recipe"]["data"] == str(data)
    assert provenance["recipe"]["generator"]["ema"] == 0.9
    assert len(provenance["pairs"]) == 6
    known = provenance["known"]
    assert sorted(known["each"]) == ["blur", "brighten", "darken"]
    assert known["before"] == pytest.approx(sum(was for was, _ in known["each"].values()) / 3, abs=1e-3)
    output = tmp_path / "edited.png"
    command = ["edit", str(data / "0_in.png"), "--instruction", "darken", "--model", str(tmp_path / "run" / "model")]
    assert cli.main([*command, "--output", str(output), "--allow-out-of-scope", "--quiet"]) == 0
    with Image.open(output) as edited:
        assert edited.size == (48, 40)


def test_the_loss_falls(recipe: PairsRecipe, tmp_path: Path) -> None:
    recipe = replace(recipe, generator=replace(recipe.generator, steps=30, learning_rate=4e-3, schedule="constant"))
    model = EmbeddedModel.from_pretrained(recipe.start or "")
    training, held_back = split_pairs(read_pairs(recipe.data or ""), recipe.held_back)
    stage = PairsStage(recipe, model, training, held_back)
    train_pairs(recipe, tmp_path)
    after_stage = PairsStage(recipe, EmbeddedModel.from_pretrained(tmp_path / "model"), training, held_back)
    before, after = (
        [float(each.losses(step)[1].detach().mean()) for step in range(4)] for each in (stage, after_stage)
    )
    assert np.mean(after) < np.mean(before) - 0.3
    scalars = after_stage.evaluate().scalars
    assert {"psnr/darken", "psnr/invert", "psnr_mean", "adapter/within", "adapter/across"} <= set(scalars)
    assert 0 < scalars["adapter/relative_norm"] < scalars["adapter/relative_norm_max"]


def test_stopped_and_continued_is_the_same_and_other_data_is_refused(recipe: PairsRecipe, tmp_path: Path) -> None:
    train_pairs(recipe, tmp_path / "whole")
    train_pairs(recipe, tmp_path / "parts", stop_after=3)
    assert not (tmp_path / "parts" / "model").exists()
    train_pairs(replace(recipe, generator=replace(recipe.generator, accumulate=1), log_every=3), tmp_path / "parts")
    one, other = (load_file(tmp_path / f / "generator" / "state.safetensors") for f in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    listing = Path(recipe.data or "") / "pairs.jsonl"
    listing.write_text(listing.read_text().replace("darker", "darker still", 1))
    with pytest.raises(CheckpointError, match=r"another recipe \(changed: pairs\)"):
        train_pairs(recipe, tmp_path / "whole")


def test_a_start_that_changed_is_refused(recipe: PairsRecipe, tmp_path: Path) -> None:
    start = tmp_path / "start"
    model = EmbeddedModel.from_pretrained(recipe.start or "")
    model.save_pretrained(start, torch.float32)
    recipe = replace(recipe, start=str(start))
    train_pairs(recipe, tmp_path / "run", stop_after=1)
    train_pairs(recipe, tmp_path / "run", stop_after=1)
    model.instruction.query.add_(1)
    model.save_pretrained(start, torch.float32)
    with pytest.raises(CheckpointError, match=r"another recipe \(changed: start\)"):
        train_pairs(recipe, tmp_path / "run")


def test_broken_data_are_reported_whole_before_the_first_step(recipe: PairsRecipe, tmp_path: Path) -> None:
    listing = Path(recipe.data or "") / "pairs.jsonl"
    lines = listing.read_text().splitlines()
    lines[1], lines[4] = "{", lines[4].replace("4_out", "none")
    listing.write_text("\n".join(lines))
    with pytest.raises(DatasetError, match=r"2 problems(.|\n)*pairs\.jsonl:2: (.|\n)*pairs\.jsonl:5: target"):
        train_pairs(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(OpenwuError, match="data: expected a JSONL file or a folder of pairs; pass data=PATH"):
        train_pairs(replace(recipe, data=None), tmp_path / "run")


def stage_of(recipe: PairsRecipe) -> PairsStage:
    training, held_back = split_pairs(read_pairs(recipe.data or ""), recipe.held_back)
    return PairsStage(recipe, EmbeddedModel.from_pretrained(recipe.start or ""), training, held_back)


def test_half_of_every_batch_asks_for_known_edits_and_the_past_self_answers(recipe: PairsRecipe) -> None:
    """The answers are those of the start, whatever the trained weights are by then."""
    stage = stage_of(recipe)
    before = stage.batches.batch(1)
    assert before.names[:2] == ("darken", "invert") or before.names[:2] == ("invert", "darken")
    assert set(before.names[2:]) <= {"brighten", "darken", "blur"}  # the labels that the model has
    start = EmbeddedModel.from_pretrained(recipe.start or "")
    text = start.instruction(before.sentences[2:])
    with torch.no_grad():
        adapter = start.adapt(before.whole[2:], text, before.reference[2:], before.present[2:])
        expected = start.edit(before.picture[2:], before.planes[2:], text, adapter.scaled(before.dial[2:]), raw=True)
    torch.testing.assert_close(before.target[2:], expected)
    with torch.no_grad():
        for parameter in stage.trained.parameters():
            parameter.add_(1.0)
    assert torch.equal(stage.batches.batch(1).target, before.target)
    assert stage.batches.size(1) == len(before.names) == 4


def test_rehearsal_keeps_what_the_model_did(recipe: PairsRecipe) -> None:
    """Distance of the trained models' answers to known requests from the start's."""
    config = replace(recipe.generator, steps=20, learning_rate=1e-3, schedule="constant")
    asked = stage_of(recipe).batches.batch(900)
    known = take_rows(asked, slice(2, 4))
    moved = []
    for rehearsed in (0.5, 0.0):
        stage = stage_of(replace(recipe, generator=config, rehearsed=rehearsed))
        train_stage(stage, config)
        with torch.no_grad():
            answer = stage.predict(known, stage.read(known))
        moved.append(float((answer - known.target).square().mean()))
    assert moved[0] < 0.5 * moved[1], moved


def test_a_training_without_rehearsal_warns(recipe: PairsRecipe, tmp_path: Path) -> None:
    with pytest.warns(RetentionWarning, match="rehearsed=0: nothing keeps the 3 edits that the start knows"):
        train_pairs(replace(recipe, rehearsed=0.0), tmp_path, stop_after=1)


def test_rehearsal_needs_room_in_a_batch(recipe: PairsRecipe, tmp_path: Path) -> None:
    single = replace(recipe, generator=replace(recipe.generator, shapes=((1, 16),)))
    with pytest.raises(OpenwuError, match=r"rehearsed: expected a share .* in a batch of 1, got 0\.5; enlarge"):
        train_pairs(single, tmp_path)
    with pytest.raises(ValueError, match="rehearsed: expected a share from 0 to below 1"):
        replace(recipe, rehearsed=1.0)


def test_pictures_of_ones_own_are_photographs_for_known_edits() -> None:
    pictures = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in ((40, 60), (200, 100), (96, 96))]
    small, tall, square = photographs_of(pictures, side=64)
    assert [scale.shape for scale in small.scales] == [(64, 96, 3)]  # enlarged
    assert [scale.shape for scale in tall.scales] == [(200, 100, 3), (150, 75, 3)]
    assert torch.equal(square.scales[0], pictures[2].permute(1, 2, 0))
    assert len(square.scales) == 2


def test_wordings_are_varied_and_a_line_may_have_several(recipe: PairsRecipe) -> None:
    listing = Path(recipe.data or "") / "pairs.jsonl"
    listing.write_text(listing.read_text().replace('"darker"', '["darker", "less light"]'))
    assert read_pairs(listing).pairs[0].instructions == ("darker", "less light")
    stage = stage_of(recipe)
    seen = {sentence for step in range(12) for sentence in stage.pairs.batch(step).sentences}
    assert len(seen) > 6
    assert any("less light" in sentence for sentence in seen)
    assert stage.pairs.batch(5).sentences == stage.pairs.batch(5).sentences
    assert stage.validation is not None
    assert set(stage.validation.batch(0).sentences) <= {"darker", "less light", "negative"}
    listing.write_text(listing.read_text().replace('["darker", "less light"]', '["darker", ""]'))
    with pytest.raises(DatasetError, match=r"instruction: expected text, or a list of wordings, got \['darker', ''\]"):
        read_pairs(listing)


def test_two_references_are_refused(recipe: PairsRecipe, tmp_path: Path) -> None:
    listing = Path(recipe.data or "") / "pairs.jsonl"
    listing.write_text(listing.read_text().replace('"5_ref.png"', '"5_ref.png", "4_in.png"'))
    with pytest.raises(DatasetError, match=r"at most one reference.* got more at pairs\.jsonl:6"):
        train_pairs(recipe, tmp_path / "run")


def test_broken_pairs_are_named_by_their_line(recipe: PairsRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    training, held_back = split_pairs(read_pairs(recipe.data or ""), recipe.held_back)
    stage = PairsStage(recipe, EmbeddedModel.from_pretrained(recipe.start or ""), training, held_back)
    sound = stage.pairs.batch(0)
    broken = sound.target.clone()
    broken[1] = torch.nan
    monkeypatch.setattr(OwnPairSampler, "batch", lambda *_: replace(sound, target=broken))
    pair, _ = training.step(0, 2, recipe.seed)[1]
    assert stage.not_finite(0, MicroBatch(0, 2)) == [f"{pair.where} ({sound.sentences[1]!r})"]
    assert stage.not_finite(0, MicroBatch(1, 2)) == []


def test_the_recipe_of_the_tree_is_sound() -> None:
    recipe = load_recipe(RECIPE, ["data=somewhere", "generator.steps=3"])
    assert isinstance(recipe, PairsRecipe)
    assert (recipe.data, recipe.start, recipe.generator.steps) == ("somewhere", None, 3)
    with pytest.raises(OpenwuError, match=r"generator\.shapes: expected equally many requests"):
        load_recipe(RECIPE, ["generator.shapes=((4, 64), (5, 64))"])
    with pytest.raises(OpenwuError, match=r"generator\.shapes: expected crops of 1 to side=192"):
        load_recipe(RECIPE, ["generator.shapes=((4, 256),)"])


def test_hashes_follow_pictures(data: Path) -> None:
    before = pairs_hashes(read_pairs(data))
    Image.new("RGB", (48, 42)).save(data / "2_ref.png")
    assert pairs_hashes(read_pairs(data)) == before
    Image.new("RGB", (48, 42)).save(data / "2_out.png")
    after = pairs_hashes(read_pairs(data))
    assert {name for name in before if before[name] != after[name]} == {"pairs.jsonl:3"}
