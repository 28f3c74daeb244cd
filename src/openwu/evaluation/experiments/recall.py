"""Measure what a language memory recalls, against no memory, another note's, the note in the prompt, and retrieval.

An answer is right when it holds the value that the note gives to the person asked about, and no other value of the
note. Names, values and one wording of the questions are of the test's part of `openwu.memory.facts`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from openwu.backbones.causal_lm.base import IGNORED
from openwu.evaluation.experiments.geometry import Mean, mean_over
from openwu.memory.facts import ORDINARY_TEST, TRAINED, Fact, FactSource, Note, Relation, vocabulary_words
from openwu.memory.language import LanguageMemory
from openwu.memory.note import MemoryNote, padded
from openwu.training.retention import token_divergence
from openwu.types import Adapter

RUNGS = ("none", "random", "other note", "matched", "in the prompt", "retrieved sentence")
PASS = 16
"""Questions that are answered at once."""
LEAK_TOKENS = 20
"""Length of the answers that are compared with and without a note."""


@dataclass(frozen=True)
class RecallCase:
    """A note, the fact that is asked for, and the question."""

    note: Note
    fact: Fact
    question: str

    def right(self, answer: str) -> float:
        """Return 1 for an answer with the value, and with no other of the note."""
        others = {fact.value for fact in self.note.facts} - {self.fact.value}
        return float(holds(answer, self.fact.value) and not any(holds(answer, value) for value in others))

    def mistaken(self, answer: str) -> float:
        """Return 1 for an answer with another person's value alone."""
        others = {fact.value for fact in self.note.facts} - {self.fact.value}
        return float(any(holds(answer, value) for value in others) and not holds(answer, self.fact.value))


@dataclass(frozen=True)
class Recall:
    """Shares of answers: right ones, and those with another person's value."""

    right: Mean
    mistaken: Mean
    examples: tuple[tuple[str, str, str], ...]
    """(note, question, answer) of the first cases."""

    def to_json(self) -> dict[str, Any]:
        return {"right": self.right.to_json(), "mistaken": self.mistaken.to_json(), "examples": self.examples}


def holds(answer: str, value: str) -> bool:
    """Whether an answer holds a value as whole words."""
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", answer, re.IGNORECASE) is not None


def recall_cases(
    memory: LanguageMemory,
    facts: int,
    count: int,
    *,
    seed: int,
    relations: Sequence[Relation] = TRAINED,
    wording: int = 0,
    same_relation: float = 1.0,
) -> list[RecallCase]:
    """Draw cases whose facts are all of one relation (binding) unless `same_relation` says otherwise."""
    source = FactSource(vocabulary_words(memory.base.tokenizer.get_vocab()), seed, test=True)
    cases = []
    for _ in range(count):
        note = source.note(facts, relations=relations, same_relation=same_relation)
        fact = source.random.choice(note.facts)
        cases.append(RecallCase(note, fact, fact.question(wording)))
    return cases


def measure(memory: LanguageMemory, cases: Sequence[RecallCase], rung: str = "matched") -> Recall:
    """Answer every case on one rung of the ladder, one of RUNGS."""
    answers = [answer for start in range(0, len(cases), PASS) for answer in _answers(memory, cases, start, rung)]
    groups = [case.fact.relation.statements[0] for case in cases]
    right = mean_over([case.right(answer) for case, answer in zip(cases, answers, strict=True)], groups)
    wrong = mean_over([case.mistaken(answer) for case, answer in zip(cases, answers, strict=True)], groups)
    shown = tuple((c.note.text, c.question, a) for c, a in zip(cases[:4], answers[:4], strict=True))
    return Recall(right, wrong, shown)


def _answers(memory: LanguageMemory, cases: Sequence[RecallCase], start: int, rung: str) -> list[str]:
    some = cases[start : start + PASS]
    questions = [case.question for case in some]
    texts = [case.note.text for case in some]
    if rung == "in the prompt":
        questions = [f"{text}\n{question}" for text, question in zip(texts, questions, strict=True)]
    elif rung == "retrieved sentence":
        questions = [f"{retrieved(case)}\n{case.question}" for case in some]
    notes: list[list[MemoryNote | str]] = [[] for _ in some]
    if rung in ("matched", "random", "other note"):
        if rung == "other note":
            texts = [cases[(start + place + 1) % len(cases)].note.text for place in range(len(some))]
        written = [memory.remember(text) for text in texts]
        notes = [[shuffled(note) if rung == "random" else note] for note in written]
    return memory.ask_batch(questions, notes, max_new_tokens=24)


@dataclass(frozen=True)
class Leak:
    """How much notes change answers to questions that have nothing to do with them."""

    same: Mean
    """Share of answers that are the same, word for word."""
    divergence: Mean
    """KL(without note || with note), nats for each token of the model's own answer."""
    examples: tuple[tuple[str, str, str], ...]
    """(question, answer without a note, answer with one) of the first questions."""

    def to_json(self) -> dict[str, Any]:
        return {
            "same": self.same.to_json(),
            "divergence": self.divergence.to_json(),
            "examples": self.examples,
        }


@torch.no_grad()
def leak(memory: LanguageMemory, notes: Sequence[str], questions: Sequence[str] = tuple(ORDINARY_TEST)) -> Leak:
    """Ask every question with one note, the notes in turn, and without; answers of up to LEAK_TOKENS tokens."""
    prompts = [memory.reader.question(question) for question in questions]
    held = [[memory.remember(notes[number % len(notes)])] for number in range(len(questions))]
    alone = memory.answer(prompts, max_new_tokens=LEAK_TOKENS)
    under = memory.ask_batch(questions, held, max_new_tokens=LEAK_TOKENS)
    texts = memory.base.tokenize_dialogues([[pair] for pair in zip(prompts, alone, strict=True)])
    own, labels = memory.base.answer_logits(texts)
    adapter = padded([note.adapter for [note] in held])
    with memory.handle.applied(adapter):
        changed, _ = memory.base.answer_logits(texts)
    divergences = token_divergence(changed, own, labels != IGNORED).tolist()
    same = [float(one == other) for one, other in zip(alone, under, strict=True)]
    shown = tuple(zip(questions, alone, under, strict=True))[:6]
    return Leak(mean_over(same, questions), mean_over(divergences, questions), shown)


def retrieved(case: RecallCase) -> str:
    """Return the note's sentence that shares the most words with the question: the simplest retrieval."""
    asked = set(re.findall(r"\w+", case.question.lower()))
    sentences = re.split(r"(?<=\.) ", case.note.text)
    return max(sentences, key=lambda sentence: len(asked & set(re.findall(r"\w+", sentence.lower()))))


def shuffled(note: MemoryNote, seed: int = 0) -> MemoryNote:
    """Return a note whose keys belong to random values: the same numbers, the columns of B in another order."""
    draws = torch.Generator().manual_seed(seed)
    order = torch.randperm(note.adapter.rank, generator=draws)
    own = {target.name for target in note.adapter.targets if target.rank is None}
    pairs = {name: (a, b[..., order] if name in own else b) for name, (a, b) in note.adapter.pairs.items()}
    adapter = Adapter.from_pairs(note.adapter.targets, pairs, note.adapter.scale)
    return MemoryNote(adapter, note.tokens, note.source, note.base, note.generator, note.name)


def seconds(call: Callable[[], object], repeats: int = 5) -> float:
    """Return the median CPU seconds of a call."""
    taken = []
    for _ in range(repeats):
        began = time.process_time()
        call()
        taken.append(time.process_time() - began)
    return sorted(taken)[repeats // 2]
