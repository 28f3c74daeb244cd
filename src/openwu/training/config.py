"""What a recipe returns: every number that decides which weights come out of a training.

A recipe is a Python file with a function `recipe()` that returns an EmbeddedRecipe, PairsRecipe, WordingRecipe or
PipelineRun; a variant calls a base recipe and replaces fields. Command-line overrides (`key=value`, dots for nesting)
replace fields in the same way.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openwu.errors import OpenwuError
from openwu.registry import CONDITION_ENCODERS
from openwu.training.embedded.losses import FLOOR
from openwu.training.embedded.model import EmbeddedConfig

STAGES = ("instruction", "base", "generator", "shared")
"""In the order in which they build on one another; "shared" is the baseline of equal length, not part of the model."""

SCHEDULES = ("linear", "cosine", "constant")
"""See `schedule.FALLS`."""

ENCODERS_AFTER = ("drop", "cpu", "keep")
"""What becomes of a large base's encoders once they have said all that a training needs."""

LATER = {"later": True}
"""Marks fields that descriptions leave out at their defaults; those of earlier trainings do not have them."""


@dataclass(frozen=True)
class StageConfig:
    """The optimisation of one stage."""

    steps: int
    """Optimiser steps."""
    shapes: tuple[tuple[int, int], ...]
    """Steps walk through these (requests, side of the base's crop in pixels) in turn; sentences have no side."""
    learning_rate: float
    """Peak learning rate of AdamW."""
    matrix_learning_rate: float = 0.0
    """Peak learning rate of Muon, which then trains the weights of linear layers; 0: AdamW trains them too."""
    warmup: int = 50
    """Steps over which the learning rate rises from 0."""
    decay: float = 0.6
    """Fraction of the steps, at the end, over which the learning rate falls to 0."""
    weight_decay: float = 0.02
    """Weight decay, on matrices only."""
    first_floor: float = FLOOR
    """Where the loss's floor starts; see `loss.falling_floor`."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    schedule: str = field(default="linear", metadata=LATER)
    """How the learning rate falls over the last `decay` of the steps: "linear" or "cosine" to 0; "constant": never."""
    accumulate: int = field(default=1, metadata=LATER)
    """Micro-batches of an update: the batch is computed in so many parts, for less memory at equal gradients."""
    ema: float = field(default=0.0, metadata=LATER)
    """Decay of the moving average of the weights, which is then what is evaluated and exported; 0: none."""

    def __post_init__(self) -> None:
        for name in ("steps", "learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        if not self.matrix_learning_rate >= 0:
            raise ValueError(f"matrix_learning_rate: expected 0 or more, got {self.matrix_learning_rate}")
        if not self.shapes or any(requests < 1 for requests, _ in self.shapes):
            raise ValueError(f"shapes: expected at least one (requests, crop side), got {self.shapes}")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay: expected a fraction from 0 to 1, got {self.decay}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: expected one of {list(SCHEDULES)}, got {self.schedule!r}")
        if not self.accumulate >= 1:
            raise ValueError(f"accumulate: expected at least 1, got {self.accumulate}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema: expected 0, or a decay below 1 such as 0.999, got {self.ema}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON. Fields that came later stand in it only where they are set, so that old descriptions stay true."""
        fields = {each.name: (each, getattr(self, each.name)) for each in dataclasses.fields(self)}
        return {name: value for name, (each, value) in fields.items() if not each.metadata or value != each.default}


