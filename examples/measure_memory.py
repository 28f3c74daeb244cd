"""Measure what a language memory recalls, and what it costs; the numbers of docs/memory.md.

    python examples/measure_memory.py results.json [--generator FOLDER] [--seeds FOLDER ...] [--cases 24]

Without a generator's folder the one of the package is measured. `--seeds`: generators of further trainings, of which
the main lines are measured and averaged with the first one's. Lines that stand in results.json already are kept, so an
interrupted measurement goes on; those of another generator are refused. Remove the file to measure everything anew.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from openwu.evaluation.experiments.geometry import mean_over
from openwu.evaluation.experiments.recall import Recall, RecallCase, holds, leak, measure, recall_cases, seconds
from openwu.files.origin import origin
from openwu.files.weights import sampled_digest
from openwu.memory.facts import UNSEEN, FactSource, vocabulary_words
from openwu.memory.language import LanguageMemory
from openwu.memory.telling import prose


def cells(memory: LanguageMemory, count: int) -> dict[str, tuple[list[RecallCase], str]]:
    """Return what is measured: title -> (cases, rung of the ladder)."""
    two = recall_cases(memory, 2, count, seed=22)
    found = {f"{facts} people": (recall_cases(memory, facts, count, seed=20 + facts), "matched") for facts in (1, 4)}
    found["2 people"] = two, "matched"
    found["8 people"] = recall_cases(memory, 8, count // 2, seed=28), "matched"
    found["16 people"] = recall_cases(memory, 16, count // 2, seed=77), "matched"
    found["1 person, another wording"] = recall_cases(memory, 1, count, seed=31, wording=-1), "matched"
    found["1 person, relations never trained"] = recall_cases(memory, 1, count, seed=32, relations=UNSEEN), "matched"
    found["2 people, relations never trained"] = recall_cases(memory, 2, count, seed=33, relations=UNSEEN), "matched"
    found["2 people of different relations"] = recall_cases(memory, 2, count, seed=34, same_relation=0.0), "matched"
    for rung in ("none", "random", "other note"):
        found[f"2 people: {rung}"] = two[: count // 2], rung
    for rung in ("in the prompt", "retrieved sentence"):
        found[f"2 people: {rung}"] = two, rung
    return found


def two_notes(memory: LanguageMemory, count: int) -> dict[str, Any]:
    """Ask with two notes of one person each joined, and with both texts remembered as one note."""
    cases = recall_cases(memory, 1, 2 * count, seed=41)
    pairs = list(zip(cases[::2], cases[1::2], strict=True))
    groups = [case.fact.relation.statements[0] for case, _ in pairs]
    questions = [case.question for case, _ in pairs]
    each = [[memory.remember(case.note.text) for case in pair] for pair in pairs]
    union = [[memory.remember(f"{one.note.text} {other.note.text}")] for one, other in pairs]
    answers = {
        kind: memory.ask_batch(questions, notes, max_new_tokens=24)
        for kind, notes in (("joined", each), ("one note of both", union))
    }
    return {
        kind: mean_over([case.right(text) for (case, _), text in zip(pairs, texts, strict=True)], groups).to_json()
        for kind, texts in answers.items()
    }


def many_notes(memory: LanguageMemory, count: int) -> dict[str, Any]:
    """Join so many notes of one person each; two of them are asked about, 32 notes in all."""
    cases = recall_cases(memory, 1, 32, seed=81)
    together = [cases[start : start + count] for start in range(0, len(cases), count)]
    asked = [(case, group) for group in together for case in group[:2]]
    notes = [[memory.remember(case.note.text) for case in group] for _, group in asked]
    answers = memory.ask_batch([case.question for case, _ in asked], notes, max_new_tokens=24)
    right = [case.right(answer) for (case, _), answer in zip(asked, answers, strict=True)]
    return mean_over(right, [case.fact.relation.statements[0] for case, _ in asked]).to_json()


def updates(memory: LanguageMemory, count: int) -> dict[str, Any]:
    """Remember notes that take a value back ("Not any more: now ..."), and ask which one holds."""
    source = FactSource(vocabulary_words(memory.base.tokenizer.get_vocab()), 71, test=True)
    facts, before, notes = [], [], []
    for _ in range(count):
        told = source.note(2, same_relation=1.0, reworded=0.0, fillers=0.0)
        fact, other = told.facts
        before.append(source.value())
        old = fact.relation.statements[0].format(e=fact.person, v=before[-1])
        notes.append([memory.remember(f"{old} {other.statement} Not any more: now {fact.statement}")])
        facts.append(fact)
    answers = memory.ask_batch([fact.question() for fact in facts], notes, max_new_tokens=24)
    groups = [fact.relation.statements[0] for fact in facts]
    each = list(zip(answers, facts, before, strict=True))
    found = {
        "the new value": [float(holds(text, fact.value) and not holds(text, old)) for text, fact, old in each],
        "the old value": [float(holds(text, old)) for text, _, old in each],
    }
    return {kind: mean_over(values, groups).to_json() for kind, values in found.items()}


def linked(memory: LanguageMemory, count: int) -> dict[str, Any]:
    """Remember notes in which a second fact of a person follows by a pronoun, and ask for it and for the first."""
    source = FactSource(vocabulary_words(memory.base.tokenizer.get_vocab()), 73, test=True)
    notes = [prose(source, 2, wordings=["{a}. That is not all: {again}."]) for _ in range(count)]
    written = [[memory.remember(note.text)] for note in notes]
    found: dict[str, Any] = {}
    for title, place in (("the pronoun's fact", 0), ("the fact with the name", 1)):
        facts = [note.facts[place] for note in notes]
        answers = memory.ask_batch([fact.question() for fact in facts], written, max_new_tokens=24)
        others = [{each.value for each in note.facts} - {fact.value} for note, fact in zip(notes, facts, strict=True)]
        each = zip(answers, facts, others, strict=True)
        right = [float(holds(text, fact.value) and not any(holds(text, o) for o in more)) for text, fact, more in each]
        found[title] = mean_over(right, [fact.relation.statements[0] for fact in facts]).to_json()
        found[f"{title}, examples"] = [
            (n.text, f.question(), a) for n, f, a in zip(notes[:4], facts[:4], answers[:4], strict=True)
        ]
    return found


KNOWN = (
    ("The capital of France is {v}.", "What is the capital of France?"),
    ("The capital of Italy is {v}.", "What is the capital of Italy?"),
    ("The capital of Japan is {v}.", "What is the capital of Japan?"),
    ("The capital of Germany is {v}.", "What is the capital of Germany?"),
    ("The largest planet is {v}.", "What is the largest planet?"),
    ("A spider has {v} legs.", "How many legs does a spider have?"),
    ("Romeo and Juliet was written by {v}.", "Who wrote Romeo and Juliet?"),
    ("The opposite of hot is {v}.", "What is the opposite of hot?"),
)
"""Facts that a note contradicts, and questions after them."""


def contradictions(memory: LanguageMemory) -> dict[str, Any]:
    """Remember what contradicts the model, and ask."""
    source = FactSource(vocabulary_words(memory.base.tokenizer.get_vocab()), 72, test=True)
    values = [source.value() for _ in KNOWN]
    notes = [[memory.remember(text.format(v=value))] for (text, _), value in zip(KNOWN, values, strict=True)]
    questions = [question for _, question in KNOWN]
    answers = memory.ask_batch(questions, notes, max_new_tokens=24)
    right = [float(holds(answer, value)) for answer, value in zip(answers, values, strict=True)]
    shown = list(zip(questions, values, answers, strict=True))
    return {"the note's value": mean_over(right, questions).to_json(), "examples": shown}


def costs(memory: LanguageMemory, facts: int) -> dict[str, float]:
    """Measure CPU seconds on one core and bytes, for a note of so many facts."""
    [case] = recall_cases(memory, facts, 1, seed=51)
    note = memory.remember(case.note.text)
    in_prompt = f"{case.note.text}\n{case.question}"
    return {
        "tokens": note.tokens,
        "bytes in float16": note.bytes // 2,
        "seconds to remember": seconds(lambda: memory.remember(case.note.text), 3),
        "seconds to the first token, from memory": seconds(
            lambda: memory.ask(case.question, [note], max_new_tokens=1), 3
        ),
        "seconds to the first token, note in the prompt": seconds(lambda: memory.ask(in_prompt, max_new_tokens=1), 3),
        "seconds of 12 tokens, from memory": seconds(lambda: memory.ask(case.question, [note], max_new_tokens=12), 3),
        "seconds of 12 tokens, note in the prompt": seconds(lambda: memory.ask(in_prompt, max_new_tokens=12), 3),
    }


MAIN = ("1 people", "2 people", "4 people", "8 people", "2 people, relations never trained")
"""Recall lines that are measured for every seed."""
LEAKS = {facts: f"ordinary questions, note of {facts} people" for facts in (1, 4)}
Results = dict[str, Any]


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def lines(
    memory: LanguageMemory, count: int, results: Results, save: Callable[[], None], titles: Sequence[str] = ()
) -> None:
    """Measure the lines that `results` lacks; `titles`: of these recall lines alone."""
    for title, (cases, rung) in cells(memory, count).items():
        if title not in results and (not titles or title in titles):
            recall: Recall = measure(memory, cases, rung)
            results[title] = recall.to_json()
            say(f"| {title} | {recall.right} | {recall.mistaken} |")
            save()
    for facts, title in LEAKS.items():
        if title not in results:
            found = leak(memory, [case.note.text for case in recall_cases(memory, facts, 16, seed=60 + facts)])
            results[title] = found.to_json()
            say(f"| {title} | {found.same} | {found.divergence} |")
            save()


def over_seeds(seeds: Sequence[Mapping[str, Any]]) -> Results:
    """Return the mean, the smallest and the largest value of every main line over several generators' results."""
    values = {title: [each[title]["right"]["value"] for each in seeds] for title in MAIN}
    values |= {title: [each[title]["divergence"]["value"] for each in seeds] for title in LEAKS.values()}
    return {
        title: {"mean": sum(each) / len(each), "smallest": min(each), "largest": max(each), "seeds": len(each)}
        for title, each in values.items()
    }


