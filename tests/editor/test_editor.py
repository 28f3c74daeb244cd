"""The whole path from a picture and a sentence to a picture, with an untrained model: plumbing, not quality."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageCms
from torch import nn

from openwu.backbones.embedded.condition import condition_view
from openwu.backbones.embedded.network import INPUT_CHANNELS, noise_plane, place_planes
from openwu.backbones.embedded.piecewise import pieces
from openwu.backbones.embedded.words.wishes import Wish
from openwu.editor.compatibility import AdapterScope
from openwu.editor.editor import Editor
from openwu.editor.requests import EditRequest
from openwu.errors import CheckpointError, InstructionError, OpenwuError, PictureError, TargetError
from openwu.images import read_picture
from openwu.types import Adapter, LoadingOptions

Scene = Callable[..., NDArray[np.uint8]]


def pixels(image: Image.Image) -> NDArray[np.int64]:
    return np.asarray(image).astype(np.int64)


def differ(one: Image.Image, other: Image.Image) -> int:
    """Largest difference, in 8-bit steps."""
    return int(np.abs(pixels(one) - pixels(other)).max())


@pytest.fixture
def referring(editor: Editor) -> Editor:
    """An editor that takes every instruction for "make its colours those of the reference"."""
    labels = ("take_palette", "brighten", "blur", "out_of_scope")
    encoder = editor.backbone.instruction
    encoder.config = replace(encoder.config, labels=labels)
    with torch.no_grad():
        editor.backbone.instruction.classify.bias[0] = 100
    return editor


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything above one pixel goes in pieces of two windows, then of 32 x 48 pixels."""
    for name, value in (("WHOLE", 1), ("WINDOWS", 2), ("HEIGHT", 32), ("WIDTH", 48)):
        monkeypatch.setattr(pieces, name, value)


# What may be passed


def test_paths_images_and_lists_are_alike(editor: Editor, photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "photo.png")
    expected = editor.edit(photo, "brighter").image
    assert differ(expected, photo) > 3
    for images in (str(tmp_path / "photo.png"), tmp_path / "photo.png", [photo], (tmp_path / "photo.png",)):
        assert differ(editor.edit(images, "brighter").image, expected) == 0


@pytest.mark.parametrize(
    ("count", "message"), [(0, "expected the picture to edit"), (3, "at most 1 reference after it, got 3 pictures")]
)
def test_one_picture_or_two_per_request(editor: Editor, photo: Image.Image, count: int, message: str) -> None:
    for refused in (
        lambda: editor.edit([photo] * count, "brighter"),
        lambda: editor.adapt([photo] * count, "brighter"),
        lambda: editor.edit_batch([EditRequest([photo], "brighter"), EditRequest([photo] * count, "brighter")]),
    ):
        with pytest.raises(PictureError, match=message):
            refused()


def test_a_picture_that_is_not_there(editor: Editor) -> None:
    with pytest.raises(PictureError, match="no such file"):
        editor.edit("nowhere.png", "brighter")


@pytest.mark.parametrize("instruction", ["", "  ", "123"])
def test_an_empty_instruction_is_refused_even_anyway(editor: Editor, photo: Image.Image, instruction: str) -> None:
    for refused in (
        lambda allow_out_of_scope: editor.edit(photo, instruction, allow_out_of_scope=allow_out_of_scope),
        lambda allow_out_of_scope: editor.edit(
            photo, "brighter", then=instruction, allow_out_of_scope=allow_out_of_scope
        ),
        lambda allow_out_of_scope: editor.adapt(photo, instruction, allow_out_of_scope=allow_out_of_scope),
        lambda allow_out_of_scope: editor.edit_batch(
            [EditRequest([photo], instruction)], allow_out_of_scope=allow_out_of_scope
        ),
    ):
        for allow_out_of_scope in (False, True):
            with pytest.raises(InstructionError, match="expected"):
                refused(allow_out_of_scope)


def test_out_of_scope_is_refused_and_anyway_overrides(editor: Editor, photo: Image.Image) -> None:
    expected = editor.edit(photo, "brighter").image
    outside = editor.backbone.config.instruction.labels.index("out_of_scope")
    with torch.no_grad():
        editor.backbone.instruction.classify.bias[outside] = 100
    for refused in (
        lambda: editor.edit(photo, "brighter"),
        lambda: editor.adapt(photo, "brighter"),
        lambda: editor.edit_batch([EditRequest([photo], "brighter")]),
    ):
        with pytest.raises(InstructionError, match="does not know how to 'brighter'"):
            refused()
    assert differ(editor.edit(photo, "brighter", allow_out_of_scope=True).image, expected) == 0
    assert (
        differ(editor.edit_batch([EditRequest([photo], "brighter")], allow_out_of_scope=True)[0].image, expected) == 0
    )
    adapter = editor.adapt(photo, "brighter", allow_out_of_scope=True)
    assert differ(editor.edit(photo, "brighter", adapter=adapter).image, expected) == 0


