"""The embedded model as a whole: folders, errors, gradients from the picture back to the condition, batches."""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from openwu.backbones.embedded.network import TinyEditor
from openwu.errors import CheckpointError, TargetError
from openwu.training.embedded.model import EmbeddedConfig, EmbeddedModel
from openwu.types import Adapter


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def batch(b: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures, their planes and whole pictures of another size."""
    generator = torch.Generator().manual_seed(0)
    return (
        torch.rand(b, 3, 16, 32, generator=generator),
        torch.randn(b, 3, 16, 32, generator=generator),
        torch.rand(b, 3, 40, 24, generator=generator),
    )


def rewrite(folder: Path, change: Any) -> None:
    """Change `config.json` in place."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


# Folders


def test_float32_comes_back_exactly(embedded_model: EmbeddedModel, folder: Path) -> None:
    loaded = EmbeddedModel.from_pretrained(folder)
    assert loaded.config == embedded_model.config
    expected = embedded_model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not list(folder.glob(".*"))


def test_float16_comes_back_closely(embedded_model: EmbeddedModel, tmp_path: Path) -> None:
    embedded_model.save_pretrained(tmp_path)
    loaded = EmbeddedModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    exact = EmbeddedModel.from_pretrained(tmp_path)
    for name, value in exact.state_dict().items():
        torch.testing.assert_close(value, embedded_model.state_dict()[name], atol=1e-4, rtol=1e-3)
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) < 2.5 * sum(
        embedded_model.num_parameters.values()
    )


def test_everything_that_does_not_fit_is_listed_at_once(folder: Path) -> None:
    backbone = load_file(folder / "backbone.safetensors")
    del backbone["norm.weight"]
    backbone["surplus"] = torch.zeros(1)
    backbone["blocks.0.fc1.bias"] = torch.zeros(7)
    save_file(backbone, folder / "backbone.safetensors")
    (folder / "generator.safetensors").unlink()
    (folder / "condition.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0garbage")
    with pytest.raises(CheckpointError) as refused:
        EmbeddedModel.from_pretrained(folder)
    message = str(refused.value)
    for part in (
        "backbone.safetensors: missing norm.weight",
        "backbone.safetensors: unexpected surplus",
        "backbone.safetensors: blocks.0.fc1.bias: expected shape [48], got [7]",
        "generator.safetensors: cannot be read",
        "condition.safetensors: cannot be read",
    ):
        assert part in message
    assert "instruction.safetensors" not in message


@pytest.mark.parametrize("text", [None, "{broken", "[1, 2]", '"text"'])
def test_a_missing_or_broken_config(folder: Path, text: str | None) -> None:
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json: expected"):
        EmbeddedModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("model_type",), "parameter_generator", "model_type: expected 'openwu-embedded', got 'parameter_generator'"),
        (("backbone",), None, "backbone: expected an object with fields, got None"),
        (("backbone", "d_model"), "32", "backbone.d_model: expected a positive whole number, got '32'"),
        (("backbone", "head_dim"), 5, "backbone.d_model: expected a multiple of head_dim=5, got 32"),
        (("backbone", "depth"), 3, "backbone.depth: unknown field"),
        (("backbone", "text_dim"), 16, "backbone.text_dim: expected 32"),
        (("condition", "heads"), 0, "condition.heads: expected a positive whole number, got 0"),
        (("condition", "num_text_tokens"), 5, "condition.num_text_tokens: expected 4"),
        (("instruction", "labels"), "brighten", "instruction.labels: expected a list of names, got 'brighten'"),
        (("instruction", "labels"), ["one"], "instruction.labels: expected at least two different names"),
        (("generator", "rank"), -1, "generator.rank: expected"),
        (("generator", "input_dim"), 25, "generator.input_dim: expected 24"),
        (("generator",), [], "generator.expected an object with fields, got list"),
    ],
)
def test_config_errors_name_the_field(folder: Path, path: tuple[str, ...], value: Any, message: str) -> None:
    def change(config: dict[str, Any]) -> None:
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value

    rewrite(folder, change)
    with pytest.raises(CheckpointError) as refused:
        EmbeddedModel.from_pretrained(folder)
    assert message in str(refused.value)


def test_all_config_errors_come_together(folder: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        del config["condition"]
        del config["instruction"]["labels"]
        config["backbone"]["window"] = 2.5
        del config["generator"]["rank"]

    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=r"instruction\.labels: missing; backbone\.window: .*; condition: .*rank"):
        EmbeddedModel.from_pretrained(folder)


def test_a_generator_for_another_base_is_refused(folder: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["generator"]["groups"][0]["num_base_model_layers"] = 3

    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=r"do not fit: .*\n  blocks\.2\.qkv: no such module"):
        EmbeddedModel.from_pretrained(folder)


def test_a_config_survives_json(embedded_config: EmbeddedConfig) -> None:
    assert EmbeddedConfig.from_dict(json.loads(json.dumps(embedded_config.to_dict()))) == embedded_config


# The path of the data


