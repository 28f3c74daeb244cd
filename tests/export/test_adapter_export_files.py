"""LoRA files of diffusers, kohya and ComfyUI: exact keys, the way back, mixed ranks and scales, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_cases import SMALL_TARGETS, mixture_targets, random_adapter, relative_error, small_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openwu.adapters.inject import attach
from openwu.errors import CheckpointError, OpenwuError, TargetError
from openwu.types import Adapter, Target

DIFFUSERS, COMFYUI = "pytorch_lora_weights.safetensors", "comfyui_lora.safetensors"
PLAIN = (Target("down.0.to_q", 4, 6), Target("down.0.to_out.0", 6, 4), Target("up", 4, 4))


class Named(nn.Module):
    """Modules whose names hold underscores, dots and numbers."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.ModuleDict({"to_q": nn.Linear(4, 6), "to_out": nn.ModuleList([nn.Linear(6, 4)])})
        self.down = nn.ModuleList([block])
        self.up = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down[0]["to_out"][0](self.down[0]["to_q"](x)))


def named() -> Named:
    torch.manual_seed(0)
    return Named().double().requires_grad_(False)


def answer(model: nn.Module, adapter: Adapter, x: Tensor) -> Tensor:
    with attach(model, adapter.targets) as handle, handle.applied(adapter):
        return model(x)


def written(path: Path, tensors: dict[str, Tensor]) -> Path:
    path.parent.mkdir(exist_ok=True)
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize("component", [None, "transformer", "unet"])
def test_diffusers_keys_and_the_way_back(tmp_path: Path, component: str | None) -> None:
    adapter = random_adapter(SMALL_TARGETS, 1, scale=0.5)
    adapter.save_pretrained(tmp_path / "a", format="diffusers", component=component)
    prefix = component or "transformer"
    tensors = load_file(tmp_path / "a" / DIFFUSERS)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        f"{prefix}.first.lora_A.weight": (2, 3, 3, 3),
        f"{prefix}.first.lora_B.weight": (4, 2, 1, 1),
        f"{prefix}.last.lora_A.weight": (2, 4, 1, 1),
        f"{prefix}.last.lora_B.weight": (5, 2, 1, 1),
        f"{prefix}.middle.0.lora_A.weight": (2, 4),
        f"{prefix}.middle.0.lora_B.weight": (4, 2),
    }
    assert torch.equal(tensors[f"{prefix}.middle.0.lora_B.weight"], adapter.pairs["middle.0"][1][0] * 0.5)
    for path in (tmp_path / "a", tmp_path / "a" / DIFFUSERS):
        back = Adapter.from_pretrained(path)
        assert back.scale == 1
        assert {t.name: t.kernel for t in back.targets} == {t.name: t.kernel for t in SMALL_TARGETS}
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        assert relative_error(answer(small_model(), back, x), answer(small_model(), adapter, x)) < 1e-12


@pytest.mark.parametrize(
    ("component", "stem"),
    [(None, "diffusion_model.middle.0"), ("transformer", "transformer.middle.0"), ("unet", "lora_unet_middle_0")],
)
def test_comfyui_keys_and_the_way_back(tmp_path: Path, component: str | None, stem: str) -> None:
    adapter = random_adapter(SMALL_TARGETS, 1, scale=0.25)
    adapter.save_pretrained(tmp_path / "a", format="comfyui", component=component)
    tensors = load_file(tmp_path / "a" / COMFYUI)
    assert {key for key in tensors if "middle" in key} == {
        f"{stem}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    assert len(tensors) == 9
    # ComfyUI's arithmetic: alpha / rows of down * up @ down.
    up, down, alpha = (tensors[f"{stem}.{end}"] for end in ("lora_up.weight", "lora_down.weight", "alpha"))
    a, b = (part[0] for part in adapter.pairs["middle.0"])
    assert torch.allclose(alpha / len(down) * up @ down, 0.25 * b @ a)
    back = Adapter.from_pretrained(tmp_path / "a", model=small_model())
    assert set(back.targets) == set(adapter.targets)
    assert back.scale == adapter.scale
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in adapter.state_dict().items())


