"""Training configs: the optimisation of a stage, what every recipe has, and runs through a large base.

A recipe is a Python file with a function `recipe()` that returns a `Recipe`: a `PipelineRun`, or one of the embedded
model's in `openwu.training.embedded.config`. A variant calls a base recipe and replaces fields. Every config class
names the function that trains it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from openwu.registry import CONDITION_ENCODERS, OPERATORS

SCHEDULES = ("linear", "cosine", "constant")
"""See `optimizers.DECAYS`."""

ENCODERS_AFTER = ("drop", "cpu", "keep")
"""What becomes of a large base's encoders once every pair is encoded."""

LATER: dict[str, Any] = {"later": True}
"""Field metadata: left out of descriptions at its default, since recipes described earlier do not have the field."""

FIRST_FLOOR = 1e-4
"""Default of `StageConfig.first_floor`: the floor that every training ends with."""


@dataclass(frozen=True)
class StageConfig:
    """The optimisation of one stage."""

    steps: int
    """Optimiser steps."""
    shapes: tuple[tuple[int, int], ...]
    """Steps cycle through these (requests, side of the base's crop in pixels); sentences have no side."""
    learning_rate: float
    """Peak learning rate of AdamW."""
    matrix_learning_rate: float = 0.0
    """Peak learning rate of Muon, which then trains the weights of linear layers; 0: AdamW trains them too."""
    warmup: int = 50
    """Steps over which the learning rate rises from 0."""
    decay: float = 0.6
    """Fraction of the steps, at the end, over which the learning rate falls."""
    weight_decay: float = 0.02
    """Weight decay, on matrices only."""
    first_floor: float = FIRST_FLOOR
    """Where the floor of a picture loss starts; see `embedded.picture_stages.annealed_floor`."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    schedule: str = field(default="linear", metadata=LATER)
    """How the learning rate falls over the last `decay` of the steps: "linear" or "cosine" to 0; "constant": never."""
    stack_learning_rate: float = field(default=0.0, metadata=LATER)
    """Peak learning rate of Muon for stacks of matrices (`optimizers.MatrixStacks`, such as LoRA factors of one adapter
    or many); 0: AdamW trains them."""
    accumulate: int = field(default=1, metadata=LATER)
    """Micro-batches of an update: the batch is computed in so many parts, for less memory at equal gradients."""
    ema: float = field(default=0.0, metadata=LATER)
    """Decay of the EMA weights, which then are what is evaluated and exported; 0: none."""

    def __post_init__(self) -> None:
        for name in ("steps", "learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        for name in ("matrix_learning_rate", "stack_learning_rate"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
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
        """Return the fields as JSON values; `LATER` ones only where they differ from their defaults."""
        return set_fields(self)


def set_fields(config: Any) -> dict[str, Any]:
    """Return a config's fields by name, those marked `LATER` only where they differ from their defaults."""
    fields = {each: getattr(config, each.name) for each in dataclasses.fields(config)}
    return {each.name: value for each, value in fields.items() if not each.metadata or value != each.default}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What every recipe has. A subclass adds its own fields and names the function that trains it."""

    runner: ClassVar[str]
    """ "module:function", called as `(recipe, folder, stages)`."""
    known_stages: ClassVar[tuple[str, ...]]
    """The stages that it may train, in order; each has a field of its name with its StageConfig."""

    name: str
    """Names the run's folder."""
    seed: int = 0
    """Seed of initial weights and data."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    evaluate_every: int = 200
    """Steps between evaluations on data that is not trained on."""
    log_every: int = 10
    """Steps between points of the training curve."""
    export: str | None = None
    """Where the finished model is written besides the run's folder."""

    @property
    def bfloat16_on_cpu(self) -> bool:
        """Whether it computes in bfloat16 on the CPU, whatever other devices there are."""
        return False


def check_share(name: str, value: float) -> None:
    """Raise ValueError unless a share of the data that is held back is from 0 to below 1."""
    if not 0 <= value < 1:
        raise ValueError(f"{name}: expected a share from 0 to below 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class PipelineRun(Recipe):
    """Train a generator for a large frozen base in a diffusers pipeline, from pairs, end to end through the base."""

    runner: ClassVar[str] = "openwu.training.bases.pipelines:train_pipeline"
    known_stages: ClassVar[tuple[str, ...]] = ("generator",)

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
    operator: str = field(default="lora", metadata=LATER)
    """What the generator writes for each target: one of `openwu.registry.OPERATORS`, or several joined by "+"."""
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
    """Base weights and activations in bfloat16; the generator's weights are float32. False: all are float32."""
    quantise: str | None = None
    """Linear maps in the base's layers in fewer bits: "8bit" or "4bit", by bitsandbytes; None: as `bf16` says."""
    checkpoint_base: bool = True
    """Gradient checkpointing of the base's blocks: recomputed in the backward pass instead of kept."""
    checkpoint_generator: bool = True
    """The same for the generator's blocks."""
    cache: str = "cache"
    """Folder of the pairs' encodings, relative to the run's; "" encodes in every step instead."""
    encoders: str = "drop"
    """Once all is in the cache: "drop" encoders from memory, move them to the "cpu", or "keep" them where they are."""
    device: str | None = None
    """Where to compute; None: CUDA where there is one."""
    held_back: float = 0.1
    """Share of every task's pairs that is validated on instead, at least one where a task has two."""
    validated: int = 4
    """Most pairs held back whose loss is logged; they are computed at once."""
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        if len(self.generator.shapes) != 1 or self.generator.shapes[0][1] != 0:
            raise ValueError(f"generator.shapes: expected one ((requests, 0),), got {self.generator.shapes}")
        if self.encoders not in ENCODERS_AFTER:
            raise ValueError(f"encoders: expected one of {list(ENCODERS_AFTER)}, got {self.encoders!r}")
        if self.quantise not in (None, "8bit", "4bit"):
            raise ValueError(f"quantise: expected 8bit, 4bit or None, got {self.quantise!r}")
        check_share("held_back", self.held_back)
        if unknown := [name for name in self.operator.split("+") if name not in OPERATORS]:
            raise ValueError(f"operator: expected some of {', '.join(OPERATORS)} joined by '+', got {unknown}")
        for chosen in self.condition:
            if not isinstance(chosen, Mapping) or chosen.get("name") not in CONDITION_ENCODERS:
                known = ", ".join(name for name in CONDITION_ENCODERS if name != "segments")
                raise ValueError(f"condition: expected encoders such as {{'name': ...}} of {known}, got {chosen!r}")
        for name in ("pixels", "validated"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
