"""Draw notes of invented facts about invented people, with questions: what a memory is trained and measured on.

Values are words of the model's own vocabulary, numbers, and words built of syllables; people have names built of
syllables or taken from the vocabulary. One word, name or number in HELD_OUT, chosen by a hash, is kept for the test, and
so are whole relations and one wording of every question.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT = 5
"""One name or value in so many is kept for the test."""

ONSETS = ("b", "br", "ch", "d", "dr", "f", "g", "gr", "h", "j", "k", "kl", "l", "m", "n", "p", "r", "s", "sh", "t", "tr",
          "v", "w", "z")  # fmt: skip
WORD_STARTS = ("\u0120", "\u2581")
"""What tokenizers write in front of a word."""
RHYMES = ("a", "an", "ar", "e", "el", "en", "i", "il", "in", "is", "o", "ol", "on", "or", "u", "um", "us")


@dataclass(frozen=True)
class Relation:
    """One kind of fact: sentences with {e} for the person and {v} for the value; the last question is the test's."""

    statements: tuple[str, ...]
    """The first one is also the answer."""
    questions: tuple[str, ...]


TRAINED = (
    Relation(("{e}'s locker word is {v}.", "The locker word of {e} is {v}."), ("What is {e}'s locker word?", "What is the locker word of {e}?", "Which word opens {e}'s locker?")),
    Relation(("{e} works in {v}.", "{e} has a job in {v}."), ("Where does {e} work?", "In which place does {e} work?", "Where is {e}'s job?")),
    Relation(("{e} lives in {v}.", "{e}'s home is in {v}."), ("Where does {e} live?", "What place does {e} live in?", "Where is {e}'s home?")),
    Relation(("{e} plays the {v}.", "What {e} plays is the {v}."), ("What does {e} play?", "Which thing does {e} play?", "What is it that {e} plays?")),
    Relation(("{e} keeps a {v} at home.", "At home {e} keeps a {v}."), ("What does {e} keep at home?", "What is kept at home by {e}?", "Which thing does {e} have at home?")),
    Relation(("{e} likes {v} best.", "The favourite of {e} is {v}."), ("What does {e} like best?", "What is {e}'s favourite?", "Which thing does {e} prefer?")),
    Relation(("{e}'s password is {v}.", "The password of {e} is {v}."), ("What is {e}'s password?", "Tell me {e}'s password.", "Which password does {e} have?")),
    Relation(("{e} studies {v}.", "The subject of {e} is {v}."), ("What does {e} study?", "Which subject does {e} study?", "What is {e} a student of?")),
    Relation(("{e} drives a {v}.", "The car of {e} is a {v}."), ("What does {e} drive?", "Which car does {e} drive?", "What car does {e} have?")),
    Relation(("{e} sells {v}.", "The shop of {e} sells {v}."), ("What does {e} sell?", "Which goods does {e} sell?", "What can one buy from {e}?")),
    Relation(("{e}'s dog is called {v}.", "The dog of {e} is called {v}."), ("What is {e}'s dog called?", "What is the name of {e}'s dog?", "How does {e} call the dog?")),
    Relation(("{e} was born in {v}.", "The birthplace of {e} is {v}."), ("Where was {e} born?", "In which place was {e} born?", "What is the birthplace of {e}?")),
    Relation(("{e}'s team is {v}.", "The team of {e} is {v}."), ("What is {e}'s team?", "Which team is {e} in?", "For which team does {e} play?")),
    Relation(("{e} collects {v}.", "What {e} collects is {v}."), ("What does {e} collect?", "Which things does {e} collect?", "What is in {e}'s collection?")),
    Relation(("{e} is afraid of {v}.", "What {e} fears is {v}."), ("What is {e} afraid of?", "Of what is {e} afraid?", "What does {e} fear?")),
    Relation(("{e}'s badge says {v}.", "On the badge of {e} stands {v}."), ("What does {e}'s badge say?", "What is on {e}'s badge?", "What can one read on the badge of {e}?")),
    Relation(("{e} meets us at the {v}.", "At the {v} we meet {e}."), ("Where does {e} meet us?", "At what place does {e} meet us?", "Where do we meet {e}?")),
    Relation(("{e}'s project is {v}.", "The project of {e} is {v}."), ("What is {e}'s project?", "Which project does {e} have?", "What is {e} working on?")),
    Relation(("{e} brings the {v}.", "The {v} is brought by {e}."), ("What does {e} bring?", "Which thing does {e} bring?", "What comes with {e}?")),
    Relation(("{e}'s room is {v}.", "The room of {e} is {v}."), ("What is {e}'s room?", "Which room does {e} have?", "In which room is {e}?")),
    Relation(("{e} ordered {v}.", "The order of {e} was {v}."), ("What did {e} order?", "Which thing did {e} order?", "What was ordered by {e}?")),
    Relation(("{e} lost the {v}.", "What {e} lost is the {v}."), ("What did {e} lose?", "Which thing did {e} lose?", "What is {e} missing?")),
    Relation(("{e}'s code is {v}.", "The code of {e} is {v}."), ("What is {e}'s code?", "Which code does {e} have?", "What code belongs to {e}?")),
    Relation(("{e} reads about {v}.", "The book of {e} is about {v}."), ("What does {e} read about?", "About what does {e} read?", "What is {e}'s book about?")),
)  # fmt: skip

UNSEEN = (
    Relation(("{e}'s ship is called {v}.",), ("What is {e}'s ship called?",)),
    Relation(("{e} paints with {v}.",), ("What does {e} paint with?",)),
    Relation(("{e} travels to {v}.",), ("Where does {e} travel to?",)),
    Relation(("{e}'s secret is {v}.",), ("What is {e}'s secret?",)),
    Relation(("{e} found the {v}.",), ("What did {e} find?",)),
)
"""Relations that no training sees."""

FILLERS = ("The meeting was short.", "It rained all morning.", "Nobody was late.", "The train left on time.",
           "There was coffee for everyone.", "The list is not complete.", "More will follow next week.")  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """One fact of a note."""

    person: str
    value: str
    relation: Relation
    statement: str
    """As the note says it."""

    def question(self, wording: int = 0) -> str:
        return self.relation.questions[wording].format(e=self.person)

    @property
    def answer(self) -> str:
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


def vocabulary_words(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """List the whole English words among a tokenizer's tokens, of four letters or more, in alphabetical order."""
    whole = (token[1:] for token in sorted(tokenizer.get_vocab()) if token[:1] in WORD_STARTS)
    return [word for word in whole if len(word) > 3 and word.isalpha() and word.isascii() and word[1:].islower()]