def test_the_model_tells_the_kernels(tmp_path: Path) -> None:
    bare = [Target(target.name, target.in_dim, target.out_dim) for target in SMALL_TARGETS]
    for kind, file, key in [
        ("diffusers", DIFFUSERS, "transformer.first.lora_A.weight"),
        ("comfyui", COMFYUI, "diffusion_model.first.lora_down.weight"),
    ]:
        random_adapter(bare, 1).save_pretrained(tmp_path / kind, format=kind, model=small_model())
        assert load_file(tmp_path / kind / file)[key].shape == (2, 3, 3, 3)


@pytest.mark.parametrize("format", ["diffusers", "comfyui"])
def test_what_the_formats_cannot_hold(tmp_path: Path, format: str) -> None:
    for adapter, message in [
        (random_adapter(PLAIN, 2), "one sample, got 2"),
        (random_adapter([*PLAIN, *mixture_targets()], 1), r"no experts, got experts\.w1, experts\.w2, experts\.w3"),
    ]:
        with pytest.raises(OpenwuError, match=message):
            adapter.save_pretrained(tmp_path / "a", format=format)
    with pytest.raises(OpenwuError, match=rf"component: expected one of .*transformer, unet for {format}, got 'vae'"):
        random_adapter(PLAIN, 1).save_pretrained(tmp_path / "a", format=format, component="vae")
    with pytest.raises(TargetError, match="up: no such module"):
        random_adapter(PLAIN, 1).save_pretrained(tmp_path / "a", format=format, model=small_model())
    assert not list(tmp_path.iterdir())


def test_names_that_are_one_without_dots(tmp_path: Path) -> None:
    twins = (Target("a.b", 3, 3), Target("a_b", 3, 3))
    with pytest.raises(OpenwuError, match="a_b: another target is lora_unet_a_b too"):
        random_adapter(twins, 1).save_pretrained(tmp_path / "a", format="comfyui", component="unet")
    random_adapter(twins, 1).save_pretrained(tmp_path / "a", format="comfyui")
    assert set(Adapter.from_pretrained(tmp_path / "a").targets) == set(twins)


STYLES: dict[str, Callable[[str], tuple[str, str]]] = {
    "diffusers": lambda n: (f"transformer.{n}.lora_A.weight", f"transformer.{n}.lora_B.weight"),
    "peft": lambda n: (f"base_model.model.{n}.lora_A.weight", f"base_model.model.{n}.lora_B.weight"),
    "of an unet": lambda n: (f"unet.{n}.lora.down.weight", f"unet.{n}.lora.up.weight"),
    "bare": lambda n: (f"{n}.lora_A.default.weight", f"{n}.lora_B.default.weight"),
    "comfyui": lambda n: (f"diffusion_model.{n}.lora_down.weight", f"diffusion_model.{n}.lora_up.weight"),
    "kohya": lambda n: tuple(f"lora_unet_{n.replace('.', '_')}.lora_{end}.weight" for end in ("down", "up")),  # type: ignore[return-value]
    "processors": lambda n: tuple(  # type: ignore[return-value]
        f"unet.{n.replace('.to_', '.processor.to_').removesuffix('.0')}_lora.{end}.weight" for end in ("down", "up")
    ),
}


@pytest.mark.parametrize("alphas", [(3.0, 1.0, 5.0), (2.0, None, 2.0), (None, None, None), (0.0, 0.0, 1.0)])
@pytest.mark.parametrize("style", STYLES)
def test_mixed_ranks_and_alphas_are_exact(tmp_path: Path, style: str, alphas: tuple[float | None, ...]) -> None:
    """Every module has a rank and an alpha of its own; the reference adds each update to its weight."""
    draw = torch.Generator().manual_seed(0)
    model, reference = named(), named()
    tensors: dict[str, Tensor] = {}
    for rank, (target, alpha) in enumerate(zip(PLAIN, alphas, strict=True), start=1):
        down, up = STYLES[style](target.name)
        a = torch.randn(rank, target.in_dim, generator=draw, dtype=torch.float64)
        b = torch.randn(target.out_dim, rank, generator=draw, dtype=torch.float64)
        tensors |= {down: a, up: b}
        if alpha is not None:
            tensors[f"{re.split(r'[._]lora[._](A|down)', down)[0]}.alpha"] = torch.tensor(alpha)
        reference.get_submodule(target.name).weight += (1 if alpha is None else alpha / rank) * b @ a
    path = written(tmp_path / "x" / "some_lora.safetensors", tensors)
    x = torch.randn(3, 4, dtype=torch.float64)
    for place in (path, path.parent):
        adapter = Adapter.from_pretrained(place, model=model)
        assert adapter.rank == 3
        assert set(adapter.targets) == set(PLAIN)
        assert relative_error(answer(model, adapter, x), reference(x)) < 1e-12
    if style == "kohya":
        with pytest.raises(CheckpointError, match="underscores for dots means nothing without its model; pass model="):
            Adapter.from_pretrained(path)
    else:
        assert set(Adapter.from_pretrained(path).targets) == set(PLAIN)


