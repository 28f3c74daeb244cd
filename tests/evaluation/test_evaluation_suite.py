"""The edit suite's scores: means, cases, methods."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from openwu.backbones.embedded.network import noise_plane, place_planes
from openwu.data.suite import EDITS
from openwu.data.suite.core import Scene
from openwu.data.suite.phrases import load_phrases
from openwu.editor.editor import Editor
from openwu.errors import OpenwuError
from openwu.evaluation.pictures import to_image
from openwu.evaluation.suite import (
    METHODS,
    Report,
    Score,
    apply,
    draw_cases,
    evaluate_suite,
    following,
    generate,
    make_cases,
    psnr_of,
    run_methods,
    sorted_position,
)
from openwu.training.embedded.model import EmbeddedModel
from openwu.types import Adapter

FEW = ("brighten", "darken", "blur")


def score(edit: str, method: str, psnr: float, language: str = "en", split: str = "train") -> Score:
    return Score(edit, "coffee", method, 0, language, split, psnr, psnr / 100)


def test_means_are_over_what_was_asked_for() -> None:
    report = Report([score("blur", "base", 10), score("fog", "base", 20), score("blur", "generated", 40)])
    assert report.mean("psnr", "base") == 15
    assert report.mean("psnr", "base", ["fog"]) == 20
    assert report.mean("ssim", "generated", ["blur"], language="en") == pytest.approx(0.4)
    assert math.isnan(report.mean("psnr", "generated", language="zh"))
    assert report.methods == ["base", "generated"]
    assert report.edits == ["blur", "fog"]


def test_the_summary_is_about_pairs_and_differences() -> None:
    scores = [score(edit, method, 10) for edit in ("blur", "deblur", "pencil") for method in METHODS]
    scores += [score("blur", "generated", 40, "zh"), score("blur", "generated", 25, split="held_out")]
    scores += [score("pencil", "shuffled", 90)]  # no pair: must not count
    report = Report(scores)
    assert report.paired == ["blur", "deblur"]
    summary = report.summary()
    generated = (10 + 10 + 40 + 25) / 4
    for method in set(METHODS) - {"generated"}:
        assert summary[f"pairs_psnr_{method}"] == 10
        assert summary[f"generated_minus_{method}"] == pytest.approx(generated - 10)
    assert summary["pairs_psnr_generated"] == pytest.approx(generated)
    assert summary["pairs_ssim_generated"] == pytest.approx(generated / 100)
    assert summary["all_psnr_shuffled"] == pytest.approx((10 + 10 + 10 + 90) / 4)


def test_a_summary_without_the_baseline_leaves_it_out() -> None:
    scores = [score(edit, method, 10) for edit in ("blur", "deblur") for method in METHODS if method != "shared"]
    assert not any("shared" in name for name in Report(scores).summary())


def test_missed_is_what_does_not_beat_its_input() -> None:
    scores = [score(edit, "input", 20) for edit in ("blur", "fog", "rain", "sepia")]
    scores += [score("blur", "generated", 20.1), score("fog", "generated", 20), score("rain", "generated", 10)]
    scores += [score("sepia", "generated", math.nan)]
    assert Report(scores).missed() == [name for name in EDITS if name in {"fog", "rain", "sepia"}]


def test_cases_depend_on_their_names_alone(source: torch.Tensor) -> None:
    second = source.flip(0)
    some = draw_cases("coffee", source, 1, ("darken", "denoise", "take_palette"), second)
    more = draw_cases("coffee", source, 1, ("brighten", "darken", "denoise", "take_palette"), second)
    assert some.sentences == more.sentences[1:]
    for name in ("picture", "planes", "target", "reference", "present"):
        assert torch.equal(getattr(some, name), getattr(more, name)[1:])
    again = draw_cases("coffee", source, 5, ("darken", "denoise", "take_palette"), second)
    assert not torch.equal(again.picture, some.picture)


def test_only_reference_edits_have_a_second_picture(source: torch.Tensor) -> None:
    second = torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(1))
    cases = draw_cases("coffee", source, 0, ("brighten", "take_light", "take_grain"), second)
    assert cases.present.tolist() == [False, True, True]
    assert cases.reference.shape == (3, 3, 20, 20)
    assert not cases.reference[0].any()
    assert not torch.equal(cases.reference[1], cases.reference[2])
    for row in (1, 2):  # made from the second photograph, not from the first
        assert float(torch.corrcoef(torch.stack([cases.reference[row].flatten(), second.flatten()]))[0, 1]) > 0.7


def test_the_model_sees_the_noise_of_the_scene_and_every_pixels_place(source: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 24, 32, generator=generator)
    cases = make_cases("x", ["add_noise"], ["add grain"], [Scene(source, noise, generator)], "en", "train")
    assert torch.equal(cases.planes[0, :1], noise)
    assert torch.equal(cases.planes[0, 1:], place_planes(24, 32))
    assert torch.equal(cases.target[0], (source + 0.1 * noise).clamp(0, 1))


def test_languages_and_splits_take_turns(source: torch.Tensor) -> None:
    cases = [draw_cases("astronaut", source, seed, FEW, source) for seed in range(4)]
    assert [(each.language, each.split) for each in cases] == [
        ("en", "train"),
        ("zh", "train"),
        ("en", "held_out"),
        ("zh", "held_out"),
    ]
    for each in cases:
        for edit, sentence in zip(each.edits, each.sentences, strict=True):
            assert sentence in load_phrases()[edit][each.language][each.split]
    assert sorted_position("chelsea") == 1
    assert sorted_position("elsewhere") == 0


def test_the_second_photograph_is_the_next_one(photographs: dict[str, torch.Tensor]) -> None:
    assert following("astronaut", photographs) is photographs["coffee"]
    assert following("rocket", photographs) is photographs["astronaut"]


@torch.inference_mode()
@pytest.mark.parametrize(
    "edits", [("brighten", "blur"), FEW, (*FEW, "fog", "age", "take_palette", "warm", "take_style", "cool")]
)
def test_methods_are_what_they_say(
    embedded_model: EmbeddedModel, shared: Adapter, source: torch.Tensor, edits: tuple[str, ...]
) -> None:
    """Shuffled above all: never the adapter of the same sub-task, also where rows go in blocks."""
    cases = draw_cases("coffee", source, 0, edits, source.flip(2))
    outputs = dict(run_methods(embedded_model, shared, cases))
    assert set(outputs) == set(METHODS) - {"input"}
    text = embedded_model.instruction(cases.sentences)
    own = [
        embedded_model.adapt(
            cases.picture[i : i + 1], text[i : i + 1], cases.reference[i : i + 1] if cases.present[i] else None
        )
        for i in range(len(edits))
    ]

    def alone(i: int, adapter: Adapter | None) -> torch.Tensor:
        row = slice(i, i + 1)
        return embedded_model.edit(cases.picture[row], cases.planes[row], text[row], adapter)[0]

    for i in range(len(edits)):
        torch.testing.assert_close(outputs["base"][i], alone(i, None), atol=1e-4, rtol=0)
        torch.testing.assert_close(outputs["shared"][i], alone(i, shared), atol=1e-4, rtol=0)
        torch.testing.assert_close(outputs["generated"][i], alone(i, own[i]), atol=1e-4, rtol=0)
        distances = [float((outputs["shuffled"][i] - alone(i, adapter)).abs().max()) for adapter in own]
        assert min(distances) < 1e-4
        assert distances.index(min(distances)) != i
        assert distances[i] > 1e-3
    assert set(dict(run_methods(embedded_model, None, cases))) == {"base", "generated", "shuffled"}


def test_scores_are_those_of_the_8_bit_picture(
    embedded_model: EmbeddedModel, shared: Adapter, photographs: dict[str, torch.Tensor]
) -> None:
    two = {name: photographs[name] for name in ("coffee", "rocket")}
    report = evaluate_suite(embedded_model, shared, two, [0, 1], FEW)
    assert len(report.scores) == len(FEW) * len(METHODS) * 2 * 2
    cases = draw_cases("coffee", two["coffee"], 1, FEW, two["rocket"])
    eight_bit = (cases.picture[1] * 255).round() / 255
    expected = float(-10 * (eight_bit - cases.target[1]).square().mean().log10())
    copied = [
        each.psnr
        for each in report.scores
        if (each.edit, each.photograph, each.method, each.seed) == ("darken", "coffee", "input", 1)
    ]
    assert copied == pytest.approx([expected], abs=1e-3)
    assert all(-1 < each.ssim <= 1 for each in report.scores)
    assert list(report.grid) == list(FEW)
    assert all(len(cells) == len(METHODS) + 1 for cells in report.grid.values())
    with pytest.raises(OpenwuError, match="at least two sub-tasks"):
        evaluate_suite(embedded_model, shared, two, [0], ["blur"])


@torch.inference_mode()
@pytest.mark.parametrize("edit", ["brighten", "take_palette"])
def test_the_suite_measures_what_the_editor_makes(
    editor: Editor, photographs: dict[str, torch.Tensor], edit: str
) -> None:
    """They go different ways through the same model."""
    source, second = photographs["coffee"], photographs["rocket"]
    height, width = source.shape[1:]
    scene = Scene(source, noise_plane(width, height, 5).float(), torch.Generator(), second=second)
    cases = make_cases("coffee", [edit], ["do something"], [scene], "en", "train")
    measured = apply(editor.model, cases, *generate(editor.model, cases))[0]
    pictures = [to_image(source)]
    if cases.present[0]:
        pictures.append(to_image(cases.reference[0]))
    edited = editor.edit(pictures, "do something", seed=5).image
    difference = np.abs(np.asarray(edited).astype(int) - np.asarray(to_image(measured)))
    assert difference.max() <= 2  # the editor's reference has 8 bits
    assert np.abs(np.asarray(edited).astype(int) - np.asarray(pictures[0])).max() > 3


def test_psnr_is_of_what_a_file_shows() -> None:
    target = torch.full((3, 4, 4), 0.5)
    assert psnr_of(target + 0.1, (target + 0.1) * 0 + 153 / 255) == pytest.approx(100)
    assert psnr_of(torch.full((3, 4, 4), 9.0), torch.ones(3, 4, 4)) == pytest.approx(100)
    assert psnr_of(torch.zeros(3, 4, 4), torch.ones(3, 4, 4)) == pytest.approx(0, abs=1e-5)
    assert math.isnan(psnr_of(target * math.nan, target))
