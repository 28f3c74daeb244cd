"""Adapters of other operators than LoRA in the files of other tools: written, loaded there, read back, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openwu.adapters.merge import merged_copy
from openwu.errors import CheckpointError, ExportError, OpenwuError
from openwu.export.files import CONFIG, WEIGHTS, read_tensors
from openwu.export.proof import Base, export
from openwu.types import Adapter, Target


class Model(nn.Module):
    """A convolution and linear modules; `proj` is also how `inner.proj` ends."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.proj = nn.Linear(4, 6, bias=False)
        self.inner = nn.ModuleDict({"proj": nn.Linear(6, 6), "last": nn.Linear(6, 5)})

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner["proj"](torch.tanh(self.proj(self.conv(x).flatten(2).mT)))
        return self.inner["last"](hidden)


def model() -> Model:
    torch.manual_seed(0)
    return Model().requires_grad_(False)


def adapter_of(conv: str, proj: str, last: str, *, scale: float = 0.5) -> Adapter:
    targets = (
        Target("conv", 27, 4, kernel=(3, 3), operator=conv),
        Target("proj", 4, 6, operator=proj),
        Target("inner.last", 6, 5, operator=last),
    )
    draw = torch.Generator().manual_seed(0)
    factors = {
        t.name: {name: torch.randn(shape, generator=draw) for name, shape in t.shapes(1, 2).items()} for t in targets
    }
    return Adapter(targets, factors, scale)


HELD = [
    ("scale", "scale", "scale"),
    ("offset", "offset", "offset"),
    ("lora", "offset", "lora"),
    ("lora+offset", "offset", "lora"),
]


@pytest.mark.parametrize("operators", HELD, ids="-".join)
def test_peft_loads_it_and_computes_the_same(tmp_path: Path, operators: tuple[str, str, str]) -> None:
    adapter = adapter_of(*operators)
    x = torch.randn(2, 3, 6, 6)
    outcome = export(adapter, tmp_path / "peft", "peft", base=Base(model(), run=lambda each: each(x)))
    assert outcome.checked
    assert "3 modules and the whole model answer as with live injection" in outcome.told

    # The way back, with the model and without it.
    for came in (
        Adapter.from_pretrained(tmp_path / "peft"),
        Adapter.from_pretrained(tmp_path / "peft", model=model()),
    ):
        assert {t: t.kernel for t in came.targets} == {t: t.kernel for t in adapter.targets}
        for name, parts in adapter.factors.items():
            for part, tensor in parts.items():
                held = came.factors[name][part]
                if part in ("gain", "offset"):
                    torch.testing.assert_close(held * came.scale, tensor * adapter.scale)
                else:
                    assert torch.equal(held, tensor)


@pytest.mark.parametrize("operators", HELD, ids="-".join)
@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed", "ignore:Adapter .default.. 3 LoRA tensor")
def test_what_peft_writes_itself_is_read(tmp_path: Path, operators: tuple[str, str, str]) -> None:
    """A folder that has gone through PEFT has none of our metadata."""
    adapter = adapter_of(*operators)
    adapter.save_pretrained(tmp_path / "ours", "peft", model=model())
    loaded = peft.PeftModel.from_pretrained(model(), str(tmp_path / "ours"))
    loaded.save_pretrained(str(tmp_path / "theirs"))
    came = Adapter.from_pretrained(tmp_path / "theirs", model=model())
    assert set(came.targets) == set(adapter.targets)
    for name, parts in adapter.factors.items():
        for part, tensor in parts.items():
            scaled = came.scale / adapter.scale if part in ("gain", "offset") else 1.0
            torch.testing.assert_close(came.factors[name][part] * scaled, tensor)


def test_ia3_without_metadata_needs_the_model(tmp_path: Path) -> None:
    adapter_of("scale", "scale", "scale").save_pretrained(tmp_path / "a", "peft", model=model())
    save_file(load_file(tmp_path / "a" / WEIGHTS), tmp_path / "a" / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"do not say how wide the modules' inputs are; pass model="):
        Adapter.from_pretrained(tmp_path / "a")
    assert Adapter.from_pretrained(tmp_path / "a", model=model()).rank == 0