def test_equal_ranks_and_alphas_lose_no_bit(tmp_path: Path) -> None:
    tensors = {}
    for target in PLAIN:
        a, b = torch.randn(4, target.in_dim).bfloat16(), torch.randn(target.out_dim, 4).bfloat16()
        tensors |= {f"{target.name}.lora_A.weight": a, f"{target.name}.lora_B.weight": b}
        tensors[f"{target.name}.alpha"] = torch.tensor(3.0)
    adapter = Adapter.from_pretrained(written(tmp_path / "x.safetensors", tensors))
    assert adapter.scale == 0.75
    for target in PLAIN:
        a, b = adapter.pairs[target.name]
        assert torch.equal(a[0], tensors[f"{target.name}.lora_A.weight"])
        assert torch.equal(b[0], tensors[f"{target.name}.lora_B.weight"])


def test_a_prefix_that_is_a_module_of_the_model(tmp_path: Path) -> None:
    model = nn.ModuleDict({"transformer": nn.ModuleDict({"up": nn.Linear(4, 4)}), "up": nn.Linear(4, 5)})
    tensors = {"transformer.up.lora_A.weight": torch.ones(2, 4), "transformer.up.lora_B.weight": torch.ones(4, 2)}
    path = written(tmp_path / "x.safetensors", tensors)
    assert [t.name for t in Adapter.from_pretrained(path, model=model).targets] == ["transformer.up"]
    assert [t.name for t in Adapter.from_pretrained(path).targets] == ["up"]


def test_a_1x1_convolution_in_the_file_may_be_linear_in_the_model(tmp_path: Path) -> None:
    tensors = {"up.lora_down.weight": torch.ones(2, 4, 1, 1), "up.lora_up.weight": torch.ones(4, 2, 1, 1)}
    adapter = Adapter.from_pretrained(written(tmp_path / "x.safetensors", tensors), model=named())
    assert adapter.targets[0].kernel is None


A, B = torch.ones(2, 4), torch.ones(4, 2)
GOOD = {"up.lora_down.weight": A, "up.lora_up.weight": B}
TEXT = {"lora_te1_text_model_fc1.lora_down.weight": A, "lora_te1_text_model_fc1.lora_up.weight": B}

