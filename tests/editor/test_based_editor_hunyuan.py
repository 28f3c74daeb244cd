"""The released system's path on its stand-in: from folders, in Python and on the command line."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import base_cases
import hunyuan_stand_in
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import openwu
from openwu import cli
from openwu.adapters.merge import merged
from openwu.backbones.hunyuan_image_3.base import HunyuanImage3
from openwu.editor.cache import AdapterCache
from openwu.editor.editor import Editor
from openwu.editor.requests import EditRequest
from openwu.errors import InstructionError, OpenwuError, TargetError
from openwu.types import BaseRequest, LoadingOptions, SamplingOptions

FAST = SamplingOptions(steps=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("released")
    model = hunyuan_stand_in.save(root / "base")
    base_cases.generator(HunyuanImage3(model)).save_pretrained(root / "generator")
    return root / "base", root / "generator"


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The stand-in works with the transformers that is here, and thinks briefly."""
    monkeypatch.setattr(HunyuanImage3, "transformers_version", transformers.__version__)
    monkeypatch.setattr(HunyuanImage3, "needs_gpu", False)
    monkeypatch.setattr(HunyuanImage3, "reasoning_tokens", 3)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def editor(folders: tuple[Path, Path]) -> Any:
    base, generator = folders
    made = openwu.Editor.from_pretrained(
        "hunyuan-image-3",
        base=base,
        generator=generator,
        loading=LoadingOptions(device="cpu", trust_remote_code=True),
        sampling=FAST,
    )
    yield made
    made.handle.detach()


def pixels(result: openwu.EditResult) -> np.ndarray[Any, Any]:
    return np.asarray(result.photo.pixels, np.int32)


def difference(one: openwu.EditResult, other: openwu.EditResult) -> int:
    if pixels(one).shape != pixels(other).shape:
        return 255  # the base chose another ratio
    return int(np.abs(pixels(one) - pixels(other)).max())


def test_the_generator_has_the_released_form(folders: tuple[Path, Path]) -> None:
    config = (folders[1] / "config.json").read_text()
    assert '"pg_mapping"' in config
    assert '"groups"' not in config


def test_an_edit_follows_adapter_seed_reasoning_and_strength(editor: Editor) -> None:
    photo = base_cases.picture(1, 50, 70)
    result = editor.edit(photo, "make it warm", seed=3)
    own = result.image.size
    assert own != photo.size, "the base's own size, as the released pipeline returns it"
    fitted = replace(FAST, fit_to_photo=True)
    assert editor.edit(photo, "make it warm", seed=3, sampling=fitted).image.size == photo.size == (50, 70)
    assert editor.edit(photo, "make it warm", seed=3).image.size == own
    assert difference(result, editor.edit(photo, "make it warm", seed=3)) == 0
    assert difference(result, editor.edit(photo, "make it warm", seed=4)) > 3
    assert difference(result, editor.edit(photo, "make it warm", seed=3, strength=0.0)) > 3
    assert difference(result, editor.edit(photo, "make it warm", seed=3, reasoning="it is cold")) > 3
    first, other = (editor.adapt(photo, "make it warm", seed=seed).pairs for seed in (3, 4))
    assert any((first[name][1] - other[name][1]).abs().max() > 1e-6 for name in first), "the condition has the seed"
    ours = result.adapter.pairs
    assert all(torch.equal(pair[1], ours[name][1]) for name, pair in first.items())


def test_an_edit_is_the_base_with_merged_weights(editor: Editor) -> None:
    photo = base_cases.picture(1, 40, 40)
    result = editor.edit(photo, "make it warm", seed=3)
    request = BaseRequest((photo,), "make it warm", 3)
    editor.handle.detach()
    with merged(editor.backbone.denoiser, result.adapter):

        def rows(_: Any) -> Any:
            return base_cases.nothing(_)

        (picture,) = editor.backbone.generate([request], FAST, rows)
    came = torch.from_numpy(pixels(result)).permute(2, 0, 1) / 255
    assert (came - picture.clamp(0, 1)).abs().max() < 2.5 / 255


