"""The loop: its schedule, that it learns, stops on nonsense, and continues to the same weights."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.event_file_writer import AtomicCounter
from torch import Tensor, nn

from openwu.data.suite.photographs import Photograph, load_folder
from openwu.errors import CheckpointError, OpenwuError
from openwu.training.checkpoint import STATE, load_weights
from openwu.training.config import StageConfig
from openwu.training.embedded.config import EmbeddedRecipe
from openwu.training.embedded.instruction_stages import InstructionStage
from openwu.training.embedded.picture_stages import base_stage, generator_stage
from openwu.training.embedded.run import new_model, train
from openwu.training.loop import Evaluation, LoopConfig, train_stage
from openwu.training.micro_batch import FULL_BATCH, MicroBatch
from openwu.training.optimizers import learning_rate_factor

LOOP = LoopConfig(json.dumps({"seed": 0}), checkpoint_every=2, evaluate_every=3, log_every=1)
CONFIG = StageConfig(steps=8, shapes=((1, 1),), learning_rate=1e-2, warmup=2, decay=0.5)


@dataclass
class Regression:
    """Fits a matrix to noise that depends on the step alone."""

    broken_at: int | None = None
    name: str = "regression"
    trained: nn.Module = field(default_factory=lambda: _linear())
    steps: list[int] = field(default_factory=list)

    @contextmanager
    def loss(self, step: int, part: MicroBatch = FULL_BATCH) -> Iterator[Tensor]:
        self.steps.append(step)
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))[part.rows(4)]
        loss = (self.trained(x) - x.sum(1, keepdim=True)).square().mean() * part.share(4)
        yield loss * math.nan if step == self.broken_at else loss

    def not_finite(self, step: int, _part: MicroBatch = FULL_BATCH) -> list[str]:
        return ["the second", "the third"] if step == self.broken_at else []

    def evaluate(self) -> Evaluation:
        return Evaluation({"quality": 1.0}, torch.zeros(3, 4, 4))


def _linear() -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(3, 1)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Writing and continuing


def test_curves_and_state_are_written(tmp_path: Path) -> None:
    stage = Regression()
    assert train_stage(stage, CONFIG, LOOP, tmp_path)
    assert stage.steps == list(range(8))
    state = load_file(tmp_path / STATE)
    assert torch.equal(state["weight/weight"], stage.trained.state_dict()["weight"])
    assert not list(tmp_path.glob(".*"))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 9))
    assert [event.step for event in events.Scalars("quality")] == [3, 6, 8]
    assert [event.step for event in events.Images("validation")] == [3, 6, 8]
    rates = [event.value for event in events.Scalars("learning_rate")]
    assert rates == pytest.approx([CONFIG.learning_rate * learning_rate_factor(CONFIG, step) for step in range(8)])


@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_stopping_and_continuing_changes_nothing(
    tmp_path: Path, stop_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Files of one second are read by their number, as text: 9, 10 would be out of order.
    monkeypatch.setattr("tensorboard.summary.writer.event_file_writer._global_uid", AtomicCounter(10**6))
    whole = Regression()
    train_stage(whole, CONFIG, LOOP, tmp_path / "whole")
    steps: list[int] = []
    done = False
    while not done:
        part = Regression()
        done = train_stage(part, CONFIG, replace(LOOP, stop_after=stop_after), tmp_path / "parts")
        assert 0 < len(part.steps) <= stop_after
        steps += part.steps
    assert steps == whole.steps
    curve = EventAccumulator(str(tmp_path / "parts")).Reload().Scalars("loss")
    assert [event.step for event in curve] == list(range(1, 9))
    assert same(weights(part.trained), weights(whole.trained))
    again = Regression()
    assert train_stage(again, CONFIG, LOOP, tmp_path / "parts")
    assert again.steps == []
    assert same(weights(again.trained), weights(whole.trained))


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(
        OpenwuError, match="regression: the loss is nan at step 5; the last checkpoint is kept"
    ) as prediction:
        train_stage(Regression(broken_at=5), CONFIG, LOOP, tmp_path)
    assert "Samples whose loss is not finite: the second, the third. " in str(prediction.value)
    mended = Regression()
    assert train_stage(mended, CONFIG, LOOP, tmp_path)
    assert mended.steps == [4, 5, 6, 7]
    whole = Regression()
    train_stage(whole, CONFIG, LOOP, tmp_path / "whole")
    assert same(weights(mended.trained), weights(whole.trained))


def test_a_gradient_that_is_no_number_touches_no_weight(tmp_path: Path) -> None:
    """The square root's derivative at 0: a finite loss without a finite gradient."""

    class Rooted(Regression):
        @contextmanager
        def loss(self, step: int, part: MicroBatch = FULL_BATCH) -> Iterator[Tensor]:
            with super().loss(step, part) as loss:
                yield loss + (loss - loss).sqrt() if step == 5 else loss

    stage = Rooted()
    with pytest.raises(OpenwuError, match=r"gradient's norm is nan at step 5.* Every sample's loss is finite"):
        train_stage(stage, CONFIG, LOOP, tmp_path)
    assert all(bool(value.isfinite().all()) for value in weights(stage.trained).values())


