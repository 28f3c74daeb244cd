"""How the model inside the package was made: base, generator and examples from nothing, for the words that it reads.

`openwu train recipes/embedded_pictures.py` is recipes/embedded.py without its stages for words. What reads words has
recipes of its own (wording.py, reading.py, cuts.py, sentence.py) and stays, with all that was measured of it.
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