def test_a_request_chooses_its_size_and_the_adapter_follows(editor: Editor) -> None:
    """With a size, source pictures are cropped, so that the condition is another one; the cache tells both apart."""
    photo = base_cases.picture(1, 50, 70)
    asked = {size: EditRequest(photo, "make it warm", image_size=size) for size in (None, "auto", "24x40", "32x32")}
    results = dict(zip(asked, editor.edit_batch(list(asked.values())), strict=True))
    assert results["24x40"].image.size == (40, 24)
    assert results["32x32"].image.size == (32, 32)
    assert difference(results[None], results["auto"]) == 0
    ours, others = (
        [result.adapter.state_dict() for result in (results[a], results[b])]
        for a, b in ((None, "auto"), ("auto", "24x40"))
    )
    assert all(torch.equal(ours[0][name], ours[1][name]) for name in ours[0])
    assert any(not torch.equal(others[0][name], others[1][name]) for name in others[0])
    editor.cache = AdapterCache()
    for size in ("auto", "24x40", "auto", "24x40"):
        adapter = editor.adapt(photo, "make it warm", image_size=size)
        assert torch.equal(
            next(iter(adapter.state_dict().values())), next(iter(results[size].adapter.state_dict().values()))
        )
    assert (editor.cache.statistics.hits, editor.cache.statistics.misses) == (2, 2)
    with pytest.raises(OpenwuError, match="image_size: expected auto, HxW such as 1024x1024, or W:H, got 'large'"):
        editor.edit(photo, "make it warm", image_size="large")


def test_without_a_seed_it_is_the_released_pipeline_s_and_the_result_tells(editor: Editor) -> None:
    photo = base_cases.picture(1, 50, 70)
    result, same = editor.edit(photo, "make it warm"), editor.edit(photo, "make it warm", seed=42)
    assert (result.seed, same.seed) == (42, 42)
    assert difference(result, same) == 0
    assert editor.edit(photo, "make it warm", seed=0).seed == 0


def test_a_batch_is_its_requests_one_at_a_time(editor: Editor) -> None:
    requests = [
        EditRequest([base_cases.picture(1, 60, 60)], "make it warm", seed=1),
        EditRequest([base_cases.picture(2, 60, 60), base_cases.picture(3)], "blur it", strength=0.5, seed=2),
        EditRequest([base_cases.picture(1, 60, 60)], "blur it", seed=1, then=["make it warm"], reasoning="both"),
    ]
    alone = [
        editor.edit(
            each.images,
            each.instruction,
            then=each.then,
            strength=each.strength,
            seed=each.seed,
            reasoning=each.reasoning,
        )
        for each in requests
    ]
    for one, together in zip(alone, editor.edit_batch(requests), strict=True):
        assert difference(one, together) <= 2


