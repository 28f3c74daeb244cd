"""Draw notes of invented facts about invented people, with questions: what a memory is trained and measured on.

Values are words of the model's own vocabulary, numbers, and words built of syllables; people have names built of
syllables or taken from the vocabulary. One word, name or number in HELD_OUT, chosen by a hash, is kept for the test,
and so are whole relations and one wording of every question.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

HELD_OUT = 5
"""One name or value in so many is kept for the test."""

WORD_STARTS = ("\u0120", "\u2581")
"""What tokenizers write in front of a word."""


@dataclass(frozen=True)
class Relation:
    """One kind of fact: sentences with {e} for the person and {v} for the value; the last question is the test's."""

    statements: tuple[str, ...]
    """The first one is also the answer."""
    questions: tuple[str, ...]
    spoken: tuple[str, ...] = ()
    """As the speaker tells it of himself, his question, and the answer; (): never in a training."""


def _relations(kind: str) -> tuple[Relation, ...]:
    return tuple(
        Relation(tuple(each["statements"]), tuple(each["questions"]), tuple(each.get("spoken", ())))
        for each in _DATA[kind]
    )


_DATA: dict[str, list[Any]] = json.loads((Path(__file__).parent / "relations.json").read_text(encoding="utf-8"))
TRAINED, UNSEEN = _relations("trained"), _relations("unseen")
"""Relations of the training, and those that no training sees."""
FILLERS: list[str] = _DATA["fillers"]
"""Sentences without a fact."""
ORDINARY: list[str] = _DATA["ordinary"]
"""Questions that no note answers; the base's answers to them shall stay as they are."""
ORDINARY_KINDS: list[str] = _DATA["ordinary_kinds"]
"""Wordings of ordinary questions about any word {w}."""
ORDINARY_TEST: list[str] = _DATA["ordinary_test"]
"""More of them, which no generator was fitted to."""
ONSETS: list[str] = _DATA["onsets"]
RHYMES: list[str] = _DATA["rhymes"]
"""A built word is a row of an onset and a rhyme."""
UPDATES: list[str] = _DATA["updates"]
"""Sentences with which a statement {s} takes an earlier one back."""
OPENERS: list[str] = _DATA["openers"]
"""Words in front of a statement {s}."""
LINKED: list[str] = _DATA["linked"]
"""A statement {a} and a second one of the same person, by a pronoun: {again}, or {Again} at a sentence's beginning."""
CONFIRMATIONS: list[str] = _DATA["confirmations"]
"""What an assistant answers to a fact."""


@dataclass(frozen=True)
class Fact:
    """One fact of a note."""

    person: str
    value: str
    relation: Relation
    statement: str
    """As the note says it."""
    spoken: bool = False
    """The speaker tells it of himself."""

    def question(self, wording: int = 0) -> str:
        return self.relation.spoken[1] if self.spoken else self.relation.questions[wording].format(e=self.person)

    @property
    def answer(self) -> str:
        if self.spoken:
            return self.relation.spoken[2].format(v=self.value)
        return self.relation.statements[0].format(e=self.person, v=self.value)


@dataclass(frozen=True)
class Note:
    """A text and the facts in it."""

    text: str
    facts: tuple[Fact, ...]


class FactSource:
    """Draws notes; the same seed draws the same ones."""

    def __init__(self, words: Sequence[str], seed: int, *, test: bool) -> None:
        """`words`: what values are drawn from, beside numbers and built words; `test`: the held-out part of all."""
        self.random, self.test = Random(seed), test
        self.words = [word for word in words if word[:1].islower() and self._mine(word)]
        self.names = [word for word in words if word[:1].isupper() and self._mine(word)]

    def _mine(self, text: str) -> bool:
        return (zlib.crc32(text.lower().encode()) % HELD_OUT == 0) == self.test

    def built(self, syllables: int) -> str:
        """Return a word built of syllables."""
        while True:
            drawn = "".join(self.random.choice(ONSETS) + self.random.choice(RHYMES) for _ in range(syllables))
            if self._mine(drawn):
                return drawn

    def person(self) -> str:
        """Return a name, sometimes with a family name."""
        kind = self.random.random()
        first = self.random.choice(self.names) if kind < 0.5 else self.built(2).capitalize()
        return f"{first} {self.built(2).capitalize()}" if self.random.random() < 0.2 else first

    def value(self) -> str:
        """Return a word of the vocabulary, two of them, a number, or a word of syllables."""
        kind = self.random.random()
        if kind < 0.5:
            return self.random.choice(self.words)
        if kind < 0.65:
            return f"{self.random.choice(self.words)} {self.random.choice(self.words)}"
        if kind < 0.85:
            while not self._mine(drawn := str(self.random.randrange(100, 9999))):
                pass
            return drawn
        return self.built(self.random.randint(2, 3))

    def note(
        self,
        facts: int,
        *,
        relations: Sequence[Relation] = TRAINED,
        same_relation: float = 0.5,
        reworded: float = 0.35,
        fillers: float = 0.2,
    ) -> Note:
        """Draw a note of that many facts, each about another person.

        `same_relation`: probability that all facts are of one relation, which binding needs; `reworded`: that a
        statement is not worded as the answer; `fillers`: that a sentence without a fact follows one.
        """
        people: list[str] = []
        values: list[str] = []
        while len(people) < facts:
            if (person := self.person()) not in people:
                people.append(person)
        while len(values) < facts:
            if (value := self.value()) not in values:
                values.append(value)
        common = self.random.choice(relations) if self.random.random() < same_relation else None
        told: list[Fact] = []
        sentences: list[str] = []
        for person, value in zip(people, values, strict=True):
            relation = common or self.random.choice(relations)
            wording = (
                self.random.choice(relation.statements) if self.random.random() < reworded else relation.statements[0]
            )
            told.append(Fact(person, value, relation, wording.format(e=person, v=value)))
            sentences.append(told[-1].statement)
            if self.random.random() < fillers:
                sentences.append(self.random.choice(FILLERS))
        return Note(" ".join(sentences), tuple(told))


def vocabulary_words(tokens: Iterable[str]) -> list[str]:
    """List the whole English words among a tokenizer's tokens, of four letters or more, in alphabetical order."""
    whole = (token[1:] for token in sorted(tokens) if token[:1] in WORD_STARTS)
    return [word for word in whole if len(word) > 3 and word.isalpha() and word.isascii() and word[1:].islower()]
