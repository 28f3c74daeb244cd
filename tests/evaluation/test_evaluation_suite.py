"""The edit suite's scores: means, cases, methods."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from openwu.backbones.embedded.network import noise_plane, place_planes
from openwu.data.suite import EDITS
from openwu.data.suite.core import Scene
from openwu.data.suite.phrases import load_phrases
from openwu.editor.editor import Editor
from openwu.errors import OpenwuError
from openwu.evaluation.cases import BATCH, batches, draw_cases, edit, following, generate, make_case
from openwu.evaluation.metrics import psnr
from openwu.evaluation.pictures import to_image
from openwu.evaluation.suite import METHODS, Report, Score, evaluate_suite, run_methods
from openwu.training.embedded.model import EmbeddedModel
from openwu.types import Adapter

FEW = ("brighten", "darken", "blur")


def score(name: str, method: str, quality: float, language: str = "en", split: str = "train") -> Score:
    return Score(name, "coffee", method, 0, language, split, quality, quality / 100)


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


def pictures(source: torch.Tensor, second: torch.Tensor, name: str = "coffee") -> dict[str, torch.Tensor]:
    """A photograph under a name, and the one that follows it."""
    return {name: source, "zebra": second}


def test_cases_depend_on_their_names_alone(source: torch.Tensor) -> None:
    photographs = pictures(source, source.flip(0))
    some = draw_cases(photographs, ("darken", "denoise", "take_palette"), 1, only="coffee")
    more = draw_cases(photographs, ("brighten", "darken", "denoise", "take_palette"), 1)[1:4]
    for one, other in zip(some, more, strict=True):
        assert one.instruction == other.instruction
        for name in ("picture", "planes", "target"):
            assert torch.equal(getattr(one, name), getattr(other, name))
    assert some[2].reference is not None
    assert more[2].reference is not None
    assert torch.equal(some[2].reference, more[2].reference)
    again = draw_cases(photographs, ("darken", "denoise", "take_palette"), 5, only="coffee")
    assert not torch.equal(again[1].picture, some[1].picture)


def test_only_reference_edits_have_a_second_picture(source: torch.Tensor) -> None:
    second = torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(1))
    plain, light, grain = draw_cases(pictures(source, second), ("brighten", "take_light", "take_grain"), 0, "coffee")
    assert plain.reference is None
    assert light.reference is not None
    assert grain.reference is not None
    assert not torch.equal(light.reference, grain.reference)
    for reference in (light.reference, grain.reference):  # made from the second photograph, not from the first
        assert reference.shape == (3, 20, 20)
        assert float(torch.corrcoef(torch.stack([reference.flatten(), second.flatten()]))[0, 1]) > 0.7


def test_the_model_sees_the_noise_of_the_scene_and_every_pixels_place(source: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 24, 32, generator=generator)
    case = make_case("add_noise", "add grain", Scene(source, noise, generator))
    assert torch.equal(case.planes[:1], noise)
    assert torch.equal(case.planes[1:], place_planes(24, 32))
    assert torch.equal(case.target, (source + 0.1 * noise).clamp(0, 1))


def test_languages_and_splits_take_turns(source: torch.Tensor) -> None:
    photographs = pictures(source, source, "astronaut")
    cases = [draw_cases(photographs, FEW, seed, only="astronaut") for seed in range(4)]
    assert [{(case.language, case.split) for case in each} for each in cases] == [
        {("en", "train")},
        {("zh", "train")},
        {("en", "held_out")},
        {("zh", "held_out")},
    ]
    for case in (case for each in cases for case in each):
        assert case.instruction in load_phrases()[case.task][case.language][case.split]
    # A photograph's turn does not depend on what else is evaluated; unknown ones begin at the first.
    turns = draw_cases({"chelsea": source, "elsewhere": source}, ("blur",), 0)
    assert [(case.language, case.split) for case in turns] == [("zh", "train"), ("en", "train")]


def test_batches_hold_neighbours_of_one_size(source: torch.Tensor) -> None:
    """Pictures and reference pictures are equally large in each; cases without a reference fit anywhere."""
    wide = draw_cases({"a": source, "b": source[:, :20]}, ("blur", "take_palette"), 0)
    assert list(batches(wide)) == [slice(0, 2), slice(2, 4)]
    other = make_case("take_palette", "x", Scene(source, source[:1], torch.Generator(), second=source))
    assert list(batches([wide[0], wide[1], wide[0], other])) == [slice(0, 3), slice(3, 4)]
    assert list(batches([wide[0]] * (BATCH + 2))) == [slice(0, BATCH), slice(BATCH, BATCH + 2)]
    assert list(batches([])) == []


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
    cases = draw_cases(pictures(source, source.flip(2)), edits, 0, only="coffee")
    outputs = dict(run_methods(embedded_model, shared, cases))
    assert set(outputs) == set(METHODS) - {"input"}
    texts = [embedded_model.instruction([case.instruction]) for case in cases]
    own = [
        embedded_model.adapt(case.picture[None], text, None if case.reference is None else case.reference[None])
        for case, text in zip(cases, texts, strict=True)
    ]

    def alone(i: int, adapter: Adapter | None) -> torch.Tensor:
        return embedded_model.edit(cases[i].picture[None], cases[i].planes[None], texts[i], adapter)[0]

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
    case = draw_cases(two, FEW, 1, only="coffee")[1]
    eight_bit = (case.picture * 255).round() / 255
    expected = float(-10 * (eight_bit - case.target).square().mean().log10())
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
@pytest.mark.parametrize("task", ["brighten", "take_palette"])
def test_the_suite_measures_what_the_editor_makes(
    editor: Editor, model_folder: Path, photographs: dict[str, torch.Tensor], task: str
) -> None:
    """They go different ways through the same model."""
    source, second = photographs["coffee"], photographs["rocket"]
    height, width = source.shape[1:]
    scene = Scene(source, noise_plane(width, height, 5).float(), torch.Generator(), second=second)
    case = make_case(task, "do something", scene)
    model = EmbeddedModel.from_pretrained(model_folder)
    measured = edit(model, [case], generate(model, [case]))[0]
    given = [to_image(source)]
    if case.reference is not None:
        given.append(to_image(case.reference))
    edited = editor.edit(given, "do something", seed=5).image
    difference = np.abs(np.asarray(edited).astype(int) - np.asarray(to_image(measured)))
    assert difference.max() <= 2  # the editor's reference has 8 bits
    assert np.abs(np.asarray(edited).astype(int) - np.asarray(given[0])).max() > 3


def test_psnr_is_of_what_a_file_shows() -> None:
    target = torch.full((3, 4, 4), 0.5)
    assert float(psnr(target + 0.1, (target + 0.1) * 0 + 153 / 255)) == pytest.approx(100)
    assert float(psnr(torch.full((3, 4, 4), 9.0), torch.ones(3, 4, 4))) == pytest.approx(100)
    assert float(psnr(torch.zeros(3, 4, 4), torch.ones(3, 4, 4))) == pytest.approx(0, abs=1e-5)
    assert math.isnan(float(psnr(target * math.nan, target)))
    batch = psnr(torch.stack([torch.zeros(3, 4, 4), target]), torch.stack([torch.ones(3, 4, 4), target]))
    assert batch.tolist() == pytest.approx([0, float(psnr(target, target))], abs=1e-5)
