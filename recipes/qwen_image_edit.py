"""Train a generator for Qwen-Image-Edit (20 billion parameters, Apache-2.0).

openwu train recipes/qwen_image_edit.py data=FOLDER_OR_JSONL base=FOLDER_OR_HUB_ID

For one GPU of 80 GB. docs/train-a-large-base.md goes through it; nobody has trained with these numbers yet.
"""

from openwu.training.config import PipelineRun, StageConfig


def recipe() -> PipelineRun:
    return PipelineRun(
        name="qwen_image_edit",
        model="qwen-image-edit",
        # 8 requests an update, 1 at a time.
        generator=StageConfig(
            steps=10_000,
            shapes=((8, 0),),
            learning_rate=1e-4,
            warmup=200,
            accumulate=8,
            ema=0.999,
        ),
    )
