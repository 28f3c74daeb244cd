"""An editor with a cache: the same results without generating, and no result of another request."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from openwu import AdapterCache, cli
from openwu.backbones.embedded.condition import condition_pixels
from openwu.editor.editor import Editor
from openwu.editor.requests import EditRequest
from openwu.errors import InstructionError
from openwu.generator.inference.fast import FastGenerator, FastOptions
from openwu.generator.inference.products import Dense, fp8
from openwu.images import read_picture
from openwu.types import Adapter, LoadingOptions

Scene = Callable[..., NDArray[np.uint8]]


@pytest.fixture
def cached(model_folder: Path) -> Editor:
    return Editor.from_pretrained(model_folder, loading=LoadingOptions(dtype=torch.float32), cache=AdapterCache())


@pytest.fixture
def generated(cached: Editor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many adapters each run of the generator wrote."""
    counts: list[int] = []

    class Counting(FastGenerator):
        def __call__(self, condition: Any) -> Adapter:
            adapter = super().__call__(condition)
            counts.append(adapter.batch)
            return adapter

    monkeypatch.setattr(cached, "fast", Counting(cached.generator))
    return counts


def counts(editor: Editor) -> tuple[int, int]:
    assert editor.cache is not None
    return editor.cache.statistics.hits, editor.cache.statistics.misses


def equal(one: Adapter, other: Adapter) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_second_edit_is_the_first_one_without_generating(
    editor: Editor, cached: Editor, generated: list[int], photo: Image.Image
) -> None:
    expected = editor.edit(photo, "brighter", seed=3)
    for _ in range(2):
        result = cached.edit(photo, "brighter", seed=3)
        assert np.array_equal(np.asarray(result.image), np.asarray(expected.image))
        assert equal(result.adapter, expected.adapter)
        assert result.adapter.instructions == (("brighter",),)
        assert set(result.timings) == {"read", "condition", "generate", "edit"}
    assert generated == [1]
    assert counts(cached) == (1, 1)


def test_strength_and_seed_are_applied_later_and_share_an_entry(cached: Editor, photo: Image.Image) -> None:
    pictures = [
        np.asarray(cached.edit(photo, "brighter", strength=strength, seed=seed).image)
        for strength, seed in ((1, 0), (0.5, 0), (1, 1))
    ]
    assert counts(cached) == (2, 1)
    assert not np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


def test_a_picture_is_the_same_from_a_file_and_from_memory(
    cached: Editor, photo: Image.Image, tmp_path: Path, generated: list[int]
) -> None:
    photo.save(tmp_path / "photo.png")
    photo.save(tmp_path / "photo.tif")
    for images in (photo, tmp_path / "photo.png", str(tmp_path / "photo.tif"), [photo.convert("RGBA")]):
        cached.edit(images, "brighter")
    assert generated == [1]
    photo.save(tmp_path / "photo.jpg", quality=60)
    cached.edit(tmp_path / "photo.jpg", "brighter")
    assert generated == [1, 1]


def test_spellings_that_the_model_reads_alike_share_an_entry(
    editor: Editor, cached: Editor, generated: list[int], photo: Image.Image
) -> None:
    for text in ("make it brighter", "  Make IT\n brighter "):
        result = cached.edit(photo, text)
        assert equal(result.adapter, editor.adapt(photo, text))
        assert result.adapter.instructions == ((" ".join(text.split()),),)
    assert generated == [1]
    cached.edit(photo, "make it brighter!")
    assert generated == [1, 1]


def test_adapt_and_edit_share_entries(cached: Editor, generated: list[int], photo: Image.Image) -> None:
    adapter = cached.adapt(photo, "brighter")
    assert equal(cached.edit(photo, "brighter").adapter, adapter)
    assert equal(cached.adapt(photo, "brighter"), adapter)
    assert generated == [1]
    adapter.pairs["blocks.0.qkv"][0].requires_grad_().sum().backward()


def test_a_batch_generates_what_is_missing_in_one_run(
    editor: Editor, cached: Editor, generated: list[int], scene: Scene
) -> None:
    first, second = (Image.fromarray(scene(32, 24, seed)) for seed in (1, 2))
    cached.edit(first, "brighter")
    requests = [
        EditRequest([first], "blur it"),
        EditRequest([first], "brighter", then=["blur it"]),
        EditRequest([second], "brighter"),
        EditRequest([first], "blur it", seed=5),
    ]
    expected = editor.edit_batch(requests)
    for result, plain in zip(cached.edit_batch(requests), expected, strict=True):
        difference = np.asarray(result.image).astype(int) - np.asarray(plain.image).astype(int)
        assert np.abs(difference).max() <= 1
        assert result.adapter.instructions == plain.adapter.instructions
        assert result.adapter.rank == plain.adapter.rank
    assert generated == [1, 2, 1]  # before the batch, for its first passes, for the second pass of one
    cached.edit_batch(requests)
    assert generated == [1, 2, 1]


def test_a_given_adapter_needs_no_look_up(cached: Editor, photo: Image.Image) -> None:
    adapter = cached.adapt(photo, "brighter")
    before = counts(cached)
    cached.edit(photo, "blur it", adapter=adapter)
    assert counts(cached) == before


