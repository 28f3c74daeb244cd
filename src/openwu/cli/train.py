"""`openwu train`: a recipe goes in, its stages are trained in order, a model with its provenance comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from openwu.backbones.embedded.base import WEIGHTS
from openwu.data.pairs import read_pairs
from openwu.data.suite.photographs import folder_hashes, load_folder
from openwu.data.suite.phrases import phrases_hash
from openwu.errors import OpenwuError
from openwu.files.hashing import of_files, of_json
from openwu.files.origin import origin
from openwu.training.checkpoint import load_weights
from openwu.training.config import STAGES, EmbeddedRecipe, PairsRecipe, PipelineRun, WordingRecipe, load_recipe
from openwu.training.distributed import joined_until_done
from openwu.training.embedded.model import SHARED, EmbeddedModel
from openwu.training.embedded.own_pairs import PairsStage, pairs_hashes, split_pairs
from openwu.training.embedded.stages import InstructionStage, SharedAdapter, base_stage, generator_stage, shared_stage
from openwu.training.embedded.wording import WordingStage
from openwu.training.loop import SECONDS, LoopConfig, Stage, train_stage
from openwu.training.record import describe, export_folders, seconds_of, stored_provenance, write_provenance

_ONLY_STAGES = {PairsRecipe: "generator", WordingRecipe: "wording", PipelineRun: "generator"}


def run(recipe: str, overrides: list[str], *, output: str | None = None, stages: list[str] | None = None) -> Path:
    """Train a recipe's stages in order; returns the run's folder. Finished stages are skipped, begun ones continued."""
    config = load_recipe(Path(recipe), overrides)
    folder = Path(output) if output else Path("runs") / config.name
    known = STAGES if isinstance(config, EmbeddedRecipe) else (_ONLY_STAGES[type(config)],)
    unknown = sorted(set(stages or ()) - set(known))
    if unknown:
        raise OpenwuError(f"stages: expected some of {list(known)}, got {unknown}")
    with joined_until_done():
        if isinstance(config, EmbeddedRecipe):
            asked = config.stages if stages is None else stages
            train(config, folder, tuple(stage for stage in STAGES if stage in asked))
        elif isinstance(config, PairsRecipe):
            train_pairs(config, folder)
        elif isinstance(config, PipelineRun):
            from openwu.training.pipelines import train_based

            train_based(config, folder)
        else:
            train_wording(config, folder)
    return folder


def train(
    recipe: EmbeddedRecipe, folder: Path, stages: tuple[str, ...] = STAGES, stop_after: int | None = None
) -> None:
    """`stop_after`: leave each stage after so many updates, for tests and trials."""
    recipe.check_baseline()
    photographs = Path(recipe.photographs)
    hashes = folder_hashes(photographs)
    # Asked before anything is written: an export may replace the start.
    described = {name: _fingerprint(name, recipe, hashes) for name in stages}
    model, before = begun(recipe)
    pictures = (load_folder(photographs), load_folder(photographs, validation=True))
    last = max((STAGES.index(name) for name in stages), default=-1)
    for name in STAGES[: last + 1]:
        if name in stages:
            stage = _stage(name, recipe, model, pictures)
            every = (recipe.checkpoint_every, recipe.evaluate_every, recipe.log_every)
            loop = LoopConfig(described[name], *every, stop_after)
            if not train_stage(stage, getattr(recipe, name), loop, folder / name):
                return
            if isinstance(stage.trained, SharedAdapter):
                _export_shared(recipe, stage.trained, folder, hashes)
        elif recipe.start is None or name in recipe.stages:
            load_weights(folder / name, _trained(name, model), getattr(recipe, name).steps)
        if name == "generator":  # The model is whole; the baseline is no part of it.
            _export(recipe, model, folder, hashes, before)


def train_pairs(recipe: PairsRecipe, folder: Path, stop_after: int | None = None) -> None:
    """Pairs are all looked at before the first step. `stop_after`: as in `train`."""
    if recipe.data is None:
        raise OpenwuError("data: expected a JSONL file or a folder of pairs; pass data=PATH")
    training, held_back = split_pairs(read_pairs(recipe.data), recipe.held_back)
    hashes = pairs_hashes(training, held_back)
    model = EmbeddedModel.from_pretrained(recipe.start or WEIGHTS)
    stage = PairsStage(recipe, model, training, held_back)
    unimportant = {"name", "data", "export", "checkpoint_every", "evaluate_every", "log_every"}
    described = {key: value for key, value in describe(recipe).items() if key not in unimportant}
    described["generator"].pop("accumulate", None)
    # By its contents: the package's own weights change with its version, and a checkpoint has only what is trained.
    described["start"] = _weights_hash(Path(recipe.start or WEIGHTS))
    before = stored_provenance(recipe.start or WEIGHTS)
    every = (recipe.checkpoint_every, recipe.evaluate_every, recipe.log_every)
    data = of_json(hashes).hexdigest()
    loop = LoopConfig(json.dumps({**described, "pairs": data}, sort_keys=True), *every, stop_after)
    if train_stage(stage, recipe.generator, loop, folder / "generator"):
        _export(recipe, model, folder, hashes, before)


def train_wording(recipe: WordingRecipe, folder: Path, stop_after: int | None = None) -> None:
    """`stop_after`: as in `train`."""
    start = Path(recipe.start or WEIGHTS)
    model, before = EmbeddedModel.from_pretrained(start), stored_provenance(start)
    stage = WordingStage(recipe, model)
    unimportant = {"name", "export", "checkpoint_every", "evaluate_every", "log_every"}
    described = {key: value for key, value in describe(recipe).items() if key not in unimportant}
    described["wording"].pop("accumulate", None)
    described["start"] = _weights_hash(start)
    every = (recipe.checkpoint_every, recipe.evaluate_every, recipe.log_every)
    loop = LoopConfig(json.dumps({**described, "sentences": phrases_hash()}, sort_keys=True), *every, stop_after)
    if not train_stage(stage, recipe.wording, loop, folder / "wording"):
        return
    made = {
        **origin(),
        "seconds": seconds_of(folder / "wording"),
        "recipe": describe(recipe),
        "sentences": phrases_hash(),
    }
    for target in export_folders(recipe, folder):
        model.save_pretrained(target)
        write_provenance(target, made, before)


def begun(recipe: EmbeddedRecipe) -> tuple[EmbeddedModel, dict[str, Any] | None]:
    """The model that the stages go on from, and where it comes from: its start's, or a new one and None."""
    if recipe.start is None:
        return new_model(recipe), None
    model = EmbeddedModel.from_pretrained(recipe.start)
    if model.config != recipe.model:
        raise OpenwuError(
            f"start: expected a model of the recipe's sizes and labels, got another one in {recipe.start}; "
            "change the recipe's model, or start from nothing"
        )
    return model, stored_provenance(recipe.start)


