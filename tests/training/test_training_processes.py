"""Several processes learn what one does: under torchrun and accelerate, copied or cut up, and when one dies."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from process_cases import main, new_stage, new_trained
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from openwu.errors import OpenwuError
from openwu.training import distributed as module
from openwu.training.checkpoint import STATE, load_weights, read_state_header
from openwu.training.config import StageConfig
from openwu.training.distributed import Processes
from openwu.training.embedded.config import EmbeddedRecipe
from openwu.training.embedded.model import EmbeddedConfig
from openwu.training.embedded.run import train
from openwu.training.loop import LoopConfig, Trainer
from openwu.training.micro_batch import MicroBatch

SCRIPT = Path(__file__).parent / "process_cases.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
ACCELERATE += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


def launch(command: list[str], *arguments: object, **settings: object) -> subprocess.CompletedProcess[str]:
    """On a port that is free, so that tests may run beside one another."""
    texts = [*map(str, arguments), *(f"{name}={json.dumps(value)}" for name, value in settings.items())]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    option = "--master-port" if command[: len(TORCHRUN)] == TORCHRUN else "--main_process_port"
    command = [*command[:3], option, str(port), *command[3:], *texts]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)


def curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(each.step, each.value) for each in EventAccumulator(str(folder)).Reload().Scalars(tag)]


def assert_same_training(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    """Weights, averages and losses, to rounding."""
    assert [step for step, _ in curve(one, "loss")] == [step for step, _ in curve(other, "loss")]
    for tag in ("loss", "gradient_norm", "validation", "adapter/within_over_across"):
        values = [torch.tensor([value for _, value in curve(folder, tag)]) for folder in (one, other)]
        torch.testing.assert_close(*values, atol=tolerance, rtol=tolerance)
    assert_same_weights(load_file(one / STATE), load_file(other / STATE), tolerance)


def assert_same_weights(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        # Attention does not see its keys' biases: their gradients are rounding, which Adam makes as large as any.
        if not name.startswith("optimizer/") and not name.endswith(("W_k.bias", "kv.bias")):
            torch.testing.assert_close(
                value, other[name], atol=tolerance, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
            )


@pytest.mark.slow
def test_a_killed_process_ends_the_run_which_then_continues(tmp_path: Path) -> None:
    main(tmp_path / "alone", {})
    killed = launch([*TORCHRUN, str(SCRIPT)], tmp_path / "two", dies_at=5)
    assert killed.returncode != 0, killed.stderr
    assert "exitcode  : -9" in killed.stderr
    folder = tmp_path / "two"
    assert time.time() - float((folder / "died").read_text()) < 60  # Seconds, on an idle machine.
    assert not list(folder.glob("*.partial")) + list(folder.glob(".*"))
    assert read_state_header(folder / STATE)[0] == 4
    resumed = launch([*TORCHRUN, str(SCRIPT)], folder)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout == "finished\n"
    assert "own: 100%" in resumed.stderr
    assert_same_training(folder, tmp_path / "alone")
    # Each of the two launches wrote one file of curves: the second process wrote none.
    assert len(list(folder.glob("events.*"))) == 2


@pytest.mark.slow
def test_accelerate_launch_with_micro_batches_muon_and_averages(tmp_path: Path) -> None:
    """Six requests in four parts. Muon orthogonalises in bfloat16: it turns rounding into 1e-4 of its own."""
    settings: dict[str, Any] = {"steps": 4, "matrix_learning_rate": 1e-3, "ema": 0.5}
    main(tmp_path / "alone", dict(settings))
    run = launch([*ACCELERATE, str(SCRIPT)], tmp_path / "two", **settings, accumulate=2)
    assert run.returncode == 0, run.stderr
    assert read_state_header(tmp_path / "two" / STATE)[0] == 4
    assert_same_training(tmp_path / "two", tmp_path / "alone", tolerance=1e-3)


@pytest.mark.slow
def test_sharded_processes_go_on_from_a_process_alone(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"ema": 0.5, "sometimes": False}
    main(tmp_path / "alone", dict(settings))
    main(tmp_path / "two", {**settings, "stop_after": 3})
    run = launch([*TORCHRUN, str(SCRIPT)], tmp_path / "two", **settings, shard=True, accumulate=2)
    assert run.returncode == 0, run.stderr
    assert_same_training(tmp_path / "two", tmp_path / "alone")
    one, other = new_trained(), new_trained()
    load_weights(tmp_path / "two", one, 8)
    load_weights(tmp_path / "alone", other, 8)
    assert_same_weights(one.state_dict(), other.state_dict())


@pytest.mark.slow
def test_what_is_not_finite_stops_all_and_names_the_sample_of_any(tmp_path: Path) -> None:
    run = launch([*TORCHRUN, str(SCRIPT)], tmp_path, broken_at=3)
    assert run.returncode != 0
    for rank in range(2):
        assert f"rank {rank}: own: the loss is nan at step 3; the last checkpoint is kept." in run.stderr
    assert "Samples whose loss is not finite: number 4 of the batch. " in run.stderr
    assert read_state_header(tmp_path / STATE)[0] == 2


RECIPE = """
import json
from openwu.training.embedded.model import EmbeddedConfig
from openwu.training.config import StageConfig
from openwu.training.embedded.config import EmbeddedRecipe

