"""Train the sentence reader: sentences of one to three wishes and of none -> the edits at each place.

    openwu train recipes/sentence.py

Sentences are those of people (two_wishes.json), pairs of them put together, composed ones, and the suite's.

Shapes: b sentences, t words, g n-grams, W places, L labels and "nothing more" after them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from openwu.backbones.embedded.config import WEIGHTS, EmbeddedBaseConfig, read_config
from openwu.backbones.embedded.sentence import SentenceConfig, SentenceReader
from openwu.data.suite.phrases import LANGUAGES, OUT_OF_SCOPE, load_phrases, phrases_hash, vary
from openwu.training.embedded.config import SentenceRecipe
from openwu.training.embedded.two_wishes import (
    HELD_OUT,
    PEOPLE_GROUPS,
    SEVERAL,
    Sentence,
    brief,
    composed,
    joined_people,
    shared,
    single,
    told,
    written,
)
from openwu.training.loop import Evaluation, LoopConfig, train_stage
from openwu.training.micro_batch import FULL_BATCH, MicroBatch
from openwu.training.record import dependencies, export_folders, provenance, stored_provenance, write_provenance

PEOPLE, JOINED, COMPOSED, OUTSIDE = 0.45, 0.08, 0.12, 0.06
"""Shares of a batch: sentences of people, two of theirs put together, composed ones, the suite's out of scope; the rest
is the suite's of one edit."""
VARIED = {"people": 0.3, "composed": 0.3, "suite": 0.5}
"""Shares of these that are varied: another word for the picture, politeness, a reason, typing errors."""
DROPPED = 0.15
"""Share of the n-grams that is left out."""
NO_WORD = 0.04
"""Share of the words that is left out, all n-grams of it."""


PARTS = 5
"""Parts of a batch, by length, that are read apart: short sentences are not padded to the longest one's words."""
LONGEST = {"en": 70, "zh": 26}
"""Characters of a person's sentence that is put together with another one, at most."""


