"""What is to be measured, whether or not it was: the rows of the benchmark, their themes and their goals in words.

A row that nobody has measured is shown as such, so it must be known without running it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Planned:
    """One row before it is measured."""

    theme: str
    """Names the result file that it goes to."""
    what: str
    against: str
    goal: str

    @property
    def title(self) -> str:
        return f"{self.what}, against {self.against}"


PLAN = {
    "C1": Planned("generator", "a small generator on the CPU", "a plain reference", "at least 1.1 x"),
    "C2": Planned("generator", "bytes materialised per block", "the plain reference", "at most 0.45 x"),
    "C3": Planned("adapters", "an experts layer, overhead of the adapter", "a loop over experts", "at least 2 x lower"),
    "C4": Planned("adapters", "a dense layer, 8 and 32 adapters in a batch", "PEFT", "overhead at least 5 x lower"),
    "C5": Planned("adapters", "an experts layer, one adapter", "PEFT", "at least 1.3 x"),
    "C6": Planned("adapters", "20 adapters in turn, compiled", "PEFT's hot swap", "at least 5 x, no recompilation"),
    "C7": Planned("edit", "generating and applying an adapter, 1 megapixel", "the whole edit", "at most 25 %"),
    "C8": Planned("edit", "an adapter from the cache", "generating it again", "at least 20 x"),
    "G1": Planned("generator", "the generator at released size", "the device's limit", "at least 80 % of it"),
    "G2": Planned("adapters", "one experts layer at released size", "no adapter", "at most 3 % more at 8192 tokens"),
    "G3": Planned("adapters", "1 to 8 adapters in a batch", "one after another", "at most 10 % overhead at 8"),
    "G4": Planned("generator", "peak memory of G1", "the plain reference", "at most 0.65 x"),
}
"""Name of a row -> what it will say. C rows run on a CPU, G rows on a GPU."""


def needs_gpu(name: str) -> bool:
    return name.startswith("G") and name in PLAN
