"""Capturing a module's inputs and outputs, with and without stopping the forward pass there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from openwu.kernels.modules import capture_inputs, capture_outputs


@pytest.fixture
def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))


def ran(module: nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("stop", [True, False])
def test_outputs_are_captured_and_what_follows_runs_only_without_stop(network: nn.Sequential, stop: bool) -> None:
    x, later = torch.ones(1, 2), ran(network[2])
    with capture_outputs(network[1], stop=stop) as outputs:
        network(x)
        network(x)
    expected = network[1](network[0](x))
    assert len(outputs) == (1 if stop else 2)
    assert torch.equal(outputs[0], expected)
    assert len(later) == (0 if stop else 2)
    assert not network[1]._forward_hooks, "the hook is gone"
    assert network(x).shape == (1, 1)


def test_inputs_are_captured_before_the_module_runs(network: nn.Sequential) -> None:
    x, own = torch.ones(1, 2), ran(network[2])
    with capture_inputs(network[2], stop=True) as inputs:
        network(x)
    ((args, kwargs),) = inputs
    assert torch.equal(args[0], network[:2](x))
    assert (kwargs, own) == ({}, [])
    assert not network[2]._forward_pre_hooks


def test_a_module_that_never_runs_leaves_the_list_empty_and_errors_pass_through(network: nn.Sequential) -> None:
    with capture_outputs(nn.Linear(1, 1), stop=True) as outputs:
        network(torch.ones(1, 2))
    assert outputs == []
    with pytest.raises(KeyError), capture_outputs(network[0], stop=True):
        raise KeyError
    assert not network[0]._forward_hooks


def test_a_stop_ends_its_own_scope_and_no_other(network: nn.Sequential) -> None:
    reached = False
    with capture_outputs(network[0], stop=True) as outer:
        with capture_outputs(network[2], stop=True) as inner:
            network(torch.ones(1, 2))
        reached = True
    assert (len(outer), len(inner), reached) == (1, 0, False)
    assert not network[2]._forward_hooks