@dataclass(frozen=True)
class EmbeddedRecipe:
    """How the embedded model is made from nothing."""

    name: str
    """Names the run's folder."""
    model: EmbeddedConfig
    """Sizes of the four parts."""
    instruction: StageConfig
    """Instruction encoder: tell the sub-tasks apart."""
    base: StageConfig
    """Frozen base: a few sub-tasks, read from the instruction."""
    generator: StageConfig
    """Condition encoder and generator, end to end through the frozen base, on every sub-task."""
    shared: StageConfig
    """The baseline: one adapter for all sub-tasks, for as many steps on batches drawn alike."""
    base_edits: tuple[str, ...]
    """Sub-tasks that the base learns."""
    edits: tuple[str, ...]
    """Sub-tasks that adapters learn."""
    photographs: str = "photos"
    """Folder of training photographs, relative to the working directory."""
    side: int = 192
    """Side in pixels of the picture that the condition encoder sees in training."""
    seed: int = 0
    """Seed of initial weights and data."""
    b_init_std: float = 1e-2
    """Standard deviation of a generated B's elements before training: small, so that the base starts as it is."""
    bf16: bool = True
    """Compute in bfloat16 (weights and optimiser stay in float32); False on CPUs without it."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    evaluate_every: int = 200
    """Steps between evaluations on the validation photographs."""
    log_every: int = 10
    """Steps between points of the training curve."""
    export: str | None = field(default=None)
    """Where the finished model is written besides the run's folder."""
    start: str | None = field(default=None, metadata=LATER)
    """Folder of a finished model of the same sizes whose weights the stages go on from; None: from nothing."""
    stages: tuple[str, ...] = field(default=STAGES, metadata=LATER)
    """The stages that are trained; with a `start`, the others stay as they are there."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.stages) - set(STAGES))
        if unknown or not self.stages:
            raise ValueError(f"stages: expected some of {list(STAGES)}, got {list(self.stages)}")

    def check_baseline(self) -> None:
        """Refuse an unfair baseline. Not at construction: overrides change one of the two stages at a time."""
        for name in ("steps", "shapes", "first_floor"):
            ours, theirs = getattr(self.shared, name), getattr(self.generator, name)
            if ours != theirs:
                raise OpenwuError(
                    f"shared.{name}: expected the generator's {theirs} for a fair baseline, got {ours}; set both"
                )


@dataclass(frozen=True)
class PairsRecipe:
    """How a finished model goes on to learn pairs of one's own: its condition encoder and generator, end to end."""

    name: str
    """Names the run's folder."""
    generator: StageConfig
    """Condition encoder and generator; every shape has as many requests, so that tasks stay balanced."""
    data: str | None = None
    """JSONL file or folder of pairs, see `openwu.data.pairs`."""
    start: str | None = None
    """Folder of the model to start from; None: the one inside the package."""
    side: int = 192
    """Side of the square part of a picture that is shown whole to the condition encoder."""
    held_back: float = 0.1
    """Share of every task's pairs that is validated on instead, at least one where a task has two."""
    seed: int = 0
    """Of everything that is drawn."""
    bf16: bool = True
    """Compute in bfloat16 (weights and optimiser stay in float32); False on CPUs without it."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    evaluate_every: int = 100
    """Steps between evaluations on the pairs held back."""
    log_every: int = 10
    """Steps between points of the training curve."""
    export: str | None = None
    """Where the finished model is written besides the run's folder."""

    def __post_init__(self) -> None:
        if len({requests for requests, _ in self.generator.shapes}) > 1:
            raise ValueError(f"generator.shapes: expected equally many requests in all, got {self.generator.shapes}")
        if any(not 0 < crop <= self.side for _, crop in self.generator.shapes):
            raise ValueError(f"generator.shapes: expected crops of 1 to side={self.side}, got {self.generator.shapes}")
        if not 0 <= self.held_back < 1:
            raise ValueError(f"held_back: expected a share from 0 to below 1, got {self.held_back}")


@dataclass(frozen=True)
class WordingRecipe:
    """How a finished model's instruction encoder goes on with sentences that came later; all else stays as it is."""

    name: str
    """Names the run's folder."""
    wording: StageConfig
    """The instruction encoder; its one shape has (sentences, 0)."""
    dropped: float = 0.3
    """Share of the n-grams that is left out of sentences."""
    hold: float = 0.3
    """Weight of the distance from the tokens that the frozen base and generator expect."""
    start: str | None = None
    """Folder of the model to start from; None: the one inside the package."""
    seed: int = 0
    """Of everything that is drawn."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    evaluate_every: int = 400
    """Steps between evaluations on sentences that were held out."""
    log_every: int = 10
    """Steps between points of the training curve."""
    export: str | None = None
    """Where the finished model is written besides the run's folder."""