def main(output: Path, generator: str | None, seeds: Sequence[str], count: int) -> None:
    memory = LanguageMemory.from_pretrained(generator)
    made = {"cases": count, "generator": sampled_digest({"": memory.generator})}
    results: Results = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {**origin(), **made}
    if results["cases"] != count:
        raise SystemExit(f"{output}: has results of {results['cases']} cases; remove it, or give --cases that number")
    if results.get("generator") != made["generator"]:
        raise SystemExit(f"{output}: has results of another generator; remove it, or give another file")

    def save() -> None:
        output.write_text(json.dumps(results, indent=1), encoding="utf-8")

    lines(memory, count, results, save)
    further: dict[str, Callable[[], Results]] = {
        "many notes": lambda: {f"{number} joined": many_notes(memory, number) for number in (4, 8)},
        "updates": lambda: updates(memory, 16),
        "pronouns": lambda: linked(memory, 16),
        "contradictions": lambda: contradictions(memory),
        "two notes": lambda: two_notes(memory, count // 2),
        "costs": lambda: {f"{facts} facts": costs(memory, facts) for facts in (2, 8)},
    }
    for title, find in further.items():
        if title not in results:
            results[title] = find()
            say(f"{title}: {json.dumps(results[title])}")
            save()
    memory.close()
    others = results.setdefault("other seeds", {}) if seeds else {}
    for number, folder in enumerate(seeds, start=1):
        say(f"seed {number}: {folder}")
        further_memory = LanguageMemory.from_pretrained(folder)
        own = {"generator": sampled_digest({"": further_memory.generator})}
        if others.setdefault(str(number), own).get("generator") != own["generator"]:
            raise SystemExit(f"{output}: seed {number} is another generator than {folder}; remove it, or another file")
        lines(further_memory, count, others[str(number)], save, MAIN)
        results["over seeds"] = over_seeds([results, *others.values()])
        save()


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description="Measure what a language memory recalls, and what it costs.")
    parser.add_argument("output", type=Path, help="JSON file of the results")
    parser.add_argument("--generator", metavar="FOLDER", help="generator to measure (default: the package's)")
    parser.add_argument("--seeds", metavar="FOLDER", nargs="*", default=[], help="generators of further trainings")
    parser.add_argument("--cases", type=int, default=24, help="notes a line (default: 24)")
    asked = parser.parse_args()
    main(asked.output, asked.generator, asked.seeds, asked.cases)