def test_a_gain_survives_in_float32(tmp_path: Path) -> None:
    """Of 16 bits, the multiplier 1 + s g would keep nothing of a small gain."""
    adapter = adapter_of("scale", "scale", "scale").scaled(1e-3).to(torch.bfloat16)
    adapter.save_pretrained(tmp_path / "a", "peft")
    came = Adapter.from_pretrained(tmp_path / "a")
    torch.testing.assert_close(
        came.factors["proj"]["gain"], 0.5 * adapter.factors["proj"]["gain"].float(), rtol=1e-3, atol=1e-7
    )


def test_a_wrong_multiplier_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from openwu.export import peft_ia3

    def without_one(folder: Path, weights: str, tensors: dict[str, Tensor], *rest: object) -> None:
        write(folder, weights, {name: tensor - 1 for name, tensor in tensors.items()}, *rest)

    write = peft_ia3.write
    monkeypatch.setattr(peft_ia3, "write", without_one)
    with pytest.raises(ExportError, match="3 modules answer otherwise"):
        export(adapter_of("scale", "scale", "scale"), tmp_path / "a", "peft", base=Base(model()))
    assert not (tmp_path / "a").exists()


class Others(nn.Module):
    """Linear modules of even width and norms around them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)
        self.last, self.group = nn.Linear(6, 4, bias=False), nn.GroupNorm(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.group(self.norm(self.first(x)).mT).mT)


def others() -> Others:
    torch.manual_seed(0)
    model = Others().requires_grad_(False)
    for parameter in (*model.norm.parameters(), *model.group.parameters()):
        nn.init.normal_(parameter)
    return model


WRITTEN = [
    ("peft", "rotation", ("first", "last")),
    ("peft", "dora", ("first", "last")),
    ("peft", "basis_matrix", ("first", "last")),
    ("peft", "scale", ("norm", "group")),
    ("peft", "scale_offset", ("norm", "group")),
    ("comfyui", "basis_diagonal", ("first", "last")),
]


@pytest.mark.parametrize(("format", "operator", "names"), WRITTEN)
def test_what_another_tool_holds_is_written_and_agrees(
    tmp_path: Path, format: str, operator: str, names: tuple[str, ...]
) -> None:
    widths = {"first": (4, 6), "last": (6, 4), "norm": (6, 6), "group": (6, 6)}
    targets = tuple(Target(name, *widths[name], operator=operator) for name in names)
    factors = {t.name: {name: torch.randn(shape) for name, shape in t.shapes(1, 2).items()} for t in targets}
    x = torch.randn(2, 3, 4)
    base = Base(others(), run=lambda each: each(x))
    outcome = export(Adapter(targets, factors, 0.5), tmp_path / "a", format, base=base)
    assert "2 modules and the whole model answer as with live injection" in outcome.told


@pytest.mark.parametrize(("operator", "names"), [("rotation", ("first", "last")), ("scale_offset", ("norm", "group"))])
def test_rotations_and_norms_are_read_back(tmp_path: Path, operator: str, names: tuple[str, ...]) -> None:
    widths = {"first": (4, 6), "last": (6, 4), "norm": (6, 6), "group": (6, 6)}
    targets = tuple(Target(name, *widths[name], operator=operator) for name in names)
    factors = {t.name: {name: torch.randn(shape) for name, shape in t.shapes(1, 2).items()} for t in targets}
    adapter, model, x = Adapter(targets, factors, 0.5), others(), torch.randn(2, 3, 4)
    adapter.save_pretrained(tmp_path / "a", "peft", model=model)
    found = Adapter.from_pretrained(tmp_path / "a", model=model)
    assert [(each.name, each.operator) for each in found.targets] == [(name, operator) for name in names]
    torch.testing.assert_close(merged_copy(model, found)(x), merged_copy(model, adapter)(x), rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    if operator == "rotation":
        assert Adapter.from_pretrained(tmp_path / "a").targets == found.targets  # our metadata has the widths
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, "group_size": 64}))
        with pytest.raises(CheckpointError, match=r"variant 'road_1' and group_size 2, got \('road_1', 64\)"):
            Adapter.from_pretrained(tmp_path / "a", model=model)
        return
    with pytest.raises(CheckpointError, match="holds weights, not changes of them; pass model="):
        Adapter.from_pretrained(tmp_path / "a")
    nn.init.zeros_(model.norm.weight)
    with pytest.raises(CheckpointError, match="norm: the model's weight has zeros, which no gain can change"):
        Adapter.from_pretrained(tmp_path / "a", model=model)


def test_what_peft_needs_the_base_for_is_refused_without_it(tmp_path: Path) -> None:
    with pytest.raises(OpenwuError, match=r"DoRA's magnitudes are absolute.* pass model="):
        adapter_of("dora", "dora", "dora").save_pretrained(tmp_path / "a", "peft")
    turns = {"conv": {"turns": torch.ones(1, 2, 2)}}
    conv = Adapter((Target("conv", 27, 4, kernel=(3, 3), operator="rotation"),), turns, 1.0)
    with pytest.raises(OpenwuError, match="RoAd knows linear modules alone, got convolutions: conv"):
        conv.save_pretrained(tmp_path / "a", "peft")
    norm, plain = Target("norm", 6, 6, operator="scale"), Target("first", 4, 6, operator="scale")
    mixed = Adapter((norm, plain), {name: {"gain": torch.ones(1, 6)} for name in ("norm", "first")}, 1.0)
    with pytest.raises(OpenwuError, match=r"norms \(norm\) and other modules cannot be in one folder"):
        mixed.save_pretrained(tmp_path / "a", "peft", model=others())
    assert not (tmp_path / "a").exists()


def test_dora_of_peft_s_own_is_read_beside_the_base_s_row_norms(tmp_path: Path) -> None:
    """Trained there, with a rank and an alpha of its own for one module, and written back for PEFT."""
    base = model()
    config = peft.LoraConfig(
        r=2, lora_alpha=3, use_dora=True, target_modules=["conv", "proj", "last"],
        rank_pattern={"last": 1}, alpha_pattern={"last": 5}, use_rslora=True,
    )  # fmt: skip
    theirs = peft.get_peft_model(model(), config)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
        elif "magnitude" in name:
            parameter.data *= torch.linspace(0.5, 1.5, parameter.numel()).view_as(parameter)
    theirs.save_pretrained(tmp_path / "a")
    found = Adapter.from_pretrained(tmp_path / "a", model=base)
    assert {target.operator for target in found.targets} == {"dora"}
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(merged_copy(base, found)(x), theirs(x), rtol=1e-4, atol=1e-5)
    found.save_pretrained(tmp_path / "b", "peft", model=base)
    again = peft.PeftModel.from_pretrained(model(), tmp_path / "b")
    torch.testing.assert_close(again(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_dora_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    base, folder = model(), tmp_path / "a"
    adapter_of("dora", "dora", "dora").save_pretrained(folder, "peft", model=base)
    with pytest.raises(CheckpointError, match=r"use_dora: DoRA's magnitudes are absolute.* pass model="):
        Adapter.from_pretrained(folder)
    tensors, settings = load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text())
    key = "base_model.model.proj.lora_magnitude_vector"
    for changed, message in (
        ({name: each for name, each in tensors.items() if name != key}, "these do not have both: proj"),
        (tensors | {"base_model.model.other.lora_magnitude_vector": torch.ones(3)}, "do not have both: other"),
        (tensors | {key: torch.ones(7)}, r"proj: expected lora_magnitude_vector \[6\], got \(7,\)"),
    ):
        save_file(changed, folder / WEIGHTS)
        with pytest.raises(CheckpointError, match=message):
            Adapter.from_pretrained(folder, model=base)
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({**settings, "lora_bias": True}))
    with pytest.raises(CheckpointError, match="expected DoRA alone, got it with lora_bias"):
        Adapter.from_pretrained(folder, model=base)
    (folder / CONFIG).write_text(json.dumps(settings))
    base.proj.weight[2] = 0
    with pytest.raises(CheckpointError, match="proj: the model's weight has rows of zeros"):
        Adapter.from_pretrained(folder, model=base)


REFUSED = [
    ("peft", ("lora+scale", "lora", "lora"), "got lora, lora.scale; PEFT cannot hold these"),
    ("peft", ("dora", "lora", "lora"), "got dora, lora; PEFT cannot hold these"),
    ("peft", ("scale_offset", "scale_offset", "scale_offset"), "PEFT cannot hold these in one folder: save with"),
    ("peft", ("scale", "lora", "scale"), "got lora, scale; PEFT cannot hold these"),
    ("peft", ("scale", "offset", "scale"), "got offset, scale; PEFT cannot hold these"),
    (
        "peft",
        ("prefix", "lora", "lora"),
        r"peft: expected operators that change weights, got conv \(prefix\); save",
    ),
    ("comfyui", ("prefix", "lora", "lora"), "comfyui: expected operators that change weights"),
    ("diffusers", ("lora", "scale", "lora"), r"diffusers: the format holds LoRA alone, got proj \(scale\); save with"),
    ("comfyui", ("offset", "lora", "lora"), r"comfyui: the format holds LoRA alone, got conv \(offset\); save with"),
]


@pytest.mark.parametrize(("format", "operators", "message"), REFUSED)
def test_what_a_format_cannot_hold_is_refused_by_name(
    tmp_path: Path, format: str, operators: tuple[str, str, str], message: str
) -> None:
    with pytest.raises(OpenwuError, match=message):
        adapter_of(*operators).save_pretrained(tmp_path / "a", format)
    assert not (tmp_path / "a").exists()


def test_experts_beside_offsets_are_refused(tmp_path: Path) -> None:
    experts, plain = Target("moe.w1", 4, 6, 3), Target("proj", 4, 6, operator="offset")
    factors = {t.name: {name: torch.ones(shape) for name, shape in t.shapes(1, 2).items()} for t in (experts, plain)}
    with pytest.raises(OpenwuError, match="also beside LoRA without experts"):
        Adapter((experts, plain), factors, 1.0).save_pretrained(tmp_path / "a", "peft")


def changed_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | changes))

    return change


def changed_tensors(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors, metadata = read_tensors(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata)

    return apply


BROKEN = [
    (HELD[0], changed_config(feedforward_modules=["last"]), "got feedforward_modules, .* inner.last"),
    (HELD[0], changed_config(feedforward_modules=r"inner\.\w+"), "got feedforward_modules, .* inner.last"),
    (HELD[0], changed_tensors(lambda t: t.pop("base_model.model.proj.ia3_l")), "metadata .* do not fit|missing"),
    (HELD[0], changed_tensors(lambda t: t.update(other=torch.ones(1, 1))), "unexpected .*other"),
    (
        HELD[1],
        changed_tensors(lambda t: t.pop("base_model.model.proj.lora_B.bias")),
        "lora_bias: expected a bias for every module, missing for .*proj",
    ),
    (HELD[2], changed_config(lora_bias=False), "unexpected .*lora_B.bias"),
]


@pytest.mark.parametrize(("operators", "break_folder", "message"), BROKEN)
def test_broken_folders_say_what_is_wrong(
    tmp_path: Path, operators: tuple[str, str, str], break_folder: Callable[[Path], None], message: str
) -> None:
    adapter_of(*operators).save_pretrained(tmp_path / "a", "peft")
    break_folder(tmp_path / "a")
    with pytest.raises(CheckpointError, match=message):
        Adapter.from_pretrained(tmp_path / "a")