def new_model(recipe: EmbeddedRecipe) -> EmbeddedModel:
    """Initial weights from the recipe's seed, without touching the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = EmbeddedModel(recipe.model)
        model.generator.init_weights(recipe.b_init_std)
        return model


def _stage(name: str, recipe: EmbeddedRecipe, model: EmbeddedModel, pictures: Any) -> Stage:
    if name == "instruction":
        return InstructionStage(model, recipe.seed, recipe.instruction.shapes[0][0])
    return {"base": base_stage, "generator": generator_stage, "shared": shared_stage}[name](recipe, model, pictures)


def _trained(name: str, model: EmbeddedModel) -> torch.nn.Module:
    parts = {"instruction": model.instruction, "base": model.backbone}
    if name in parts:
        return parts[name]
    return torch.nn.ModuleDict({"condition": model.condition, "generator": model.generator})


def _fingerprint(name: str, recipe: EmbeddedRecipe, photographs: dict[str, str]) -> str:
    """What a stage's weights depend on: neither later stages and parts nor how often something is written."""
    described = describe(recipe)
    unimportant = {"name", "export", "stages", "checkpoint_every", "evaluate_every", "log_every"}
    unimportant |= {*STAGES[STAGES.index(name) + 1 :], *({"generator"} if name == "shared" else ())}
    unimportant |= {"b_init_std"} if name != "generator" else set()
    later_parts = {"instruction": ("backbone", "condition", "generator"), "base": ("condition", "generator")}
    model = {key: value for key, value in described.pop("model").items() if key not in later_parts.get(name, ())}
    kept = {key: value for key, value in described.items() if key not in unimportant}
    for stage in kept.keys() & set(STAGES):
        kept[stage].pop("accumulate", None)  # Of the batch, it changes only how much is computed at a time.
    # By their contents: files change, and so do the package's own sentences and weights from version to version.
    if recipe.start is not None:
        kept["start"] = _weights_hash(Path(recipe.start))
    if name != "instruction":
        kept["photographs"] = of_json(photographs).hexdigest()
    return json.dumps({**kept, "model": model, "sentences": phrases_hash()}, sort_keys=True)


def _export_shared(recipe: EmbeddedRecipe, shared: SharedAdapter, folder: Path, data: dict[str, str]) -> None:
    """The baseline stands beside the model, so that the table can be remade, and says itself where it comes from."""
    for target in export_folders(recipe, folder):
        shared().detach().to(torch.float16).save_pretrained(target / SHARED)
        write_provenance(target / SHARED, provenance(recipe, folder, data))


def _export(
    recipe: EmbeddedRecipe | PairsRecipe,
    model: EmbeddedModel,
    folder: Path,
    data: dict[str, str],
    before: dict[str, Any] | None,
) -> None:
    for target in export_folders(recipe, folder):
        model.save_pretrained(target)
        write_provenance(target, provenance(recipe, folder, data), before)


def _weights_hash(model: Path) -> str:
    """SHA-256 of a model's files of weights."""
    return of_files(sorted(model.glob("*.safetensors"))).hexdigest()


def provenance(recipe: EmbeddedRecipe | PairsRecipe, folder: Path, data: dict[str, str]) -> dict[str, Any]:
    """Where weights come from: recipe, code version, data hashes, seeds, machine, seconds of every stage.

    `data`: hashes of the photographs, or of the pairs.
    """
    seconds = {name: seconds_of(folder / name) for name in STAGES if (folder / name / SECONDS).exists()}
    return {
        **origin(),
        "seconds": seconds,
        "recipe": describe(recipe),
        "sentences": phrases_hash(),
        ("photographs" if isinstance(recipe, EmbeddedRecipe) else "pairs"): data,
    }