REFUSED: list[tuple[dict[str, Tensor], str]] = [
    (GOOD | {"up.dora_scale": torch.ones(4)}, r"got DoRA, which also scales the base's weights: up\.dora_scale"),
    (GOOD | {"up.lora_magnitude_vector": torch.ones(4)}, r"got DoRA"),
    (GOOD | TEXT, r"2 tensors are for text encoders.*lora_te1_text_model_fc1\.lora_down\.weight.*skip_text_encoders"),
    (GOOD | {"text_encoder_2.a.lora_A.weight": A, "text_encoder_2.a.lora_B.weight": B}, r"2 tensors are for text"),
    (
        GOOD | {"up.lora_mid.weight": A},
        r"up: expected lora_down \[s, in, 1, 1\] and lora_mid \[r, s, kh, kw\], got \(2, 4\)",
    ),
    (
        GOOD | {"other.lora_mid.weight": A},
        r"expected only LoRA's A, B and alpha, got 1 others: other\.lora_mid\.weight",
    ),
    (GOOD | {"down.alpha": torch.tensor(1.0)}, r"got 1 others: down\.alpha"),
    ({"up.lokr_w1": A, "up.lokr_w2": B}, r"expected a plain LoRA, got LoKr, a Kronecker product: up\.lokr_w1"),
    ({"up.hada_w1_a": A}, r"expected a plain LoRA, got LoHa, .*: up\.hada_w1_a"),
    ({"up.oft_blocks": A}, r"expected a plain LoRA, got OFT, .*: up\.oft_blocks"),
    (GOOD | {"norm.diff": A}, r"expected a plain LoRA, got whole weights: norm\.diff"),
    (GOOD | {"up.lora_embedding_A": A}, r"expected a plain LoRA, got embeddings of tokens"),
    (
        GOOD | {"bundle_emb.cat.clip_l": A},
        r"1 tensors are for text encoders.*bundle_emb\.cat\.clip_l.*skip_text_encoders",
    ),
    (GOOD | {"down.diff_b": A[0]}, r"down\.diff_b: a change of a bias alone does not say .*; pass model="),
    (GOOD | {"up.lora_B.bias": A[0, :2]}, r"up: expected a bias \[4\], got \(2,\)"),
    (
        {"up.lora_A.cat.weight": A, "up.lora_B.cat.weight": B, "up.lora_A.dog.weight": A},
        r"expected one adapter, got cat, dog",
    ),
    ({"up.lora_down.weight": torch.tensor(1.0), "up.lora_up.weight": B}, r"up: expected A \[r, in\]"),
    (
        {"up.lora_down.weight": A * torch.tensor([1, torch.nan, 1, 1]), "up.lora_up.weight": B},
        r"got NaN or infinity in 1 tensors: up\.lora_down",
    ),
    (
        {"up.lora_down.weight": A, "up.lora_up.weight": B.half() * torch.inf},
        r"got NaN or infinity in 1 tensors: up\.lora_up",
    ),
    (
        {"up.lora_down.weight": A.to(torch.complex64), "up.lora_up.weight": B},
        r"got complex ones in up\.lora_down\.weight",
    ),
    ({"up.lora_up.weight": B}, r"got 1 others: up\.lora_up\.weight"),
    ({"up.lora_down.weight": A}, r"up\.lora_down\.weight: expected up\.lora_up\.weight with it, which is missing"),
    (GOOD | {"up.lora_A.weight": A, "up.lora_B.weight": B}, r"up: the file has A and B in two key styles"),
    (GOOD | {"unet.up.lora_A.weight": A, "unet.up.lora_B.weight": B}, r"the file has up twice"),
    (GOOD | {"up.alpha": torch.ones(2)}, r"up\.alpha: expected one finite number"),
    (
        GOOD | {"up.alpha": torch.tensor(float("nan"))},
        r"expected finite numbers, got NaN or infinity in 1 tensors: up\.alpha",
    ),
    (
        {"up.lora_down.weight": A, "up.lora_up.weight": torch.ones(4, 3)},
        r"up: expected A \[r, in\].*\(2, 4\) and \(4, 3\)",
    ),
    ({"up.lora_down.weight": A, "up.lora_up.weight": torch.ones(4, 2, 3, 3)}, r"up: expected A"),
    ({"up.lora_down.weight": torch.ones(2), "up.lora_up.weight": B}, r"up: expected A"),
    ({"up.lora_down.weight": torch.ones(0, 4), "up.lora_up.weight": torch.ones(4, 0)}, r"up: expected A"),
    ({"up.lora_down.weight": A.int(), "up.lora_up.weight": B.int()}, r"up: expected floating-point numbers"),
    ({}, r"expected the LoRA of at least one module, got no tensors"),
]


@pytest.mark.parametrize("name", ["up.diff_b", "up.lora_B.bias"])
def test_low_rank_and_a_change_of_the_bias_are_one_operator_of_a_module(tmp_path: Path, name: str) -> None:
    model, x = named().float(), torch.randn(3, 4)
    plain = Adapter.from_pretrained(written(tmp_path / "plain.safetensors", GOOD))
    adapter = Adapter.from_pretrained(written(tmp_path / "x.safetensors", GOOD | {name: A[0]}))
    assert [target.operator for target in adapter.targets] == ["lora+offset"]
    with attach(model, plain.targets) as handle, handle.applied(plain):
        expected = model.up(x) + A[0]
    with attach(model, adapter.targets) as handle, handle.applied(adapter):
        torch.testing.assert_close(model.up(x), expected)


