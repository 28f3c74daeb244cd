"""Draw notes that tell their invented facts in harder ways: with updates, in the first person, as prose, as dialogues.

What a note says last holds: an update's fact has the new value, and the old one is only in the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from openwu.memory.facts import CONFIRMATIONS, LINKED, OPENERS, TRAINED, UPDATES, Fact, FactSource, Note

DIALOGUES = 0.5
"""Share of the notes in the first person that are dialogues; of others a third of it are."""
SPEAKER = "I"


@dataclass(frozen=True)
class Telling:
    """Shares of notes that are told in a harder way; the rest are one plain statement for each fact."""

    updates: float = 0.0
    """One value is taken back by a later sentence."""
    first_person: float = 0.0
    """One of the facts is the speaker's own."""
    prose: float = 0.0
    """Words in front of statements, and two facts of a person linked by a pronoun."""

    def __post_init__(self) -> None:
        shares = (self.updates, self.first_person, self.prose)
        if min(shares) < 0 or sum(shares) > 1:
            raise ValueError(f"telling: expected shares from 0 to 1 with a sum of at most 1, got {shares}")

    def note(self, source: FactSource, facts: int) -> Note:
        """Draw a note of that many facts, one more where two of a person are linked.

        A harder note lists two facts alone, which are asked about: the harder one and any other.
        """
        kind = source.random.random() if self != Telling() else 1.0
        if kind < self.updates:
            return _asked(dialogue(updated(source, facts), source.random, DIALOGUES / 3), source.random)
        if kind < self.updates + self.first_person:
            return _asked(dialogue(spoken(source, facts), source.random, DIALOGUES), source.random)
        if kind < self.updates + self.first_person + self.prose:
            return _asked(prose(source, facts), source.random)
        return source.note(facts)


def updated(source: FactSource, facts: int) -> Note:
    """Draw a note in which one fact's value is taken back; that fact is the first of its `facts`."""
    random, told = source.random, source.note(facts, fillers=0.0)
    number = random.randrange(facts)
    changed = told.facts[number]
    old = source.value()
    while old in {fact.value for fact in told.facts}:
        old = source.value()
    new = random.choice(UPDATES).format(s=changed.relation.statements[0]).format(e=changed.person, v=changed.value)
    sentences = [fact.statement for fact in told.facts]
    sentences[number] = random.choice(changed.relation.statements).format(e=changed.person, v=old)
    sentences.insert(random.randint(number + 1, facts), new)
    rest = [fact for fact in told.facts if fact is not changed]
    return Note(" ".join(sentences), (replace(changed, statement=new), *rest))


def spoken(source: FactSource, facts: int) -> Note:
    """Draw a note in which one fact is the speaker's own; that fact is the first of its `facts`."""
    relations = [relation for relation in TRAINED if relation.spoken]
    told = source.note(facts, relations=relations, fillers=0.0)
    number = source.random.randrange(facts)
    mine = told.facts[number]
    statement = mine.relation.spoken[0].format(v=mine.value)
    mine = Fact(SPEAKER, mine.value, mine.relation, statement, spoken=True)
    sentences = [mine.statement if place == number else fact.statement for place, fact in enumerate(told.facts)]
    return Note(" ".join(sentences), (mine, *(fact for place, fact in enumerate(told.facts) if place != number)))


def prose(source: FactSource, facts: int, wordings: Sequence[str] = LINKED) -> Note:
    """Draw a note in which a person has two facts, the second by a pronoun; these are the first of its `facts`."""
    random, told = source.random, source.note(facts, reworded=0.0, fillers=0.0)
    first, others = told.facts[0], told.facts[1:]
    relation = random.choice([each for each in TRAINED if each != first.relation])
    value = source.value()
    while value in {fact.value for fact in told.facts}:
        value = source.value()
    woman = random.random() < 0.5
    words = {"{e}'s": "her" if woman else "his", "{e}": "she" if woman else "he"}
    again = relation.statements[0].removesuffix(".")
    for person, pronoun in words.items():
        again = again.replace(person, pronoun)
    again = again.format(v=value)
    pair = random.choice(wordings).format(
        a=first.statement.removesuffix("."), again=again, Again=again[0].upper() + again[1:]
    )
    second = Fact(first.person, value, relation, pair)
    sentences = [random.choice([*OPENERS, "{s}"]).format(s=fact.statement) for fact in others]
    sentences.insert(random.randint(0, len(sentences)), pair)
    return Note(" ".join(sentences), (second, first, *others))


def dialogue(note: Note, random: Random, share: float) -> Note:
    """Put every sentence into a turn of its own that an assistant confirms, in that share of cases."""
    if random.random() >= share:
        return note
    turns = [f"User: {turn}.\nAssistant: {random.choice(CONFIRMATIONS)}" for turn in note.text.rstrip(".").split(". ")]
    return Note("\n".join(turns), note.facts)


def _asked(note: Note, random: Random) -> Note:
    return Note(note.text, (note.facts[0], *random.sample(note.facts[1:], min(1, len(note.facts) - 1))))
