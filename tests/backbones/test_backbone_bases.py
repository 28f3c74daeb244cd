"""Tests of every base: its targets, its edits with adapters, and its training prediction against its own pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from base_cases import FAST, adapter, backbone, edited, noisy, nothing, picture, requests, targets_of
from torch import nn

from openwu import attach
from openwu.adapters.merge import merged
from openwu.types import BaseRequest, SamplingOptions


def test_targets_are_the_linear_maps_of_the_blocks_without_modulation(base: Any) -> None:
    linear = {
        name
        for name, module in base.denoiser.named_modules()
        if isinstance(module, nn.Linear)
        and ("transformer_blocks." in name or name.startswith("blocks."))
        and "norm" not in name
    }
    assert {target.name for target in targets_of(base)} == linear


def test_every_target_receives_gradient(base: Any) -> None:
    weights = adapter(base, 2)
    for pair in weights.pairs.values():
        for part in pair:
            part.requires_grad_()
    asked = requests(2)
    batch = base.latent_batch(asked, [torch.full((3, 64, 64), 0.3), torch.full((3, 64, 64), 0.8)])
    time = torch.tensor([500, 200]) if base.prediction != "flow" else torch.tensor([0.5, 0.2])
    with attach(base.denoiser, weights.targets) as handle, handle.applied(weights):
        prediction = base.predict(batch, noisy(batch), time)
    assert prediction.shape == batch.target.shape
    prediction.square().mean().backward()
    dead = [
        f"{name}.{part}"
        for name, pair in weights.pairs.items()
        for part, factor in zip("AB", pair, strict=True)
        if factor.grad is None or not bool((factor.grad.flatten(1).abs().amax(1) > 0).all())
    ]
    assert dead == []


def test_an_adapter_changes_the_picture_and_none_leaves_it(base: Any) -> None:
    asked = requests(1)
    alone = torch.stack(base.generate(asked, FAST, nothing))
    weights = adapter(base, 1)
    changed = torch.stack(edited(base, asked, weights))
    assert changed.shape == alone.shape == (1, 3, 64, 64)
    assert (changed - alone).abs().max() > 1e-3
    torch.testing.assert_close(torch.stack(edited(base, asked, weights.scaled(0.0))), alone, rtol=0, atol=1e-6)


def test_hooks_equal_merged_weights(base: Any) -> None:
    asked, weights = requests(1), adapter(base, 1)
    with merged(base.denoiser, weights):
        expected = torch.stack(base.generate(asked, FAST, nothing))
    torch.testing.assert_close(torch.stack(edited(base, asked, weights)), expected, rtol=0, atol=2e-5)


def test_each_request_of_a_batch_has_its_own_adapter_seed_and_picture(base: Any) -> None:
    asked = [*requests(2), BaseRequest((picture(7, 96, 48),), "sharpen", seed=5), requests(1)[0]]
    weights = adapter(base, 4)
    together = edited(base, asked, weights)
    for i, request in enumerate(asked):
        alone = edited(base, [request], weights.select([i]))[0]
        torch.testing.assert_close(together[i], alone, rtol=0, atol=5e-5)
    assert (together[0] - together[3]).abs().max() > 1e-3, "the same request under two adapters"


def test_the_training_prediction_is_what_the_pipeline_computes(base: Any) -> None:
    """The pipeline's own call of its denoiser, captured, against `predict` on a batch made from the same request."""
    asked = requests(1)
    seen: list[tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]] = []
    hook = base.denoiser.register_forward_hook(
        lambda _, args, kwargs, output: seen.append((args, kwargs, output[0])), with_kwargs=True
    )
    try:
        base.generate(asked, SamplingOptions(steps=2, guidance=1.0, pixels=64 * 64), nothing)
    finally:
        hook.remove()
    (args, kwargs, output) = seen[0]
    batch = base.latent_batch(asked, [torch.full((3, 64, 64), 0.4)])
    if base.prediction == "flow":
        count = batch.target.shape[1]
        x_t, time, expected = kwargs["hidden_states"][:, :count], kwargs["timestep"], output[:, :count]
        if base.clip_frames is not None:  # a time for every token, in steps
            time = time.flatten()[:1] / 1000
    else:
        x_t, time, expected = args[0][:, :4], args[1].reshape(1), output
    torch.testing.assert_close(base.predict(batch, x_t, time), expected, rtol=1e-5, atol=1e-5)


def test_a_condition_reads_text_and_pictures_and_a_batch_is_its_samples(base: Any) -> None:
    asked = [requests(2)[0], BaseRequest((picture(3), picture(4, 128, 64)), "a longer instruction")]
    together = base.condition(asked)
    (_, width), (name, more) = base.condition_widths.items()
    assert (together.tokens.shape[2], together.more[name].tokens.shape[2]) == (width, more)
    assert together.mask is not None
    for i, request in enumerate(asked):
        alone = base.condition([request])
        torch.testing.assert_close(together.tokens[i][together.mask[i]], alone.tokens[0][alone.mask[0]])
        mask = together.more[name].mask[i]
        torch.testing.assert_close(together.more[name].tokens[i][mask], alone.more[name].tokens[0])
    # 16 tokens for 64 x 64; the reference becomes 64 x 64 or 80 x 64, by the base's multiple.
    assert together.more[name].mask.sum(1).tolist() == [16, 16 + (20 if base.multiple == 16 else 16)]
    other = base.condition([BaseRequest((picture(9),), asked[0].instruction)])
    first = base.condition([asked[0]])
    assert torch.equal(other.tokens, first.tokens)
    assert not torch.equal(other.more[name].tokens, first.more[name].tokens)


def test_progress_counts_every_step_of_every_call(base: Any) -> None:
    seen: list[tuple[int, int]] = []
    asked = [requests(1)[0], BaseRequest((picture(7, 256, 64),), "sharpen")]
    base.generate(asked, FAST, nothing, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_pictures_of_several_shapes_cannot_train_together(base: Any) -> None:
    asked = [requests(1)[0], BaseRequest((picture(7, 256, 64),), "sharpen")]
    targets = [torch.zeros(3, 64, 64), torch.zeros(3, 64, 64)]
    with pytest.raises(Exception, match="expected pictures of one shape in a batch"):
        base.latent_batch(asked, targets)
    with pytest.raises(Exception, match="expected 2 pictures, one per request, got 1"):
        base.latent_batch(asked, targets[:1])


def test_what_a_base_does_not_have_is_refused() -> None:
    with pytest.raises(Exception, match="image_guidance: expected none for FluxKontext"):
        backbone("flux-kontext").options(SamplingOptions(image_guidance=1.5))
    with pytest.raises(Exception, match="true_guidance: expected none for InstructPix2Pix"):
        backbone("instruct-pix2pix").options(SamplingOptions(true_guidance=1.5))
