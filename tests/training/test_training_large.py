"""Recipes for large bases, on tiny ones in folders: from pairs to an edit, cached, resumed, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import large_cases
import pytest
import torch

from openwu import cli
from openwu.backbones import backbone_class
from openwu.backbones.diffusers import pipeline
from openwu.backbones.diffusers.pipeline import PipelineBackbone
from openwu.errors import CheckpointError, DatasetError, OpenwuError
from openwu.training.bases import pipelines as large
from openwu.training.bases.pipelines import train_pipeline
from openwu.training.config import PipelineRun, StageConfig

EVERY = tuple(large_cases.LARGE)
CLASSES = {name: backbone_class(name.replace("_", "-")) for name in EVERY}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: large_cases.saved(name, tmp_path_factory.mktemp(name)) for name in EVERY}


@pytest.fixture(autouse=True)
def processors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if torchvision were there, and conditions of few tokens."""
    import tiny_multimodal
    import transformers

    monkeypatch.setattr(pipeline, "library", lambda *_: None)
    for kind, patch in (("Qwen2VLProcessor", 14), ("Qwen3VLProcessor", 16)):
        made = tiny_multimodal.processor(kind, patch)
        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", lambda *_, made=made, **__: made)
    monkeypatch.setattr(PipelineBackbone, "condition_pixels", 64 * 64)
    return


def asked(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """How many requests the encoders are asked about from here on, call by call."""
    calls: list[int] = []
    original = CLASSES[name].latent_batch

    def counted(self: Any, requests: Any, targets: Any) -> Any:
        calls.append(len(requests))
        return original(self, requests, targets)

    monkeypatch.setattr(CLASSES[name], "latent_batch", counted)
    return calls


def curve(folder: Path, name: str) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "generator"))
    events.Reload()
    return [point.value for point in events.Scalars(name)]


