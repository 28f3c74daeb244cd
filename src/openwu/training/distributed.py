"""The processes of one training: rank and count, collective operations, and the trained module under DDP or FSDP2.

`torchrun` and `accelerate launch` set what `Processes.join` reads. Gradients are those of the whole batch: the module
is copied on every process (DDP), or cut up among them (FSDP2).
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
    """This process among `count`; collective operations do nothing where it is the only one."""

    rank: int = 0
    count: int = 1

    @classmethod
    def join(cls, device: torch.device) -> Processes:
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
        """Whether this process writes checkpoints, curves and progress."""
        return self.rank == 0

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        """Return the sum over all processes."""
        if self.count > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def all_gather(self, own: list[str]) -> list[str]:
        """Concatenate the lists of all processes."""
        if self.count == 1:
            return own
        each: list[Any] = [None] * self.count
        dist.all_gather_object(each, own)
        return [text for one in each for text in one]

    def check_same_step(self, step: int, folder: object) -> None:
        """Raise OpenwuError unless every process resumes from the same step."""
        steps = self.all_gather([str(step)])
        if len(set(steps)) > 1:
            raise OpenwuError(
                f"{folder}: expected every process to see the same checkpoint, they are at steps {steps}; "
                "the folder must be shared by all machines"
            )

    def barrier(self) -> None:
        """Wait until every process has called this."""
        if self.count > 1:
            dist.barrier()


def is_main() -> bool:
    """Whether this process writes for the whole training; usable before the processes have joined."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def process_group_scope() -> Iterator[None]:
    """Destroy the process group at the end, also after an error. Once in a script, around all of its trainings."""
    try:
        yield
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


class ForwardWrapper(nn.Module):
    """Run any function that uses `trained` inside a module's forward, which is where DDP and FSDP2 look for it."""

    def __init__(self, trained: nn.Module) -> None:
        super().__init__()
        self.trained = trained

    def forward(self, run: Callable[[], Result]) -> Result:
        return run()


def wrap_distributed(trained: nn.Module, processes: Processes, shard: bool) -> nn.Module:
    """Wrap `trained` so that backward passes leave the mean gradient over all processes.

    Returns a module whose forward takes a function to run, see `ForwardWrapper`. `shard`: the parameters of `trained`,
    in place, become shards of which each process holds one; the items of its module lists are gathered one at a time.
    """
    wrapper = ForwardWrapper(trained)
    if processes.count == 1:
        return wrapper
    device = next(trained.parameters()).device
    if not shard:
        device_ids = None if device.type == "cpu" else [device]
        # What a step does not use (an encoder of second pictures, say) has no gradient there.
        return nn.parallel.DistributedDataParallel(wrapper, device_ids=device_ids, find_unused_parameters=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes.count,))
    for each in reversed(list(trained.modules())):  # Inner modules come first.
        # Weights are gathered when a module runs: one that never runs itself stays with the module around it.
        for item in (one for one in each if _has_forward(one)) if isinstance(each, nn.ModuleList) else ():
            fully_shard(item, mesh=mesh, reshard_after_forward=True)
    sharded = fully_shard(wrapper, mesh=mesh, reshard_after_forward=True)
    sharded.set_reduce_scatter_unused_params(True)
    return wrapper


def _has_forward(module: nn.Module) -> bool:
    """Whether it has a forward pass of its own, which lists and dicts of modules have not."""
    return type(module).forward is not nn.Module.forward


@contextmanager
def no_gradient_sync(wrapper: nn.Module, enabled: bool) -> Iterator[None]:
    """Keep DDP from synchronising gradients in the scope's backward passes, where another micro-batch follows."""
    if enabled and isinstance(wrapper, nn.parallel.DistributedDataParallel):
        with wrapper.no_sync():
            yield
    else:
        yield


def full_tensor(value: Tensor) -> Tensor:
    """Gather a sharded tensor on every process; other tensors are returned as they are."""
    from torch.distributed.tensor import DTensor

    if not isinstance(value, DTensor):
        return value
    gathered: Tensor = value.full_tensor()
    return gathered


def shard_like(value: Tensor, other: Tensor) -> Tensor:
    """Cut up a whole tensor as `other` is; unchanged where `other` is not sharded or differs in shape."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(other, DTensor) or value.shape != other.shape:
        return value
    return distribute_tensor(value, other.device_mesh, other.placements)


def full_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gather every tensor, see `full_tensor`."""
    return {name: full_tensor(value.detach()).contiguous() for name, value in tensors.items()}
