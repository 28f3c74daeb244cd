"""The linear reader of the model inside the package goes on with the sentences that the suite and people have now.

openwu train recipes/reading.py     # then recipes/cuts.py, which reads by it
"""

from openwu.training.config import StageConfig
from openwu.training.embedded.config import WordingRecipe


def recipe() -> WordingRecipe:
    return WordingRecipe(
        name="reading",
        wording=StageConfig(steps=600, shapes=((256, 0),), learning_rate=3e-3, ema=0.99),
        phrases_only=True,
        start_share=0.5,
        evaluate_every=600,
        export="src/openwu/backbones/embedded/weights",
    )
