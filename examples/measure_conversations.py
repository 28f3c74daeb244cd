"""Measure what a language memory keeps of conversations, and whether it joins two facts; numbers of docs/memory.md.

    python examples/measure_conversations.py results.json [--generator FOLDER]

A conversation is remembered as a note and asked about in another one. Names and values are of the test's part.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from openwu.evaluation.experiments.geometry import mean_over
from openwu.evaluation.experiments.recall import holds
from openwu.files.origin import origin
from openwu.memory.facts import FactSource, vocabulary_words
from openwu.memory.language import LanguageMemory
from openwu.memory.note import padded

TOLD = (
    ("{e} works in {v}.", "Where does {e} work?", "I work in {v}.", "Where do I work?"),
    ("{e} lives in {v}.", "Where does {e} live?", "I live in {v}.", "Where do I live?"),
    ("{e} likes {v} best.", "What does {e} like best?", "I like {v} best.", "What do I like best?"),
    ("{e}'s password is {v}.", "What is {e}'s password?", "My password is {v}.", "What is my password?"),
    ("{e} drives a {v}.", "What does {e} drive?", "I drive a {v}.", "What do I drive?"),
    ("{e}'s dog is called {v}.", "What is {e}'s dog called?", "My dog is called {v}.", "What is my dog called?"),
    ("{e} was born in {v}.", "Where was {e} born?", "I was born in {v}.", "Where was I born?"),
)
"""A fact of a third person and a question; the same fact as the user tells it of himself, and his question."""
CASES = 14
HOPS = 8
OPENING = ("Good morning!", "Good morning! How can I help you today?")
"""The turns that another conversation begins with."""


@dataclass(frozen=True)
class Said:
    """A conversation's facts: the one asked about first."""

    person: str
    values: tuple[str, str]
    relations: tuple[tuple[str, str, str, str], tuple[str, str, str, str]]
    other: str
    """The second person."""

    def third(self, number: int) -> str:
        """Word a fact about the first or the second person, both of the first relation."""
        return self.relations[0][0].format(e=(self.person, self.other)[number], v=self.values[number])

    def first(self, number: int) -> str:
        """Word a fact as the user tells it of himself, each of another relation."""
        return self.relations[number][2].format(v=self.values[number])

    @property
    def of_person(self) -> str:
        return self.relations[0][1].format(e=self.person)

    @property
    def of_me(self) -> str:
        return self.relations[0][3]


def conversation(*turns: str) -> str:
    """Write user's turns as a conversation in which the assistant confirms each."""
    return "\n".join(f"User: {turn}\nAssistant: Noted." for turn in turns)


def template(turn: str) -> str:
    """Write one user's turn and its confirmation in the model's own chat template."""
    return f"<|im_start|>user\n{turn}<|im_end|>\n<|im_start|>assistant\nNoted.<|im_end|>"


def shuffled(told: Said, texts: Sequence[str]) -> list[str]:
    """Put the fact that is asked about second in half of the cases."""
    return list(texts) if len(told.person) % 2 else list(reversed(texts))


FORMS: dict[str, tuple[Callable[[Said], str], Callable[[Said], str]]] = {
    "the bare sentence, 1 fact": (lambda s: s.third(0), lambda s: s.of_person),
    "the bare sentences, 2 people": (lambda s: " ".join(shuffled(s, (s.third(0), s.third(1)))), lambda s: s.of_person),
    "conversation, 1 fact": (lambda s: conversation(s.third(0)), lambda s: s.of_person),
    "conversation, 2 people": (
        lambda s: conversation(*shuffled(s, (s.third(0), s.third(1)))),
        lambda s: s.of_person,
    ),
    "conversation in the chat template, 1 fact": (lambda s: template(s.third(0)), lambda s: s.of_person),
    "first person, bare sentence, 1 fact, asked as I": (lambda s: s.first(0), lambda s: s.of_me),
    "first person, conversation, 1 fact, asked as I": (lambda s: conversation(s.first(0)), lambda s: s.of_me),
    "first person, conversation, 2 facts, asked as I": (
        lambda s: conversation(*shuffled(s, (s.first(0), s.first(1)))),
        lambda s: s.of_me,
    ),
    "first person with a name, asked by the name": (
        lambda s: conversation(f"I am {s.person}. {s.first(0)}"),
        lambda s: s.of_person,
    ),
}
"""Form of a note -> (its text, its question)."""


def draw(memory: LanguageMemory, seed: int) -> tuple[list[Said], FactSource]:
    """Draw the cases, every relation twice."""
    source = FactSource(vocabulary_words(memory.base.tokenizer.get_vocab()), seed, test=True)
    cases = []
    for number in range(CASES):
        person, other = source.person(), source.person()
        values = source.value(), source.value()
        relations = TOLD[number % len(TOLD)], TOLD[(number + 3) % len(TOLD)]
        cases.append(Said(person, values, relations, other))
    return cases, source