@pytest.mark.parametrize("model", ["nowhere", "file"])
def test_a_model_that_is_no_folder(tmp_path: Path, model: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OpenwuError, match=r"model: expected one of .*, or a folder with config\.json"):
        Editor.from_pretrained(tmp_path / model)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Editor.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(editor: Editor, model_folder: Path, photo: Image.Image, dtype: torch.dtype) -> None:
    """What the editor does by default on processors that compute in bfloat16."""
    rough = Editor.from_pretrained(model_folder, loading=LoadingOptions(dtype=dtype))
    exact, image = editor.edit(photo, "brighter").image, rough.edit(photo, "brighter").image
    assert np.abs(pixels(image) - pixels(exact)).mean() < 0.1 * np.abs(pixels(exact) - pixels(photo)).mean()
    requests = [EditRequest([photo], "brighter"), EditRequest([photo], "把照片调亮一点", 2.0, 1)]
    assert differ(rough.edit_batch(requests)[0].image, image) <= 6


def test_the_default_dtype_is_the_processors(
    model_folder: Path, photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    for capabilities, dtype in (({"amx_bf16": True}, torch.bfloat16), ({}, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert Editor.from_pretrained(model_folder).dtype == dtype


# Adapters, strength, seed


def test_an_adapter_can_be_made_first_kept_and_used_again(editor: Editor, photo: Image.Image, tmp_path: Path) -> None:
    direct = editor.edit(photo, "brighter", strength=1.5)
    adapter = editor.adapt(photo, "brighter")
    adapter.save_pretrained(tmp_path / "adapter")
    loaded = Adapter.from_pretrained(tmp_path / "adapter")
    for again in (direct.adapter, adapter, loaded):
        assert again.batch == 1
        assert differ(editor.edit(photo, "brighter", strength=1.5, adapter=again).image, direct.image) == 0


def test_an_adapter_is_the_generators_own_also_after_its_weights_changed(editor: Editor, photo: Image.Image) -> None:
    text = editor.backbone.instruction(["brighter"])
    condition = editor.backbone.condition_encoder(condition_view(read_picture(photo)), text)
    for _ in range(2):
        expected = editor.generator(condition).detach().state_dict()
        came = editor.adapt(photo, "brighter").state_dict()
        for key, tensor in expected.items():
            torch.testing.assert_close(came[key], tensor, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            for parameter in editor.generator.parameters():
                parameter.mul_(1.2)


def test_an_adapter_needs_no_instruction(editor: Editor, photo: Image.Image) -> None:
    adapter = editor.adapt(photo, "brighter")
    assert differ(editor.edit(photo, adapter=adapter).image, editor.edit(photo, adapter=adapter.scaled(0)).image) > 1


def test_the_adapter_of_a_batch_is_refused(editor: Editor, photo: Image.Image) -> None:
    adapter = editor.adapt(photo, "brighter")
    with pytest.raises(TargetError, match="expected one sample, got 2"):
        editor.edit(photo, "brighter", adapter=Adapter.stack([adapter, adapter]))


def test_the_adapter_of_another_base_is_refused(editor: Editor, photo: Image.Image) -> None:
    adapter = editor.adapt(photo, "brighter")
    targets = adapter.targets[1:]
    fewer = Adapter(targets, {target.name: adapter.factors[target.name] for target in targets}, adapter.scale)
    with pytest.raises(TargetError, match="missing from the adapter"):
        editor.edit(photo, "brighter", adapter=fewer)


def test_strength(editor: Editor, photo: Image.Image) -> None:
    images = {strength: editor.edit(photo, "brighter", strength=strength).image for strength in (0.0, 1.0, -1.0, 2.0)}
    assert np.array_equal(pixels(images[0.0]), pixels(photo))
    for one, other in ((0.0, 1.0), (1.0, -1.0), (1.0, 2.0), (0.0, -1.0)):
        assert differ(images[one], images[other]) > 1


def test_an_adapter_of_zeros_leaves_the_base_alone(editor: Editor, photo: Image.Image) -> None:
    picture = torch.from_numpy(read_picture(photo).floats()).permute(2, 0, 1)[None]
    with torch.inference_mode():
        text = editor.backbone.instruction(["brighter"])
        planes = torch.cat([noise_plane(*photo.size, 0).float(), place_planes(photo.height, photo.width)])[None]
        base = editor.backbone.network(picture, planes, text)
    expected = base[0].clamp(0, 1).mul(255).round().permute(1, 2, 0).numpy()
    assert np.array_equal(pixels(quiet(editor, photo, "brighter")), expected)


def quiet(editor: Editor, images: Any, instruction: str, seed: int = 0) -> Image.Image:
    """What the base makes without its adapter."""
    zeros = editor.adapt(images, instruction).scaled(0.0)
    return editor.edit(images, instruction, adapter=zeros, seed=seed).image


def test_a_result_without_numbers_is_an_error_and_no_picture(editor: Editor, photo: Image.Image) -> None:
    with pytest.raises(OpenwuError, match="smaller strength"):
        editor.edit(photo, "brighter", adapter=editor.adapt(photo, "brighter").scaled(1e38))


def test_the_seed_changes_what_uses_noise_and_nothing_else(editor: Editor, photo: Image.Image) -> None:
    first, same, other = (editor.edit(photo, "brighter", seed=seed).image for seed in (5, 5, 6))
    assert differ(first, same) == 0
    assert differ(first, other) > 0
    with torch.no_grad():
        editor.backbone.network.embed.weight[:, 3::INPUT_CHANNELS] = 0
        editor.backbone.network.pixels.stem.weight[:, 3] = 0
    # Adapters of the stem would read the noise, too.
    assert differ(*[quiet(editor, photo, "brighter", seed) for seed in (5, 6)]) == 0


def weights_differ(one: Adapter, other: Adapter) -> float:
    return max(float((one.pairs[name][i] - other.pairs[name][i]).abs().max()) for name in one.pairs for i in (0, 1))


# Wrong arguments


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"strength": float("nan")}, "strength: expected a finite number"),
        ({"strength": float("inf")}, "strength: expected a finite number"),
        ({"strength": "a"}, "strength: expected a finite number, 1 for the edit as asked, got 'a'"),
        ({"strength": True}, "strength: expected"),
        ({"strength": 2.1}, "strength: expected -1 to 2 for"),
        ({"strength": -1.1}, "strength: expected -1 to 2 for"),
        ({"strength": None}, "strength: expected"),
        ({"seed": "7"}, "seed: expected a whole number"),
        ({"seed": 1.5}, "seed: expected a whole number"),
        ({"seed": -1}, "seed: expected a whole number"),
        ({"then": 5}, "then: expected a text or a list of texts, got int"),
        ({"then": None}, "then: expected a text or a list of texts, got NoneType"),
        ({"then": [5]}, "instruction: expected text, got int"),
        ({"reasoning": 5}, "reasoning: expected text"),
        ({"edit": "brighten"}, "edit: expected without an instruction"),
        ({"edit": 5}, "edit: expected text"),
        ({"adapter": "folder"}, "adapter: expected Adapter or None, got str"),
        ({"sampling": {}}, "sampling: expected SamplingOptions or None, got dict"),
        ({"progress": 5}, "progress: expected a function"),
        ({"allow_out_of_scope": 1}, "allow_out_of_scope: expected True or False"),
        ({"images": []}, "images: expected the picture to edit"),
        ({"images": None}, "images: expected a path, bytes.*got NoneType"),
        ({"images": [5]}, "images: expected a path, bytes.*got int"),
        ({"instruction": None}, "instruction: expected text, got NoneType"),
        ({"instruction": b"warm"}, "instruction: expected text, got bytes"),
    ],
)
def test_wrong_arguments_are_named(editor: Editor, photo: Image.Image, arguments: Any, words: str) -> None:
    with pytest.raises(OpenwuError, match=words):
        editor.edit(**{"images": photo, "instruction": "brighter", **arguments})


