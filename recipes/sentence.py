"""The sentence reader of the model inside the package, which reads several wishes in one sentence, from nothing.

openwu train recipes/sentence.py
"""

from openwu.training.config import StageConfig
from openwu.training.embedded.config import SentenceRecipe


def recipe() -> SentenceRecipe:
    return SentenceRecipe(
        name="sentence",
        sentence=StageConfig(
            steps=2200,
            shapes=((160, 0),),
            learning_rate=2e-3,
            matrix_learning_rate=1e-2,
            weight_decay=0.02,
            schedule="cosine",
            decay=0.9,
            ema=0.99,
        ),
        export="src/openwu/backbones/embedded/weights",
    )
