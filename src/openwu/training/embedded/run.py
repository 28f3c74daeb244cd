"""Train the embedded model from a recipe: its stages in order, or one on pairs of one's own or new sentences."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from openwu.backbones.embedded.config import WEIGHTS
from openwu.data.pairs import pairs_hashes, read_pairs, split_pairs
from openwu.data.suite.photographs import folder_hashes, load_folder
from openwu.data.suite.phrases import phrases_hash
from openwu.errors import OpenwuError
from openwu.evaluation.wording import understanding
from openwu.files.hashing import of_files, of_json
from openwu.training.checkpoint import load_weights
from openwu.training.distributed import is_main
from openwu.training.embedded.config import STAGES, EmbeddedRecipe, PairsRecipe, WordingRecipe
from openwu.training.embedded.example_stage import ensure_wordless, example_stage, shown_parts
from openwu.training.embedded.instruction_stages import InstructionStage, PhrasesStage, WordingStage
from openwu.training.embedded.model import SHARED, EmbeddedModel
from openwu.training.embedded.own_pairs import PairsTraining
from openwu.training.embedded.picture_stages import Photographs, base_stage, generator_of, generator_stage, shared_stage
from openwu.training.embedded.rehearsal import known_retention
from openwu.training.loop import LoopConfig, Stage, train_stage
from openwu.training.record import (
    dependencies,
    describe,
    export_folders,
    provenance,
    stored_provenance,
    write_provenance,
)
from openwu.training.retention import Retention, RetentionWarning, WatchedStage
from openwu.training.stage import TrainableLora

UNDERSTOOD = 0.01
"""Share of held-out sentences that may be understood less well on average before a warning is given."""


def phrases_stage(recipe: EmbeddedRecipe, model: EmbeddedModel, _: Photographs) -> PhrasesStage:
    """Build the stage that trains the linear reader."""
    assert recipe.phrases is not None
    return PhrasesStage(model, recipe.seed, recipe.phrases.shapes[0][0])


STAGE_BUILDERS: dict[str, Callable[[EmbeddedRecipe, EmbeddedModel, Photographs], Stage]] = {
    "instruction": lambda recipe, model, _: InstructionStage(
        model, recipe.seed, recipe.instruction.shapes[0][0], recipe.words_dropped
    ),
    "phrases": phrases_stage,
    "base": base_stage,
    "generator": generator_stage,
    "examples": example_stage,
    "shared": shared_stage,
}


def train(
    recipe: EmbeddedRecipe, folder: Path, stages: tuple[str, ...] | None = None, stop_after: int | None = None
) -> None:
    """Train stages in order and write the model. Finished stages are skipped, interrupted ones resume.

    stages: None for those of the recipe. stop_after: leave each stage after so many updates, for tests and trials.
    """
    if unknown := sorted(set(stages or ()) - set(recipe.known)):
        raise OpenwuError(f"stages: expected some of this recipe's {list(recipe.known)}, got {unknown}")
    stages = recipe.stages if stages is None else stages
    recipe.check_baseline()
    photographs = Path(recipe.photographs)
    hashes = folder_hashes(photographs)
    # Computed before anything is written: an export may replace the start.
    described = {name: stage_dependencies(name, recipe, hashes) for name in stages}
    model, before = starting_model(recipe)
    made: dict[str, Any] = {"sentences": phrases_hash(), "photographs": hashes}
    if recipe.only_words:
        made["words"], before = trainings_of_words(before or {}), None
    pictures = (load_folder(photographs), load_folder(photographs, validation=True))
    known = None
    if recipe.start is not None and not recipe.only_words and {"base", "generator"} & set(stages):
        crop = max(crop for _, crop in recipe.generator.shapes)
        known = known_retention(model, pictures[1], recipe.side, crop, recipe.seed + 13, recipe.bf16)
    last = max((recipe.known.index(name) for name in stages if name in recipe.known), default=-1)
    complete = _completed_by(recipe)
    for name in recipe.known[: last + 1]:
        if name in stages:
            stage = STAGE_BUILDERS[name](recipe, model, pictures)
            stage = WatchedStage(stage, known) if known is not None and name == "generator" else stage
            loop = LoopConfig.of(recipe, described[name], stop_after)
            if not train_stage(stage, getattr(recipe, name), loop, folder / name):
                return
            if isinstance(stage.trained, TrainableLora):
                _export_shared(recipe, stage.trained, folder, hashes)
        elif recipe.start is None or name in recipe.stages:
            load_weights(folder / name, _trained(name, model), getattr(recipe, name).steps)
            if name == "examples":  # Its tokens of no words are learned before its first step, and not in its state.
                ensure_wordless(recipe, model, pictures)
        if name == "base" and name in recipe.stages and model.instruction.wordless is not None:
            model.instruction.wordless.data.zero_()  # Those of a start are its base's; this one learns its own.
        if name == complete:
            if model.instruction.wordless is not None:
                ensure_wordless(recipe, model, pictures)
            _export(recipe, model, folder, before, known, **made)


def _completed_by(recipe: EmbeddedRecipe) -> str | None:
    """Return the stage after which the model is written: its last one, or the recipe's last one for a finished start.

    None where the recipe trains nothing but the baseline, which is no part of the model.
    """
    if recipe.start is None:
        return "generator" if recipe.examples is None else "examples"
    trained = [name for name in recipe.known if name in recipe.stages and name != "shared"]
    return trained[-1] if trained else None


def train_pairs(
    recipe: PairsRecipe, folder: Path, _stages: tuple[str, ...] | None = None, stop_after: int | None = None
) -> None:
    """Train condition encoder and generator on pairs; every pair is checked before the first step.

    The known edits are watched: `known/...` is logged, a RetentionWarning given where they lose more than 0.5 dB.
    """
    if recipe.data is None:
        raise OpenwuError("data: expected a JSONL file or a folder of pairs; pass data=PATH")
    training, held_back = split_pairs(read_pairs(recipe.data), recipe.held_back)
    hashes = pairs_hashes(training, held_back)
    start = Path(recipe.start or WEIGHTS)
    model, before = EmbeddedModel.from_pretrained(start), stored_provenance(start)
    pairs = PairsTraining(recipe, model, training, held_back)
    known = pairs.known
    if not recipe.rehearsed and recipe.trained == "all" and is_main():
        warnings.warn(
            f"rehearsed=0: nothing keeps the {len(known.before)} edits that the start knows ({known.mean:.1f} dB on "
            "these pictures); unless the pairs have all of them, expect most to be lost. With rehearsed=0.5 half of "
            "every batch keeps them",
            RetentionWarning,
            stacklevel=2,
        )
    # The start by its contents: the package's weights change with its version, and a checkpoint has the trained alone.
    found = {"start": weights_hash(start), "pairs": of_json(hashes).hexdigest()}
    if recipe.photographs is not None:
        found["photographs"] = of_json(folder_hashes(Path(recipe.photographs))).hexdigest()
    described = json.dumps(dependencies(recipe, ("data",), **found), sort_keys=True)
    loop = LoopConfig.of(recipe, described, stop_after)
    if train_stage(WatchedStage(pairs.stage, known), recipe.generator, loop, folder / "generator"):
        drawn_back = 1 - pairs.finish()
        made = {"sentences": phrases_hash(), "pairs": hashes, "drawn_back": drawn_back}
        _export(recipe, pairs.model, folder, before, known, **made)


def train_wording(
    recipe: WordingRecipe, folder: Path, _stages: tuple[str, ...] | None = None, stop_after: int | None = None
) -> None:
    """Train the instruction encoder alone, on the suite's present sentences."""
    start = Path(recipe.start or WEIGHTS)
    model, before = EmbeddedModel.from_pretrained(start), stored_provenance(start)
    known = Retention(partial(_understood, model), UNDERSTOOD, "of the held-out sentences", "raise hold")
    wording: Stage = WordingStage(recipe, model)
    if recipe.phrases_only:
        wording = PhrasesStage(model, recipe.seed, recipe.wording.shapes[0][0])
    stage = WatchedStage(wording, known)
    begun = {name: value.clone() for name, value in wording.trained.state_dict().items()}
    found = {"start": weights_hash(start), "sentences": phrases_hash()}
    described = json.dumps(dependencies(recipe, **found), sort_keys=True)
    if train_stage(stage, recipe.wording, LoopConfig.of(recipe, described, stop_after), folder / "wording"):
        with torch.no_grad():
            for name, value in wording.trained.state_dict().items():
                value.lerp_(begun[name], recipe.start_share)
        _export(recipe, model, folder, before, known, sentences=phrases_hash())


