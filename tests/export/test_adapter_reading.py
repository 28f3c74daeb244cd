"""What files mean: any mixture of modules, ranks, alphas and key styles, and PEFT's initialisations of the base."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from openwu import Adapter, attach
from openwu.errors import CheckpointError

STYLES = {
    "diffusers": ("transformer.{}", ".lora_A.weight", ".lora_B.weight"),
    "PEFT": ("base_model.model.{}", ".lora_A.weight", ".lora_B.weight"),
    "kohya": ("lora_unet_{}", ".lora_down.weight", ".lora_up.weight"),
    "ComfyUI": ("diffusion_model.{}", ".lora_down.weight", ".lora_up.weight"),
    "LyCORIS": ("lycoris_{}", ".lora_down.weight", ".lora_up.weight"),
}


class Block(nn.Module):
    """Names with dots and underscores, a convolution among them."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.proj_out = nn.Linear(5, 7), nn.Linear(5, 3), nn.Conv2d(4, 6, 3)


MODEL = nn.ModuleDict({"blocks": nn.ModuleList([Block(), Block()]), "down_blocks": nn.ModuleList([Block()])})
NAMES = [name for name, module in MODEL.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]

modules = st.dictionaries(
    st.sampled_from(NAMES),
    st.tuples(st.integers(1, 4), st.one_of(st.none(), st.floats(0.25, 64, width=16))),
    min_size=1,
)
"""Name -> rank and alpha (None: the file has none)."""


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    modules, st.sampled_from(list(STYLES)), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.data()
)
def test_a_file_means_the_sum_of_its_products(
    held: dict[str, tuple[int, float | None]], style: str, dtype: torch.dtype, data: st.DataObject
) -> None:
    """Every module's update is alpha / r * B A of its own tensors, whatever ranks and alphas stand beside it."""
    draws = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    prefix, down, up = STYLES[style]
    tensors: dict[str, Tensor] = {}
    wanted: dict[str, Tensor] = {}
    for name, (rank, alpha) in held.items():
        weight = MODEL.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        kernel = weight.shape[2:]
        a = torch.randn(rank, *weight.shape[1:], generator=draws).to(dtype)
        b = torch.randn(len(weight), rank, *[1] * len(kernel), generator=draws).to(dtype)
        stem = prefix.format(name.replace(".", "_") if prefix.endswith("_{}") else name)
        tensors |= {stem + down: a, stem + up: b}
        if alpha is not None:
            tensors[stem + ".alpha"] = torch.tensor(alpha)
        wanted[name] = (1.0 if alpha is None else alpha / rank) * b.flatten(1).double() @ a.flatten(1).double()
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, f"{folder}/lora.safetensors")
        adapter = Adapter.from_pretrained(f"{folder}/lora.safetensors", model=MODEL)
    assert {target.name for target in adapter.targets} == set(held)
    # A ratio of scales is multiplied into B and rounded once in its dtype.
    for name, (a, b) in adapter.pairs.items():
        update = adapter.scale * b[0].flatten(1).double() @ a[0].flatten(1).double()
        assert (update - wanted[name]).norm() <= torch.finfo(dtype).eps * 4 * wanted[name].norm()


def test_joined_adapters_with_unchanged_alpha_are_as_weak_as_elsewhere(tmp_path: Path) -> None:
    """Three LoRA of rank 2 side by side with the alpha of one: alpha / r is a third; the file does not say so."""
    draws = [(torch.randn(2, 5), torch.randn(7, 2)) for _ in range(3)]
    tensors = {
        "transformer.blocks.0.to_q.lora_down.weight": torch.cat([a for a, _ in draws]),
        "transformer.blocks.0.to_q.lora_up.weight": torch.cat([b for _, b in draws], dim=1),
        "transformer.blocks.0.to_q.alpha": torch.tensor(2.0),
    }
    save_file(tensors, tmp_path / "joined.safetensors")
    adapter = Adapter.from_pretrained(tmp_path / "joined.safetensors", model=MODEL)
    ((a, b),) = adapter.pairs.values()
    single = sum(b_one @ a_one for a_one, b_one in draws)
    torch.testing.assert_close(adapter.scale * b[0] @ a[0], single / 3)


def initialised(init: str, folder: Path, *, converted: bool) -> tuple[nn.Module, nn.Module]:
    """Return a base, and PEFT's model of it, whose adapter was initialised so, changed, and saved to `folder / "a"`."""
    peft: Any = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8)).requires_grad_(False)
    model, x = copy.deepcopy(base), torch.randn(16, 8)
    own = {"corda_config": peft.tuners.lora.config.CordaConfig()} if init == "corda" else {}
    own |= {"lora_ga_config": peft.LoraGAConfig()} if init == "lora_ga" else {}
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0", "1"], init_lora_weights=init, **own)
    if init == "corda":
        from peft.tuners.lora.corda import preprocess_corda

        preprocess_corda(model, config, run_model=lambda: model(x))
    if init == "lora_ga":
        from peft.tuners.lora.loraga import preprocess_loraga

        preprocess_loraga(model.requires_grad_(True), config, lambda: model(x).square().mean().backward())
        model.requires_grad_(False)
    wrapped = peft.get_peft_model(model, config)
    wrapped.save_pretrained(str(folder / "initial"))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter += 0.1
    how = {"path_initial_model_for_weight_conversion": str(folder / "initial")} if converted else {}
    wrapped.save_pretrained(str(folder / "a"), **how)
    return base, wrapped


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_initialisations_from_data_are_refused(tmp_path: Path, init: str) -> None:
    base, _ = initialised(init, tmp_path, converted=False)
    with pytest.raises(CheckpointError, match=f"init_lora_weights='{init}': such an initialisation moves a part of"):
        Adapter.from_pretrained(tmp_path / "a", model=base)


def test_initialisations_from_quantisation_are_refused(tmp_path: Path) -> None:
    """PEFT computes LoftQ's on a GPU alone; what it saves differs from a plain folder in the config."""
    peft: Any = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(8, 6)).requires_grad_(False)
    config = peft.LoraConfig(
        r=2, target_modules=["0"], init_lora_weights="loftq", loftq_config=peft.LoftQConfig(loftq_bits=4)
    )
    plain = peft.LoraConfig(r=2, target_modules=["0"])
    peft.get_peft_model(copy.deepcopy(base), plain).save_pretrained(str(tmp_path / "a"))
    config.save_pretrained(str(tmp_path / "a"))
    with pytest.raises(CheckpointError, match="init_lora_weights='loftq': such an initialisation moves a part of"):
        Adapter.from_pretrained(tmp_path / "a", model=base)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing", "ignore:.* changes the base weights of the model")
@pytest.mark.filterwarnings("ignore:`corda_config` specified", "ignore:`lora_ga_config` specified")
@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "lora_ga"])
def test_what_peft_converted_is_read_and_fits_the_original_base(tmp_path: Path, init: str) -> None:
    """The advice of the refusal works."""
    base, wrapped = initialised(init, tmp_path, converted=True)
    adapter = Adapter.from_pretrained(tmp_path / "a", model=base)
    x = torch.randn(3, 8)
    with torch.no_grad(), attach(base, adapter.targets) as handle, handle.applied(adapter):
        torch.testing.assert_close(base(x), wrapped(x), atol=1e-5, rtol=1e-5)
