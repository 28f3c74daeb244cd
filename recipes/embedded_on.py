"""The model inside the package goes on: base, then condition encoder and generator, with more photographs.

openwu train recipes/embedded_on.py
"""

from dataclasses import replace
from pathlib import Path

from openwu.training.embedded.config import EmbeddedRecipe
from openwu.training.run import load_recipe

MISSED = ("deblur", "white_balance", "scratches", "remove_motion_blur", "colourise")
"""What fell short of its goal, or barely reached it, comes up more often."""


def recipe() -> EmbeddedRecipe:
    begun = load_recipe(Path(__file__).with_name("embedded_first.py"), [])
    assert isinstance(begun, EmbeddedRecipe)
    base = replace(begun.base, steps=1800, learning_rate=1e-3, matrix_learning_rate=3e-3, decay=0.8, first_floor=3e-4)
    generator = replace(
        begun.generator, steps=1800, learning_rate=6e-4, matrix_learning_rate=2e-3, decay=0.8, first_floor=3e-3
    )
    return replace(
        begun,
        name="embedded_on",
        start="src/openwu/backbones/embedded/weights",
        stages=("base", "generator"),
        base=base,
        generator=generator,
        shared=replace(begun.shared, steps=generator.steps, first_floor=generator.first_floor),
        base_edits=(*begun.base_edits, "deblur", "remove_motion_blur"),
        edits=(*begun.edits, *MISSED),
        seed=1,
    )
