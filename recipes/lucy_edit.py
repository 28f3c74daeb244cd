"""Train a generator for Lucy-Edit (5 billion parameters, non-commercial licence), which edits clips.

openwu train recipes/lucy_edit.py data=FOLDER_OR_JSONL base=FOLDER_OR_HUB_ID

Pairs are pictures: clips of one frame. docs/video.md says what a clip gets from it; nobody has trained with these
numbers yet.
"""

from openwu.training.config import PipelineRun, StageConfig


def recipe() -> PipelineRun:
    return PipelineRun(
        name="lucy_edit",
        model="lucy-edit",
        # 8 requests an update, 4 at a time.
        generator=StageConfig(
            steps=10_000,
            shapes=((8, 0),),
            learning_rate=1e-4,
            warmup=200,
            accumulate=2,
            ema=0.999,
        ),
    )