def recipe():
    pictures = StageConfig(steps=3, shapes=((2, 16), (3, 32)), learning_rate=2e-3, warmup=2)
    return EmbeddedRecipe(
        name="tiny", model=EmbeddedConfig.from_dict(json.loads({model!r})),
        instruction=StageConfig(steps=3, shapes=((6, 0),), learning_rate=2e-3, warmup=2),
        base=pictures, generator=pictures, shared=pictures, base_edits=("brighten", "blur"),
        edits=("brighten", "darken", "blur", "take_palette"), photographs={photographs!r}, side=32, bf16=False,
        checkpoint_every=2, evaluate_every=4, log_every=1,
    )
"""


@pytest.mark.slow
def test_openwu_train_in_two_processes(
    recipe: EmbeddedRecipe, embedded_config: EmbeddedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "recipe.py"
    file.write_text(RECIPE.format(model=json.dumps(embedded_config.to_dict()), photographs=recipe.photographs))
    run = launch([*TORCHRUN, "-m", "openwu", "train", str(file)], "--output", tmp_path / "two")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("->") + run.stderr.count(f"{file} ->") == 1
    loaded: dict[str, Any] = {}
    exec(file.read_text(), loaded)
    train(loaded["recipe"](), tmp_path / "alone")
    for stage in ("instruction", "base", "generator", "shared"):
        one, other = (load_file(tmp_path / folder / stage / STATE) for folder in ("two", "alone"))
        for name, value in one.items():
            if name.startswith("weight/") and not name.endswith(("W_k.bias", "kv.bias", "qkv.bias")):
                torch.testing.assert_close(value, other[name], atol=1e-4, rtol=0, msg=f"{stage} {name}")
    assert (tmp_path / "two" / "model" / "provenance.json").exists()
    assert not list((tmp_path / "two").rglob("*.partial"))


# Without launching anything


def test_a_process_alone_talks_to_no_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = Processes.join(torch.device("cpu"))
    assert (alone.rank, alone.count, alone.main) == (0, 1, True)
    assert float(alone.all_reduce_sum(torch.tensor(2.0))) == 2.0
    assert alone.all_gather(["x"]) == ["x"]
    alone.check_same_step(3, "folder")
    alone.barrier()
    monkeypatch.setenv("RANK", "1")
    assert not module.is_main()


def test_processes_that_see_other_checkpoints_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Processes, "all_gather", lambda _, own: [*own, "7"])
    with pytest.raises(OpenwuError, match=r"here: expected every process to see the same checkpoint.*\['0', '7'\]"):
        Processes(0, 2).check_same_step(0, "here")


def test_each_process_computes_its_own_parts() -> None:
    trainer = Trainer(new_stage(new_trained(), lambda _: None), _config(accumulate=2))
    trainer.processes = Processes(1, 3)
    assert trainer.micro_batches == [MicroBatch(2, 6), MicroBatch(3, 6)]


def test_muon_with_shards_is_refused() -> None:
    with pytest.raises(OpenwuError, match=r"shard: Muon needs whole matrices.* set matrix_learning_rate to 0"):
        Trainer(new_stage(new_trained(), lambda _: None), _config(matrix_learning_rate=1e-2), LoopConfig(shard=True))


def _config(**fields: Any) -> StageConfig:
    return StageConfig(**{"steps": 2, "shapes": ((6, 0),), "learning_rate": 1e-2, **fields})
