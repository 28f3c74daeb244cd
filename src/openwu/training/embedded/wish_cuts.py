"""Train the linear model of cuts: whether a sentence has two wishes, and where the second begins (`words/cuts.py`).

    openwu train recipes/cuts.py

Sentences of two wishes are composed of two sentences of one each, or written by people (two_wishes.json); sentences of
one wish are those of the suite and of people. Where a sentence of two wishes is cut right follows from what is read of
its sides.

Shapes: n cuts, s sentences.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openwu.backbones.embedded.config import WEIGHTS
from openwu.backbones.embedded.instruction import InstructionEncoder
from openwu.backbones.embedded.understanding import read_sentences
from openwu.backbones.embedded.words.cuts import (
    DATA_FILES,
    PHRASE_FACTOR,
    Cut,
    cuts,
    likeliest,
    numbers_of,
    phrases_of,
    sides,
)
from openwu.backbones.embedded.words.wishes import Reading
from openwu.data.suite.phrases import OUT_OF_SCOPE
from openwu.files.writing import write_json
from openwu.training.config import StageConfig
from openwu.training.embedded.config import CutsRecipe
from openwu.training.embedded.model import EmbeddedModel
from openwu.training.embedded.two_wishes import (
    HELD_OUT,
    PEOPLE_GROUPS,
    Sentence,
    brief,
    composed,
    shared,
    single,
    told,
    written,
)
from openwu.training.record import export_folders

RARE = 10
"""Sentences in which a word must stand to get a weight."""
WORD_PENALTY = 2e-4


@dataclass(frozen=True)
class Example:
    """A sentence with its cuts that have two different edits at their sides."""

    sentence: Sentence
    numbers: tuple[tuple[float, ...], ...]
    phrases: tuple[tuple[str, ...], ...]
    right: tuple[bool, ...]
    """Whether the sides of a cut are taken for the two edits that are asked for."""


def train_cuts(recipe: CutsRecipe, folder: Path, _stages: tuple[str, ...] | None = None) -> None:
    """Read sentences with a model's reader, fit, and write `cuts.json` to the run's folder and `export`."""
    encoder = EmbeddedModel.from_pretrained(Path(recipe.start or WEIGHTS)).instruction
    found = fit(gather(encoder, training_sentences(recipe)), recipe.cuts, recipe.seed)
    for target in export_folders(recipe, folder):
        target.mkdir(parents=True, exist_ok=True)
        write_json(target / DATA_FILES[0], found)


def training_sentences(recipe: CutsRecipe) -> list[Sentence]:
    """Return what the linear model of cuts is trained on: people's sentences, held-out ones, and composed ones."""
    people = [each for group in PEOPLE_GROUPS for each in written(group)]
    unseen = [each for split in HELD_OUT for each in single(1000, recipe.seed, split)]
    made = [*composed(recipe.composed, recipe.seed), *shared(recipe.shared, recipe.seed)]
    made += [*brief(recipe.brief, recipe.seed), *told(recipe.told, recipe.seed), *single(recipe.single, recipe.seed)]
    return [*people, *unseen, *made]


@torch.no_grad()
def gather(encoder: InstructionEncoder, sentences: Sequence[Sentence], batch: int = 200) -> list[Example]:
    """Read both sides of every cut of some sentences."""
    found = []
    for start in range(0, len(sentences), batch):
        part = sentences[start : start + batch]
        every = [cuts(sentence.text) for sentence in part]
        texts = {sentence.text for sentence in part} | {t for each in every for cut in each for t in sides(cut)}
        readings = _read(encoder, sorted(texts, key=len))
        found += [_example(sentence, each, readings) for sentence, each in zip(part, every, strict=True)]
    return found


def _read(encoder: InstructionEncoder, texts: Sequence[str], size: int = 256) -> dict[str, Reading]:
    return {
        text: reading
        for start in range(0, len(texts), size)
        for text, reading in zip(
            texts[start : start + size], read_sentences(encoder, texts[start : start + size]), strict=True
        )
    }


def _example(sentence: Sentence, every: Sequence[Cut], readings: Mapping[str, Reading]) -> Example:
    numbers, phrases, right = [], [], []
    for cut in every:
        one, other = likeliest(cut, readings)
        row = numbers_of(cut, readings[sentence.text], readings[one], readings[other])
        if row is None:
            continue
        numbers.append(tuple(row))
        phrases.append(tuple(phrases_of(cut)))
        names = [next(edit for edit, _ in readings[text].ranked if edit != OUT_OF_SCOPE) for text in (one, other)]
        wanted = sentence.edits if len(sentence.edits) == 2 else (frozenset[str](), frozenset[str]())
        right.append(any(a in x and b in y for a, b in (names, names[::-1]) for x, y in [wanted]))
    return Example(sentence, tuple(numbers), tuple(phrases), tuple(right))


def fit(examples: Sequence[Example], stage: StageConfig, seed: int = 0) -> dict[str, Any]:
    """Train on the cuts of some sentences; return what cuts.json holds. `stage`: its steps and learning rate.

    The loss is the cross entropy of "one wish" against every cut; of two wishes, all right cuts count together.
    """
    counted = Counter(word for each in examples for word in {w for row in each.phrases for w in row})
    words = {word: 1 + at for at, word in enumerate(sorted(w for w, count in counted.items() if count >= RARE))}
    usable = [each for each in examples if each.numbers]
    owner = torch.tensor([at for at, each in enumerate(usable) for _ in each.numbers])
    numbers = torch.tensor([row for each in usable for row in each.numbers])
    right = torch.tensor([value for each in usable for value in each.right]).float()
    rows = _rows([row for each in usable for row in each.phrases], words)
    lengths = torch.tensor([len(row) for each in usable for row in each.phrases]).sqrt()
    two = torch.tensor([any(each.right) for each in usable])  # What no cut reads rightly shall not be cut.
    share = torch.tensor([each.sentence.weight for each in usable])
    torch.manual_seed(seed)
    weight = torch.zeros(numbers.shape[1], requires_grad=True)
    table = torch.zeros(len(words) + 1, requires_grad=True)
    optimizer = torch.optim.Adam([weight, table], lr=stage.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, stage.steps)
    for _ in range(stage.steps):
        scores = numbers @ weight + PHRASE_FACTOR * (table[rows] * (rows > 0)).sum(1) / lengths
        shares = torch.exp(scores.clamp(max=30))
        total = torch.zeros(len(usable)).index_add(0, owner, shares) + 1
        found = torch.zeros(len(usable)).index_add(0, owner, shares * right)
        chance = torch.where(two, found / total, 1 / total).clamp(min=1e-7)
        loss = -(share * chance.log()).sum() / share.sum() + WORD_PENALTY * table.square().sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    trained = table.detach().tolist()
    kept = {word: round(trained[at], 3) for word, at in words.items() if abs(trained[at]) >= 0.02}
    return {"numbers": [round(each, 4) for each in weight.tolist()], "words": kept}


def _rows(phrases: Sequence[Sequence[str]], words: Mapping[str, int]) -> Tensor:
    """Rows of the table of words `[n, m]`, 0 where there is nothing."""
    found = [[words[word] for word in row if word in words] for row in phrases]
    rows = torch.zeros(len(found), max(1, *map(len, found)), dtype=torch.long)
    for at, row in enumerate(found):
        rows[at, : len(row)] = torch.tensor(row, dtype=torch.long)
    return rows