@pytest.mark.parametrize("name", EVERY)
def test_from_pairs_to_an_edit(
    name: str, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """As a user calls it; a second run of more steps would not ask the encoders, nor does a second epoch."""
    pairs = large_cases.write_pairs(tmp_path / "pairs")
    calls = asked(monkeypatch, name)
    file = str(large_cases.RECIPES / f"{name}.py")
    run = tmp_path / "run"
    overrides = [*large_cases.SMALL, f"data={pairs}", f"base={bases[name]}"]
    assert cli.main(["train", file, *overrides, "--output", str(run)]) == 0
    assert calls == [1] * 6
    told = capsys.readouterr().err
    assert "memory on cpu: about" in told
    assert "denoiser" in told
    found = json.loads((run / "model" / "provenance.json").read_text())
    assert found["recipe"]["model"] == name.replace("_", "-")
    assert len(found["pairs"]) == 6
    out = tmp_path / "out.png"
    words = ["edit", str(tmp_path / "pairs" / "0.png"), "--instruction", "make it dark", "--output", str(out)]
    place = ["--model", name.replace("_", "-"), "--base", str(bases[name]), "--generator", str(run / "model")]
    assert cli.main([*words, *place, "--steps", "2", "--pixels", "4096", "--device", "cpu"]) == 0
    assert out.is_file()
    calls.clear()
    assert cli.main(["train", file, *overrides, f"cache={run / 'cache'}", "--output", str(tmp_path / "other")]) == 0
    assert calls == []
    one, other = large_cases.weights(run), large_cases.weights(tmp_path / "other")
    assert all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize("name", EVERY)
def test_cached_rows_train_as_encoders_asked_in_every_step(
    name: str, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = large_cases.recipe(name, bases[name], large_cases.write_pairs(tmp_path / "pairs"))
    train_pipeline(recipe, tmp_path / "cached")
    calls = asked(monkeypatch, name)
    train_pipeline(replace(recipe, cache=""), tmp_path / "asked")
    assert len(calls) == 2 + 2 * 4, "two pairs held back, two of each step"
    one, other = large_cases.weights(tmp_path / "cached"), large_cases.weights(tmp_path / "asked")
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_the_loss_falls_on_a_few_pairs(bases: dict[str, Path], tmp_path: Path) -> None:
    pairs = large_cases.write_pairs(tmp_path / "pairs", ((64, 64),) * 4)
    stage = StageConfig(steps=24, shapes=((4, 0),), learning_rate=5e-3, warmup=2)
    recipe = large_cases.recipe("flux_kontext", bases["flux_kontext"], pairs, generator=stage, evaluate_every=4)
    train_pipeline(recipe, tmp_path / "run")
    losses = curve(tmp_path / "run", "validation")
    assert losses[-1] < 0.9 * losses[0], losses
    means = [sum(part) / 6 for part in (curve(tmp_path / "run", "loss")[:6], curve(tmp_path / "run", "loss")[-6:])]
    assert means[1] < 0.9 * means[0], means


@pytest.mark.parametrize("encoders", ["drop", "keep"])
def test_resumed_it_comes_to_the_very_same_weights(encoders: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """And memory's settings change nothing but rounding."""
    pairs = large_cases.write_pairs(tmp_path / "pairs")
    recipe = large_cases.recipe("flux_kontext", bases["flux_kontext"], pairs, encoders=encoders)
    stage = replace(recipe.generator, ema=0.5)
    train_pipeline(replace(recipe, generator=stage), tmp_path / "whole")
    for steps in (1, 3):
        train_pipeline(replace(recipe, generator=stage), tmp_path / "parts", stop_after=steps)
    one, other = large_cases.weights(tmp_path / "whole"), large_cases.weights(tmp_path / "parts")
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    if encoders == "drop":
        frugal = replace(recipe, generator=replace(stage, accumulate=2), checkpoint_base=False)
        train_pipeline(replace(frugal, checkpoint_generator=False), tmp_path / "frugal")
        for key, value in large_cases.weights(tmp_path / "frugal").items():
            torch.testing.assert_close(one[key], value, atol=2e-4, rtol=0)


def test_broken_rows_are_made_again(bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = large_cases.write_pairs(tmp_path / "pairs")
    recipe = large_cases.recipe("flux_kontext", bases["flux_kontext"], pairs)
    train_pipeline(recipe, tmp_path / "run", stop_after=1)
    rows = sorted((tmp_path / "run" / "cache").glob("*/*.safetensors"))
    assert len(rows) == 6
    rows[0].write_bytes(rows[0].read_bytes()[:-10])
    turned = bytearray(rows[1].read_bytes())
    turned[-1] ^= 1
    rows[1].write_bytes(turned)
    rows[2].unlink()
    calls = asked(monkeypatch, "flux_kontext")
    train_pipeline(recipe, tmp_path / "run", stop_after=1)
    assert calls == [1] * 3
    large_cases.picture(99).save(tmp_path / "pairs" / "3.png")
    calls.clear()
    train_pipeline(recipe, tmp_path / "another", stop_after=1)
    train_pipeline(replace(recipe, cache=str(tmp_path / "run" / "cache")), tmp_path / "third", stop_after=1)
    assert calls == [1] * 7, "one pair has another picture"


def test_pictures_of_several_shapes_and_a_reference(bases: dict[str, Path], tmp_path: Path) -> None:
    """Every batch is of one shape; instructions of different lengths share one, though Qwen's prompts then differ."""
    pairs = large_cases.write_pairs(tmp_path / "pairs", ((64, 64), (64, 64), (128, 64), (128, 64), (64, 64), (64, 64)))
    for name in ("qwen_image_edit", "flux2_klein"):
        recipe = large_cases.recipe(name, bases[name], pairs, pixels=8192, held_back=0.0)
        train_pipeline(recipe, tmp_path / name)
        assert (tmp_path / name / "model" / "config.json").is_file()


def test_in_half_precision_the_base_has_its_own_dtype(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The generator's weights stay in float32; autocast would widen what the base keeps for the backward pass."""
    recipe = large_cases.recipe("flux_kontext", bases["flux_kontext"], large_cases.write_pairs(tmp_path / "p"))
    seen: set[tuple[bool, torch.dtype, torch.dtype]] = set()
    original = CLASSES["flux_kontext"].predict

    def noted(self: Any, batch: Any, x_t: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        prediction: torch.Tensor = original(self, batch, x_t, time)
        seen.add((torch.is_autocast_enabled("cpu"), x_t.dtype, prediction.dtype))
        return prediction

    monkeypatch.setattr(CLASSES["flux_kontext"], "predict", noted)
    train_pipeline(replace(recipe, bf16=True), tmp_path / "run")
    assert seen == {(False, torch.float32, torch.bfloat16)}
    assert {value.dtype for value in large_cases.weights(tmp_path / "run").values()} == {torch.float32}


def test_without_its_encoders_the_base_holds_no_weights_of_theirs(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = large_cases.recipe("flux_kontext", bases["flux_kontext"], large_cases.write_pairs(tmp_path / "p"))
    placed: list[Any] = []
    original = large.backbone_stage

    def noted(backbone: Any, *x_t: Any, **more: Any) -> Any:
        parts = {**backbone.encoders(), "denoiser": backbone.denoiser}
        placed.append({name: next(part.parameters()).device.type for name, part in parts.items()})
        placed.append((backbone.denoiser.is_gradient_checkpointing, x_t[0].gradient_checkpointing))
        return original(backbone, *x_t, **more)

    monkeypatch.setattr(large, "backbone_stage", noted)
    train_pipeline(recipe, tmp_path / "run", stop_after=1)
    assert placed == [
        {"vae": "meta", "text_encoder": "meta", "text_encoder_2": "meta", "denoiser": "cpu"},
        (True, True),
    ]


def test_what_is_wrong_shows_before_anything_is_loaded(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = large_cases.write_pairs(tmp_path / "pairs")
    recipe = large_cases.recipe("flux_kontext", bases["flux_kontext"], pairs)
    train_pipeline(recipe, tmp_path / "begun", stop_after=1)
    monkeypatch.setattr(PipelineBackbone, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    nowhere = tmp_path / "run"
    for changes, error, message in (
        ({"data": None}, OpenwuError, "data: expected a JSONL file or a folder of pairs; pass data=PATH"),
        ({"base": None}, OpenwuError, "base: expected the base's folder or hub id"),
        ({"base": str(tmp_path)}, CheckpointError, "expected a diffusers pipeline"),
        ({"base": str(bases["flux2_klein"])}, CheckpointError, "expected a pipeline of class FluxKontextPipeline"),
        ({"model": "instruct-pix2pix"}, OpenwuError, "encoders: expected 'keep' for instruct-pix2pix"),
        ({"model": "no"}, OpenwuError, "model: expected one of"),
        ({"d_model": 30}, OpenwuError, "recipe: .*d_model: expected a multiple"),
        ({"d_model": 2**17}, OpenwuError, r"memory: expected \d.* GB free on cpu .*; make the generator smaller"),
    ):
        with pytest.raises(error, match=message):
            train_pipeline(replace(recipe, **changes), nowhere)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="changed: rank"):
        train_pipeline(replace(recipe, rank=2), tmp_path / "begun")
    with pairs.open("a") as file:
        file.write('\n{"images": ["0.png"], "instruction": "x", "target": "none.png"}\n{"images": []}\n')
    with pytest.raises(DatasetError, match=r"2 problems(.|\n)*pairs.jsonl:7: target(.|\n)*"):
        train_pipeline(recipe, nowhere)
    assert not nowhere.exists()


def test_pairs_that_the_base_cannot_take_are_named_together(bases: dict[str, Path], tmp_path: Path) -> None:
    pairs = large_cases.write_pairs(tmp_path / "pairs")
    lines = [json.loads(line) for line in pairs.read_text().splitlines()]
    lines[1]["instruction"] = lines[3]["instruction"] = "very " * 600
    pairs.write_text("\n".join(map(json.dumps, lines)))
    recipe = large_cases.recipe("flux_kontext", bases["flux_kontext"], pairs)
    with pytest.raises(DatasetError, match=r"2 problems(.|\n)*pairs.jsonl:2: instruction: expected at most 512 tokens"):
        train_pipeline(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "generator").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"generator": StageConfig(4, ((2, 64),), 1e-3)},
        {"generator": StageConfig(4, ((2, 0), (3, 0)), 1e-3)},
        {"encoders": "forget"},
        {"held_back": 1.0},
        {"operator": "lora+twist"},
        {"pixels": 0},
    ],
)
def test_bad_fields(changes: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"name": "x", "model": "x", "generator": StageConfig(4, ((2, 0),), 1e-3), **changes}
    with pytest.raises(ValueError, match="expected"):
        PipelineRun(**fields)


def test_encoders_are_placed_only_while_they_are_asked(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = large_cases.recipe("flux_kontext", bases["flux_kontext"], large_cases.write_pairs(tmp_path / "p"))
    calls: list[dict[str, str]] = []
    original = PipelineBackbone.place

    def noted(self: PipelineBackbone, **where: Any) -> None:
        calls.append({name: str(device) for name, device in where.items()})
        original(self, **where)

    monkeypatch.setattr(PipelineBackbone, "place", noted)
    train_pipeline(recipe, tmp_path / "run", stop_after=1)
    train_pipeline(replace(recipe, encoders="cpu"), tmp_path / "run", stop_after=1)
    assert calls == [
        {"encoders": "cpu"},
        {"encoders": "meta", "denoiser": "cpu"},
        {"encoders": "cpu", "denoiser": "cpu"},
    ]


def test_a_pair_whose_loss_is_not_finite_is_named(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = large_cases.recipe("flux_kontext", bases["flux_kontext"], large_cases.write_pairs(tmp_path / "p"))
    original = CLASSES["flux_kontext"].predict

    def second_broken(self: Any, *x_t: Any) -> torch.Tensor:
        prediction: torch.Tensor = original(self, *x_t)
        return prediction + torch.tensor([0.0, torch.nan]).view(-1, 1, 1)

    monkeypatch.setattr(CLASSES["flux_kontext"], "predict", second_broken)
    with pytest.raises(OpenwuError, match=r"Samples whose loss is not finite: pairs.jsonl:\d \('[a-z, ]+'\)\. Look"):
        train_pipeline(recipe, tmp_path / "run")


@pytest.mark.parametrize("name", ["instruct_pix2pix", "flux2_dev", "qwen_image_edit_plus", "qwen_image_21"])
def test_other_bases_stand_in_a_recipe(name: str, tmp_path: Path) -> None:
    """With what the page says that they need."""
    base = large_cases.saved(name, tmp_path / "base")
    recipe = large_cases.recipe("flux_kontext", base, large_cases.write_pairs(tmp_path / "p"))
    stage = replace(recipe.generator, steps=2)
    if name == "qwen_image_21":
        stage = replace(stage, shapes=((2, 0),))
        with pytest.raises(DatasetError, match=r"places of one shape in a batch.*generator.shapes=\(\(1,0\),\)"):
            train_pipeline(replace(recipe, model="qwen-image-21", generator=stage), tmp_path / "run")
        stage = replace(stage, shapes=((1, 0),))
    encoders = "keep" if name == "instruct_pix2pix" else "drop"
    fields: dict[str, Any] = {"model": name.replace("_", "-"), "encoders": encoders, "generator": stage, "validated": 1}
    train_pipeline(replace(recipe, **fields), tmp_path / "one")
    assert (tmp_path / "one" / "model" / "config.json").is_file()