def test_every_target_and_parameter_receives_a_gradient_from_the_picture(embedded_model: EmbeddedModel) -> None:
    picture, planes, whole = batch()
    embedded_model.requires_grad_(False)
    for part in (embedded_model.condition, embedded_model.generator):
        part.requires_grad_(True)
    text = embedded_model.instruction(["brighter", "blur it", "darker please"])
    adapter = embedded_model.adapt(whole, text)
    for a, b in adapter.pairs.values():
        a.retain_grad()
        b.retain_grad()
    embedded_model.edit(picture, planes, text, adapter).square().mean().backward()
    for name, pair in adapter.pairs.items():
        for factor in pair:
            assert factor.grad is not None, name
            assert (factor.grad.flatten(1).abs().amax(1) > 0).all(), name
    for part in (embedded_model.condition, embedded_model.generator):
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in embedded_model.backbone.parameters())


@torch.no_grad()
def test_every_sample_of_a_batch_has_its_own_adapter(embedded_model: EmbeddedModel) -> None:
    picture, planes, whole = batch()
    text = embedded_model.instruction(["brighter", "blur it", "brighter"])
    adapter = embedded_model.adapt(whole, text)
    together = embedded_model.edit(picture, planes, text, adapter)
    for i in range(3):
        row = slice(i, i + 1)
        own = embedded_model.adapt(whole[row], text[row])
        alone = embedded_model.edit(picture[row], planes[row], text[row], own)
        torch.testing.assert_close(together[row], alone, atol=2e-5, rtol=1e-5)
        other = embedded_model.edit(picture[row], planes[row], text[row], adapter.select([(i + 1) % 3]))
        assert (other - alone).abs().max() > 1e-3


@torch.no_grad()
def test_without_an_adapter_the_base_answers(embedded_model: EmbeddedModel) -> None:
    picture, planes, whole = batch()
    text = embedded_model.instruction(["brighter"] * 3)
    adapter = embedded_model.adapt(whole, text)
    base = embedded_model.backbone(picture, planes, text)
    assert torch.equal(embedded_model.edit(picture, planes, text, None), base)
    assert torch.equal(embedded_model.edit(picture, planes, text, adapter.scaled(0)), base)
    assert (embedded_model.edit(picture, planes, text, adapter) - base).abs().max() > 1e-3
    assert torch.equal(embedded_model.backbone(picture, planes, text), base)


def test_an_adapter_of_another_batch_or_model_is_refused(embedded_model: EmbeddedModel) -> None:
    picture, planes, whole = batch()
    text = embedded_model.instruction(["brighter"] * 3)
    adapter = embedded_model.adapt(whole, text)
    with pytest.raises(TargetError, match="3 rows"):
        embedded_model.edit(picture[:2], planes[:2], text[:2], adapter)
    fewer = Adapter.from_pairs(
        adapter.targets[1:], {t.name: adapter.pairs[t.name] for t in adapter.targets[1:]}, adapter.scale
    )
    with pytest.raises(TargetError, match="missing from the adapter"):
        embedded_model.edit(picture, planes, text, fewer)
    with pytest.raises(TargetError, match="missing from the adapter"):
        embedded_model.adapted(fewer.select([0]), 10**6)


@torch.no_grad()
def test_merged_weights_edit_as_hooks_do_and_leave_the_base_alone(embedded_model: EmbeddedModel) -> None:
    picture, planes, whole = batch()
    text = embedded_model.instruction(["brighter"] * 3)
    adapter = embedded_model.adapt(whole, text).select([1])
    base = embedded_model.backbone(picture, planes, text)
    expected = embedded_model.edit(picture, planes, text, adapter)
    small, large = (embedded_model.adapted(adapter, pixels) for pixels in (4, 10**6))
    assert isinstance(large, TinyEditor)
    assert not isinstance(small, TinyEditor)
    assert torch.equal(small(picture, planes, text), expected)
    torch.testing.assert_close(large(picture, planes, text), expected, atol=2e-5, rtol=1e-5)
    assert torch.equal(embedded_model.backbone(picture, planes, text), base)
    several = embedded_model.adapted(embedded_model.adapt(whole, text), 10**6)
    assert not isinstance(several, TinyEditor)
    assert torch.equal(embedded_model.adapted(adapter.scaled(0), 10**6)(picture, planes, text), base)


def test_the_base_without_an_adapter_waits_for_an_edit_through_hooks(embedded_model: EmbeddedModel) -> None:
    """What runs the bare base in another thread is neither refused nor adapted."""
    model = embedded_model.requires_grad_(False)
    picture, planes, whole = (each[:1] for each in batch())
    text = model.instruction(["brighter"])
    adapter = model.adapt(whole, text).scaled(5)
    bare, adapted = (model.edit(picture, planes, text, each) for each in (None, adapter))
    assert not torch.equal(bare, adapted)

    def edit(number: int) -> bool:
        used, expected = ((None, bare), (adapter, adapted))[number % 2]
        return torch.equal(model.edit(picture, planes, text, used), expected)

    hook = model.backbone.register_forward_pre_hook(lambda *_: time.sleep(0.03))  # so that threads would meet in it
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(edit, range(8)))
    hook.remove()