class SentenceStage:
    """Negative log-likelihood of the right edits at every place; of alternatives, any."""

    name = "sentence"

    def __init__(self, reader: SentenceReader, recipe: SentenceRecipe) -> None:
        self.reader, self.seed, self.size = reader, recipe.seed, recipe.sentence.shapes[0][0]
        self.index = {name: at for at, name in enumerate(reader.config.labels)}
        self.people = [each for group in (*PEOPLE_GROUPS, *SEVERAL) for each in written(group) if self._known(each)]
        self.short = {
            language: [each for each in self.people if each.language == language and _is_short(each)]
            for language in LANGUAGES
        }
        made = partial(composed, recipe.composed, recipe.seed, ("train",))
        self.composed = [*made(), *shared(recipe.composed // 15, recipe.seed)]
        self.composed += brief(recipe.composed // 3, recipe.seed)
        self.composed += told(recipe.composed // 3, recipe.seed, ("train",))
        self.single = {
            name: {language: texts[language]["train"] for language in LANGUAGES}
            for name, texts in load_phrases().items()
        }

    def _known(self, sentence: Sentence) -> bool:
        return all(edit in self.index for each in sentence.edits for edit in each)

    @property
    def trained(self) -> nn.Module:
        """The reader."""
        return self.reader

    def drawn(self, step: int) -> list[Sentence]:
        """Draw a step's sentences."""
        draws = random.Random(f"{self.seed} {step}")
        generator = torch.Generator().manual_seed(self.seed * 3_000_017 + step)
        return [self._draw(draws, generator) for _ in range(self.size)]

    def _draw(self, draws: random.Random, generator: torch.Generator) -> Sentence:
        kind = draws.random()
        if kind < PEOPLE:
            found, varied = draws.choice(self.people), VARIED["people"]
        elif kind < PEOPLE + JOINED:
            one, other = draws.sample(self.short[draws.choice(LANGUAGES)], 2)
            found, varied = joined_people(one, other, draws), 0.0
        elif kind < PEOPLE + JOINED + COMPOSED:
            found, varied = draws.choice(self.composed), VARIED["composed"]
        else:
            outside = kind >= 1 - OUTSIDE
            name = OUT_OF_SCOPE if outside else self.reader.config.labels[draws.randrange(len(self.index) - 1)]
            language = draws.choice(LANGUAGES)
            edits = () if outside else (frozenset({name}),)
            found, varied = Sentence(draws.choice(self.single[name][language]), language, edits), VARIED["suite"]
        if draws.random() >= varied:
            return found
        return Sentence(vary(found.text, found.language, generator), found.language, found.edits)

    def rows(self, sentences: Sequence[Sentence], step: int) -> Tensor:
        """Return the rows `[b, t, g]` of a step's sentences, some left out; a word without any reads as unknown."""
        rows = self.reader.hashed([each.text for each in sentences])
        generator = torch.Generator().manual_seed(self.seed * 3_000_017 + step)
        kept = torch.rand(rows.shape, generator=generator) >= DROPPED
        kept &= (torch.rand(rows.shape[:2], generator=generator) >= NO_WORD)[..., None]
        first = torch.zeros_like(kept)
        first[..., 0] = ~(rows * kept > 0).any(2)  # Something of every word stays, so that it still is one.
        return rows * (kept | first)

    def right(self, sentences: Sequence[Sentence]) -> Tensor:
        """Return which labels are right at each place `[b, W, L + 1]`, bool."""
        places, labels = self.reader.config.wishes, len(self.index)
        right = torch.zeros(len(sentences), places, labels + 1, dtype=torch.bool)
        for row, sentence in zip(right, sentences, strict=True):
            wanted: list[frozenset[str]] = [*(sentence.edits or (frozenset({OUT_OF_SCOPE}),))][:places]
            for place, edits in enumerate(wanted):
                row[place, [self.index[each] for each in edits]] = True
            row[len(wanted) :, labels] = True
        return right

    @contextmanager
    def loss(self, step: int, micro_batch: MicroBatch = FULL_BATCH) -> Iterator[Tensor]:
        """Compute the micro-batch's share of the step's loss."""
        sentences = sorted(self.drawn(step), key=lambda each: len(each.text))
        own = micro_batch.rows(self.size)
        rows, right = self.rows(sentences, step)[own], self.right(sentences)[own]
        losses = [self._lost(*part) for part in zip(rows.tensor_split(PARTS), right.tensor_split(PARTS), strict=True)]
        yield torch.stack(losses).sum() / self.size

    def _lost(self, rows: Tensor, right: Tensor) -> Tensor:
        """Return the summed loss of some sentences `[b, t, g]`, without the padding that longer ones need."""
        longest = int((rows > 0).any(2).sum(1).amax()) if len(rows) else 0
        if not longest:
            return rows.new_zeros((), dtype=torch.float32)
        found = self.reader(rows[:, :longest])
        lost: Tensor = -found.masked_fill(~right, -1e4).logsumexp(2).sum()
        return lost

    def not_finite(self, step: int, _micro_batch: MicroBatch = FULL_BATCH) -> list[str]:
        """Name the step: sentences are drawn, and none is the user's."""
        return [f"the sentences of step {step}"]

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """Count the suite's held-out sentences that are read right: their edit alone, or none."""
        scalars = {}
        for split in HELD_OUT:
            sentences = single(6, self.seed, split)
            read = self.reader.read([each.text for each in sentences])
            right = sum(
                len(found.edits) == len(each.edits) and all(map(_in, found.edits, each.edits))
                for found, each in zip(read, sentences, strict=True)
            )
            scalars[f"{split}/right"] = right / len(sentences)
        return Evaluation(scalars)


def _in(edit: str, edits: frozenset[str]) -> bool:
    return edit in edits


def _is_short(sentence: Sentence) -> bool:
    return len(sentence.edits) == 1 and len(sentence.text) < LONGEST[sentence.language]


def new_reader(labels: tuple[str, ...], seed: int) -> SentenceReader:
    """Make initial weights without touching the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SentenceReader(SentenceConfig(labels))


def train_sentence(
    recipe: SentenceRecipe, folder: Path, _stages: tuple[str, ...] | None = None, stop_after: int | None = None
) -> None:
    """Train a sentence reader from nothing for a model's labels; write its file to the run's folder and `export`."""
    start = Path(recipe.start or WEIGHTS)
    before = stored_provenance(start)
    reader = new_reader(EmbeddedBaseConfig.from_dict(read_config(start)).instruction.labels, recipe.seed)
    described = json.dumps(dependencies(recipe, sentences=phrases_hash()), sort_keys=True)
    stage = SentenceStage(reader, recipe)
    loop = LoopConfig.of(recipe, described, stop_after)
    if train_stage(stage, recipe.sentence, loop, folder / "sentence"):
        for target in export_folders(recipe, folder):
            target.mkdir(parents=True, exist_ok=True)
            reader.save(target)
            write_provenance(target, provenance(recipe, folder, sentences=phrases_hash()), before)
