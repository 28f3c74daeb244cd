"""Optimisers (AdamW, or Muon beside it), learning-rate schedules and EMA weights of a training stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from openwu.training.config import StageConfig

BETAS = (0.9, 0.98)
NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)
"""Coefficients of Muon's iteration (Jordan et al. 2024), torch's own default."""

DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda left: left,
    "cosine": lambda left: 0.5 - 0.5 * math.cos(math.pi * left),
    "constant": lambda _: 1.0,
}
"""Name of a schedule -> the learning-rate factor when this fraction (1 to 0) of the decay's steps is left."""


def learning_rate_factor(config: StageConfig, step: int) -> float:
    """Return the factor on the peak learning rates at a step: linear warm-up, constant, then the schedule's decay."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup))
    left = (config.steps - step) / max(1.0, config.decay * config.steps)
    return min(warmup, DECAYS[config.schedule](min(1.0, left)))


class MatrixStacks(nn.Module):
    """Base class of modules whose parameters are all stacks of matrices `[..., rows, columns]`."""


class StageOptimizer:
    """Muon for linear layers' weights and stacks of matrices, AdamW for the rest, each with its own learning rate."""

    def __init__(self, module: nn.Module, config: StageConfig) -> None:
        matrices = list(_linear_weights(module)) if config.matrix_learning_rate else []
        stacks = list(_stacks(module)) if config.stack_learning_rate else []
        by_muon = {id(parameter) for parameter in (*matrices, *stacks)}
        rest = [p for p in module.parameters() if p.requires_grad and id(p) not in by_muon]
        decayed, others = [p for p in rest if p.ndim >= 2], [p for p in rest if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._optimizers: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.AdamW(groups, lr=config.learning_rate, betas=BETAS, fused=True), config.learning_rate)
        ]
        if matrices:
            rate = config.matrix_learning_rate
            kind = torch.optim.Muon if multiplies_bfloat16(matrices[0].device) else Float32Muon
            # The update is scaled to the size of AdamW's, so that rates and decay mean the same (Liu et al. 2025).
            muon = kind(matrices, lr=rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
            self._optimizers.append((muon, rate))
        if stacks:
            rate = config.stack_learning_rate
            self._optimizers.append((StackMuon(stacks, rate, config.weight_decay), rate))

    def step(self, factor: float) -> None:
        """Update the weights at this factor (0 to 1) of the peak learning rates."""
        for optimizer, peak in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
            # Fused kernels change weights without raising their version, by which caches notice a change.
            for group in optimizer.param_groups:
                torch.autograd.graph.increment_version(group["params"])

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer, _ in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return the optimiser state of a parameter; empty before its first update."""
        return {key: value for opt, _ in self._optimizers for key, value in opt.state.get(parameter, {}).items()}

    def set_state_of(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        """Restore what `state_of` returned."""
        for optimizer, _ in self._optimizers:
            if any(parameter is each for group in optimizer.param_groups for each in group["params"]):
                # Files are read on the CPU, and fused kernels want even the step counter beside the weights.
                optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}


class Float32Muon(torch.optim.Muon):
    """Muon that orthogonalises in float32: torch's does so in bfloat16, 40 times slower where no unit multiplies it.

    Only what `StageOptimizer` asks for: the update is scaled to the size of AdamW's. The state is that of torch's.
    """

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update the weights."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                momentum = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - group["momentum"])
                direction = weight.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
                update = orthogonalised(direction, group["ns_coefficients"], group["ns_steps"], group["eps"])
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(weight.shape)))


def orthogonalised(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Bring the singular values of a matrix near 1 by Newton-Schulz iterations (Jordan et al. 2024), in its dtype."""
    a, b, c = coefficients
    tall = x.shape[0] > x.shape[1]
    y = x.T if tall else x
    y = y / y.norm().clamp(min=eps)
    for _ in range(steps):
        gram = y @ y.T
        y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.T if tall else y


class StackMuon(torch.optim.Optimizer):
    """Muon for stacks of matrices `[..., rows, columns]`: each matrix is orthogonalised by itself, in float32.

    A matrix without any gradient in a step stays, its momentum too: in a bank of adapters a step asks for a few, and
    an orthogonalised momentum would move all others as far.
    """

    def __init__(
        self, stacks: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95, ns_steps: int = 5
    ) -> None:
        super().__init__(stacks, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "ns_steps": ns_steps})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update the weights."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                asked = weight.grad.flatten(-2).any(-1)[..., None, None]
                momentum = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
                momentum.copy_(torch.where(asked, momentum.lerp(weight.grad, 1 - group["momentum"]), momentum))
                direction = weight.grad.lerp(momentum, group["momentum"])
                update = orthogonalised_stack(direction, group["ns_steps"])
                size = 0.2 * math.sqrt(max(weight.shape[-2:]))
                moved = weight * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * size * update
                weight.copy_(torch.where(asked, moved, weight))


def orthogonalised_stack(x: Tensor, steps: int, eps: float = 1e-7) -> Tensor:
    """Bring the singular values of every matrix of a stack `[..., rows, columns]` near 1; see `orthogonalised`."""
    a, b, c = NEWTON_SCHULZ
    tall = x.shape[-2] > x.shape[-1]
    y = (x.mT if tall else x).float()
    y = y / torch.linalg.matrix_norm(y, keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    found: Tensor = (y.mT if tall else y).to(x.dtype)
    return found


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether a device has units that multiply matrices in bfloat16: every accelerator, not every processor."""
    if device.type != "cpu":
        return True
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def _linear_weights(module: nn.Module) -> Iterator[nn.Parameter]:
    for each in module.modules():
        if isinstance(each, nn.Linear) and each.weight.requires_grad:
            assert isinstance(each.weight, nn.Parameter)
            yield each.weight


def _stacks(module: nn.Module) -> Iterator[nn.Parameter]:
    for each in module.modules():
        if isinstance(each, MatrixStacks):
            yield from (parameter for parameter in each.parameters() if parameter.requires_grad)


class EmaWeights:
    """EMA of the trained parameters; evaluated, exported and built on in their place. `decay` 0: no average is kept.

    average <- decay * average + (1 - decay) * weight after every update, starting from the weights after the first.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad} if decay else {}
        self._parameters = list(trained.values())
        self._update: Callable[..., None] = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self.values: dict[str, Tensor] = {name: p.detach().clone() for name, p in trained.items()}
        """Name of the parameter -> its average."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average in the weights after the update number `step` (from 0)."""
        if step == 0:
            for average, parameter in zip(self.values.values(), self._parameters, strict=True):
                average.copy_(parameter)
        elif self.values:
            self._update(list(self.values.values()), list(self._parameters), step)

    @torch.no_grad()
    def copy_to_module(self) -> None:
        """Overwrite the module's weights with their averages."""
        for average, parameter in zip(self.values.values(), self._parameters, strict=True):
            parameter.copy_(average)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Swap the averages in for the scope; the trained weights come back at its end, also after an exception."""
        trained = [parameter.detach().clone() for parameter in self._parameters]
        self.copy_to_module()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, own in zip(self._parameters, trained, strict=True):
                    parameter.copy_(own)
