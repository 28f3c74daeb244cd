"""Train the generator that writes notes into SmolLM2-135M-Instruct, from invented facts.

openwu train recipes/language_memory.py

The generator of the package was made in two parts: docs/memory.md has both commands.
"""

from openwu.training.bases.language import LanguageMemoryRun
from openwu.training.config import StageConfig


def recipe() -> LanguageMemoryRun:
    return LanguageMemoryRun(
        name="language_memory",
        generator=StageConfig(
            steps=440,
            shapes=((4, 0),),
            learning_rate=2e-3,
            warmup=20,
            decay=0.35,
            weight_decay=0.0,
        ),
        layers=(25,),
        strengths=(500.0,),
        states=15,
        reader_layers=(19, 20, 21, 22, 23, 24),
        later=True,
        updates=0.3,
        first_person=0.25,
        prose=0.15,
    )