def right(answers: Sequence[str], expected: Sequence[str], others: Sequence[str], groups: Sequence[str]) -> Any:
    """Return the share of answers with the expected value and without the other one."""
    each = zip(answers, expected, others, strict=True)
    return mean_over([float(holds(text, value) and not holds(text, other)) for text, value, other in each], groups)


def conversations(memory: LanguageMemory) -> dict[str, Any]:
    """Remember every form of note and ask: at once, in the middle of another conversation, and from the prompt."""
    cases, _ = draw(memory, 91)
    groups = [case.relations[0][0] for case in cases]
    values, others = [case.values[0] for case in cases], [case.values[1] for case in cases]
    results: dict[str, Any] = {}

    def keep(title: str, texts: Sequence[str], questions: Sequence[str], answers: Sequence[str]) -> None:
        found = right(answers, values, others, groups)
        shown = list(zip(texts, questions, answers, strict=True))
        results[title] = {"right": found.to_json(), "answers": shown}
        sys.stdout.write(f"| {title} | {found} |\n")
        sys.stdout.flush()

    for title, (write, ask) in FORMS.items():
        texts, questions = [write(case) for case in cases], [ask(case) for case in cases]
        notes = [[memory.remember(text)] for text in texts]
        keep(title, texts, questions, memory.ask_batch(questions, notes, max_new_tokens=24))
        if title in ("conversation, 1 fact", "first person, conversation, 1 fact, asked as I"):
            prompts = [after_opening(memory, question) for question in questions]
            adapters = padded([note.adapter for [note] in notes])
            answers = memory.answer(prompts, adapters, max_new_tokens=24)
            keep(f"{title}, in the middle of another conversation", texts, questions, answers)
            both = [f"{text}\n{question}" for text, question in zip(texts, questions, strict=True)]
            keep(
                f"{title}: in the prompt", texts, questions, memory.ask_batch(both, [[]] * len(both), max_new_tokens=24)
            )
    return results


def after_opening(memory: LanguageMemory, question: str) -> str:
    """Return the prompt of a question that follows the OPENING of a conversation."""
    greeting, reply = OPENING
    turn = f"{memory.reader.question(greeting)}{reply}{memory.base.tokenizer.eos_token}\n"
    return turn + memory.reader.question(question)


def two_hops(memory: LanguageMemory) -> dict[str, Any]:
    """Ask for what two sentences say together: a person works in a place, and the place's office sells something."""
    _, source = draw(memory, 92)
    rows = []
    for _ in range(HOPS):
        people = source.person(), source.person()
        places = source.built(2).capitalize(), source.built(3).capitalize()
        rows.append((people, places, (source.value(), source.value())))
    works = [[f"{p} works in {q}." for p, q in zip(people, places, strict=True)] for people, places, _ in rows]
    sells = [[f"{q}'s office sells {v}." for q, v in zip(places, goods, strict=True)] for _, places, goods in rows]
    first = [goods[0] for *_, goods in rows]
    groups = [str(number) for number in range(HOPS)]
    results: dict[str, Any] = {}

    def ask(title: str, texts: Sequence[Sequence[str]], questions: Sequence[str], values: Sequence[str]) -> list[str]:
        notes = [[memory.remember(text) for text in each] for each in texts]
        answers = memory.ask_batch(questions, notes, max_new_tokens=24)
        others = [row[2][1] if value == row[2][0] else row[1][1] for row, value in zip(rows, values, strict=True)]
        found = right(answers, values, others, groups)
        results[title] = {"right": found.to_json(), "answers": list(zip(texts, questions, answers, strict=True))}
        sys.stdout.write(f"| {title} | {found} |\n")
        sys.stdout.flush()
        return answers

    both = [[" ".join((*one, *two))] for one, two in zip(works, sells, strict=True)]
    questions = [f"What does {people[0]}'s office sell?" for people, *_ in rows]
    one_person = [[f"{one[0]} {two[0]}"] for one, two in zip(works, sells, strict=True)]
    ask("one person and one office in one note", one_person, questions, first)
    ask("the same, as two notes", [[one[0], two[0]] for one, two in zip(works, sells, strict=True)], questions, first)
    ask("two people and two offices in one note", both, questions, first)
    asked = [f"Where does {people[0]} work?" for people, *_ in rows]
    steps = ask("the first hop alone", both, asked, [places[0] for _, places, _ in rows])
    ask("the second hop alone", both, [f"What does {places[0]}'s office sell?" for _, places, _ in rows], first)
    found = [re.search(r"works in (\w+)", answer) for answer in steps]
    recalled = [match.group(1) if match else "" for match in found]
    ask(
        "asked in two steps, the first answer in the second question",
        both,
        [f"What does {place}'s office sell?" for place in recalled],
        first,
    )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("results", type=Path)
    parser.add_argument("--generator", help="folder of a generator (default: the one of the package)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    memory = LanguageMemory.from_pretrained(options.generator)
    results: dict[str, Any] = {**origin()}
    for title, find in (("two hops", two_hops), ("conversations", conversations)):
        results[title] = find(memory)
        options.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