def test_another_recipe_is_refused_by_what_changed(tmp_path: Path) -> None:
    train_stage(Regression(), CONFIG, LOOP, tmp_path)
    with pytest.raises(CheckpointError, match=r"another recipe \(changed: edits null -> \[\], seed 0 -> 1\)"):
        train_stage(Regression(), CONFIG, replace(LOOP, recipe=json.dumps({"seed": 1, "edits": []})), tmp_path)


def test_the_steps_of_the_stage_may_grow_and_nothing_else(tmp_path: Path) -> None:
    """With a constant rate the longer training is the one that would have been, to the same weights."""
    config = replace(CONFIG, schedule="constant")

    def loop(steps: int, rate: float = 0.1, base: int = 3) -> LoopConfig:
        fields = {"regression": {"steps": steps, "rate": rate}, "base": {"steps": base}}
        return replace(LOOP, recipe=json.dumps(fields))

    at_once, extended = Regression(), Regression()
    train_stage(at_once, config, loop(8), tmp_path / "at_once")
    train_stage(Regression(), replace(config, steps=5), loop(5), tmp_path / "extended")
    for other, message in (
        (loop(8, rate=0.2), r"\(changed: regression\.rate 0.1 -> 0.2\)"),
        (loop(8, base=4), r"\(changed: base\.steps 3 -> 4\)"),
        (loop(4), r"\(changed: regression\.steps 5 -> 4\)"),
    ):
        with pytest.raises(CheckpointError, match=message):
            train_stage(Regression(), config, other, tmp_path / "extended")
    train_stage(extended, config, loop(8), tmp_path / "extended")
    assert extended.steps == [5, 6, 7]
    for name, value in weights(at_once.trained).items():
        assert torch.equal(value, weights(extended.trained)[name])


@pytest.mark.parametrize("kept", [0, 5, 60, -4])
def test_a_truncated_state_is_a_clear_error(tmp_path: Path, kept: int) -> None:
    train_stage(Regression(), CONFIG, LOOP, tmp_path)
    data = (tmp_path / STATE).read_bytes()
    (tmp_path / STATE).write_bytes(data[:kept])
    with pytest.raises(CheckpointError, match="expected a training state"):
        train_stage(Regression(), CONFIG, LOOP, tmp_path)
    with pytest.raises(CheckpointError, match="expected a training state"):
        load_weights(tmp_path, _linear(), 8)


def test_only_a_finished_stage_is_built_on(tmp_path: Path) -> None:
    module = _linear()
    with pytest.raises(CheckpointError, match="expected the state of an earlier stage"):
        load_weights(tmp_path, module, 8)
    train_stage(Regression(), CONFIG, replace(LOOP, stop_after=3), tmp_path)
    with pytest.raises(CheckpointError, match="expected a finished stage of 8 steps, got 3"):
        load_weights(tmp_path, module, 8)
    load_weights(tmp_path, module, 3)
    assert not same(weights(module), weights(_linear()))


# The real stages


def pictures(recipe: EmbeddedRecipe) -> tuple[list[Photograph], list[Photograph]]:
    folder = Path(recipe.photographs)
    return load_folder(folder), load_folder(folder, validation=True)


