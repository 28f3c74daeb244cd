"""Measure how many questions about the last notes of a file a generator of language memories answers rightly.

    python examples/measure_own_notes.py notes.jsonl [--generator FOLDER] [--held-back 8]

Each note is remembered alone. An answer is right when it holds all words of the expected one that are neither in the
question nor in SMALL. Without a folder it measures the generator of the package, with which `recipes/own_notes.py`
begins.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from random import Random

import torch

from openwu.data.notes import open_notes
from openwu.memory.language import LanguageMemory

SMALL = "a an and are be by for from his her in is it its of on s the them they this to was were"
"""Words that decide nothing."""


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def right(question: str, expected: str, answer: str) -> bool:
    return words(expected) - words(question) - words(SMALL) <= words(answer)


def main(data: Path, generator: str | None, held_back: int) -> None:
    memory = LanguageMemory.from_pretrained(generator)
    notes = open_notes(data, held_back)
    asked = [(note, *pair) for note, pairs in map(notes.held_back, range(held_back)) for pair in pairs]
    written = {note: memory.remember(note) for note in dict.fromkeys(note for note, _, _ in asked)}
    answers = memory.ask_batch([q for _, q, _ in asked], [[written[note]] for note, _, _ in asked], max_new_tokens=24)
    rights = [right(q, expected, answer) for (_, q, expected), answer in zip(asked, answers, strict=True)]
    for (_, question, _), answer, fine in zip(asked, answers, rights, strict=True):
        sys.stdout.write(f"{'right' if fine else 'wrong'} | {question} | {answer}\n")
    drawn = [sum(Random(n).choices(rights, k=len(rights))) / len(rights) for n in range(1000)]
    low, high = sorted(drawn)[25], sorted(drawn)[974]
    sys.stdout.write(f"{sum(rights)} of {len(rights)} right, {sum(rights) / len(rights):.2f} [{low:.2f}, {high:.2f}]\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description="Measure the answers about notes held back.")
    parser.add_argument("data", type=Path, help="JSONL file, saved data set or tables of notes")
    parser.add_argument("--generator", metavar="FOLDER", help="generator to measure (default: the package's)")
    parser.add_argument("--held-back", type=int, default=8, help="how many of the last notes (default: 8)")
    given = parser.parse_args()
    main(given.data, given.generator, given.held_back)