def starting_model(recipe: EmbeddedRecipe) -> tuple[EmbeddedModel, dict[str, Any] | None]:
    """Load the recipe's start with its provenance, or make a new model, which has None.

    A start that was made without examples gets new parts for them; with `only_words` all is new but what reads words.
    What the start offers (edits withdrawn, the bar of acceptance) stays as it is.
    """
    if recipe.start is None:
        return new_model(recipe), None
    model = EmbeddedModel.from_pretrained(recipe.start)
    wanted = recipe.model.offering(model.config)
    grown = new_model(dataclasses.replace(recipe, model=wanted))
    grown.base.sentences = model.base.sentences
    if recipe.only_words and model.config.instruction == wanted.instruction:
        grown.instruction.load_state_dict(model.instruction.state_dict())
        return grown, stored_provenance(recipe.start)
    if model.config != wanted and model.config == wanted.without_examples():
        grown.load_state_dict({**grown.state_dict(), **model.state_dict()})
        model = grown
    if model.config != wanted:
        raise OpenwuError(
            f"start: expected a model of the recipe's sizes and labels, got another one in {recipe.start}; "
            "change the recipe's model, or start from nothing"
        )
    return model, stored_provenance(recipe.start)


def trainings_of_words(before: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what a provenance tells of the trainings of what reads words, in order."""
    first = {name: value for name, value in before.items() if name not in ("then", "words")}
    found = list(before.get("words", []))
    for each in (first, *before.get("then", [])):
        # Trainings of one stage once had its seconds alone: those of words have a recipe that tells.
        trained = each["seconds"] if isinstance(each.get("seconds"), dict) else each.get("recipe", {})
        if {"instruction", "phrases", "wording", "sentence"} & set(trained):
            found.append(each)
    return found


def new_model(recipe: EmbeddedRecipe) -> EmbeddedModel:
    """Make initial weights from the recipe's seed, without touching the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = EmbeddedModel(recipe.model)
        model.generator.init_weights(recipe.b_init_std)
        return model


def stage_dependencies(name: str, recipe: EmbeddedRecipe, photographs: dict[str, str]) -> str:
    """Describe what a stage's weights depend on, as JSON: not on later stages and parts.

    photographs: their hashes. Files count by their contents: they change, and so do the package's own sentences and
    weights from version to version.
    """
    without = {"stages", *STAGES[STAGES.index(name) + 1 :], *({"generator"} if name == "shared" else ())}
    without |= {"b_init_std"} if name != "generator" else set()
    words = ("backbone", "condition", "generator")
    later_parts = {"instruction": words, "phrases": words, "base": ("condition", "generator")}
    model = describe(recipe)["model"]
    found: dict[str, Any] = {
        "model": {key: value for key, value in model.items() if key not in later_parts.get(name, ())},
        "sentences": phrases_hash(),
    }
    if recipe.start is not None:
        found["start"] = weights_hash(Path(recipe.start))
    if name != "instruction":
        found["photographs"] = of_json(photographs).hexdigest()
    return json.dumps(dependencies(recipe, without, **found), sort_keys=True)


def weights_hash(model: Path) -> str:
    """Return the SHA-256 of the weights in a model's folder."""
    return of_files(sorted(model.glob("*.safetensors"))).hexdigest()


def _understood(model: EmbeddedModel) -> dict[str, float]:
    """Measure the understanding of held-out sentences; what there is no sentence for is left out."""
    return {name: share for name, share in understanding(model.instruction).items() if not math.isnan(share)}


def _trained(name: str, model: EmbeddedModel) -> nn.Module:
    parts = {"instruction": model.instruction, "phrases": model.instruction.phrases, "base": model.backbone}
    if name == "examples":
        return shown_parts(model)
    return parts[name] if name in parts else generator_of(model)[0]


def _export(
    recipe: EmbeddedRecipe | PairsRecipe | WordingRecipe,
    model: EmbeddedModel,
    folder: Path,
    before: dict[str, Any] | None,
    known: Retention | None,
    **data: object,
) -> None:
    """Write the model with its provenance; `data`: hashes of what it was trained on."""
    if known is not None:
        data["known"] = known.record()
    for target in export_folders(recipe, folder):
        model.save_pretrained(target)
        write_provenance(target, provenance(recipe, folder, **data), before)


def _export_shared(recipe: EmbeddedRecipe, shared: TrainableLora, folder: Path, photographs: dict[str, str]) -> None:
    """Write the baseline beside the model, with a provenance of its own, so that the table can be made again."""
    for target in export_folders(recipe, folder):
        shared().detach().to(torch.float16).save_pretrained(target / SHARED)
        made = provenance(recipe, folder, sentences=phrases_hash(), photographs=photographs)
        write_provenance(target / SHARED, made)
