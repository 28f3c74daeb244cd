"""The linear model of cuts, which finds a second wish in a sentence, for the reader inside the package.

openwu train recipes/cuts.py     # after every change of the reader: its probabilities are what the model reads
"""

from openwu.training.config import StageConfig
from openwu.training.embedded.config import CutsRecipe


def recipe() -> CutsRecipe:
    return CutsRecipe(
        name="cuts",
        cuts=StageConfig(steps=150, shapes=((1, 0),), learning_rate=2e-2),
        export="src/openwu/backbones/embedded/words",
    )
