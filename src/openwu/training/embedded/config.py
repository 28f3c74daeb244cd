"""Recipes of the embedded model: made from nothing, from pairs of one's own, or with new sentences."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from openwu.errors import OpenwuError
from openwu.training.config import LATER, Recipe, StageConfig, check_share
from openwu.training.embedded.model import EmbeddedConfig

STAGES = ("instruction", "phrases", "base", "generator", "examples", "shared")
"""In the order in which they build on one another. "shared" is the baseline of equal length, not part of the model."""
OPTIONAL = ("phrases", "examples")
"""Those that a recipe may go without."""


@dataclass(frozen=True, kw_only=True)
class EmbeddedRecipe(Recipe):
    """Make the embedded model, from nothing or from a finished one."""

    runner: ClassVar[str] = "openwu.training.embedded.run:train"
    known_stages: ClassVar[tuple[str, ...]] = STAGES

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
    b_init_std: float = 1e-2
    """Standard deviation of a generated B's elements before training: small, so that the base starts as it is."""
    bf16: bool = True
    """Compute in bfloat16 (weights and optimiser stay in float32); False on CPUs without it."""
    words_dropped: float = field(default=0.1, metadata=LATER)
    """Share of the n-grams that is left out of sentences while the instruction encoder learns them."""
    phrases: StageConfig | None = field(default=None, metadata=LATER)
    """The instruction encoder's linear reader by itself, once its tokens are learned; None: no such stage."""
    examples: StageConfig | None = field(default=None, metadata=LATER)
    """Example encoder and the generator's branch for it: edits that are shown by pairs of pictures; None: no such
    stage."""
    photographs_each: int = field(default=2, metadata=LATER)
    """Photographs on which each program of a batch of examples is learned."""
    plain_examples: int = field(default=0, metadata=LATER)
    """So many batches of examples at first show one operation on colours alone, see `ExampleSampler.plain`."""
    colour_examples: float = field(default=0.0, metadata=LATER)
    """Share of the programs of examples that change colours alone, see `ExampleSampler.colours`."""
    smooth: float = field(default=0.0, metadata=LATER)
    """Share of the photographs that are smoothed, see `PairSampler.smooth`."""
    cameras: float = field(default=0.0, metadata=LATER)
    """Share of the repairs whose damage is that of cameras and files, see `PairSampler.cameras`."""
    start: str | None = field(default=None, metadata=LATER)
    """Folder of a finished model of the same sizes whose weights the stages go on from; None: from nothing."""
    only_words: bool = field(default=False, metadata=LATER)
    """Of the start, only what reads words is taken; base, condition encoder and generator begin from nothing."""
    stages: tuple[str, ...] = field(default=STAGES, metadata=LATER)
    """The stages that are trained; with a `start`, the others stay as they are there."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.stages) - set(STAGES))
        if unknown or not self.stages:
            raise ValueError(f"stages: expected some of {list(STAGES)}, got {list(self.stages)}")
        check_share("words_dropped", self.words_dropped)
        if not 0 <= self.cameras <= 1:
            raise ValueError(f"cameras: expected a share from 0 to 1, got {self.cameras}")
        needed = {"base", "generator", *(() if self.examples is None else ("examples",))}
        if self.only_words and (self.start is None or not needed <= set(self.stages) or "instruction" in self.stages):
            raise ValueError(
                f"only_words: expected a start that reads words, and stages with {sorted(needed)} and without "
                f"'instruction', got start={self.start!r} and {list(self.stages)}"
            )
        if self.examples is not None and not self.model.condition.examples:
            raise ValueError("examples: expected a model whose condition.examples is True, or no such stage")

    @property
    def bfloat16_on_cpu(self) -> bool:
        """Whether it computes in bfloat16: the embedded model is trained on the CPU."""
        return self.bf16

    @property
    def known(self) -> tuple[str, ...]:
        """The stages that this recipe has, in order."""
        return tuple(name for name in STAGES if name not in OPTIONAL or getattr(self, name) is not None)

    def check_baseline(self) -> None:
        """Refuse an unfair baseline. Not at construction: overrides change one of the two stages at a time."""
        for name in ("steps", "shapes", "first_floor"):
            ours, theirs = getattr(self.shared, name), getattr(self.generator, name)
            if ours != theirs:
                raise OpenwuError(
                    f"shared.{name}: expected the generator's {theirs} for a fair baseline, got {ours}; set both"
                )


@dataclass(frozen=True, kw_only=True)
class PairsRecipe(Recipe):
    """Train a finished model on pairs of one's own, end to end: its generator, or its words for the new tasks alone."""

    runner: ClassVar[str] = "openwu.training.embedded.run:train_pairs"
    known_stages: ClassVar[tuple[str, ...]] = ("generator",)

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
    rehearsed: float = 0.5
    """Share of every batch that asks for edits that the start knows; its own answers are their targets. 0: none, and
    the known edits are lost."""
    photographs: str | None = None
    """Folder of JPEG photographs on which known edits are rehearsed; None: the pictures of the pairs."""
    dropped: float = 0.3
    """Share of the n-grams that is left out of sentences, so that other wordings of them are learned too."""
    own_labels: bool = field(default=True, metadata=LATER)
    """Give every task of the pairs that the start has no label for one of its own: its sentences are understood then,
    other wordings too, and no known edit stands where it stands. False: they are read as the start reads them."""
    trained: str = field(default="all", metadata=LATER)
    """ "all": condition encoder and generator, and the mean tokens of labels of one's own. "words": these tokens alone
    (textual inversion), from which known edits lose nothing, and which need no rehearsal."""
    allowed: float = field(default=0.5, metadata=LATER)
    """dB that the known edits may lose on average; where more are lost, the trained weights are drawn back towards the
    start until no more is. `inf`: never."""
    allowed_each: float = field(default=1.0, metadata=LATER)
    """The same for every known edit by itself."""
    bf16: bool = True
    """Compute in bfloat16 (weights and optimiser stay in float32); False on CPUs without it."""
    evaluate_every: int = 100

    def __post_init__(self) -> None:
        if len({requests for requests, _ in self.generator.shapes}) > 1:
            raise ValueError(f"generator.shapes: expected equally many requests in all, got {self.generator.shapes}")
        if any(not 0 < crop <= self.side for _, crop in self.generator.shapes):
            raise ValueError(f"generator.shapes: expected crops of 1 to side={self.side}, got {self.generator.shapes}")
        for name in ("held_back", "rehearsed", "dropped"):
            check_share(name, getattr(self, name))
        if self.trained not in ("all", "words") or (self.trained == "words" and not self.own_labels):
            raise ValueError(f'trained: expected "all", or "words" with own_labels=true, got {self.trained!r}')
        for name in ("allowed", "allowed_each"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number of dB above 0, or inf, got {getattr(self, name)}")

    @property
    def bfloat16_on_cpu(self) -> bool:
        """Whether it computes in bfloat16: the embedded model is trained on the CPU."""
        return self.bf16

    @property
    def rehearsed_requests(self) -> int:
        """Requests of a batch that ask for known edits. Raises OpenwuError where none would be left for the pairs."""
        if self.trained == "words":
            return 0
        requests = self.generator.shapes[0][0]
        known = round(self.rehearsed * requests)
        if self.rehearsed and not 0 < known < requests:
            raise OpenwuError(
                f"rehearsed: expected a share that leaves known and new requests in a batch of {requests}, "
                f"got {self.rehearsed}; enlarge generator.shapes, or set rehearsed=0 and lose what the start knows"
            )
        return known


@dataclass(frozen=True, kw_only=True)
class WordingRecipe(Recipe):
    """Train a finished model's instruction encoder on the suite's present sentences; all else stays as it is."""

    runner: ClassVar[str] = "openwu.training.embedded.run:train_wording"
    known_stages: ClassVar[tuple[str, ...]] = ("wording",)

    wording: StageConfig
    """The instruction encoder; its one shape has (sentences, 0)."""
    dropped: float = 0.3
    """Share of the n-grams that is left out of sentences."""
    hold: float = 0.3
    """Weight of the distance from the tokens that the frozen base and generator expect."""
    phrases_only: bool = field(default=False, metadata=LATER)
    """Train the linear reader alone: what a sentence is taken for changes, the tokens of what is understood do not."""
    start_share: float = field(default=0.0, metadata=LATER)
    """Share of the start's weights in the mean with the trained ones that is exported (weight-space ensembles,
    Wortsman et al. 2022): new sentences are learned, and less of the old is forgotten."""
    start: str | None = None
    """Folder of the model to start from; None: the one inside the package."""
    checkpoint_every: int = 200
    evaluate_every: int = 400


@dataclass(frozen=True, kw_only=True)
class CutsRecipe(Recipe):
    """Fit the linear model that tells two wishes in a sentence from one (`words/cuts.json`), for a finished reader."""

    runner: ClassVar[str] = "openwu.training.embedded.wish_cuts:train_cuts"
    known_stages: ClassVar[tuple[str, ...]] = ("cuts",)

    cuts: StageConfig
    """The linear model; every step reads all sentences, so that its shape says nothing."""
    composed: int = 3200
    """Sentences put together from two of one edit each."""
    shared: int = 200
    """Sentences in which one verb has two objects."""
    brief: int = 500
    """Two names, adjectives or complaints, joined."""
    told: int = 500
    """One wish beside where and when the picture was taken."""
    single: int = 18
    """Training sentences of each edit and language that ask for it alone."""
    start: str | None = None
    """Folder of the model whose reader reads them; None: the one inside the package."""


@dataclass(frozen=True, kw_only=True)
class SentenceRecipe(Recipe):
    """Train a sentence reader from nothing, for the labels of a finished model."""

    runner: ClassVar[str] = "openwu.training.embedded.sentence_stage:train_sentence"
    known_stages: ClassVar[tuple[str, ...]] = ("sentence",)

    sentence: StageConfig
    """The sentence reader; its one shape has (sentences, 0)."""
    composed: int = 30000
    """Sentences put together from two of one edit each; a fifteenth as many with one verb and two objects, a third as
    many of joined names and complaints, and of one wish beside where and when the picture was taken."""
    start: str | None = None
    """Folder of the model whose labels it reads; None: the one inside the package."""
    checkpoint_every: int = 200
    evaluate_every: int = 400
