"""Measure what a language memory recalls, and what it costs; the numbers of docs/memory.md.

    python examples/measure_memory.py results.json [generator [cases]]

Without a generator's folder the one of the package is measured.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from openwu.evaluation.experiments.geometry import mean_over
from openwu.evaluation.experiments.recall import Recall, RecallCase, leak, measure, recall_cases, seconds
from openwu.files.origin import origin
from openwu.memory.facts import UNSEEN
from openwu.memory.language import LanguageMemory


def cells(memory: LanguageMemory, count: int) -> dict[str, tuple[list[RecallCase], str]]:
    """Return what is measured: title -> (cases, rung of the ladder)."""
    two = recall_cases(memory, 2, count, seed=22)
    found = {f"{facts} people": (recall_cases(memory, facts, count, seed=20 + facts), "matched") for facts in (1, 4)}
    found["2 people"] = two, "matched"
    found["8 people"] = recall_cases(memory, 8, count // 2, seed=28), "matched"
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


def main(output: Path, generator: str | None, count: int) -> None:
    memory = LanguageMemory.from_pretrained(generator)
    results: dict[str, Any] = {**origin(), "cases": count}
    for title, (cases, rung) in cells(memory, count).items():
        recall: Recall = measure(memory, cases, rung)
        results[title] = recall.to_json()
        sys.stdout.write(f"| {title} | {recall.right} | {recall.mistaken} |\n")
        sys.stdout.flush()
        output.write_text(json.dumps(results, indent=1), encoding="utf-8")
    for facts in (1, 4):
        found = leak(memory, [case.note.text for case in recall_cases(memory, facts, 16, seed=60 + facts)])
        results[f"ordinary questions, note of {facts} people"] = found.to_json()
        sys.stdout.write(f"| ordinary questions, note of {facts} people | {found.same} | {found.divergence} |\n")
        sys.stdout.flush()
        output.write_text(json.dumps(results, indent=1), encoding="utf-8")
    results["two notes"] = two_notes(memory, count // 2)
    results["costs"] = {f"{facts} facts": costs(memory, facts) for facts in (2, 8)}
    output.write_text(json.dumps(results, indent=1), encoding="utf-8")
    sys.stdout.write(json.dumps({key: results[key] for key in ("two notes", "costs")}, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    arguments = sys.argv[1:]
    main(Path(arguments[0]), arguments[1] if arguments[1:] else None, int(arguments[2]) if arguments[2:] else 32)
