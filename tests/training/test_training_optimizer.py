"""The optimiser of a stage: which part trains what, and that its memory survives a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import openwu
from openwu.config import GeneratorConfig, LayerGroup, PlainTarget
from openwu.editor.cache import GeneratorIdentity
from openwu.generator.inference.fast import FastGenerator
from openwu.generator.model import ParameterGenerator
from openwu.training.checkpoint import load_state, save_state
from openwu.training.config import StageConfig
from openwu.training.optimizers import Float32Muon, StageOptimizer
from openwu.training.stage import TrainableLora

ADAMW = StageConfig(steps=8, shapes=((1, 1),), learning_rate=1e-2, weight_decay=0.0)
BOTH = replace(ADAMW, matrix_learning_rate=5e-2)


class Small(nn.Module):
    """One of everything: a table, a linear layer, a convolution, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 6)
        self.linear = nn.Linear(6, 4)
        self.convolution = nn.Conv2d(4, 3, 3, padding=1)
        self.norm = nn.RMSNorm(3)

    def forward(self, rows: Tensor) -> Tensor:
        x = self.linear(self.table(rows))[:, :, None, None].expand(-1, -1, 4, 4)
        out: Tensor = self.norm(self.convolution(x).mean((2, 3)))
        return out


def small() -> Small:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Small()


def update(module: Small, optimizer: StageOptimizer, part: float = 1.0) -> None:
    optimizer.zero_grad()
    torch.autograd.backward((module(torch.arange(5)) - 1).square().sum())
    optimizer.step(part)


def test_muon_trains_the_weights_of_linear_layers_alone() -> None:
    module = small()
    optimizer = StageOptimizer(module, BOTH)
    update(module, optimizer)
    for name, parameter in module.named_parameters():
        remembered = set(optimizer.state_of(parameter))
        assert remembered == ({"momentum_buffer"} if name == "linear.weight" else {"step", "exp_avg", "exp_avg_sq"})


def test_its_update_is_nearly_orthogonal() -> None:
    """All singular values of the step are alike, whatever those of the gradient are, as long as none is 0."""
    module = small()
    before = module.linear.weight.detach().clone()
    optimizer = StageOptimizer(module, BOTH)
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(side, 4, generator=draw)).Q for side in (4, 6))
    module.linear.weight.grad = left @ torch.diag(torch.tensor([1.0, 0.5, 0.2, 0.1])) @ right.T
    optimizer.step(1.0)
    step = torch.linalg.svdvals(module.linear.weight.detach() - before)
    assert step[-1] > 0
    assert step[0] / step[-1] < 2


@pytest.mark.parametrize("config", [ADAMW, BOTH], ids=["AdamW", "both"])
def test_an_update_shows_in_what_is_kept_from_the_weights(config: StageConfig) -> None:
    groups = (LayerGroup("layers.", 2, (PlainTarget("qkv", 6, 8),), name="layers"),)
    generator = ParameterGenerator(GeneratorConfig(2, 2, 8, 5, 16, 8, 2, 1, groups), b_init_std=0.3)
    fast, identity, condition = (
        FastGenerator(generator),
        GeneratorIdentity({"generator": generator}, {}),
        torch.ones(1, 3, 5),
    )
    fast(condition)
    before = identity.digest
    optimizer = StageOptimizer(generator, config)
    sum(b.sum() for _, b in generator(condition).pairs.values()).backward()  # type: ignore[union-attr]
    optimizer.step(1.0)
    assert identity.digest != before
    for name, factors in generator(condition).pairs.items():
        torch.testing.assert_close(fast(condition).pairs[name], tuple(part.detach() for part in factors))


def test_what_is_remembered_goes_where_the_weights_are() -> None:
    module = nn.Linear(4, 4, bias=False, device="meta")
    optimizer = StageOptimizer(module, BOTH)
    optimizer.set_state_of(module.weight, {"momentum_buffer": torch.zeros(4, 4)})
    assert optimizer.state_of(module.weight)["momentum_buffer"].device == module.weight.device


def test_without_a_rate_for_matrices_everything_is_adamws() -> None:
    module, reference = small(), small()
    optimizer = StageOptimizer(module, ADAMW)
    plain = torch.optim.AdamW(reference.parameters(), lr=1e-2, betas=(0.9, 0.98), weight_decay=0.0)
    for _ in range(3):
        update(module, optimizer)
        plain.zero_grad()
        torch.autograd.backward((reference(torch.arange(5)) - 1).square().sum())
        plain.step()
    for one, other in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("part", [0.0, 0.5])
