"""A finished model goes on: base, then condition encoder and generator, then examples.

`openwu train recipes/embedded_on.py export=runs/further`
"""

from dataclasses import replace
from pathlib import Path

from openwu.training.embedded.config import EmbeddedRecipe
from openwu.training.run import load_recipe


def recipe() -> EmbeddedRecipe:
    begun = load_recipe(Path(__file__).with_name("embedded.py"), [])
    assert isinstance(begun, EmbeddedRecipe)
    assert begun.examples is not None
    base = replace(begun.base, steps=2000, learning_rate=1e-3, matrix_learning_rate=3e-3, decay=0.8, first_floor=3e-4)
    generator = replace(
        begun.generator, steps=2200, learning_rate=6e-4, matrix_learning_rate=2e-3, decay=0.8, first_floor=3e-3
    )
    examples = replace(
        begun.examples, steps=2000, learning_rate=6e-4, matrix_learning_rate=2e-3, decay=0.8, first_floor=1e-3
    )
    return replace(
        begun,
        name="embedded_on",
        start="src/openwu/backbones/embedded/weights",
        stages=("base", "generator", "examples"),
        base=base,
        generator=generator,
        examples=examples,
        plain_examples=0,
        shared=replace(begun.shared, steps=generator.steps, first_floor=generator.first_floor),
        seed=2,
    )
