"""A user's own script, as `torchrun` starts it: trains a small generator in the folder that it is told.

torchrun --nproc-per-node 2 process_cases.py FOLDER [key=value ...]
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import openwu
from openwu.config import LayerGroup, PlainTarget
from openwu.errors import OpenwuError
from openwu.training.config import StageConfig
from openwu.training.distributed import is_main, process_group_scope
from openwu.training.loop import LoopConfig, train_stage
from openwu.training.objectives import FlowMatching, NoisySample
from openwu.training.stage import GeneratorStage

WIDTH, ROWS = 16, 6


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(WIDTH, WIDTH)}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + checkpoint(lambda y, layer=layer: torch.tanh(layer["fc"](y)), x, use_reentrant=False)
        return x


class Sometimes(nn.Module):
    """A generator, and a part of its condition that only some requests have."""

    def __init__(self, generator: openwu.ParameterGenerator) -> None:
        super().__init__()
        self.generator = generator
        self.extra = nn.Linear(4, 4)


def new_trained() -> Sometimes:
    torch.manual_seed(1)
    group = LayerGroup(prefix="layers.", num_layers=2, targets=(PlainTarget("fc", WIDTH, WIDTH),), name="layers")
    config = openwu.GeneratorConfig(
        rank=2, alpha=2, token_dim=WIDTH, input_dim=4, d_model=32, head_dim=16, dim_accumulation=2, num_pg_layers=2,
        groups=(group,),
    )  # fmt: skip
    return Sometimes(openwu.ParameterGenerator(config, b_init_std=1e-1))


def new_stage(trained: Sometimes, killed: Callable[[int], None], sometimes: bool = True) -> GeneratorStage[Tensor]:
    """Requests `[b, 2, 4]`; only the first of a batch have the part that not all have, and `sometimes` none has it."""
    base = Base().requires_grad_(False)

    def batches(step: int) -> Tensor:
        killed(step)
        requests = torch.randn(ROWS, 2, 4, generator=torch.Generator().manual_seed(step))
        requests[:, 0, 0] = (torch.arange(ROWS) < (2 if step % 3 or not sometimes else 0)).float()
        return requests

    def adapt(requests: Tensor) -> openwu.Adapter:
        has = requests[:, 0, 0] > 0
        if bool(has.any()):
            requests = requests + has[:, None, None] * trained.extra(requests)
        adapter: openwu.Adapter = trained.generator(requests)
        return adapter

    def predict(_: Tensor, question: NoisySample) -> Tensor:
        assert question.x_t is not None
        out: Tensor = base(question.x_t)
        return out

    return GeneratorStage(
        "own",
        trained,
        openwu.attach(base, trained.generator.targets),
        batches,
        adapt,
        target=lambda requests: requests.flatten(1).repeat(1, 2),
        predict=predict,
        objective=FlowMatching(),
        validation=batches(1000),
        tasks=lambda requests: ["has" if has else "has not" for has in (requests[:, 0, 0] > 0).tolist()],
    )


def main(folder: Path, settings: dict[str, Any]) -> None:
    rank, dying = int(os.environ.get("RANK", "0")), settings.pop("dies_at", None)

    def killed(step: int) -> None:
        """The second process ends as it would for want of memory."""
        if step == dying and rank == 1:
            (folder / "died").write_text(str(time.time()), encoding="utf-8")
            os.kill(os.getpid(), signal.SIGKILL)

    stop_after, shard = settings.pop("stop_after", None), settings.pop("shard", False)
    loop = LoopConfig("{}", checkpoint_every=2, evaluate_every=4, log_every=1, stop_after=stop_after, shard=shard)
    broken_at, sometimes = settings.pop("broken_at", None), settings.pop("sometimes", True)
    config = StageConfig(**{"steps": 8, "shapes": ((ROWS, 0),), "learning_rate": 1e-2, "warmup": 2, **settings})
    stage = new_stage(new_trained(), killed, sometimes)
    if broken_at is not None:
        target, batches = stage.target, stage.batches
        last = {"step": 0}
        stage.batches = lambda step: (last.update(step=step), batches(step))[1]
        spoil = torch.ones(ROWS, 1).index_fill(0, torch.tensor([4]), torch.nan)
        stage.target = lambda r: target(r) * (spoil if last["step"] == broken_at and len(r) == ROWS else 1)
    with process_group_scope():
        train_stage(stage, config, loop, folder)
    if is_main():
        sys.stdout.write("finished\n")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), {key: json.loads(value) for key, _, value in (a.partition("=") for a in sys.argv[2:])})
    except OpenwuError as error:
        sys.stderr.write(f"rank {os.environ.get('RANK')}: {error}\n")
        sys.exit(3)
