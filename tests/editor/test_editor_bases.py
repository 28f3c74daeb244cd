"""The whole path with large bases of random weights: from Python, from saved folders, and what does not fit."""

from __future__ import annotations

import copy
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import base_cases
import numpy as np
import pytest
import torch
from PIL import Image

import openwu
from openwu.backbones import backbone_class
from openwu.backbones.embedded.base import EmbeddedBase
from openwu.conditions.denoiser_states import DenoiserStates
from openwu.config import GeneratorConfig
from openwu.editor.compatibility import check_targets, encoder_for, fingerprint, generator_config, target_widths
from openwu.editor.editor import Editor
from openwu.editor.requests import EditRequest
from openwu.errors import InstructionError, OpenwuError, PictureError, TargetError
from openwu.generator.model import ParameterGenerator
from openwu.images import read_picture
from openwu.types import BaseRequest, SamplingOptions


@pytest.fixture(params=("instruct-pix2pix", "flux-kontext"))
def editor(request: pytest.FixtureRequest) -> Any:
    base = base_cases.backbone(request.param)
    made = Editor(base, base_cases.generator(base), sampling=base_cases.FAST, name=request.param)
    yield made
    made.handle.detach()


@pytest.fixture
def kontext() -> Any:
    base = base_cases.backbone("flux-kontext")
    made = Editor(base, base_cases.generator(base), sampling=base_cases.FAST)
    yield made
    made.handle.detach()


def pixels(result: openwu.EditResult) -> np.ndarray[Any, Any]:
    return np.asarray(result.photo.pixels, np.int32)


def difference(one: openwu.EditResult, other: openwu.EditResult) -> int:
    return int(np.abs(pixels(one) - pixels(other)).max())


def test_an_edit_follows_adapter_seed_and_strength_and_keeps_the_photograph_s_size(editor: Editor) -> None:
    photo = base_cases.picture(1, 50, 70)
    result = editor.edit(photo, "make it warm", seed=3)
    assert result.image.size == (50, 70)
    assert set(result.timings) == {"read", "condition", "generate", "edit"}
    assert result.adapter.instructions == (("make it warm",),)
    assert difference(result, editor.edit(photo, "make it warm", seed=3)) == 0
    assert difference(result, editor.edit(photo, "make it warm", seed=4)) > 3
    assert difference(result, editor.edit(photo, "make it warm", seed=3, strength=0.0)) > 3
    again = editor.edit(photo, seed=3, adapter=editor.adapt(photo, "make it warm"))
    assert difference(result, again) == 0


def test_a_batch_is_its_requests_one_at_a_time(editor: Editor) -> None:
    requests = [
        EditRequest([base_cases.picture(1, 60, 60)], "make it warm", seed=1),
        EditRequest([base_cases.picture(2, 60, 60)], "blur it", strength=0.5, seed=2),
        EditRequest([base_cases.picture(1, 60, 60)], "blur it", seed=1, then=["make it warm"]),
    ]
    together = editor.edit_batch(requests)
    for request, result in zip(requests, together, strict=True):
        alone = editor.edit(
            request.images, request.instruction, then=request.then, strength=request.strength, seed=request.seed
        )
        assert difference(result, alone) <= 1
    assert together[2].adapter.instructions == (("make it warm",),)
    assert editor.edit_batch([]) == []


def test_adapters_are_the_clear_generator_s(editor: Editor) -> None:
    """Generated at once and on the fast path, against one at a time on the clear one."""
    texts = ("make it warm", "draw it in oil, please", "blur")
    requests = [EditRequest([base_cases.picture(i, 60, 60 + 30 * i)], text, seed=i) for i, text in enumerate(texts)]
    calls: list[int] = []
    condition = editor.encoder.condition

    def counted(asked: Any) -> Any:
        calls.append(len(asked))
        return condition(asked)

    editor.encoder.condition = counted  # type: ignore[method-assign]
    try:
        results = editor.edit_batch(requests, sampling=SamplingOptions(steps=1, pixels=base_cases.PIXELS, batch=2))
    finally:
        del editor.encoder.condition  # type: ignore[attr-defined]
    assert calls == [2, 1]
    for request, result in zip(requests, results, strict=True):
        assert result.adapter.instructions == ((request.instruction,),)
        (picture,) = request.images
        assert isinstance(picture, Image.Image)
        with torch.no_grad():
            expected = editor.generator(condition([BaseRequest((picture,), request.instruction, request.seed)]))
        for name, pair in expected.pairs.items():
            for clear, fast in zip(pair, result.adapter.pairs[name], strict=True):
                torch.testing.assert_close(fast, clear, rtol=1e-4, atol=1e-5)