@pytest.mark.parametrize(("tensors", "message"), REFUSED)
def test_files_that_are_refused(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    path = written(tmp_path / "x.safetensors", tensors)
    with pytest.raises(CheckpointError, match=message) as error:
        Adapter.from_pretrained(path)
    assert str(error.value).startswith(str(path))


def test_text_encoders_are_left_out_on_request(tmp_path: Path) -> None:
    path = written(tmp_path / "x.safetensors", GOOD | TEXT)
    assert [t.name for t in Adapter.from_pretrained(path, skip_text_encoders=True).targets] == ["up"]
    path = written(tmp_path / "y.safetensors", TEXT)
    with pytest.raises(CheckpointError, match="expected the LoRA of at least one module"):
        Adapter.from_pretrained(path, skip_text_encoders=True)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"upp.lora_A.weight": A, "upp.lora_B.weight": B},
            r"1 of 1 names do not fit the model: upp \(no such module\)",
        ),
        ({"lora_unet_x.lora_down.weight": A, "lora_unet_x.lora_up.weight": B}, r"lora_unet_x \(no such module\)"),
        ({"down.lora_A.weight": A, "down.lora_B.weight": B}, r"down: expected an nn\.Linear or nn\.Conv2d, got Module"),
        (
            {"up.lora_A.weight": torch.ones(2, 5), "up.lora_B.weight": B},
            r"up: expected a linear module 5 -> 4, got 4 -> 4",
        ),
    ],
)
def test_files_that_do_not_fit_the_model(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    path = written(tmp_path / "x.safetensors", tensors)
    with pytest.raises(CheckpointError, match=message) as error:
        Adapter.from_pretrained(path, model=named())
    assert str(error.value).startswith(str(path))


def test_underscores_that_mean_two_modules(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(4, 4)}), "a_b": nn.Linear(4, 4)})
    path = written(
        tmp_path / "x.safetensors", {f"lora_unet_a_b.lora_{e}.weight": t for e, t in (("down", A), ("up", B))}
    )
    with pytest.raises(CheckpointError, match=r"lora_unet_a_b \(.* or .*\)"):
        Adapter.from_pretrained(path, model=model)


def test_paths_that_hold_no_adapter(tmp_path: Path) -> None:
    pickle = tmp_path / "x.bin"
    pickle.write_bytes(b"0")
    cut = written(tmp_path / "cut.safetensors", GOOD)
    cut.write_bytes(cut.read_bytes()[:-8])
    several = tmp_path / "several"
    for name in ("a", "b"):
        written(several / f"{name}.safetensors", GOOD)
    for path, message in [
        (pickle, r"expected a folder or a \.safetensors file, got a \.bin file"),
        (cut, "expected a whole safetensors file"),
        (several, r"expected one \.safetensors file, got a\.safetensors, b\.safetensors; name the one"),
        (tmp_path / "nowhere.safetensors", "no such folder"),
    ]:
        with pytest.raises(CheckpointError, match=message) as error:
            Adapter.from_pretrained(path)
        assert str(error.value).startswith(str(path))


@pytest.mark.parametrize("kind", ["openwu", "peft", "diffusers", "comfyui"])
def test_files_cut_anywhere_are_refused(tmp_path: Path, kind: str) -> None:
    random_adapter(PLAIN, 1).save_pretrained(tmp_path / "a", format=kind)
    file = next((tmp_path / "a").glob("*.safetensors"))
    whole = file.read_bytes()
    for end in range(0, len(whole), 37):
        file.write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match="expected a whole safetensors file"):
            Adapter.from_pretrained(tmp_path / "a")


def test_formats_replace_one_another(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    for kind in ("diffusers", "peft", "comfyui", "openwu", "diffusers"):
        random_adapter(PLAIN, 1).save_pretrained(folder, format=kind)
    assert [file.name for file in folder.iterdir()] == [DIFFUSERS]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(OpenwuError, match=r"not overwritten; it holds \['notes\.txt'\]"):
        random_adapter(PLAIN, 1).save_pretrained(folder, format="comfyui")
    assert len(list(folder.iterdir())) == 2