def test_what_was_merely_tried_is_still_refused(cached: Editor, photo: Image.Image) -> None:
    labels = cached.backbone.config.instruction.labels
    with torch.no_grad():
        cached.backbone.instruction.classify.bias[labels.index("out_of_scope")] = 100
    cached.adapt(photo, "brighter", allow_out_of_scope=True)
    cached.edit(photo, "brighter", allow_out_of_scope=True)
    assert counts(cached) == (1, 1)
    for refused in (cached.adapt, cached.edit):
        with pytest.raises(InstructionError, match="does not know how to"):
            refused(photo, "brighter")


def test_references_and_their_order_count(cached: Editor, generated: list[int], scene: Scene) -> None:
    one, other = (Image.fromarray(scene(32, 24, seed)) for seed in (1, 2))
    for images in (one, [one, other], [other, one], [one, one]):
        cached.edit(images, "brighter")
    assert generated == [1] * 4


def test_another_generator_finds_nothing(cached: Editor, model_folder: Path, photo: Image.Image) -> None:
    cached.edit(photo, "brighter")
    assert cached.cache is not None
    for name in ("generator", "condition", "instruction"):
        other = Editor.from_pretrained(model_folder, loading=LoadingOptions(dtype=torch.float32), cache=cached.cache)
        with torch.no_grad():
            module = {**other.backbone.modules(), "generator": other.generator}[name]
            next(module.parameters()).add_(0.01)
        other.edit(photo, "brighter")
    half = Editor.from_pretrained(model_folder, loading=LoadingOptions(dtype=torch.bfloat16), cache=cached.cache)
    half.edit(photo, "brighter")
    assert counts(cached) == (0, 5)
    same = Editor.from_pretrained(model_folder, loading=LoadingOptions(dtype=torch.float32), cache=cached.cache)
    same.edit(photo, "brighter")
    assert counts(cached) == (1, 5)


def test_two_precisions_of_one_generator_share_nothing(cached: Editor, photo: Image.Image) -> None:
    """Products in 8 bits and autocast write other adapters from the same weights."""
    exact = cached.adapt(photo, "brighter")
    cached.fast = FastGenerator(cached.generator, FastOptions(make=fp8))
    rough = cached.adapt(photo, "brighter")
    with torch.autocast("cpu", torch.bfloat16):
        halved = cached.adapt(photo, "brighter")
    assert counts(cached) == (0, 3)
    assert not equal(rough, exact)
    assert not equal(halved, rough)
    assert equal(cached.adapt(photo, "brighter"), rough)
    cached.fast = FastGenerator(cached.generator, FastOptions())
    assert equal(cached.adapt(photo, "brighter"), exact)
    assert counts(cached) == (2, 3)


def test_a_product_without_a_name_is_refused_where_adapters_are_kept(cached: Editor, photo: Image.Image) -> None:
    cached.fast = FastGenerator(cached.generator, FastOptions(make=lambda weight, bias: Dense(weight, bias)))
    with pytest.raises(ValueError, match="make: expected a class or function of a module"):
        cached.adapt(photo, "brighter")


def test_a_folder_outlives_the_editor(model_folder: Path, photo: Image.Image, tmp_path: Path) -> None:
    results = []
    for _ in range(2):
        editor = Editor.from_pretrained(model_folder, cache=tmp_path / "kept")
        results.append(editor.edit(photo, "brighter"))
    assert editor.cache is not None
    assert editor.cache.statistics.disk_hits == 1
    assert equal(results[0].adapter, results[1].adapter)
    assert [target.kernel for target in results[0].adapter.targets] == [
        target.kernel for target in results[1].adapter.targets
    ]


def test_a_large_picture_is_known_by_what_the_condition_reads(scene: Scene) -> None:
    wide = read_picture(Image.fromarray(scene(2048, 4)))
    assert condition_pixels(wide).shape == (2, 1024, 3)


def test_the_lines_of_the_documentation_work(
    photo: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the model inside the package: an untrained one does not know what "add fog" means."""
    text = (Path(__file__).parents[2] / "docs" / "cache.md").read_text(encoding="utf-8")
    commands, lines = re.findall(r"^```\w*\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    photo.save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    for command in commands.splitlines():
        assert cli.main(shlex.split(command)[1:]) == 0, capsys.readouterr().err
    assert "1 of 1 adapters found" in capsys.readouterr().out
    names: dict[str, Any] = {}
    exec(compile("import openwu\n" + lines, "docs/cache.md", "exec"), names)
    assert capsys.readouterr().out == "1.0\n"
    assert names["editor"].cache is names["cache"]


def test_the_command_finds_what_it_kept(
    model_folder: Path, photo: Image.Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo.save(tmp_path / "a.png")
    for found in (0, 1):
        words = ["edit", str(tmp_path / "a.png"), "--instruction", "brighter", "--overwrite"]
        assert cli.main([*words, "--model", str(model_folder), "--cache", str(tmp_path / "kept")]) == 0
        assert f"{found} of 1 adapters found" in capsys.readouterr().out
