"""The loss of an example: a window computes what the base does there, and what is held out is not trained on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from openwu.adapters.inject import attach
from openwu.backbones.embedded.network import TinyEditor, noise_plane, place_planes
from openwu.backbones.embedded.shown import fitting
from openwu.backbones.embedded.shown.fitting import EmbeddedFit
from openwu.training.embedded.model import EmbeddedConfig, EmbeddedModel
from openwu.training.stage import TrainableLora

WIDTH, HEIGHT = 70, 45


@pytest.fixture(scope="module")
def model(embedded_config: EmbeddedConfig) -> EmbeddedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = EmbeddedModel(embedded_config)
        torch.nn.init.normal_(model.backbone.pixels.out.weight, std=0.05)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.rand(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))


def whole(model: EmbeddedModel, pictures: Tensor, noise: Tensor, text: Tensor) -> Tensor:
    planes = torch.cat([noise.float(), place_planes(HEIGHT, WIDTH, frame=3)])[None]
    edited: Tensor = model.backbone(pictures[:1], planes, text, raw=True)
    return edited[0]


@pytest.mark.parametrize("window", [24, 200])
def test_a_step_computes_what_the_base_does_in_its_window(
    model: EmbeddedModel, pictures: Tensor, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "WINDOW", window)
    noise, text = noise_plane(WIDTH, HEIGHT, 0), model.instruction(["brighter"])
    edited = whole(model, pictures, noise, text)
    # What the base itself makes is a target without error wherever a step looks.
    fit = EmbeddedFit(model.backbone, [(pictures[0], edited, noise)], text, adapted=["pixels.out"], frame=3)
    for step in range(8):
        floor = max(fitting.FLOOR, fitting.FIRST_FLOOR * 0.01 ** (step / 8 / fitting.ANNEALED))
        assert float(fit.loss(step, 8)) == pytest.approx(math.log(floor), abs=1e-3)
    assert fit.held_out() < 1e-9
    other = EmbeddedFit(model.backbone, [(pictures[0], pictures[1], noise)], text, adapted=["pixels.out"], frame=3)
    assert other.held_out() > 1e-3
    last = {round(float(other.loss(step, 1)), 5) for step in range(1, 7)}  # the floor is where it ends
    assert (len(last) > 1) == (window < WIDTH)
    assert not any(each.requires_grad for each in fit.denoiser.parameters())


def test_held_out_squares_and_the_frame_are_never_trained_on(model: EmbeddedModel, pictures: Tensor) -> None:
    noise, text = noise_plane(WIDTH, HEIGHT, 0), model.instruction([""])
    (pair,) = EmbeddedFit(model.backbone, [(*pictures, noise)], text, adapted=["pixels.out"], frame=4).pairs
    assert not bool((pair.trained & pair.held).any())
    inner = (pair.trained | pair.held)[4:-4, 4:-4]
    assert bool(inner.all())
    assert int((pair.trained | pair.held).sum()) == inner.numel()
    assert 0.1 < float(pair.held.float().mean()) < 0.3
    changed = pictures[1].clone()
    changed[:, pair.held] = 0
    fits = [
        EmbeddedFit(model.backbone, [(pictures[0], after, noise)], text, adapted=["pixels.out"], frame=4)
        for after in (pictures[1], changed)
    ]
    assert float(fits[0].loss(0, 9)) == float(fits[1].loss(0, 9))
    assert fits[0].held_out() != fits[1].held_out()


def test_adapters_of_the_blocks_are_trained_too(model: EmbeddedModel, pictures: Tensor) -> None:
    """What the blocks see is computed under the adapter where it changes them; the base's own weights stay."""
    noise, text = noise_plane(WIDTH, HEIGHT, 0), model.instruction([""])
    targets = model.generator.targets
    fit = EmbeddedFit(model.backbone, [(*pictures, noise)], text, adapted=[target.name for target in targets])
    lora = TrainableLora(targets, 2, torch.Generator().manual_seed(0))
    with attach(fit.denoiser, targets) as handle, handle.applied(lora()):
        fit.loss(0, 4).backward()
    assert all(each.grad is not None and bool(each.grad.any()) for each in lora.b)
    assert isinstance(fit.denoiser, TinyEditor)
    assert fit.denoiser.embed.weight.data_ptr() == model.backbone.embed.weight.data_ptr()
