"""Conditions heard from a module of a network: which module, whether the rest is left out, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from language_cases import config, language_model
from openwu.conditions.hidden_states import HiddenStates
from openwu.errors import OpenwuError


class Network(nn.Module):
    """Three linear layers; counts how often the last one ran."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.unused = nn.Linear(3, 3)
        self.late = 0

    def forward(self, x: Tensor, shift: float = 0.0) -> Tensor:
        for number, layer in enumerate(self.layers):
            self.late += number == 2
            x = layer(x) + shift
        return x


class Pair(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x + 1, "cache"


@pytest.fixture
def network() -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Network()


def test_the_modules_output_is_the_condition_and_the_rest_does_not_run(network: Network) -> None:
    x = torch.randn(2, 5, 3)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    condition = HiddenStates(network, "layers.1")(x, mask=mask, shift=0.5)
    assert torch.equal(condition.tokens, network.layers[1](network.layers[0](x) + 0.5))
    assert condition.mask is not None
    assert torch.equal(condition.mask, mask.bool())
    assert network.late == 0
    assert not condition.tokens.requires_grad


@pytest.mark.parametrize("stop_early", [True, False])
def test_the_network_is_as_before(network: Network, stop_early: bool) -> None:
    x = torch.randn(1, 2, 3)
    before = network(x)
    encoder = HiddenStates(network, "layers.0", stop_early=stop_early)
    first, second = encoder(x), encoder(x)
    assert torch.equal(first.tokens, second.tokens)
    assert first.mask is None
    assert network.late == (1 if stop_early else 3)
    assert not network.layers[0]._forward_hooks
    assert torch.equal(network(x), before)


def test_an_offloaded_network_finishes_its_pass(network: Network) -> None:
    network.layers[2]._hf_hook = object()
    HiddenStates(network, "layers.0")(torch.randn(1, 2, 3))
    assert network.late == 1


def test_the_hook_goes_when_the_network_fails(network: Network) -> None:
    with pytest.raises(RuntimeError):
        HiddenStates(network, "layers.2")(torch.randn(1, 2, 7))
    assert not network.layers[2]._forward_hooks


def test_the_first_of_several_outputs_counts() -> None:
    condition = HiddenStates(nn.Sequential(Pair()), "0")(torch.zeros(1, 2, 3))
    assert torch.equal(condition.tokens, torch.ones(1, 2, 3))


def test_what_does_not_fit_is_refused(network: Network) -> None:
    with pytest.raises(OpenwuError, match=r"module: expected .* of Network, got 'layers.4'; near it are layers"):
        HiddenStates(network, "layers.4")
    with pytest.raises(OpenwuError, match="got ''"):
        HiddenStates(network, "")
    with pytest.raises(OpenwuError, match="unused: expected the network to run this module"):
        HiddenStates(network, "unused")(torch.zeros(1, 2, 3))
    with pytest.raises(OpenwuError, match=r"layers.1: expected hidden states \[b, L, d\], got torch.float32 \[2, 3\]"):
        HiddenStates(network, "layers.1")(torch.zeros(2, 3))
    with pytest.raises(OpenwuError, match=r"mask: expected \[1, 2\] as the hidden states, got \[1, 3\]"):
        HiddenStates(network, "layers.1")(torch.zeros(1, 2, 3), mask=torch.ones(1, 3))


def test_a_language_models_layer_speaks_before_the_last_norm() -> None:
    """An independent count: the library's own list holds what enters each layer, so layer 0's output is entry 1."""
    base = language_model(config(num_hidden_layers=3))
    texts = base.tokenize(["anna visits paris .", "ben drinks tea . carla visits rome ."])
    inputs = {"input_ids": texts.ids, "attention_mask": texts.mask}
    listed = base.model(**inputs, output_hidden_states=True).hidden_states
    for layer in (0, 1):
        condition = HiddenStates(base.model, f"model.layers.{layer}")(**inputs, mask=texts.mask)
        torch.testing.assert_close(condition.tokens, listed[layer + 1])
    last = HiddenStates(base.model, "model.layers.2")(**inputs, mask=texts.mask)
    torch.testing.assert_close(base.model.model.norm(last.tokens), base.model.model(**inputs).last_hidden_state)
    assert not torch.allclose(last.tokens, listed[-1])


def test_padding_changes_nothing_that_is_real() -> None:
    base = language_model()
    encoder = HiddenStates(base.model, base.layers[0])
    alone = base.tokenize(["anna visits paris ."])
    both = base.tokenize(["anna visits paris .", "ben drinks tea . carla visits rome ."])
    one = encoder(input_ids=alone.ids, attention_mask=alone.mask, mask=alone.mask)
    two = encoder(input_ids=both.ids, attention_mask=both.mask, mask=both.mask)
    assert two.mask is not None
    assert two.mask.sum(1).tolist() == [5, 9]
    torch.testing.assert_close(two.tokens[0, :5], one.tokens[0])