def test_a_generator_that_does_not_fit_is_refused_before_weights_are_opened(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail: Any = lambda *_, **__: pytest.fail("weights must not be read")  # noqa: E731
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    monkeypatch.setattr(openwu.ParameterGenerator, "from_pretrained", fail)
    config = base_cases.generator(HunyuanImage3(hunyuan_stand_in.made())).config
    deeper = tuple(replace(group, num_layers=group.num_layers + 1) for group in config.groups)
    for changed, message in (
        (
            replace(config, groups=deeper),
            r"made for another base than this hunyuan-image-3: .* first model\.layers\.2\.",
        ),
        (replace(config, input_dim=24), "it reads conditions of widths 24 "),
    ):
        openwu.ParameterGenerator(changed).save_pretrained(tmp_path / "other")
        with pytest.raises(TargetError, match=message):
            openwu.Editor.from_pretrained(
                "hunyuan-image-3",
                base=folders[0],
                generator=tmp_path / "other",
                loading=LoadingOptions(device="cpu", trust_remote_code=True),
            )


def test_on_the_command_line(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, generator = folders
    base_cases.picture(1, 80, 60).save(tmp_path / "photo.png")
    place = f"--model hunyuan-image-3 --base {base} --generator {generator} --device cpu --steps 2"
    line = (
        f"edit {tmp_path}/photo.png --instruction warm {place} --reasoning because --output {tmp_path}/out.png".split()
    )
    assert cli.main(line) == 1
    assert "ask for it with --trust-remote-code" in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()
    assert cli.main([*line, "--trust-remote-code"]) == 0
    editor = openwu.Editor.from_pretrained(
        "hunyuan-image-3",
        base=base,
        generator=generator,
        loading=LoadingOptions(device="cpu", trust_remote_code=True),
        sampling=FAST,
    )
    expected = editor.edit(tmp_path / "photo.png", "warm", reasoning="because").image
    with Image.open(tmp_path / "out.png") as written:
        assert written.size == expected.size
        assert np.abs(np.asarray(written, np.int32) - np.asarray(expected, np.int32)).max() <= 1
    sized = [*line, "--trust-remote-code", "--overwrite", "--image-size", "24x40"]
    for more, size in (([], (40, 24)), (["--fit-to-photo"], (80, 60))):
        assert cli.main([*sized, *more]) == 0
        with Image.open(tmp_path / "out.png") as written:
            assert written.size == size
    assert cli.main([*line, "--trust-remote-code", "--overwrite", "--offload"]) == 1
    assert "offload: expected a CUDA GPU" in capsys.readouterr().err


def test_options_of_other_bases_and_of_the_embedded_model(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, generator = folders
    with pytest.raises(OpenwuError, match="trust_remote_code, offload: expected none for flux-kontext"):
        openwu.Editor.from_pretrained(
            "flux-kontext",
            base=base,
            generator=generator,
            loading=LoadingOptions(trust_remote_code=True, offload=True),
        )
    with pytest.raises(OpenwuError, match="trust_remote_code: expected none for embedded"):
        openwu.Editor.from_pretrained(loading=LoadingOptions(trust_remote_code=True))
    base_cases.picture(1).save(tmp_path / "photo.png")
    line = f"edit {tmp_path}/photo.png --instruction warm --model hunyuan-image-3 --base none --generator nothing"
    assert cli.main(line.split()) == 1
    assert "trust_remote_code: none brings Python code" in capsys.readouterr().err
    assert cli.main([*line.split(), "--trust-remote-code"]) == 1
    assert "none: expected a folder, got a path that does not exist" in capsys.readouterr().err
    line = f"edit {tmp_path}/photo.png --instruction warm --trust-remote-code --reasoning because".split()
    assert cli.main(line) == 2
    assert "--trust-remote-code, --reasoning: expected only with --base" in capsys.readouterr().err
    pix2pix = base_cases.backbone("instruct-pix2pix")
    editor = Editor(pix2pix, base_cases.generator(pix2pix), sampling=base_cases.FAST)
    try:
        with pytest.raises(
            InstructionError, match="reasoning: expected none for InstructPix2Pix, which does not reason"
        ):
            editor.edit(base_cases.picture(1), "warm", reasoning="because")
        with pytest.raises(InstructionError, match="reasoning: expected none"):
            editor.adapt(base_cases.picture(1), "warm", reasoning="because")
    finally:
        editor.handle.detach()


def test_the_embedded_editor_does_not_reason(editor_of_photos: openwu.Editor) -> None:
    with pytest.raises(InstructionError, match="reasoning: expected none for embedded"):
        editor_of_photos.edit_batch([EditRequest([base_cases.picture(1)], "warm", reasoning="because")])


@pytest.fixture
def editor_of_photos(model_folder: Path) -> openwu.Editor:
    return openwu.Editor.from_pretrained(model_folder, loading=LoadingOptions(dtype=torch.float32))