@pytest.mark.parametrize("name", ["instruction", "base", "generator"])
def test_the_loss_falls(recipe: EmbeddedRecipe, tmp_path: Path, name: str) -> None:
    """One sub-task for the pictures; the base's last layer starts at zero, so a generator gets a shaken one."""
    config = replace(getattr(recipe, name), steps=30, learning_rate=5e-3, decay=0.0)
    if name == "instruction":
        config = replace(config, shapes=((32, 0),))
    recipe = replace(recipe, **{name: config}, base_edits=("invert",), edits=("invert",))
    model = new_model(recipe)
    torch.nn.init.normal_(model.backbone.pixels.out.weight, std=0.02, generator=torch.Generator().manual_seed(0))
    if name == "instruction":
        stage = InstructionStage(model, recipe.seed, 32)
    else:
        stage = {"base": base_stage, "generator": generator_stage}[name](recipe, model, pictures(recipe))
    losses: list[float] = []
    measured = stage.loss

    @contextmanager
    def noted(step: int, part: MicroBatch) -> Iterator[Tensor]:
        with measured(step, part) as loss:
            losses.append(float(loss.detach()))
            yield loss

    stage.loss = noted  # type: ignore[method-assign]
    train_stage(stage, config, replace(LOOP, checkpoint_every=100, evaluate_every=100), tmp_path)
    assert len(losses) == 30
    assert np.mean(losses[-8:]) < np.mean(losses[:8]) - 0.1


RECIPE = """
import json
from openwu.training.embedded.model import EmbeddedConfig
from openwu.training.config import StageConfig
from openwu.training.embedded.config import EmbeddedRecipe

def recipe():
    model = EmbeddedConfig.from_dict(json.loads({model!r}))
    sentences = StageConfig(steps=4, shapes=((6, 0),), learning_rate=2e-3, warmup=2)
    pictures = StageConfig(steps=100, shapes=((2, 16), (3, 32)), learning_rate=2e-3, warmup=2)
    return EmbeddedRecipe(
        name="tiny", model=model, instruction=sentences, base=pictures, generator=pictures, shared=pictures,
        base_edits=("brighten", "blur"), edits=("brighten", "darken", "blur"), photographs={photographs!r},
        side=32, bf16=False, checkpoint_every=3, evaluate_every=1000,
    )
"""


def test_a_killed_training_ends_at_the_same_weights(recipe: EmbeddedRecipe, tmp_path: Path) -> None:
    """Killed outright (SIGKILL), in the middle of the base's stage, at a moment that nothing chooses."""
    file = tmp_path / "recipe.py"
    file.write_text(RECIPE.format(model=json.dumps(recipe.model.to_dict()), photographs=recipe.photographs))
    command = [sys.executable, "-m", "openwu", "train", str(file), "--stage", "instruction", "--stage", "base"]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums depend on it

    def start(folder: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*command, "--output", str(tmp_path / folder)],
            env={**os.environ, **threads},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    state = tmp_path / "killed" / "base" / STATE
    with start("killed") as training:
        while not state.exists() and training.poll() is None:
            time.sleep(0.005)
        time.sleep(float(np.random.default_rng().uniform(0, 0.1)))
        training.send_signal(signal.SIGKILL)
    assert training.returncode == -signal.SIGKILL
    with start("killed") as training:
        errors = training.communicate()[1]
    assert training.returncode == 0, errors.decode()[-2000:]
    whole = _steps_of(recipe)
    train(whole, tmp_path / "whole", stages=("instruction", "base"))
    for stage in ("instruction", "base"):
        one, other = (load_file(tmp_path / folder / stage / STATE) for folder in ("killed", "whole"))
        assert same(one, other)


def _steps_of(recipe: EmbeddedRecipe) -> EmbeddedRecipe:
    """The numbers of RECIPE."""
    longer = replace(recipe.base, steps=100)
    sentences = replace(recipe.instruction, steps=4)
    return replace(recipe, instruction=sentences, base=longer, generator=longer, shared=longer, evaluate_every=1000)


@pytest.mark.parametrize("name", ["base", "generator"])
def test_broken_requests_are_named(recipe: EmbeddedRecipe, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture with a NaN is that of one sub-task and sentence."""
    stages = {"base": base_stage, "generator": generator_stage}
    stage = stages[name](recipe, new_model(recipe), pictures(recipe))
    assert stage.not_finite(0) == []
    sound = stage.batches.batch(0)
    broken = sound.target.clone()
    broken[1] = math.nan
    monkeypatch.setattr(type(stage.batches), "batch", lambda *_: replace(sound, target=broken))
    assert stage.not_finite(0) == [f"{sound.names[1]} ({sound.sentences[1]!r})"]
