"""Bases in 8 and 4 bits, computed by bitsandbytes on a CPU: a stand-in from transformers, and a diffusers pipeline.

References know nothing of bitsandbytes: weights are unpacked here from what it stores.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import base_cases
import hunyuan_stand_in
import pytest
import tiny_pipelines
import torch
import transformers
from base_cases import FAST, adapter, edited, nothing, requests
from torch import Tensor, nn

import openwu
from openwu import attach
from openwu.adapters.experts import ExpertRouting
from openwu.adapters.merge import merged, merged_copy, merging_pays
from openwu.backbones import backbone_class, quantised
from openwu.backbones.diffusers import loading
from openwu.backbones.diffusers.loading import part_numbers, weight_files
from openwu.backbones.hunyuan_image_3.base import HunyuanImage3
from openwu.backbones.hunyuan_image_3.memory import needs, read_headers
from openwu.backbones.quantised import quantised_bytes
from openwu.errors import OpenwuError, TargetError
from openwu.types import Adapter, SamplingOptions

pytest.importorskip("bitsandbytes")

HOW = ("8bit", "4bit")
KINDS = ("hunyuan-image-3", "flux2-klein")
LEVEL = 1 / 255
WIDE = {"hidden_size": 64, "expert_size": 64}
"""In 4 bits, rows are whole blocks of 64."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    hunyuan_stand_in.save(root / "hunyuan", **WIDE)
    tiny_pipelines.flux2_klein(heads=4).save_pretrained(root / "klein")
    return {"hunyuan-image-3": root / "hunyuan", "flux2-klein": root / "klein"}


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The stand-in works with the transformers that is here, and thinks briefly."""
    monkeypatch.setattr(HunyuanImage3, "transformers_version", transformers.__version__)
    monkeypatch.setattr(HunyuanImage3, "needs_gpu", False)
    monkeypatch.setattr(HunyuanImage3, "reasoning_tokens", 2)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))


def load(folders: dict[str, Path], kind: str, how: str | None) -> Any:
    more = {"trust_remote_code": True} if kind in base_cases.OWN_CODE else {}
    base: Any = backbone_class(kind).from_pretrained(folders[kind], dtype=torch.float32, quantise=how, **more)  # type: ignore[call-arg]
    if kind not in base_cases.OWN_CODE:
        base.condition_pixels = base.pixels = base_cases.PIXELS
    return base


@pytest.fixture(scope="module")
def loaded() -> dict[Any, Any]:
    return {}


@pytest.fixture(params=[(kind, how) for kind in KINDS for how in HOW], ids="-".join)
def base(request: pytest.FixtureRequest, folders: dict[str, Path], loaded: dict[Any, Any]) -> Any:
    """Load each base once; tests must not change it."""
    if request.param not in loaded:
        loaded[request.param] = load(folders, *request.param)
    return loaded[request.param]


def quantised_layers(model: nn.Module) -> dict[str, Any]:
    return {name: each for name, each in model.named_modules() if type(each).__module__.startswith("bitsandbytes")}


def unpacked(module: Any) -> Tensor:
    """Return the dequantised weight `[out, in]` of a layer."""
    weight = module.weight
    if weight.data.dtype == torch.int8:
        scales = weight.SCB if weight.SCB is not None else module.state.SCB
        return weight.data.double() * scales.double()[:, None] / 127
    state = weight.quant_state
    packed = weight.data.view(torch.uint8).flatten().long()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[: state.shape.numel()]
    scales = state.absmax.double().repeat_interleave(64)[: len(codes)]
    return (state.code.double()[codes] * scales).view(state.shape)


def held(model: nn.Module) -> int:
    """Bytes of a model's weights with all that belongs to quantised ones."""
    tensors = list(model.parameters())
    for module in quantised_layers(model).values():
        state = getattr(module.weight, "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code]
        else:
            tensors.append(module.weight.SCB if module.weight.SCB is not None else module.state.SCB)
    return sum(each.numel() * each.element_size() for each in tensors)


def update_of(weights: Adapter, path: str) -> Tensor:
    """Return scale * B A of one sample for a layer's weight, of an expert too; a zero if it is not adapted."""
    found = weights.pairs.get(path)
    if found is not None:
        return weights.scale * found[1][0].double() @ found[0][0].double()
    container, _, rest = path.partition(".experts.")
    if not rest:
        return torch.zeros(())
    number, name = rest.split(".")
    parts = [weights.pairs[f"{container}.experts.{each}"] for each in {"down_proj": ["w2"]}.get(name, ["w3", "w1"])]
    return torch.cat([weights.scale * b[0, int(number)].double() @ a[0, int(number)].double() for a, b in parts])


def edits(base: Any, asked: Sequence[Any], weights: Adapter) -> list[Tensor]:
    return edited(base, asked, weights, SamplingOptions(steps=2) if isinstance(base, HunyuanImage3) else FAST)


def test_only_maps_in_the_layers_are_quantised_and_the_estimate_is_what_is_held(
    folders: dict[str, Path], base: Any
) -> None:
    found = quantised_layers(base.denoiser)
    how = "4bit" if "Linear4bit" in {type(each).__name__ for each in found.values()} else "8bit"
    assert len({type(each) for each in found.values()}) == 1
    linear = {name for name, each in base.denoiser.named_modules() if isinstance(each, nn.Linear)}
    folder = folders["hunyuan-image-3" if isinstance(base, HunyuanImage3) else "flux2-klein"]
    if isinstance(base, HunyuanImage3):
        inside = {name for name in linear if name.startswith("model.layers.") and name.endswith("_proj")}
        estimate = needs(read_headers(folder), quantise=how).weights  # type: ignore[arg-type]
        assert estimate < needs(read_headers(folder)).weights
    else:
        inside = {name for name in linear if "transformer_blocks." in name}
        quantisation_plan, files = base.quantisation_plan(how), weight_files(folder / "transformer")
        estimate = 4 * part_numbers(folder)["transformer"] - quantisation_plan.saved(folder, files, 4)
    assert set(found) == inside
    assert held(base.denoiser) == estimate
    base.generate(requests(1), FAST if folder.name == "klein" else SamplingOptions(steps=1), nothing)
    assert held(base.denoiser) == estimate, "computing keeps nothing more"


def test_every_map_computes_its_unpacked_weight_plus_the_update(base: Any) -> None:
    weights = adapter(base, 1)
    heard: dict[str, tuple[Tensor, Tensor]] = {}

    def listen(name: str) -> Any:
        return lambda _, args, y: heard.__setitem__(name, (args[0].detach().double(), y.detach().double()))

    routing = None if base.routing is None else ExpertRouting(*base.routing)
    with attach(base.denoiser, weights.targets, routing=routing) as handle:
        layers = quantised_layers(base.denoiser)
        hooks = [each.register_forward_hook(listen(name)) for name, each in layers.items()]
        base.generate(requests(1), SamplingOptions(steps=2), lambda _: handle.applied(weights))
        for hook in hooks:
            hook.remove()
    eight = "Linear8bitLt" in {type(each).__name__ for each in layers.values()}
    adapted = 0
    for name, (x, y) in heard.items():
        update = update_of(weights, name)
        weight, bias = unpacked(layers[name]), layers[name].bias
        alone, expected = (
            nn.functional.linear(x, each, None if bias is None else bias.double()) for each in (weight, weight + update)
        )
        adapted += update.ndim > 0
        # In 8 bits inputs are rounded, too: 127 steps up to a row's largest value.
        assert (y - expected).norm() <= (2e-2 if eight else 1e-5) * expected.norm(), name
        if update.ndim:
            assert (alone - expected).norm() > 0.1 * expected.norm(), "the update must matter"
    assert adapted >= len(layers) - 4 * (not isinstance(base, HunyuanImage3))


def test_an_adapter_changes_the_picture_and_a_batch_is_its_requests(base: Any) -> None:
    asked, weights = requests(2), adapter(base, 2)
    if isinstance(base, HunyuanImage3):
        base.max_batch = 4
    options = SamplingOptions(steps=2) if isinstance(base, HunyuanImage3) else FAST
    plain = base.generate(asked, options, nothing)
    together = edits(base, asked, weights)
    alone = [edits(base, [request], weights.select([i]))[0] for i, request in enumerate(asked)]
    swapped = edits(base, asked, weights.select([1, 0]))
    for i in range(2):
        assert (together[i] - plain[i]).abs().max() > 5 * LEVEL
        assert (together[i] - swapped[i]).abs().max() > 5 * LEVEL
        torch.testing.assert_close(together[i], alone[i], rtol=0, atol=2.01 * LEVEL)


def test_gradients_reach_every_adapter_also_after_a_pass_without(base: Any) -> None:
    """bitsandbytes would repack 4 bits on some CPUs in the first pass, and lose gradients in the second."""
    weights = adapter(base, 2)
    for pair in weights.pairs.values():
        for part in pair:
            part.requires_grad_()
    asked = [
        openwu.types.BaseRequest((base_cases.picture(i),), "a long instruction for every expert " * 2) for i in (1, 2)
    ]
    routing = None if base.routing is None else ExpertRouting(*base.routing)
    if isinstance(base, HunyuanImage3):
        from openwu.backbones.hunyuan_image_3.dialogue import inputs_of

        given = [inputs_of(base.model, each, "", None)["rows"][0].detach() for each in asked]

        def run() -> Tensor:
            return base.model.prefill(given)[0]  # type: ignore[attr-defined, no-any-return]
    else:
        batch = base.latent_batch(asked, [torch.zeros(3, 64, 64)] * 2)

        def run() -> Tensor:
            return base.predict(batch, batch.target, torch.tensor([0.3, 0.7]))  # type: ignore[no-any-return]

    with torch.no_grad():
        run()
    with attach(base.denoiser, weights.targets, routing=routing) as handle, handle.applied(weights):
        run().square().mean().backward()
    dead = []
    for name, pair in weights.pairs.items():
        for part, factor in zip("AB", pair, strict=True):
            grad = factor.grad if factor.grad is not None else torch.zeros_like(factor)
            if not bool((grad.flatten(2 if "experts" in name else 1).abs().amax(-1) > 0).all()):
                dead.append(f"{name}.{part}")
    assert dead == []


@pytest.mark.parametrize("how", HOW)
def test_a_generator_learns_through_a_quantised_base(folders: dict[str, Path], how: str) -> None:
    base = load(folders, "flux2-klein", how)
    generator = base_cases.generator(base, b_init_std=0.05)
    before, after = base_cases.losses_of_training(base, generator, requests(2), steps=6)
    assert after < before


def test_merging_is_refused(base: Any) -> None:
    weights = adapter(base, 1)
    with pytest.raises(TargetError, match=r"merge: use attach\(\.\.\.\)\.applied\(\.\.\.\) instead:\n.*is quantised"):
        merged_copy(base.denoiser, weights)
    with pytest.raises(TargetError, match="is quantised"), merged(base.denoiser, weights):
        pass
    assert not merging_pays(base.denoiser, weights.targets, weights.rank, 10**9)


@pytest.mark.parametrize("kind", KINDS)
def test_an_editor_loads_and_edits_in_fewer_bits_without_a_word(
    folders: dict[str, Path], kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: Any
) -> None:
    full = load(folders, kind, None)
    base_cases.generator(full).save_pretrained(tmp_path / "generator")
    options = SamplingOptions(steps=2) if kind in base_cases.OWN_CODE else FAST
    capfd.readouterr()
    caplog.set_level(logging.WARNING)
    pictures = {}
    for how in HOW:
        editor = openwu.Editor.from_pretrained(
            kind,
            base=folders[kind],
            generator=tmp_path / "generator",
            loading=openwu.LoadingOptions(device="cpu", quantise=how, trust_remote_code=kind in base_cases.OWN_CODE),
            sampling=options,
        )
        photo = base_cases.picture(1)
        pictures[how] = editor.edit(photo, "make it warm", seed=3).image.tobytes()
        assert pictures[how] != editor.edit(photo, "make it warm", seed=3, strength=0.0).image.tobytes()
        editor.handle.detach()
    assert pictures["8bit"] != pictures["4bit"]
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_narrow_maps_stay_as_they_are_in_4_bits(tmp_path: Path) -> None:
    """Where bitsandbytes unpacks rows that are no whole blocks wrongly on some CPUs."""
    hunyuan_stand_in.save(tmp_path / "narrow", expert_size=64)
    headers = read_headers(tmp_path / "narrow")
    base = load({"hunyuan-image-3": tmp_path / "narrow"}, "hunyuan-image-3", "4bit")
    found = quantised_layers(base.denoiser)
    assert found
    assert {name.rpartition(".")[2] for name in found} == {"down_proj"}, "others are 32 wide"
    assert held(base.denoiser) == needs(headers, quantise="4bit").weights
    assert all(unpacked(each).shape == (32, 64) for each in found.values())


def test_bytes_of_odd_shapes() -> None:
    assert quantised_bytes((3, 5), "8bit") == 15 + 3 * 4
    assert quantised_bytes((3, 43), "4bit") == 65 + 3 * 4 + 64


def test_what_cannot_be(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    kind: Any = backbone_class("flux2-klein")
    with pytest.raises(OpenwuError, match="quantise: expected 8bit, 4bit or nothing, got '2bit'"):
        kind.from_pretrained(folders["flux2-klein"], quantise="2bit")
    with pytest.raises(OpenwuError, match="quantise: expected 8bit, 4bit or nothing, got '2bit'"):
        kind.check(folders["flux2-klein"], quantise="2bit")
    folder = folders["flux2-klein"]
    quantisation_plan = kind.quantisation_plan("4bit")
    full = 2 * sum(part_numbers(folder).values())
    monkeypatch.setattr(loading, "free_memory", lambda _: int(1.1 * full) - 1)
    with pytest.raises(OpenwuError, match=r"use quantise \(8bit, 4bit\), a smaller dtype"):
        loading.check_memory(folder, torch.bfloat16, torch.device("cuda"))
    loading.check_memory(folder, torch.bfloat16, torch.device("cuda"), quantisation_plan)
    with pytest.raises(OpenwuError, match=r"on cpu \(weights in bfloat16 and 4bit 0.00 GB\)"):
        loading.check_memory(folder, torch.bfloat16, torch.device("cpu"), quantisation_plan)

    def missing(name: str, extra: str) -> Any:
        raise OpenwuError(f"needs {name}; pip install 'openwu[{extra}]'")

    monkeypatch.setattr(quantised, "library", missing)
    with pytest.raises(OpenwuError, match=r"needs bitsandbytes; pip install 'openwu\[quantised\]'"):
        kind.from_pretrained(folder, quantise="8bit")
