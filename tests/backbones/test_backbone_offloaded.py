"""Bases whose weights wait in memory or on disk between passes, by accelerate's hooks, with the CPU as the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hunyuan_stand_in
import pytest
import tiny_pipelines
import torch
from base_cases import FAST, PIXELS, adapter, edited, generator, losses_of_training, nothing, requests
from torch import Tensor

from openwu import attach
from openwu.adapters.experts import ExpertRouting
from openwu.adapters.merge import merged_copy, merging_pays
from openwu.backbones import backbone_class
from openwu.backbones.hunyuan_image_3.base import HunyuanImage3
from openwu.backbones.hunyuan_image_3.dialogue import inputs_of
from openwu.conditions.denoiser_states import DenoiserStates
from openwu.conditions.part_states import PartStates
from openwu.conditions.siglip2 import Siglip2
from openwu.editor.compatibility import placed
from openwu.errors import TargetError
from openwu.types import Adapter, SamplingOptions

accelerate = pytest.importorskip("accelerate")

CPU = torch.device("cpu")
LEVEL = 1 / 255


def hunyuan() -> Any:
    base = HunyuanImage3(hunyuan_stand_in.made())
    base.reasoning_tokens = 2
    return base


def kontext() -> Any:
    base: Any = backbone_class("flux-kontext")(tiny_pipelines.flux_kontext())  # type: ignore[call-arg]
    base.condition_pixels = base.pixels = PIXELS
    return base


def by_map(model: Any, folder: Path) -> None:
    """Offload one layer to memory and the next one to disk, by a `device_map`."""
    names = {name: "cpu" for name, _ in model.named_children() if name != "model"}
    names |= {"model.wte": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.ln_f": "cpu"}
    accelerate.dispatch_model(model, names, offload_dir=str(folder))


def in_memory(model: Any, _: Path) -> None:
    """The stand-in's own code asks a weight outside of its layers for the device, so only layers move."""
    accelerate.cpu_offload(getattr(getattr(model, "model", None), "layers", model), CPU)


def on_disk(model: Any, folder: Path) -> None:
    accelerate.disk_offload(model, str(folder), CPU)


WAYS: dict[str, tuple[Callable[[], Any], Callable[[Any, Path], None], str]] = {
    "hunyuan by map": (hunyuan, by_map, "model.layers.1."),
    "hunyuan in memory": (hunyuan, in_memory, "model.layers."),
    "kontext in memory": (kontext, in_memory, ""),
    "kontext on disk": (kontext, on_disk, ""),
}


def edits(base: Any, weights: Adapter) -> list[Tensor]:
    return edited(base, requests(2), weights, SamplingOptions(steps=2) if isinstance(base, HunyuanImage3) else FAST)


def gradients(base: Any, weights: Adapter) -> dict[str, Tensor]:
    """Return the gradient of every A and B of a fixed loss."""
    leaves = {
        f"{name}.{part}": factor.detach().requires_grad_()
        for name, pair in weights.pairs.items()
        for part, factor in zip("AB", pair, strict=True)
    }
    trained = Adapter.from_pairs(
        weights.targets, {name: (leaves[f"{name}.A"], leaves[f"{name}.B"]) for name in weights.pairs}, weights.scale
    )
    routing = None if base.routing is None else ExpertRouting(*base.routing)
    with attach(base.denoiser, weights.targets, routing=routing) as handle, handle.applied(trained):
        if isinstance(base, HunyuanImage3):
            rows = [inputs_of(base.model, each, "", None)["rows"][0] for each in requests(2)]
            output = base.model.prefill([row.detach() for row in rows])[0]  # type: ignore[attr-defined]
        else:
            batch = base.latent_batch(requests(2), [torch.zeros(3, 64, 64)] * 2)
            output = base.predict(batch, batch.target, torch.tensor([0.3, 0.7]))
        output.square().mean().backward()
    return {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("way", WAYS)
def test_offloaded_weights_compute_the_same(way: str, tmp_path: Path) -> None:
    """Conditions, pictures with an adapter for each request, and gradients."""
    make, offload, moved = WAYS[way]
    base, weights = make(), adapter(make(), 2)
    condition, pictures, slopes = base.condition(requests(2)).tokens, edits(base, weights), gradients(base, weights)
    offload(base.denoiser, tmp_path)
    waiting = [name for name, each in base.denoiser.named_parameters() if each.is_meta]
    assert waiting == [name for name, _ in base.denoiser.named_parameters() if name.startswith(moved)]
    torch.testing.assert_close(base.condition(requests(2)).tokens, condition)
    there = placed(weights, base)
    assert {part.device for pair in there.pairs.values() for part in pair} == {CPU}
    for actual, expected in zip(edits(base, there), pictures, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1.01 * LEVEL)
    assert any(bool(each.any()) for each in slopes.values())
    for name, actual in gradients(base, there).items():
        torch.testing.assert_close(actual, slopes[name], msg=lambda text, name=name: f"{name}: {text}")
    assert [name for name, each in base.denoiser.named_parameters() if each.is_meta] == waiting, "they wait again"
    one = weights.select([0])
    with pytest.raises(TargetError, match=r"its weight is not loaded \(device meta\)"):
        merged_copy(base.denoiser, one)
    assert not merging_pays(base.denoiser, one.targets, one.rank, 10**9)


def test_a_generator_learns_through_an_offloaded_base() -> None:
    base = kontext()
    in_memory(base.denoiser, Path())
    before, after = losses_of_training(base, generator(base, b_init_std=0.05), requests(2), steps=4)
    assert after < before


def test_conditions_of_offloaded_parts_are_the_same(tmp_path: Path) -> None:
    base = kontext()
    folder = tiny_pipelines.siglip2(tmp_path / "siglip2")

    def conditions() -> list[Tensor]:
        probe, layer = (
            DenoiserStates(base, "transformer_blocks.1"),
            PartStates(base, "text_encoder_2", "encoder.block.0"),
        )
        return [each.condition(requests(2)).tokens for each in (probe, probe, layer, Siglip2(base, str(folder)))]

    expected = conditions()
    in_memory(base.denoiser, tmp_path)
    in_memory(base.pipeline.text_encoder_2, tmp_path)
    for actual, each in zip(conditions(), expected, strict=True):
        torch.testing.assert_close(actual, each)
    assert all(each.is_meta for each in base.denoiser.parameters()), "also after a pass that was left early"
    assert len(base.generate(requests(1), FAST, nothing)) == 1


def test_siglip2_computes_where_an_offloaded_base_does(tmp_path: Path) -> None:
    """Of a base without a `device`, whose first weight is on the meta device."""
    base = hunyuan()
    in_memory(base.denoiser, tmp_path)
    encoder = Siglip2(base, str(tiny_pipelines.siglip2(tmp_path / "siglip2")))
    assert encoder.identity
    assert encoder.condition(requests(1)).tokens.device == CPU


def test_pairs_follow_a_base_that_is_offloaded_as_a_whole() -> None:
    base = kontext()
    weights = adapter(base, 1)
    base.denoiser._hf_hook = type("Hook", (), {"execution_device": "meta"})()
    assert {part.device.type for pair in placed(weights, base).pairs.values() for part in pair} == {"meta"}