def test_references_reach_the_adapter(kontext: Editor) -> None:
    photo = base_cases.picture(1)
    one, other = (kontext.edit([photo, base_cases.picture(seed)], "take its colours") for seed in (2, 3))
    assert difference(one, other) > 0


def test_sixteen_bits_and_transparency_survive(kontext: Editor, tmp_path: Path) -> None:
    image = base_cases.picture(1, 70, 66).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((70, 66)))
    image.save(tmp_path / "clear.png")
    result = kontext.edit(tmp_path / "clear.png", "make it warm")
    assert result.photo.alpha is not None
    assert np.array_equal(result.photo.alpha, np.asarray(image)[:, :, 3])


def test_a_call_s_own_options_win(kontext: Editor) -> None:
    seen: list[tuple[int, int]] = []
    kontext.edit(
        base_cases.picture(1),
        "make it warm",
        sampling=SamplingOptions(steps=3, pixels=4096, true_guidance=2.0),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (3, 3)


def test_in_turn_is_what_two_calls_make(kontext: Editor) -> None:
    photo = base_cases.picture(1, 60, 60)
    first = kontext.edit(photo, "make it warm", seed=1)
    second = kontext.edit(first.photo, "blur it", seed=1)
    assert difference(kontext.edit(photo, "make it warm", then="blur it", seed=1), second) == 0
    assert difference(first, second) > 0


def test_requests_that_cannot_be(kontext: Editor) -> None:
    adapter = base_cases.adapter(kontext.backbone, 2)
    with pytest.raises(TargetError, match="adapter: expected one sample, got 2"):
        kontext.edit(base_cases.picture(1), adapter=adapter)
    with pytest.raises(InstructionError, match="then: expected nothing beside a given adapter"):
        kontext.edit(base_cases.picture(1), adapter=adapter.select([0]), then="more")
    with pytest.raises(PictureError, match="images: expected the picture to edit"):
        kontext.edit([], "warm")
    with pytest.raises(InstructionError):
        kontext.edit(base_cases.picture(1), "")


def test_a_generator_of_another_base_is_refused_with_both_fingerprints() -> None:
    pix2pix, klein = base_cases.backbone("instruct-pix2pix"), base_cases.backbone("flux2-klein")
    ours, theirs = (fingerprint(target_widths(base.layer_groups())) for base in (klein, pix2pix))
    with pytest.raises(TargetError) as caught:
        Editor(pix2pix, base_cases.generator(klein), name="instruct-pix2pix")
    message = str(caught.value)
    assert ours in message
    assert theirs in message
    assert "transformer_blocks.0.attn.to_q (32 -> 32, here none)" in message
    assert "this instruct-pix2pix" in message


def test_a_generator_may_adapt_less_but_must_read_the_same_condition() -> None:
    base = base_cases.backbone("flux-kontext")
    config = base_cases.generator(base).config.to_dict()
    fewer = GeneratorConfig.from_dict({**config, "groups": config["groups"][:1]})
    check_targets(fewer, base, "flux-kontext")
    blind = {key: value for key, value in config.items() if key != "more_inputs"}
    with pytest.raises(
        TargetError, match=r"reads conditions of widths 16 \{\}, but this flux-kontext makes 16 \{'pict"
    ):
        encoder_for(GeneratorConfig.from_dict(blind), base, "flux-kontext")


def test_a_fingerprint_depends_on_names_and_widths_alone() -> None:
    widths = {"a": (1, 2, None), "b": (3, 4, None)}
    assert fingerprint(widths) == fingerprint(dict(reversed(widths.items())))
    assert fingerprint(widths) != fingerprint({**widths, "b": (3, 5, None)})
    assert fingerprint(widths) != fingerprint({"a": (1, 2, None)})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and a generator for it, on disk."""
    root = tmp_path_factory.mktemp("large")
    base = base_cases.backbone("flux-kontext")
    base.pipeline.save_pretrained(root / "base")
    base_cases.generator(base).save_pretrained(root / "generator")
    return root / "base", root / "generator"


def test_from_folders_in_python_and_on_the_command_line(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from openwu import cli

    base, generator = folders
    base_cases.picture(1, 80, 60).save(tmp_path / "photo.png")
    line = f"edit {tmp_path}/photo.png --instruction warm --model flux-kontext --base {base} --generator {generator}"
    assert cli.main([*line.split(), "--steps", "2", "--pixels", "4096", "--output", f"{tmp_path}/out.png"]) == 0
    assert "edit" in capsys.readouterr().out
    editor = openwu.Editor.from_pretrained("flux-kontext", base=base, generator=generator, sampling=base_cases.FAST)
    expected = editor.edit(tmp_path / "photo.png", "warm").image
    with Image.open(tmp_path / "out.png") as written:
        assert np.abs(np.asarray(written, np.int32) - np.asarray(expected, np.int32)).max() <= 1


def test_folders_and_options_that_do_not_belong_together(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from openwu import cli

    base, generator = folders
    with pytest.raises(OpenwuError, match=r"generator=FOLDER \(--generator\) together, got model=flux-kontext, base="):
        openwu.Editor.from_pretrained("flux-kontext", base=base)
    with pytest.raises(OpenwuError, match="together"):
        openwu.Editor.from_pretrained("flux-kontext")
    with pytest.raises(OpenwuError, match="model: expected one of instruct-pix2pix"):
        openwu.Editor.from_pretrained("stable-cascade", base=base, generator=generator)
    with pytest.raises(OpenwuError, match=r"expected a folder with config\.json"):
        openwu.Editor.from_pretrained("flux-kontext", base=base, generator=tmp_path / "none")
    with pytest.raises(OpenwuError, match=r"base: expected a folder with a diffusers pipeline"):
        openwu.Editor.from_pretrained("flux-kontext", base=tmp_path / "no base", generator=tmp_path / "none")
    with pytest.raises(OpenwuError, match=r"expected a pipeline of class StableDiffusionInstructPix2PixPipeline"):
        openwu.Editor.from_pretrained("instruct-pix2pix", base=base, generator=tmp_path / "none")
    with pytest.raises(OpenwuError, match=r"/none: expected a folder with config\.json"):  # nothing is downloaded first
        openwu.Editor.from_pretrained("flux-kontext", base="nobody/nothing", generator=tmp_path / "none")
    for loading, message in (
        (openwu.LoadingOptions(device="cuda"), "device: expected cpu for the embedded model, got cuda"),
        (openwu.LoadingOptions(revision="main"), "revision: expected none for the embedded model"),
        (openwu.LoadingOptions(quantise="8bit"), "quantise: expected none for embedded"),
    ):
        with pytest.raises(OpenwuError, match=message):
            openwu.Editor.from_pretrained(loading=loading)
    base_cases.picture(1).save(tmp_path / "photo.png")
    assert cli.main(["edit", f"{tmp_path}/photo.png", "--instruction", "warm", "--steps", "3"]) == 2
    assert "--steps: expected only with --base and --generator" in capsys.readouterr().err


def test_a_generator_that_does_not_fit_is_refused_before_weights_are_opened(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """The base's files are garbage behind their headers: whatever reads them fails otherwise."""
    base, generator = tmp_path / "base", tmp_path / "generator"
    shutil.copytree(folders[0], base)
    for file in base.glob("*/*.safetensors"):
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        file.write_bytes(file.read_bytes()[:header])
    other = base_cases.backbone("instruct-pix2pix")
    base_cases.generator(other).save_pretrained(generator)
    with pytest.raises(TargetError, match="it was made for another base than this flux-kontext: targets"):
        openwu.Editor.from_pretrained("flux-kontext", base=base, generator=generator)
    fitting = base_cases.generator(base_cases.backbone("flux-kontext")).config
    ParameterGenerator(replace(fitting, input_dim=24)).save_pretrained(generator)
    with pytest.raises(TargetError, match="it reads conditions of widths 24 "):
        openwu.Editor.from_pretrained("flux-kontext", base=base, generator=generator)


@pytest.mark.parametrize("name", base_cases.NAMES)
def test_a_base_without_weights_has_the_same_layers_and_widths(name: str, tmp_path: Path) -> None:
    whole = base_cases.backbone(name)
    whole.pipeline.save_pretrained(tmp_path)
    seen: list[Any] = []
    with pytest.raises(ZeroDivisionError):
        type(whole).from_pretrained(tmp_path, before_weights=lambda hollow: seen.append(hollow) or 1 / 0)
    (hollow,) = seen
    assert hollow.layer_groups() == whole.layer_groups()
    assert hollow.condition_widths == whole.condition_widths


def test_models_lists_every_base_with_its_licence_and_extra(capsys: pytest.CaptureFixture[str]) -> None:
    from openwu import cli
    from openwu.registry import BASES, DEFAULT_BASE

    assert cli.main(["models"]) == 0
    out = capsys.readouterr().out
    for name in BASES:
        assert name in out.splitlines() or name == DEFAULT_BASE
        assert backbone_class(name).facts.licence in out
    assert "pip install 'openwu[diffusers]'" in out


def written(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many adapters each run of the generator writes from now on."""
    counts: list[int] = []
    fast = editor.fast

    def counted(condition: Any) -> Any:
        adapter = fast(condition)
        counts.append(adapter.batch)
        return adapter

    counted.described = fast.described  # type: ignore[attr-defined]
    monkeypatch.setattr(editor, "fast", counted)
    return counts


def test_a_large_base_s_adapters_are_kept_too(kontext: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    photo, other = base_cases.picture(1, 60, 60), base_cases.picture(2, 60, 60)
    expected = [kontext.edit(photo, "make it warm", seed=seed) for seed in (1, 2)]
    kontext.cache = openwu.AdapterCache()
    counts = written(kontext, monkeypatch)
    for seed, plain in zip((1, 2), expected, strict=True):
        result = kontext.edit(photo, "make it warm", seed=seed)
        assert difference(result, plain) == 0
        assert result.adapter.instructions == (("make it warm",),)
    assert counts == [1]  # this base reads no seed
    requests = [EditRequest([photo], "blur it"), EditRequest([photo], "blur it", seed=7)]
    requests += [EditRequest([photo], "make it warm", then=["blur it"]), EditRequest([other], "make it warm")]
    results = kontext.edit_batch(requests)
    # Equal requests are generated once, in one run with what else is missing; second passes have a run of their own.
    assert counts == [1, 2, 1]
    kontext.cache = None
    for request, result in zip(requests, results, strict=True):
        alone = kontext.edit(request.images, request.instruction, then=request.then, seed=request.seed)
        assert difference(result, alone) <= 1


def test_a_key_has_the_seed_where_the_condition_draws() -> None:
    base = base_cases.backbone("flux-kontext")
    encoder = DenoiserStates(base, "transformer_blocks.1")
    config = generator_config(
        base, encoder=encoder, rank=2, token_dim=32, d_model=32, head_dim=16, dim_accumulation=2, num_pg_layers=1
    )
    editor = Editor(base, ParameterGenerator(config), sampling=base_cases.FAST, cache=openwu.AdapterCache())
    try:
        assert editor.encoder is not base
        for seed in (1, 2, 1):
            editor.adapt(base_cases.picture(1), "make it warm", seed=seed)
        assert editor.cache is not None
        assert (editor.cache.statistics.hits, editor.cache.statistics.misses) == (1, 2)
    finally:
        editor.handle.detach()


def test_a_cache_tells_bases_of_other_weights_apart(kontext: Editor) -> None:
    job = kontext.backbone.read((read_picture(base_cases.picture(1)),), ("make it warm",))
    key = kontext.adapter_key(job)
    other: Any = backbone_class("flux-kontext")(copy.deepcopy(kontext.backbone.pipeline))  # type: ignore[call-arg]
    other.condition_pixels = other.pixels = base_cases.PIXELS
    with torch.no_grad():
        next(other.pipeline.text_encoder_2.parameters()).add_(0.1)
    again = Editor(other, kontext.generator, sampling=base_cases.FAST)
    assert again.adapter_key(job) != key
    assert kontext.adapter_key(job) == key


def test_what_a_base_cannot_serve_is_refused_by_name(kontext: Editor, model_folder: Path) -> None:
    photo = base_cases.picture(1)
    for refused in (
        lambda: kontext.edit(photo, "warm", allow_out_of_scope=True),
        lambda: kontext.adapt(photo, "warm", allow_out_of_scope=True),
        lambda: kontext.edit_batch([EditRequest([photo], "warm")], allow_out_of_scope=True),
    ):
        with pytest.raises(InstructionError, match="allow_out_of_scope: expected False for FluxKontext, which refuses"):
            refused()
    embedded = openwu.Editor.from_pretrained(model_folder)
    for name, value in {"steps": 3, "guidance": 2.0, "image_guidance": 1.0, "true_guidance": 1.0, "pixels": 9}.items():
        options = SamplingOptions(**{name: value})  # type: ignore[arg-type]
        with pytest.raises(OpenwuError, match=f"^{name}: expected none for the embedded model"):
            embedded.edit(photo, "brighter", sampling=options)
    with pytest.raises(InstructionError, match="reasoning: expected none for embedded"):
        embedded.adapt(photo, "brighter", reasoning="because")
    for editor, name in ((embedded, "embedded"), (kontext, "FluxKontext")):
        with pytest.raises(OpenwuError, match=f"^image_size: expected none for {name}, whose results have the photogr"):
            editor.edit(photo, "brighter", image_size="64x64")
        with pytest.raises(OpenwuError, match=f"^fit_to_photo: expected none for {name}, whose results have the photo"):
            editor.edit(photo, "brighter", sampling=SamplingOptions(fit_to_photo=True))
        with pytest.raises(OpenwuError, match=r"^image_size: expected none"):
            editor.adapt(photo, "brighter", image_size="1:2")
        with pytest.raises(OpenwuError, match="fit_to_photo: expected True or False, got 'yes'"):
            editor.edit(photo, "brighter", sampling=SamplingOptions(fit_to_photo="yes"))  # type: ignore[arg-type]


def test_without_a_seed_it_is_the_base_s_and_the_result_tells(kontext: Editor) -> None:
    photo = base_cases.picture(1)
    result = kontext.edit(photo, "warm")
    assert result.seed == kontext.backbone.default_seed == 0
    assert difference(result, kontext.edit(photo, "warm", seed=0)) == 0
    assert [each.seed for each in kontext.edit_batch([EditRequest(photo, "warm", seed=s) for s in (None, 7)])] == [0, 7]


def test_threads_take_turns_in_a_large_base(kontext: Editor) -> None:
    requests = [(base_cases.picture(i, 60, 60), text) for i, text in enumerate(("make it warm", "blur", "draw it"))]
    alone = [kontext.edit(photo, text, seed=1) for photo, text in requests]
    with ThreadPoolExecutor(3) as threads:
        started = [threads.submit(kontext.edit, photo, text, seed=1) for photo, text in requests]
        for one, expected in zip(started, alone, strict=True):
            assert difference(one.result(), expected) == 0


def test_a_generator_of_one_s_own_for_the_embedded_base(model_folder: Path, tmp_path: Path) -> None:
    base = EmbeddedBase.from_pretrained(model_folder, dtype=torch.float32)
    base_cases.generator(base).save_pretrained(tmp_path)
    loading = openwu.LoadingOptions(dtype=torch.float32)
    editor = Editor.from_pretrained("embedded", base=model_folder, generator=tmp_path, loading=loading)
    photo = base_cases.picture(1, 40, 30)
    results = [editor.edit(photo, "brighter", strength=strength) for strength in (1.0, 0.0)]
    assert difference(*results) > 0
    bundled = Editor.from_pretrained(model_folder, loading=loading).edit(photo, "brighter", strength=0.0)
    assert difference(results[1], bundled) == 0


def test_the_embedded_base_serves_what_knows_it_only_as_a_base(model_folder: Path) -> None:
    """Conditions and pictures from plain requests, as encoders and training ask any base."""
    base = EmbeddedBase.from_pretrained(model_folder, dtype=torch.float32)
    editor = Editor.from_pretrained(model_folder, loading=openwu.LoadingOptions(dtype=torch.float32))
    photo = base_cases.picture(1, 40, 30)
    request = BaseRequest((photo,), "brighter", seed=4)
    job = base.read((read_picture(photo),), ("brighter",), 4)
    assert torch.equal(base.condition([request]).tokens, base.condition_of([job]).tokens)
    (picture,) = base.generate([request], SamplingOptions(), base_cases.nothing)
    silent = editor.adapt(photo, "brighter").scaled(0.0)
    plain = editor.edit(photo, "brighter", adapter=silent, seed=4)
    assert torch.equal((picture * 255).round().permute(1, 2, 0).int(), torch.from_numpy(pixels(plain)))
    with pytest.raises(OpenwuError, match="training: expected a base with a loss of its own, got EmbeddedBase"):
        base.latent_batch([request], [torch.zeros(3, 8, 8)])
