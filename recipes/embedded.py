"""The whole embedded model from nothing, edits in words and by example: `openwu train recipes/embedded.py`.

One training in place of those that the weights inside the package went through, with what they found right: the
instruction encoder reads all sentences and keeps averaged weights; the linear reader goes on by itself; base and
generator train at one go, on all photographs, with the damage of cameras and with what had fallen short more often;
then examples, through the last layer's solution, and the baseline. docs/training.md says which stages have been run.
"""

from dataclasses import replace
from pathlib import Path

from openwu.data.suite import EDITS
from openwu.training.config import StageConfig
from openwu.training.embedded.config import STAGES, EmbeddedRecipe, WordingRecipe
from openwu.training.run import load_recipe

WITHDRAWN = ("scratches", "poster", "pixel_art", "stained_glass", "blueprint", "rain", "snow", "take_style")
"""Learned, and refused by name: a person would not call their results right. No edit of these is learned twice as often
as others."""
CAREFUL = ("deblur", "deblur")
"""Comes up more often, as the damage of cameras does: one blur shall be undone, a sharp picture left alone."""


def part(name: str) -> EmbeddedRecipe:
    """Load one of the recipes that made the weights inside the package."""
    found = load_recipe(Path(__file__).with_name(f"{name}.py"), [])
    assert isinstance(found, EmbeddedRecipe)
    return found


def recipe() -> EmbeddedRecipe:
    first, further, shown = part("embedded_first"), part("embedded_on"), part("embedded_examples")
    latest = part("embedded_shown")
    words = load_recipe(Path(__file__).with_name("wording.py"), [])
    assert isinstance(words, WordingRecipe)
    generator = replace(first.generator, steps=7000)
    assert shown.examples is not None
    assert latest.examples is not None
    # From nothing, 2,400 steps through the last layer's solution are as good as 5,850 of which 3,450 went without it.
    examples = replace(
        latest.examples,
        learning_rate=1.5e-3,
        matrix_learning_rate=5e-3,
        first_floor=shown.examples.first_floor,
    )
    edits = (*EDITS, *(name for name in further.edits[len(EDITS) :] if name not in WITHDRAWN), *CAREFUL)
    offered = replace(further.model.instruction, accepted_percent=85, withdrawn=WITHDRAWN)
    return replace(
        further,
        name="embedded",
        model=replace(further.model, instruction=offered),
        start=None,
        stages=STAGES,
        instruction=replace(words.wording, weight_decay=first.instruction.weight_decay),
        words_dropped=words.dropped,
        phrases=StageConfig(steps=2400, shapes=((128, 0),), learning_rate=2e-3, ema=0.998),
        base=replace(first.base, steps=8400),
        generator=generator,
        examples=examples,
        plain_examples=shown.plain_examples,
        shared=replace(first.shared, steps=generator.steps),
        base_edits=(*further.base_edits, *CAREFUL),
        edits=edits,
        cameras=0.4,
        evaluate_every=first.evaluate_every,
        seed=first.seed,
    )
