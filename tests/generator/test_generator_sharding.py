"""A generator over two processes (gloo, CPU) against a single one: adapters, their parts, and gradients."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing

from openwu.config import GeneratorConfig, LayerGroup, PlainTarget
from openwu.errors import OpenwuError
from openwu.generator.inference.fast import FastOptions
from openwu.generator.model import ParameterGenerator
from openwu.generator.sharding import ShardedGenerator, spans, sum_gradients
from openwu.types import Condition

RANKS = 2


def generator_and_condition() -> tuple[ParameterGenerator, Condition]:
    """Three layers of 2 x 3 positions, and one layer of 3 positions, of which one process has none."""
    torch.manual_seed(0)
    groups = (
        LayerGroup("layers.", 3, (PlainTarget("proj", 12, 9),), name="layers"),
        LayerGroup("head.", 1, (PlainTarget("conv", 9, 4),), name="head", indexed=False),
    )
    generator = ParameterGenerator(GeneratorConfig(6, 3, 16, 7, 24, 8, 2, 3, groups), b_init_std=0.3).double()
    mask = torch.tensor([[True, True, True], [False, True, True]])
    return generator, Condition(torch.randn(2, 3, 7, dtype=torch.float64), mask)


def loss_of(weights: dict[str, Any]) -> torch.Tensor:
    return torch.stack([(b @ a).square().sum() + (b @ a).sum() for a, b in weights.values()]).sum()


def work(rank: int, port: int, folder: str) -> None:
    """What each process does; results are written for the test to compare."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    generator, condition = generator_and_condition()
    sharded = ShardedGenerator(generator, options=FastOptions(chunk_layers=1))
    found: dict[str, Any] = {}
    with torch.no_grad():
        found["whole"] = sharded(condition).state_dict()
        found["part"] = sharded(condition, gather=False).state_dict()
    with pytest.raises(OpenwuError, match="expected gather=False"):
        sharded(condition)
    part = sharded(condition, gather=False)
    found["clear part"] = part.detach().state_dict()
    loss = loss_of(dict(part.pairs))
    torch.autograd.backward(loss)
    sum_gradients(generator.parameters())
    found["gradients"] = {name: each.grad for name, each in generator.named_parameters()}
    found["loss"] = loss.detach()
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (port, str(tmp_path)), nprocs=RANKS)
    generator, condition = generator_and_condition()
    adapter = generator(condition)
    expected = adapter.detach().state_dict()
    loss = loss_of(dict(adapter.pairs))
    torch.autograd.backward(loss)
    seen: list[str] = []
    losses = []
    for rank in range(RANKS):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert set(found["whole"]) == set(expected)
        for kind in ("whole", "part", "clear part"):
            for key, tensor in found[kind].items():
                torch.testing.assert_close(tensor, expected[key], rtol=1e-10, atol=1e-13)
        assert set(found["part"]) == set(found["clear part"])
        seen += found["part"]
        losses.append(found["loss"])
        for name, parameter in generator.named_parameters():
            torch.testing.assert_close(found["gradients"][name], parameter.grad, rtol=1e-8, atol=1e-12)
    assert sorted(seen) == sorted(expected)
    torch.testing.assert_close(sum(losses), loss.detach())


@pytest.mark.parametrize(("length", "parts"), [(7, 3), (2, 4), (0, 2), (8, 1)])
def test_spans_cover_everything_once_and_evenly(length: int, parts: int) -> None:
    cut = spans(length, parts)
    assert [number for start, stop in cut for number in range(start, stop)] == list(range(length))
    sizes = [stop - start for start, stop in cut]
    assert len(cut) == parts
    assert max(sizes) - min(sizes) <= 1


def test_a_single_process_is_told_what_to_do() -> None:
    with pytest.raises(OpenwuError, match=r"expected torch\.distributed to be initialised"):
        ShardedGenerator(generator_and_condition()[0])
