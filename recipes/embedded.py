"""The whole embedded model from nothing, edits in words and by example: `openwu train recipes/embedded.py`.

One training in place of the seven that the weights inside the package went through, with what those found right: the
instruction encoder reads all sentences and keeps averaged weights; the linear reader goes on by itself; base and
generator train as long as their two trainings together, on all photographs and with what had fallen short more often;
then examples, and the baseline. It has not been run to its end (docs/training.md has an estimate).
"""

from dataclasses import replace
from pathlib import Path

from openwu.training.config import StageConfig
from openwu.training.embedded.config import EmbeddedRecipe, WordingRecipe
from openwu.training.run import load_recipe


def part(name: str) -> EmbeddedRecipe:
    """Load one of the recipes that made the weights inside the package."""
    found = load_recipe(Path(__file__).with_name(f"{name}.py"), [])
    assert isinstance(found, EmbeddedRecipe)
    return found


def recipe() -> EmbeddedRecipe:
    first, further, shown = part("embedded_first"), part("embedded_on"), part("embedded_examples")
    words = load_recipe(Path(__file__).with_name("wording.py"), [])
    assert isinstance(words, WordingRecipe)
    generator = replace(first.generator, steps=first.generator.steps + further.generator.steps)
    return replace(
        first,
        name="embedded",
        model=shown.model,
        instruction=replace(words.wording, weight_decay=first.instruction.weight_decay),
        words_dropped=words.dropped,
        phrases=StageConfig(steps=2400, shapes=((128, 0),), learning_rate=2e-3, ema=0.998),
        base=replace(first.base, steps=first.base.steps + further.base.steps),
        generator=generator,
        examples=shown.examples,
        plain_examples=shown.plain_examples,
        shared=replace(first.shared, steps=generator.steps),
        base_edits=further.base_edits,
        edits=further.edits,
    )
