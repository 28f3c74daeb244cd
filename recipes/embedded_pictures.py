"""Base, generator and examples of the embedded model from nothing, for the words that the package reads.

`openwu train recipes/embedded_pictures.py` is recipes/embedded.py without its stages for words, whose recipes
(wording.py, reading.py, cuts.py, sentence.py) say how they were made: measurements of what is understood stay as they
are, since the instruction encoder does.
"""

from dataclasses import replace
from pathlib import Path

from openwu.training.embedded.config import EmbeddedRecipe
from openwu.training.run import load_recipe


def recipe() -> EmbeddedRecipe:
    whole = load_recipe(Path(__file__).with_name("embedded.py"), [])
    assert isinstance(whole, EmbeddedRecipe)
    return replace(
        whole,
        name="embedded_pictures",
        start="src/openwu/backbones/embedded/weights",
        only_words=True,
        stages=("base", "generator", "examples"),
    )