def test_both_rates_follow_the_schedule(part: float) -> None:
    whole, partly = small(), small()
    update(whole, StageOptimizer(whole, BOTH))
    update(partly, StageOptimizer(partly, BOTH), part)
    start = small()
    for at, full, some in zip(start.parameters(), whole.parameters(), partly.parameters(), strict=True):
        torch.testing.assert_close((some - at).detach(), (part * (full - at)).detach(), atol=1e-6, rtol=1e-4)


def test_frozen_parameters_are_left_alone() -> None:
    module = small()
    module.linear.weight.requires_grad_(False)
    before = module.linear.weight.clone()
    update(module, StageOptimizer(module, BOTH))
    assert torch.equal(module.linear.weight, before)


@pytest.mark.parametrize("config", [ADAMW, BOTH])
def test_a_stored_state_continues_to_the_same_weights(tmp_path: Path, config: StageConfig) -> None:
    module = small()
    optimizer = StageOptimizer(module, config)
    for _ in range(3):
        update(module, optimizer)
    save_state(tmp_path, module, optimizer, 3, "{}")
    fresh = small()
    other = StageOptimizer(fresh, config)
    assert load_state(tmp_path, fresh, other, "{}") == 3
    for each, continued in ((module, optimizer), (fresh, other)):
        update(each, continued)
    for one, same in zip(module.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, same)
        assert optimizer.state_of(one).keys() == other.state_of(same).keys()


def stack_config(**changes: float) -> StageConfig:
    return replace(ADAMW, stack_learning_rate=5e-2, weight_decay=0.1, warmup=0, schedule="constant", **changes)


def test_a_stack_is_updated_as_its_matrices_by_themselves() -> None:
    """Two steps of every matrix, by torch's Muon (in float32) on a linear layer of that weight."""
    draws = torch.Generator().manual_seed(0)
    lora = TrainableLora((openwu.Target("0", 6, 4),), 3, draws, count=2)
    weights = [lora.a[0], lora.b[0]]
    for weight in weights:
        weight.data.normal_(generator=draws)
    gradients = [[torch.randn(weight.shape, generator=draws) for weight in weights] for _ in range(2)]
    expected = []
    for place, weight in enumerate(weights):
        for i in range(2):
            alone = torch.nn.Parameter(weight[i].detach().clone())
            muon = Float32Muon([alone], lr=5e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
            for step in gradients:
                alone.grad = step[place][i]
                muon.step()
            expected.append(alone.detach())
    optimizer = StageOptimizer(lora, stack_config())
    for step in gradients:
        for weight, gradient in zip(weights, step, strict=True):
            weight.grad = gradient
        optimizer.step(1.0)
    found = [weight[i].detach() for weight in weights for i in range(2)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert set(optimizer.state_of(weights[0])) == {"momentum_buffer"}


def test_matrices_that_a_step_does_not_ask_for_stay_as_they_are() -> None:
    lora = TrainableLora((openwu.Target("0", 6, 4),), 3, torch.Generator().manual_seed(0), count=3)
    optimizer, before = StageOptimizer(lora, stack_config()), lora.a[0].detach().clone()
    for row in (0, 2):  # The momentum of row 0 must not move it in the second step.
        optimizer.zero_grad()
        adapter = lora([row])
        torch.autograd.backward(
            (torch.cat([each.flatten() for each in adapter.state_dict().values()]) - 1).square().sum()
        )
        optimizer.step(1.0)
        moved = (lora.a[0] != before).any(2).any(1).tolist()
        assert moved == [True, False, row == 2]
        if row == 0:
            first = lora.a[0][0].detach().clone()
    assert torch.equal(lora.a[0][0].detach(), first)


def test_adamw_trains_stacks_unless_they_have_a_rate() -> None:
    lora = TrainableLora((openwu.Target("0", 6, 4),), 3, torch.Generator().manual_seed(0))
    for config, state in ((BOTH, "exp_avg"), (stack_config(), "momentum_buffer")):
        optimizer = StageOptimizer(lora, config)
        lora.a[0].grad = torch.ones_like(lora.a[0])
        optimizer.step(1.0)
        assert state in optimizer.state_of(lora.a[0])
    with pytest.raises(ValueError, match=r"stack_learning_rate: expected 0 or more, got -1"):
        replace(ADAMW, stack_learning_rate=-1.0)