@dataclass(frozen=True)
class PipelineRun:
    """How a generator for a large frozen base is made from pairs, end to end through the base."""

    name: str
    """Names the run's folder."""
    model: str
    """The base: a name of `openwu.registry.BASES`."""
    generator: StageConfig
    """Its one shape has (requests of an update, 0): pictures have the sides that `pixels` gives them."""
    data: str | None = None
    """JSONL file or folder of pairs, see `openwu.data.pairs`."""
    base: str | None = None
    """The base's diffusers folder, or hub id."""
    revision: str | None = None
    """Of a hub id."""
    condition: tuple[Mapping[str, Any], ...] = field(default=(), metadata=LATER)
    """What the generator reads: encoders of `openwu.registry.CONDITION_ENCODERS`, each a name with its settings; none:
    the base's own condition. Several become segments with an input projection for each, in this order."""
    pixels: int = 1024 * 1024
    """About how many pixels the base works on in training."""
    rank: int = 16
    """Rank of the generated adapters."""
    alpha: float = 16.0
    """Numerator of the adapters' scale, alpha / rank."""
    token_dim: int = 1024
    """Width of one row of a parameter token."""
    d_model: int = 1024
    """Width of the generator."""
    head_dim: int = 128
    """Width of one of its attention heads."""
    dim_accumulation: int = 4
    """Rows of a token in one position of its sequence."""
    blocks: int = 8
    """Its blocks."""
    b_init_std: float = 1e-3
    """Standard deviation of a generated B's elements before training: small, so that the base starts as it is."""
    bf16: bool = True
    """The base's weights, and what is computed, in bfloat16; the generator's weights are float32. False: all are."""
    quantise: str | None = None
    """Linear maps in the base's layers in fewer bits: "8bit" or "4bit", by bitsandbytes; None: as `bf16` says."""
    checkpoint_base: bool = True
    """Compute the base's blocks again in the backward pass instead of keeping what they computed."""
    checkpoint_generator: bool = True
    """The same for the generator's blocks."""
    cache: str = "cache"
    """Folder of what the base's encoders say of every pair, relative to the run's; "" encodes in every step instead."""
    encoders: str = "drop"
    """Once all is in the cache: "drop" encoders from memory, move them to the "cpu", or "keep" them where they are."""
    device: str | None = None
    """Where to compute; None: CUDA where there is one."""
    held_back: float = 0.1
    """Share of every task's pairs that is validated on instead, at least one where a task has two."""
    validated: int = 4
    """Most pairs held back whose loss is logged; they are computed at once."""
    seed: int = 0
    """Of the generator's first weights and everything that is drawn."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    evaluate_every: int = 200
    """Steps between evaluations on pairs held back."""
    log_every: int = 10
    """Steps between points of the training curve."""
    export: str | None = None
    """Where the finished generator is written besides the run's folder."""

    def __post_init__(self) -> None:
        if len(self.generator.shapes) != 1 or self.generator.shapes[0][1] != 0:
            raise ValueError(f"generator.shapes: expected one ((requests, 0),), got {self.generator.shapes}")
        if self.encoders not in ENCODERS_AFTER:
            raise ValueError(f"encoders: expected one of {list(ENCODERS_AFTER)}, got {self.encoders!r}")
        if self.quantise not in (None, "8bit", "4bit"):
            raise ValueError(f"quantise: expected 8bit, 4bit or None, got {self.quantise!r}")
        if not 0 <= self.held_back < 1:
            raise ValueError(f"held_back: expected a share from 0 to below 1, got {self.held_back}")
        for chosen in self.condition:
            if not isinstance(chosen, Mapping) or chosen.get("name") not in CONDITION_ENCODERS:
                known = ", ".join(name for name in CONDITION_ENCODERS if name != "segments")
                raise ValueError(f"condition: expected encoders such as {{'name': ...}} of {known}, got {chosen!r}")
        for name in ("pixels", "validated"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


Recipe = EmbeddedRecipe | PairsRecipe | WordingRecipe | PipelineRun
RECIPES = (EmbeddedRecipe, PairsRecipe, WordingRecipe, PipelineRun)


def load_recipe(path: Path, overrides: list[str]) -> Recipe:
    """The recipe of a file, with `key=value` overrides applied."""
    spec = importlib.util.spec_from_file_location("openwu_recipe", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise OpenwuError(f"recipe: expected a Python file with a function recipe(), found none at {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    build = getattr(module, "recipe", None)
    made = build() if callable(build) else None
    if not isinstance(made, RECIPES):
        kinds = " or ".join(kind.__name__ for kind in RECIPES)
        raise OpenwuError(f"recipe: expected {path} to define recipe() -> {kinds}, got {type(made).__name__}")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise OpenwuError(f"override: expected key=value, got {override!r}")
        try:
            made = _replaced(made, key.split("."), value, key)
        except (TypeError, ValueError) as error:
            raise OpenwuError(f"override {key}: {error}") from error
    return made


def _replaced(config: Any, path: list[str], value: str, whole: str) -> Any:
    names = [each.name for each in dataclasses.fields(config)]
    if path[0] not in names:
        raise OpenwuError(f"override {whole}: expected one of {names}, got {path[0]!r}")
    current = getattr(config, path[0])
    if len(path) > 1:
        if not dataclasses.is_dataclass(current):
            raise OpenwuError(f"override {whole}: {path[0]} has no fields")
        return dataclasses.replace(config, **{path[0]: _replaced(current, path[1:], value, whole)})
    return dataclasses.replace(config, **{path[0]: _parsed(value, current, whole)})


def _parsed(text: str, current: Any, whole: str) -> Any:
    """A value of the field's own type."""
    if dataclasses.is_dataclass(current):
        raise OpenwuError(
            f"override {whole}: expected one of its fields, e.g. {whole}.{dataclasses.fields(current)[0].name}"
        )
    if isinstance(current, str) or current is None:
        return text
    try:
        value = ast.literal_eval(text.capitalize() if isinstance(current, bool) else text)
    except (ValueError, SyntaxError):
        value = None
    if isinstance(current, float) and isinstance(value, int):
        value = float(value)
    if type(value) is not type(current):
        raise OpenwuError(f"override {whole}: expected {type(current).__name__} like {current!r}, got {text!r}")
    return value
