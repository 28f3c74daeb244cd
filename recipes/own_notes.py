"""Go on from the generator of notes inside the package with notes of your own, or train one for a model of your own.

openwu train recipes/own_notes.py data=notes.jsonl
openwu train recipes/own_notes.py data=notes.jsonl base=FOLDER start= generator.steps=300
"""

from openwu.training.bases.language import PACKAGED, LanguageMemoryRun
from openwu.training.config import StageConfig


def recipe() -> LanguageMemoryRun:
    return LanguageMemoryRun(
        name="own_notes",
        start=PACKAGED,
        held_back=2,
        generator=StageConfig(
            steps=60,
            shapes=((4, 0),),
            learning_rate=1e-3,
            warmup=10,
            decay=0.35,
            weight_decay=0.0,
        ),
    )