def test_wrong_requests_of_a_batch_are_named(editor: Editor, photo: Image.Image) -> None:
    for requests, words in (
        (EditRequest([photo], "brighter"), "requests: expected a list of EditRequest, got EditRequest"),
        ("brighter", "requests: expected a list"),
        ([photo], "requests: expected EditRequest objects, got Image"),
        ([EditRequest([photo], "brighter", strength="a")], "strength: expected"),  # type: ignore[arg-type]
    ):
        with pytest.raises(OpenwuError, match=words):
            editor.edit_batch(requests)  # type: ignore[arg-type]


def test_numbers_of_other_libraries_are_numbers(editor: Editor, photo: Image.Image) -> None:
    expected = editor.edit(photo, "brighter", strength=0.5, seed=3).image
    for strength, seed in ((np.float32(0.5), np.int64(3)), (np.float64(0.5), 3)):
        assert differ(editor.edit(photo, "brighter", strength=strength, seed=seed).image, expected) == 0


# A second picture


def test_the_base_never_sees_the_reference(referring: Editor, scene: Scene, photo: Image.Image) -> None:
    """Everything in the base up to the first adapted product is bit-equal whatever the reference shows."""
    references = [Image.fromarray(scene(30, 50, seed)) for seed in (1, 2)]
    base = referring.backbone.network
    adapted = {target.name for target in referring.generator.targets}
    assert {name.partition(".")[0] for name in adapted} == {"blocks", "pixels"}
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...], out: Any = None) -> None:
            parts = args if out is None else (*args, out)
            seen.update({f"{name}/{i}": part.clone() for i, part in enumerate(parts)})

        return hook

    # What the base is called with, what no adapter has touched yet, and what goes into the first adapted modules.
    hooks = [module.register_forward_pre_hook(keep(name)) for name, module in (("base", base), ("embed", base.embed))]
    hooks += [getattr(base, name).register_forward_hook(keep(f"{name}_out")) for name in ("embed", "text_norm")]
    for name in ("blocks.0.qkv", "blocks.0.text_kv", "pixels.stem"):
        hooks.append(base.get_submodule(name).register_forward_pre_hook(keep(name)))
    results, activations = [], []
    for reference in references:
        results.append(referring.edit([photo, reference], "use the colours of the reference"))
        activations.append(dict(seen))
        seen.clear()
    for hook in hooks:
        hook.remove()
    assert len(activations[0]) == 11
    assert activations[0].keys() == activations[1].keys()
    for name, value in activations[0].items():
        assert torch.equal(value, activations[1][name]), name
    assert weights_differ(results[0].adapter, results[1].adapter) > 1e-3
    assert differ(results[0].image, results[1].image) > 1
    silent = [quiet(referring, [photo, each], "use its colours") for each in references]
    assert differ(*silent) == 0


