"""Train the linear model of cuts: whether a sentence has two wishes, and where the second begins (`words/cuts.py`).

    write_json(path, fit(gather(base, [*composed(2500, 0), *shared(200, 0), *written(), *single(18, 0)])))

Sentences of two wishes are composed of two sentences of one each, or written by people (two_wishes.json); sentences of
one wish are those of the suite. Where a sentence of two wishes is cut right follows from what is read of its sides.

Shapes: n cuts, s sentences.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openwu.backbones.embedded.instruction import InstructionEncoder
from openwu.backbones.embedded.understanding import read_sentences
from openwu.backbones.embedded.words.cuts import PHRASE_FACTOR, Cut, cuts, likeliest, numbers_of, phrases_of, sides
from openwu.backbones.embedded.words.joined import near
from openwu.backbones.embedded.words.wishes import Reading
from openwu.data.suite import phrases as suite
from openwu.data.suite.phrases import OUT_OF_SCOPE, load_phrases

RARE = 10
"""Sentences in which a word must stand to get a weight."""
STEPS, LEARNING_RATE = 150, 2e-2
WORD_PENALTY = 2e-4
PEOPLE, PEOPLE_OF_ONE, SHARED = 6.0, 2.0, 0.5
"""Weights of sentences: that people wrote with two wishes, with one or none, and of one verb for two objects. Composed
ones have 0.5, sentences that the encoder was trained on 1: of these it is too sure."""
SHORT = {"en": 9, "zh": 14}
"""Words, or characters, of a sentence that is put together with another one, at most."""
BARE = 0.66
"""Share of composed sentences in which a side is a name or an adjective, without the words around it."""
_JOINED = {
    "en": (
        "{a} and {b}", "{a}, {b}", "{a}. {b}", "{a} and also {b}", "{a}, then {b}", "{a} but also {b}",
        "{a} plus {b}", "{a}, and {b} please", "{a}, {b} as well", "{a}, {b} too", "{a}; {b}", "{a} & {b}",
        "{a}, also {b}", "first {a}, then {b}", "{a} + {b}", "{a}, oh and {b}", "{a} and then {b}", "{a} with {b}",
        "{a} while you {b}", "{a}! {b}", "{a} - {b}", "{a}, maybe {b} too", "{a} and {b}, for my mum's birthday",
        "{a} and {b}, thanks", "{a}, it's for the album, and {b}",
    ),
    "zh": (
        "{a}，{b}", "{a}，再{b}", "{a}并{b}", "{a}，并且{b}", "{a}同时{b}", "{a}，然后{b}", "{a}，顺便{b}",
        "先{a}，再{b}", "{a}，还要{b}", "{a}，{b}也要", "{a}。{b}", "{a} {b}", "{a}、{b}", "{a}，另外{b}", "{a}加{b}",
        "{a}又{b}", "{a}而且{b}", "{a}，也{b}", "{a}，{b}，谢谢", "{a}，{b}，发朋友圈用", "又{a}又{b}",
    ),
}  # fmt: skip
_DROPPED = {
    "en": re.compile(
        r"^(?:make (?:it|this|the (?:photo|picture|image)) (?:look )?|give (?:it|this|the \w+) |add |apply |can you |"
        r"could you |please |i want )+"
    ),
    "zh": re.compile(r"^(?:请|帮我|麻烦|把|让|给)?(?:这张|这个|整个|整张)?(?:照片|图片|画面|图|相片)?的?"),
}
"""What the second of two wishes leaves out."""
DATA_FILES = ("two_wishes.json",)
HELD_OUT = ("held_out", "fresh", "stranger")


@dataclass(frozen=True)
class Sentence:
    """A sentence and the edits that it asks for."""

    text: str
    language: str
    edits: tuple[frozenset[str], ...]
    """For every wish the edits that serve it; none for a sentence out of scope."""
    weight: float = 0.5


@dataclass(frozen=True)
class Example:
    """A sentence with its cuts that have two different edits at their sides."""

    sentence: Sentence
    numbers: tuple[tuple[float, ...], ...]
    phrases: tuple[tuple[str, ...], ...]
    right: tuple[bool, ...]
    """Whether the sides of a cut are taken for the two edits that are asked for."""


@cache
def _pool(splits: tuple[str, ...]) -> Mapping[str, Mapping[str, list[str]]]:
    """Language -> edit -> its short sentences, without end marks."""

    def short(text: str, language: str) -> bool:
        return (len(text.split()) if language == "en" else len(text)) <= SHORT[language]

    return {
        language: {
            name: [
                text.rstrip(".!?。！？ ")
                for split in splits
                for text in texts[language][split]
                if short(text, language)
            ]
            for name, texts in load_phrases().items()
            if name != OUT_OF_SCOPE
        }
        for language in suite.LANGUAGES
    }


def composed(count: int, seed: int, splits: tuple[str, ...] = HELD_OUT) -> list[Sentence]:
    """Put sentences of two edits together, `count` times.

    `splits`: of the suite's sentences. Those that no training saw are read with the doubt that people's are.
    """
    draws, pool = random.Random(seed), _pool(splits)
    found: list[Sentence] = []
    while len(found) < count:
        language = draws.choice(suite.LANGUAGES)
        one, other = draws.sample([name for name, texts in pool[language].items() if texts], 2)
        if near({one, other}):
            continue
        first, second = (draws.choice(pool[language][name]) for name in (one, other))
        if language == "en" and not second.startswith(("I ", "I'", "HDR")):
            second = second[0].lower() + second[1:]
        bare = (
            draws.random()
        )  # a third "A and B" whole, a third with the second bare, a third with both: "sepia, softer"
        second = (_DROPPED[language].sub("", second) if bare < BARE else "") or second
        first = (_DROPPED[language].sub("", first) if bare < BARE / 2 else "") or first
        text = draws.choice(_JOINED[language]).format(a=first, b=second)
        found.append(Sentence(text, language, (frozenset({one}), frozenset({other}))))
    return found


def shared(count: int, seed: int) -> list[Sentence]:
    """Let one verb have two objects, `count` times: "lower the contrast and the saturation", 把亮度和对比度提高."""
    draws, found = random.Random(seed), list[Sentence]()
    for _ in range(count):
        language = draws.choice(suite.LANGUAGES)
        up = draws.random() < 0.5
        one, other = draws.sample(list(_QUANTITIES), 2)
        names = [_QUANTITIES[each][0 if language == "en" else 1] for each in (one, other)]
        verb = draws.choice(_VERBS[language][0 if up else 1])
        text = draws.choice(_SHARED[language]).format(verb=verb, a=names[0], b=names[1])
        edits = [frozenset({_QUANTITIES[each][2 if up else 3]}) for each in (one, other)]
        found.append(Sentence(text, language, (edits[0], edits[1]), SHARED))
    return found


_QUANTITIES = {
    "brightness": ("brightness", "亮度", "brighten", "darken"),
    "contrast": ("contrast", "对比度", "contrast_up", "contrast_down"),
    "saturation": ("saturation", "饱和度", "saturate", "desaturate"),
    "sharpness": ("sharpness", "锐度", "sharpen", "soften"),
}
"""Its name in English and Chinese, and the edits that raise and lower it."""
_VERBS = {
    "en": (("increase", "raise", "boost", "turn up", "more"), ("decrease", "lower", "reduce", "turn down", "less")),
    "zh": (("提高", "增加", "加强", "调高"), ("降低", "减少", "减弱", "调低")),
}
_SHARED = {
    "en": ("{verb} {a} and {b}", "{verb} the {a} and the {b}", "{verb} the {a} and {b} please", "{verb} {a}, {b}"),
    "zh": ("{verb}{a}和{b}", "把{a}和{b}都{verb}", "{a}和{b}{verb}一点", "{verb}{a}、{b}", "{a}、{b}都{verb}"),
}


def single(count: int, seed: int, split: str = "train") -> list[Sentence]:
    """Draw `count` sentences of every edit and language that ask for it alone, and 15 times as many out of scope."""
    draws, found = random.Random(seed), list[Sentence]()
    for name, texts in load_phrases().items():
        edits = () if name == OUT_OF_SCOPE else (frozenset({name}),)
        for language in suite.LANGUAGES:
            most = min(len(texts[language][split]), count if edits else 15 * count)
            weight = 1.0 if split == "train" else PEOPLE_OF_ONE
            found += [Sentence(text, language, edits, weight) for text in draws.sample(texts[language][split], most)]
    return found


def written() -> list[Sentence]:
    """Return the sentences of two writers, half of them in English: one wish, two, or out of scope."""
    stored = json.loads(Path(suite.__file__).with_name(DATA_FILES[0]).read_text(encoding="utf-8"))
    found = []
    for language, entries in stored.items():
        for text, wanted in entries:
            edits = tuple(frozenset(each.split("|")) for each in wanted)
            found.append(Sentence(text, language, edits, PEOPLE if len(edits) > 1 else PEOPLE_OF_ONE))
    return found


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


def fit(examples: Sequence[Example], seed: int = 0) -> dict[str, Any]:
    """Train on the cuts of some sentences; return what cuts.json holds.

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
    optimizer = torch.optim.Adam([weight, table], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
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
