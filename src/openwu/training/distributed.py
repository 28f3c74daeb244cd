"""The processes of one training: which one this is, and how they agree.

Enters: what `torchrun` or `accelerate launch` set for this process. Leaves: its place among all, sums over them, and a
module whose gradients are those of the whole batch: copied on every process (DDP), or cut up among them (FSDP2).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from openwu.errors import OpenwuError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """This process among `count`; alone, nothing below talks to anyone."""

    rank: int = 0
    count: int = 1

    @classmethod
    def joined(cls, device: torch.device) -> Processes:
        """Join the processes that were launched together; `device`: where the trained weights are."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=device.type == "cpu")
        if state.device.type != device.type:
            raise OpenwuError(
                f"trained: expected weights on {state.device}, where this process computes, found them on {device}; "
                "move the model there before training"
            )
        return cls(state.process_index, state.num_processes)

    @property
    def main(self) -> bool:
        """Whether this one writes checkpoints, curves and progress."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Over all processes."""
        if self.count > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def gathered(self, own: list[str]) -> list[str]:
        """The lists of all processes, one behind another."""
        if self.count == 1:
            return own
        each: list[Any] = [None] * self.count
        dist.all_gather_object(each, own)
        return [text for one in each for text in one]

    def agree(self, step: int, folder: object) -> None:
        """Every process continues from the same step."""
        steps = self.gathered([str(step)])
        if len(set(steps)) > 1:
            raise OpenwuError(
                f"{folder}: expected every process to see the same checkpoint, they are at steps {steps}; "
                "the folder must be shared by all machines"
            )

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            dist.barrier()


def is_main() -> bool:
    """Whether this process speaks for all of its training; usable before they have joined."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def joined_until_done() -> Iterator[None]:
    """Leave the group of processes at the end, also after an error. Once in a script, around all of its trainings."""
    try:
        yield
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


class ForwardWrapper(nn.Module):
    """Runs anything that uses `trained` inside a module's forward, which is where DDP and FSDP2 look for it."""

    def __init__(self, trained: nn.Module) -> None:
        super().__init__()
        self.trained = trained

    def forward(self, run: Callable[[], Result]) -> Result:
        return run()


def spread(trained: nn.Module, processes: Processes, shard: bool) -> nn.Module:
    """An `Around` of `trained` whose backward passes leave the mean gradient over all processes.

    `shard`: the parameters of `trained`, in place, become shards of which each process holds one; the items of its
    module lists are gathered one at a time.
    """
    around = ForwardWrapper(trained)
    if processes.count == 1:
        return around
    device = next(trained.parameters()).device
    if not shard:
        where = None if device.type == "cpu" else [device]
        # What a step does not use (an encoder of second pictures, say) has no gradient there.
        return nn.parallel.DistributedDataParallel(around, device_ids=where, find_unused_parameters=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes.count,))
    for each in reversed(list(trained.modules())):  # What lies inside comes first.
        # Weights are gathered when a module runs: one that never runs itself stays with the module around it.
        for item in (one for one in each if _runs(one)) if isinstance(each, nn.ModuleList) else ():
            fully_shard(item, mesh=mesh, reshard_after_forward=True)
    sharded = fully_shard(around, mesh=mesh, reshard_after_forward=True)
    sharded.set_reduce_scatter_unused_params(True)
    return around


def _runs(module: nn.Module) -> bool:
    """Whether it has a forward pass of its own, which lists and dicts of modules have not."""
    return type(module).forward is not nn.Module.forward


@contextmanager
def without_reduction(around: nn.Module, target: bool) -> Iterator[None]:
    """Backward passes inside, if `wanted`, only add to this process's gradients: another part of the batch follows."""
    if target and isinstance(around, nn.parallel.DistributedDataParallel):
        with around.no_sync():
            yield
    else:
        yield


def whole(value: Tensor) -> Tensor:
    """A tensor with all of its shards, on every process; others as they are."""
    full: Callable[[], Tensor] | None = getattr(value, "full_tensor", None)
    return value if full is None else full()


def like(value: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, cut up as `other` is."""
    if not hasattr(other, "full_tensor") or value.shape != other.shape:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(other, DTensor)
    return distribute_tensor(value, other.device_mesh, other.placements)


def whole_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: whole(value.detach()).contiguous() for name, value in tensors.items()}