def test_a_reference_is_asked_for_by_name_where_it_is_missing(referring: Editor, photo: Image.Image) -> None:
    asked = "use the colours of the reference"
    pair = EditRequest([photo, photo], asked)
    for refused in (
        lambda: referring.edit(photo, asked),
        lambda: referring.edit(photo, "brighter", then=asked),
        lambda: referring.adapt(photo, asked),
        lambda: referring.edit_batch([pair, EditRequest([photo], asked)]),
    ):
        with pytest.raises(InstructionError, match=r"second picture, but only one came; .*--reference FILE"):
            refused()
    assert referring.edit(photo, asked, allow_out_of_scope=True).image.size == photo.size


def test_a_second_picture_that_nobody_asked_for_does_no_harm(editor: Editor, photo: Image.Image, scene: Scene) -> None:
    second = Image.fromarray(scene(300, 9, 4))
    result = editor.edit([photo, second], "brighter")
    assert result.image.size == photo.size
    adapter = editor.adapt([photo, second], "brighter")
    assert weights_differ(adapter, result.adapter) == 0


def test_references_of_a_batch_stay_with_their_requests(editor: Editor, scene: Scene) -> None:
    """With and without references, of several sizes."""
    pictures = [Image.fromarray(scene(24, 20, seed)) for seed in range(3)]
    seconds = [Image.fromarray(scene(*size, 7)) for size in ((9, 31), (40, 16))]
    requests = [EditRequest([pictures[0], seconds[0]], "brighter"), EditRequest([pictures[1]], "brighter")]
    requests.append(EditRequest([pictures[2], seconds[1]], "brighter"))
    for request, result in zip(requests, editor.edit_batch(requests), strict=True):
        alone = editor.edit(request.images, "brighter")
        assert differ(result.image, alone.image) <= 1
        assert weights_differ(result.adapter, alone.adapter) < 1e-4
    swapped = editor.adapt([pictures[0], seconds[1]], "brighter")
    assert weights_differ(swapped, editor.adapt(requests[0].images, "brighter")) > 1e-3


# Several instructions


def test_a_given_sum_edits_in_one_pass_and_shows_all_tokens(editor: Editor, photo: Image.Image) -> None:
    summed = Adapter.sum([editor.adapt(photo, text) for text in ("brighter", "blur it")])
    assert summed.rank == 8
    assert summed.instructions == (("brighter", "blur it"),)
    both = editor.edit(photo, adapter=summed, seed=3)
    assert weights_differ(both.adapter, summed) == 0
    picture = torch.from_numpy(read_picture(photo).floats()).permute(2, 0, 1)[None]
    planes = torch.cat([noise_plane(*photo.size, 3).float(), place_planes(photo.height, photo.width)])[None]
    with torch.inference_mode():
        text = torch.cat([editor.backbone.instruction([text]) for text in ("brighter", "blur it")], dim=1)
        with editor.handle.applied(summed):
            out = editor.backbone.network(picture, planes, text)
    expected = out[0].clamp(0, 1).mul(255).round().permute(1, 2, 0).numpy()
    assert np.abs(pixels(both.image) - expected).max() <= 1
    for other in (
        editor.edit(photo, "brighter", seed=3),
        editor.edit(photo, "blur it", seed=3),
        editor.edit(photo, "brighter", then="blur it", seed=3),
    ):
        assert differ(other.image, both.image) > 1


def test_in_turn_is_what_two_calls_make(editor: Editor, photo: Image.Image) -> None:
    told: list[tuple[int, int]] = []
    came = editor.edit(photo, "brighter", then="blur it", strength=0.5, seed=3, progress=lambda *at: told.append(at))
    first = editor.edit(photo, "brighter", strength=0.5, seed=3)
    second = editor.edit(first.photo, "blur it", strength=0.5, seed=3)
    assert np.array_equal(came.photo.pixels, second.photo.pixels)
    assert came.adapter.instructions == (("blur it",),)
    assert came.adapter.rank == first.adapter.rank
    assert came.timings.keys() == first.timings.keys()
    assert told == [(1000, 2000), (2000, 2000)]
    three = editor.edit(photo, "brighter", then=["blur it", "darker"], strength=0.5, seed=3)
    third = editor.edit(second.photo, "darker", strength=0.5, seed=3)
    assert np.array_equal(three.photo.pixels, third.photo.pixels)


def test_in_turn_refuses_before_the_first_pass(
    editor: Editor, photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(instruction: str, *_: object) -> InstructionError | None:
        return InstructionError("out of scope") if instruction == "add a dragon" else None

    monkeypatch.setattr("openwu.backbones.embedded.understanding.refusal", check)
    monkeypatch.setattr("openwu.backbones.embedded.base.EmbeddedBase.edit", lambda *_: pytest.fail("drawn"))
    for then in ("add a dragon", ["blur it", "add a dragon"], [""]):
        with pytest.raises(InstructionError):
            editor.edit(photo, "brighter", then=then)


@pytest.mark.parametrize("then", ["blur it", ["blur it"], ("blur it",)])
def test_then_may_be_one_text_or_several(editor: Editor, photo: Image.Image, then: Any) -> None:
    expected = editor.edit(photo, "brighter", then=["blur it"])
    assert differ(editor.edit(photo, "brighter", then=then).image, expected.image) == 0
    batch = editor.edit_batch([EditRequest([photo], "brighter", then=then)])
    assert differ(batch[0].image, expected.image) == 0


def test_the_sum_is_the_same_in_either_order(editor: Editor, photo: Image.Image) -> None:
    one, other = (
        Adapter.sum([editor.adapt(photo, text) for text in texts]) for texts in (("brighter", "blur it"),) * 2
    )
    reversed_ = Adapter.sum([editor.adapt(photo, text) for text in ("blur it", "brighter")])
    assert weights_differ(one, other) == 0
    for name, (a, b) in one.pairs.items():
        theirs = reversed_.pairs[name]
        torch.testing.assert_close(b @ a, theirs[1] @ theirs[0])
        assert torch.equal(a[:, :4], theirs[0][:, 4:])
        assert torch.equal(b[..., 4:], theirs[1][..., :4])
    images = [editor.edit(photo, "brighter", adapter=adapter).image for adapter in (one, reversed_)]
    assert differ(*images) <= 1


def test_a_batch_may_mix_one_instruction_and_several(
    editor: Editor, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests share the calls of their first, second and third pass."""
    asked = (
        ((24, 20), "brighter", ("blur it",), 1.0),
        ((24, 20), "darker", (), 1.0),
        ((33, 18), "blur it", ("brighter",), 0.25),
        ((24, 20), "blur it", ("darker",), 2.0),
        ((24, 20), "brighter", ("blur it", "darker"), 1.0),
        ((24, 20), "brighter", (), 0.5),
    )
    requests = [
        EditRequest([Image.fromarray(scene(*size, seed))], text, strength, seed, then)
        for seed, (size, text, then, strength) in enumerate(asked)
    ]
    passes: list[int] = []
    draw = editor.backbone.edit

    def counted(jobs: Any, *rest: Any) -> Any:
        passes.append(len(jobs))
        return draw(jobs, *rest)

    monkeypatch.setattr(editor.backbone, "edit", counted)
    results = editor.edit_batch(requests)
    assert passes == [6, 4, 1]
    assert [result.adapter.rank for result in results] == [4] * 6
    for request, result in zip(requests, results, strict=True):
        alone = editor.edit(
            request.images, request.instruction, then=request.then, strength=request.strength, seed=request.seed
        )
        assert differ(result.image, alone.image) <= 1
        assert weights_differ(result.adapter, alone.adapter) < 1e-4
        assert result.adapter.instructions == alone.adapter.instructions
    assert differ(results[0].image, editor.edit(requests[0].images, "brighter").image) > 1


def test_a_saved_sum_is_used_again_without_words(editor: Editor, photo: Image.Image, tmp_path: Path) -> None:
    texts = ("brighter please", "blur it", "darker")
    first = editor.edit(photo, adapter=Adapter.sum([editor.adapt(photo, text) for text in texts]))
    first.adapter.save_pretrained(tmp_path / "sum")
    loaded = Adapter.from_pretrained(tmp_path / "sum")
    assert loaded.instructions == (texts,)
    assert differ(editor.edit(photo, adapter=loaded).image, first.image) == 0
    # Other words reach the base, which reads them itself, under the same adapter.
    other = editor.edit(photo, "brighter", adapter=loaded)
    assert weights_differ(other.adapter, first.adapter) == 0
    assert differ(other.image, first.image) > 0


def test_then_beside_a_given_adapter_is_refused(editor: Editor, photo: Image.Image) -> None:
    adapter = editor.adapt(photo, "brighter")
    with pytest.raises(InstructionError, match="then: expected nothing beside a given adapter; edit the result"):
        editor.edit(photo, "brighter", then="blur it", adapter=adapter)


def test_every_instruction_is_checked_for_scope(editor: Editor, photo: Image.Image) -> None:
    labels = editor.backbone.config.instruction.labels
    with torch.no_grad():
        tokens = editor.backbone.instruction(["brighter", "add a dragon"]).flatten(1)
        # Out of scope is what lies nearer to the second sentence.
        across = tokens[1] - tokens[0]
        editor.backbone.instruction.classify.weight.zero_()
        editor.backbone.instruction.classify.bias.zero_()
        editor.backbone.instruction.classify.weight[labels.index("out_of_scope")] = across
        editor.backbone.instruction.classify.bias[labels.index("out_of_scope")] = -across @ (tokens.sum(0) / 2)
    assert editor.edit(photo, "brighter").image.size == photo.size
    with pytest.raises(InstructionError, match="'add a dragon'"):
        editor.edit(photo, "brighter", then="add a dragon")
    tried = editor.edit(photo, "brighter", then="add a dragon", allow_out_of_scope=True)
    assert tried.adapter.instructions == (("add a dragon",),)


# Batches


def test_a_batch_equals_its_edits(editor: Editor, scene: Scene) -> None:
    """One size shares a forward pass. One 8-bit step is allowed: sums are ordered differently in a batch."""
    images = [Image.fromarray(scene(w, h, i)) for i, (w, h) in enumerate(((40, 28), (33, 47), (40, 28), (40, 28)))]
    requests = [
        EditRequest([image], instruction, strength, seed)
        for image, instruction, strength, seed in zip(
            images, ("brighter", "blur it", "darker", "brighter"), (1.0, 2.0, -1.0, 0.5), (0, 3, 4, 0), strict=True
        )
    ]
    results = editor.edit_batch(requests)
    assert len(results) == len(requests)
    for image, request, result in zip(images, requests, results, strict=True):
        alone = editor.edit(image, request.instruction, strength=request.strength, seed=request.seed)
        assert result.image.size == image.size
        assert differ(result.image, alone.image) <= 1
        assert result.adapter.batch == 1
        for name, (a, b) in result.adapter.pairs.items():
            torch.testing.assert_close(a, alone.adapter.pairs[name][0], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(b, alone.adapter.pairs[name][1], atol=1e-5, rtol=1e-4)


def test_chunks_of_a_batch_keep_their_order(editor: Editor, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pictures fit into a pass, three come."""
    images = [Image.fromarray(scene(20, 20, seed)) for seed in range(3)]
    expected = [editor.edit(image, "brighter").image for image in images]
    monkeypatch.setattr(pieces, "TOGETHER", 2 * 20 * 20)
    for result, alone in zip(editor.edit_batch([EditRequest([i], "brighter") for i in images]), expected, strict=True):
        assert differ(result.image, alone) <= 1


def test_an_empty_batch(editor: Editor) -> None:
    assert editor.edit_batch([]) == []


def test_progress_and_timings(editor: Editor, scene: Scene, small_pieces: None) -> None:
    calls: list[tuple[int, int]] = []
    images = [Image.fromarray(scene(*size)) for size in ((200, 30), (20, 20))]
    results = editor.edit_batch(
        [EditRequest([image], "brighter") for image in images], progress=lambda *call: calls.append(call)
    )
    total = sum(pieces.number_of_pieces(editor.backbone.config.backbone, *image.size) for image in images)
    assert total > 10
    assert calls == [(done, total) for done in range(1, total + 1)]
    assert list(results[0].timings) == ["read", "condition", "generate", "edit"]
    assert all(seconds >= 0 for seconds in results[0].timings.values())


# Nothing stays behind


def test_an_error_leaves_no_adapter_behind(editor: Editor, photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = editor.edit(photo, "brighter").image
    before = quiet(editor, photo, "brighter")
    with monkeypatch.context() as patched:

        def fail(*_: Any) -> None:
            raise RuntimeError("out of luck")

        patched.setattr(editor.backbone.network.pixels, "forward", fail)
        with pytest.raises(RuntimeError, match="out of luck"):
            editor.edit(photo, "brighter")
    assert not any(site.active for site in editor.handle._sites)
    assert differ(editor.edit(photo, "brighter").image, expected) == 0
    assert differ(quiet(editor, photo, "brighter"), before) == 0


def test_editing_leaves_the_weights_alone(editor: Editor, photo: Image.Image) -> None:
    model = nn.ModuleDict({**editor.backbone.modules(), "generator": editor.generator})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    editor.edit(photo, "brighter", strength=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()


# Pictures as people have them


def test_alpha_profile_and_size_survive(editor: Editor, scene: Scene) -> None:
    image = Image.fromarray(scene(21, 13))
    alpha = Image.fromarray(np.arange(13 * 21, dtype=np.uint16).reshape(13, 21).astype(np.uint8))
    image.putalpha(alpha)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.info["icc_profile"] = profile
    edited = editor.edit(image, "brighter").image
    assert (edited.mode, edited.size) == ("RGBA", (21, 13))
    assert np.array_equal(pixels(edited.getchannel("A")), pixels(alpha))
    assert edited.info["icc_profile"] == profile
    assert differ(edited.convert("RGB"), image.convert("RGB")) > 3


@pytest.mark.parametrize("size", [(1, 1), (500, 1), (1, 500), (3, 7), (65, 63)])
def test_any_size_comes_back(editor: Editor, scene: Scene, size: tuple[int, int]) -> None:
    image = Image.fromarray(scene(*size))
    edited = editor.edit(image, "brighter").image
    assert edited.size == size
    assert differ(edited, image) > 0


def test_thin_pictures_in_pieces(editor: Editor, scene: Scene, small_pieces: None) -> None:
    for size in ((1, 300), (300, 1), (193, 2)):
        assert editor.edit(Image.fromarray(scene(*size)), "brighter").image.size == size


@pytest.mark.parametrize("cut", [False, True])
def test_16_bit_grey_keeps_its_bits(editor: Editor, cut: bool, request: pytest.FixtureRequest) -> None:
    if cut:
        request.getfixturevalue("small_pieces")
    nn.init.zeros_(editor.backbone.network.pixels.out.weight)  # a base that changes nothing
    values = (np.arange(150 * 200, dtype=np.uint32).reshape(150, 200) * 2).astype(np.uint16)
    edited = quiet(editor, Image.fromarray(values), "brighter")
    assert edited.mode == "I;16"
    assert np.array_equal(pixels(edited), values)


def test_the_condition_sees_single_pixels_of_the_whole_picture() -> None:
    wide = read_picture(Image.fromarray(np.random.default_rng(0).integers(0, 255, (3, 4000, 3), dtype=np.uint8)))
    view = condition_view(wide)
    assert view.shape == (1, 3, 1, 1000)
    assert torch.equal(view[0, :, 0, 7] * 255, torch.from_numpy(wide.pixels[0, 28]).float())
    assert condition_view(read_picture(Image.new("RGB", (9, 5)))).shape == (1, 3, 5, 9)


# Pieces


@pytest.mark.parametrize("merged", [True, False], ids=["merged weights", "hooks"])
def test_an_edit_in_pieces_is_that_in_one(
    editor: Editor, scene: Scene, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, merged: bool
) -> None:
    """No seam, and noise and places are the whole picture's: a batch through hooks on several threads, too."""
    monkeypatch.setattr(AdapterScope, "prefers_module", lambda *_: merged)
    requests = [EditRequest([Image.fromarray(scene(131, 90, i))], "brighter", seed=i) for i in range(2)]
    whole = [result.image for result in editor.edit_batch(requests)]
    request.getfixturevalue("small_pieces")
    for found, expected, asked in zip(editor.edit_batch(requests), whole, requests, strict=True):
        assert differ(found.image, expected) <= 1
        assert np.abs(pixels(found.image) - pixels(expected)).mean() < 0.01
        assert differ(found.image, asked.images[0]) > 10


def test_an_error_in_a_piece_leaves_no_adapter_behind(
    editor: Editor, photo: Image.Image, monkeypatch: pytest.MonkeyPatch, small_pieces: None
) -> None:
    monkeypatch.setattr(AdapterScope, "prefers_module", lambda *_: False)

    def stop(done: int, _: int) -> None:
        if done == 3:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        editor.edit(photo, "brighter", progress=stop)
    assert not any(site.active for site in editor.handle._sites)


# Results


def test_a_result_is_saved_with_its_metadata(editor: Editor, photo: Image.Image, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "a title"
    photo.save(tmp_path / "in.png", exif=exif, dpi=(300, 300))
    result = editor.edit(tmp_path / "in.png", "brighter")
    assert result.save(tmp_path / "out.png") == ()
    with Image.open(tmp_path / "out.png") as saved:
        assert saved.getexif()[0x010E] == "a title"
        assert np.array_equal(np.asarray(saved), result.photo.pixels)
    with pytest.raises(PictureError, match="expected a name that ends in"):
        result.save(tmp_path / "out.xyz")


def test_a_notebook_is_shown_a_small_png(editor: Editor, scene: Scene) -> None:
    import io

    result = editor.edit(Image.fromarray(scene(1100, 20)), "brighter")
    with Image.open(io.BytesIO(result._repr_png_())) as shown:
        assert (shown.format, shown.size) == ("PNG", (1024, 19))


def test_an_edit_of_strength_zero_is_the_input_bit_for_bit(editor: Editor) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (20, 24, 3)).astype(np.uint16)
    assert np.array_equal(editor.edit(values, "brighter", strength=0).photo.pixels, values)
    batch = [EditRequest([values], "brighter", strength=strength) for strength in (0, 1)]
    still, changed = editor.edit_batch(batch)
    assert np.array_equal(still.photo.pixels, values)
    assert not np.array_equal(changed.photo.pixels, values)


def test_what_was_understood_is_returned(editor: Editor, photo: Image.Image) -> None:
    with torch.no_grad():
        editor.backbone.instruction.classify.bias[0] = 100
    result = editor.edit(photo, "brighter")
    assert result.understood is not None
    assert (result.understood.edit, result.understood.instruction) == ("brighten", "brighter")
    assert result.understood.probability > 0.99
    assert {name for name, _ in result.understood.runners_up} == {"darken", "blur"}
    assert str(result.understood) == "brighten (100%)"
    assert editor.understand("brighter") == result.understood
    both = editor.edit(photo, "brighter", then="blur it")
    assert both.understood is not None
    assert [each.instruction for each in (both.understood, *both.understood.then)] == ["brighter", "blur it"]
    assert editor.edit(photo, "whatever", allow_out_of_scope=True).understood is not None


def test_an_edit_is_asked_for_by_name(editor: Editor, photo: Image.Image) -> None:
    with torch.no_grad():
        editor.backbone.instruction.classify.bias[0] = 100
    expected = editor.edit(photo, "brighter please").image
    assert differ(editor.edit(photo, edit="brighten").image, expected) == 0
    assert differ(editor.edit_batch([EditRequest([photo], edit="brighten")])[0].image, expected) == 0
    with pytest.raises(InstructionError, match="edit: blur is not understood by this model"):
        editor.edit(photo, edit="blur")
    with pytest.raises(InstructionError, match="names that `openwu edits` lists, for example brighten; got 'brigten'"):
        editor.edit(photo, edit="brigten")


def test_a_sentence_of_several_edits_runs_them_in_turn(
    editor: Editor, photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    def split(text: str, read: Any, accepted: float) -> tuple[Wish, ...]:
        del accepted
        parts = text.split(" and ")
        strengths = [0.5 if part == "blur it" else 1.0 for part in parts]
        return tuple(map(Wish, parts, read(parts), strengths))

    monkeypatch.setattr("openwu.backbones.embedded.understanding.wishes", split)
    first = editor.edit(photo, "brighter", seed=3)
    second = editor.edit(first.photo, "blur it", seed=3)
    result = editor.edit(photo, "brighter and blur it", seed=3)
    assert np.array_equal(result.photo.pixels, second.photo.pixels)
    assert result.understood is not None
    assert [each.instruction for each in (result.understood, *result.understood.then)] == ["brighter", "blur it"]
    assert weights_differ(editor.adapt(photo, "blur it"), result.adapter) > 1e-6  # of the brighter picture
    batch = editor.edit_batch([EditRequest([photo], text, seed=3) for text in ("brighter and blur it", "brighter")])
    assert differ(batch[0].image, result.image) <= 1
    assert differ(batch[1].image, first.image) <= 1
    with pytest.raises(InstructionError, match="asks for several edits"):
        editor.adapt(photo, "brighter and blur it")
    three = editor.edit(photo, "brighter and blur it", then="darker", seed=3)
    assert np.array_equal(three.photo.pixels, editor.edit(result.photo, "darker", seed=3).photo.pixels)
