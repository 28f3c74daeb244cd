"""The model inside the package, on photographs that no training saw: what the README and the model card promise."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from openwu.backbones.embedded.base import native_dtype
from openwu.backbones.embedded.config import WEIGHTS
from openwu.backbones.embedded.piecewise import pieces
from openwu.cli import main
from openwu.cli.console import USAGE
from openwu.data.suite import CONTRADICTORY_PAIRS, EDITS
from openwu.data.suite.photographs import TEST_PHOTOGRAPHS, load_folder, load_test_photographs
from openwu.data.suite.phrases import LANGUAGES, OUT_OF_SCOPE, load_phrases
from openwu.editor.editor import Editor
from openwu.editor.requests import EditRequest
from openwu.editor.shown.reproduction import ACCEPTED, CLEAR, DECIDES
from openwu.errors import ExampleError, InstructionError
from openwu.evaluation.cases import draw_cases, generate
from openwu.evaluation.cases import edit as edit_cases
from openwu.evaluation.composition import COMBINATIONS, Composed, mean_gap
from openwu.evaluation.experiments.probes.understood import shown_programs
from openwu.evaluation.metrics import psnr
from openwu.evaluation.model_card import Findings, as_markdown
from openwu.evaluation.strength import Graded
from openwu.evaluation.suite import METHODS, Report, Score, evaluate_suite
from openwu.evaluation.tables import KNOWN_DAMAGE, goals
from openwu.evaluation.wording import Wording, understanding
from openwu.training.embedded.config import EmbeddedRecipe
from openwu.training.embedded.model import EmbeddedModel
from openwu.training.record import describe
from openwu.training.run import load_recipe
from openwu.types import Adapter

ROOT = Path(__file__).parents[1]
PAIRED = [name for name in EDITS if any(name in pair for pair in CONTRADICTORY_PAIRS)]
SHARED = ROOT / "docs" / "results" / "shared"
"""The baseline that the stored table compares with."""
QUICK_SIDE = 192
"""Longest side in pixels where a claim is checked in every run of the tests."""


@pytest.fixture(scope="module")
def editor() -> Editor:
    return Editor.from_pretrained()


@pytest.fixture(scope="module")
def report() -> Report:
    """Every paired sub-task on two of the test photographs, small."""
    return measured(QUICK_SIDE, [0], count=2)


def measured(side: int, seeds: list[int], count: int | None = None) -> Report:
    model = EmbeddedModel.from_pretrained(dtype=native_dtype())
    photographs = dict(list(load_test_photographs(side).items())[:count])
    return evaluate_suite(model, Adapter.from_pretrained(SHARED), photographs, seeds, PAIRED)


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    return photographed("coffee")


def photographed(name: str, side: int = 256) -> Image.Image:
    pixels = load_test_photographs(side)[name]
    return Image.fromarray((pixels.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))


def floats(image: Image.Image) -> NDArray[np.float64]:
    return np.asarray(image.convert("RGB")).astype(np.float64)


# What is measured


@pytest.mark.slow
def test_the_stored_table_is_what_the_weights_do(findings: Findings) -> None:
    """The model card's setting, paired sub-tasks: measured again, within what another processor's rounding does."""
    report = measured(512, [0])
    assert report.mean("psnr", "generated") == pytest.approx(findings.report.mean("psnr", "generated", PAIRED), abs=0.3)


def test_adapters_of_other_requests_lose_the_gain(report: Report) -> None:
    assert report.mean("psnr", "shuffled") < report.mean("psnr", "generated") - 5


def test_generated_adapters_beat_the_base_and_the_input(report: Report) -> None:
    assert report.mean("psnr", "generated") > report.mean("psnr", "base") + 2
    assert report.mean("psnr", "generated") > report.mean("psnr", "input") + 5


def test_one_adapter_for_all_requests_stays_between(report: Report) -> None:
    assert report.mean("psnr", "base") + 3 < report.mean("psnr", "shared") < report.mean("psnr", "generated") - 1


@pytest.mark.parametrize("edit", ["warm", "denoise", "age"])
def test_bfloat16_and_float32_are_the_same_model(edit: str) -> None:
    """Some kernels are wrong on some processors: then the two would have nothing in common."""
    photographs = {"coffee": load_test_photographs(QUICK_SIDE)["coffee"], "zebra": torch.rand(3, 64, 64)}
    cases = draw_cases(photographs, (edit,), 1, only="coffee")
    answers = []
    for dtype in (torch.float32, torch.bfloat16):
        model = EmbeddedModel.from_pretrained(dtype=dtype)
        with torch.inference_mode():
            answers.append(edit_cases(model, cases, generate(model, cases))[0].float().clamp(0, 1))
    assert float(psnr(answers[1], answers[0])) > 33
    scores = [float(psnr(answer, cases[0].target)) for answer in answers]
    assert scores[1] == pytest.approx(scores[0], abs=0.5)


# What is stored


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    numbers: dict[str, Any] = json.loads((ROOT / "docs" / "results" / "suite.json").read_text(encoding="utf-8"))
    return numbers


@pytest.fixture(scope="module")
def findings(stored: dict[str, Any]) -> Findings:
    """The stored numbers as what they were before they were written."""
    return Findings(
        report=Report([Score(**each) for each in stored["scores"]]),
        wordings=[Wording(**each) for each in stored["wording"]],
        shares=stored["understanding"],
        gains=stored["repairs"],
        graded=[Graded(**each) for each in stored["strength"]],
        composed=[Composed(**each) for each in stored["composition"]],
        composed_cells={},
        strength_cells={},
    )


def test_the_stored_results_are_of_everything_that_the_model_knows(
    stored: dict[str, Any], findings: Findings, editor: Editor
) -> None:
    assert editor.backbone.config.instruction.labels == (*EDITS, OUT_OF_SCOPE)
    report = findings.report
    assert report.edits == list(EDITS)
    assert report.methods == list(METHODS)
    assert {score.photograph for score in report.scores} == set(TEST_PHOTOGRAPHS)
    assert {score.seed for score in report.scores} == set(stored["seeds"])
    assert len(report.scores) == len(EDITS) * len(METHODS) * len(TEST_PHOTOGRAPHS) * len(stored["seeds"])
    assert {each.edit for each in findings.wordings} == set(EDITS)
    assert {each.edit for each in findings.graded} == {name for name, edit in EDITS.items() if edit.graded}
    assert [(each.first, each.second) for each in findings.composed] == list(COMBINATIONS)
    assert set(findings.gains) == set(KNOWN_DAMAGE)
    assert stored["side"] >= 512


def test_summary_and_goals_follow_from_the_stored_scores(stored: dict[str, Any], findings: Findings) -> None:
    summary = findings.report.summary()
    assert summary == pytest.approx(stored["summary"])
    assert findings.report.missed() == stored["missed"]
    again = goals(findings.report, findings.wordings, findings.shares, findings.gains)
    assert [goal.name for goal in again] == [goal["name"] for goal in stored["goals"]]
    for goal, kept in zip(again, stored["goals"], strict=True):
        assert dataclasses.asdict(goal) == pytest.approx({key: kept[key] for key in ("name", "wanted", "measured")})
        assert goal.met == kept["met"]
    assert summary["generated_minus_base"] >= 2
    assert summary["generated_minus_shuffled"] >= 5


def test_the_card_shows_the_stored_results(stored: dict[str, Any], findings: Findings) -> None:
    """Every table of the card, word for word."""
    card = (ROOT / "docs" / "model-card.md").read_text(encoding="utf-8")
    for name, section in as_markdown(findings, stored["seeds"], sorted(TEST_PHOTOGRAPHS)).items():
        between = card.partition(f"<!-- {name}: begin -->")[2].partition(f"<!-- {name}: end -->")[0]
        assert between.strip() == section.strip(), name


def test_the_stored_baseline_learned_on_the_base_inside_the_package(editor: Editor) -> None:
    shared = Adapter.from_pretrained(SHARED)
    assert set(shared.targets) == set(editor.generator.targets)
    told = json.loads((SHARED / "provenance.json").read_text(encoding="utf-8"))["recipe"]
    recipe = load_recipe(ROOT / "recipes" / "shared_lora.py", [])
    assert isinstance(recipe, EmbeddedRecipe)
    assert told == json.loads(json.dumps(describe(recipe)))
    shipped = json.loads((WEIGHTS / "provenance.json").read_text(encoding="utf-8"))["recipe"]
    assert told["generator"]["steps"] == told["shared"]["steps"] == shipped["generator"]["steps"]


def test_the_readme_shows_the_stored_results(findings: Findings) -> None:
    readme, report = (ROOT / "README.md").read_text(encoding="utf-8"), findings.report
    learned = json.loads((WEIGHTS / "provenance.json").read_text(encoding="utf-8"))["recipe"]["base_edits"]
    known = [name for name in report.paired if name in learned]
    new = [name for name in report.paired if name not in learned]
    assert f"{len(report.paired)} sub-tasks" in readme
    assert f"| {len(new)} new | {len(known)} known |" in readme
    for method in METHODS:
        cells = [f"{report.mean('psnr', method, names):.1f}" for names in (new, known)]
        assert any(all(cell in line for cell in cells) for line in readme.splitlines()), (method, cells)


def test_understanding_is_what_the_results_say(stored: dict[str, Any], editor: Editor) -> None:
    shares = understanding(EmbeddedModel.from_pretrained(dtype=editor.dtype).instruction)
    assert shares == pytest.approx(stored["understanding"], abs=0.005)  # sums differ from processor to processor
    for language in LANGUAGES:
        assert shares[f"accepted_{language}"] >= 0.98
        assert shares[f"refused_{language}"] >= 0.9


def test_two_passes_follow_two_instructions_and_one_pass_falls_behind_as_the_card_says(findings: Findings) -> None:
    closer = [each.two_passes > each.input for each in findings.composed]
    assert sum(closer) >= 0.9 * len(closer)
    assert mean_gap(findings.composed) < 0


# Edits that are shown


def graded(image: Image.Image) -> Image.Image:
    """A look on no list: warm lights, blue shadows, a lifted middle, less colour."""
    x = floats(image) / 255
    grey = (x @ np.array([0.3, 0.6, 0.1]))[..., None]
    x = (grey + 0.85 * (x - grey)) ** 0.85 * np.array([1.1, 1.0, 0.84]) + (1 - grey) ** 2 * np.array([0, 0.06, 0.14])
    return Image.fromarray((x.clip(0, 1) * 255).round().astype(np.uint8))


def away(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.square(first - second))))


@pytest.mark.parametrize("name", ["chelsea", "astronaut"])
def test_a_look_that_one_pair_shows_is_done_to_another_photograph(
    editor: Editor, photograph: Image.Image, name: str
) -> None:
    photo = photographed(name, QUICK_SIDE)
    result = editor.edit(photo, example=[(photograph, graded(photograph))])
    assert result.reproduced is not None
    assert result.reproduced.share > 0.7
    made, wanted, before = floats(result.image), floats(graded(photo)), floats(photo)
    assert away(made, wanted) < 0.4 * away(before, wanted)
    # As much in the outermost pixels as inside.
    for side in (np.s_[:1], np.s_[-1:], np.s_[:, :1], np.s_[:, -1:]):
        assert away(made[side], wanted[side]) < 0.5 * away(before[side], wanted[side])


def test_steps_on_the_pair_bring_another_photograph_closer_too(editor: Editor) -> None:
    """Where the generated adapter leaves something to gain; a look of colour has little left."""

    def graded(picture: Image.Image) -> Image.Image:
        return picture.filter(ImageFilter.EMBOSS)

    photo, before = (photographed(name, QUICK_SIDE) for name in ("chelsea", "astronaut"))
    pair = before, graded(before)
    generated, refined = (editor.edit(photo, example=[pair], refine=steps) for steps in (0, 12))
    assert generated.reproduced is not None
    assert refined.reproduced is not None
    assert refined.reproduced.before == generated.reproduced.share
    assert refined.reproduced.share > generated.reproduced.share + 0.02
    wanted = floats(graded(photo))
    assert away(floats(refined.image), wanted) < 0.98 * away(floats(generated.image), wanted)


def test_an_example_leaves_no_lines_in_a_sky(editor: Editor) -> None:
    """Photographs are continued by four patches; by one, columns differed from their neighbours by 5.8 levels here."""

    def strong(picture: Image.Image) -> Image.Image:
        mixed = floats(picture) / 255 @ np.array([[0.9, 0.1, 0], [0.1, 0.8, 0.1], [0.1, 0.2, 0.7]])
        toned = np.clip(1.7 * (mixed - 0.45) + 0.6, 0, 1) * [1, 0.97, 0.9] + [0, 0, 0.05]
        return Image.fromarray((255 * toned.clip(0, 1)).round().astype(np.uint8))

    example = photographed("coffee", 320)
    sky = np.linspace([150, 180, 225], [190, 210, 240], 240)[:, None].repeat(320, axis=1)
    photo = Image.fromarray(sky.round().astype(np.uint8))
    columns = floats(editor.edit(photo, example=[(example, strong(example))]).image).mean(0)
    steps = columns[2:-2] - (columns[1:-3] + columns[3:-1]) / 2
    assert np.abs(steps).max() < 1


def test_a_small_example_of_a_vignette_fits_a_large_photograph(editor: Editor) -> None:
    """Places are those in the picture itself, not in what it is continued to, which cost 3 dB."""

    def darkened(picture: Image.Image) -> Image.Image:
        y, x = np.mgrid[-1 : 1 : picture.height * 1j, -1 : 1 : picture.width * 1j]
        light = 1 - (x**2 + y**2)[..., None] / 4
        return Image.fromarray((floats(picture) * light).round().clip(0, 255).astype(np.uint8))

    example = photographed("astronaut", QUICK_SIDE)
    scores = []
    for side in (QUICK_SIDE, 640):
        photo = photographed("coffee", side)
        edited = editor.edit(photo, example=[(example, darkened(example))]).image
        scores.append(10 * np.log10(255**2 / np.mean((floats(edited) - floats(darkened(photo))) ** 2)))
    small, large = scores
    assert small > 34
    assert large > small - 1


def test_words_beside_an_example_name_what_it_shows(editor: Editor, photograph: Image.Image) -> None:
    """They change nothing, and that is said; those that ask for something else are refused."""
    grey = editor.edit(photograph, "black and white").image.convert("RGB")
    named = editor.edit(photographed("chelsea", QUICK_SIDE), "black and white", example=[(photograph, grey)])
    assert named.reproduced is not None
    assert named.reproduced.share > CLEAR
    assert named.reproduced.note == DECIDES
    pair = (photograph, graded(photograph))
    photo = photographed("chelsea", QUICK_SIDE)
    assert editor.edit(photo, example=[pair]).reproduced.note is None  # type: ignore[union-attr]
    for words in ("darken it", "make it black and white", "add film grain"):
        with pytest.raises(ExampleError, match="words beside an example can only name"):
            editor.adapt(instruction=words, example=[pair])
    plain = editor.edit(photo, example=[pair], seed=0)
    for words in ("brighten", "my summer look", "darken it"):
        titled = editor.edit(photo, words, example=[pair], seed=0, allow_out_of_scope=words == "darken it")
        assert np.array_equal(titled.photo.pixels, plain.photo.pixels)
        assert titled.reproduced is not None
        assert titled.reproduced.note == DECIDES
        assert titled.adapter.instructions == (("",),)
        assert np.array_equal(editor.edit(photo, adapter=titled.adapter, seed=0).photo.pixels, plain.photo.pixels)


def test_words_beside_an_example_change_nothing_from_the_command_line(photograph: Image.Image, tmp_path: Path) -> None:
    """A guarantee for the edit that they name had made the picture grey."""
    photo, before, after = (str(tmp_path / f"{name}.png") for name in ("photo", "before", "after"))
    photographed("chelsea", QUICK_SIDE).save(photo)
    photograph.save(before)
    graded(photograph).save(after)
    made = []
    for number, words in enumerate(([], ["--instruction", "black and white", "--allow-out-of-scope"])):
        output = tmp_path / f"{number}.png"
        assert main(["edit", photo, "--example", before, after, *words, "--output", str(output)]) == 0
        made.append(np.asarray(Image.open(output)))
    assert np.array_equal(*made)


def test_examples_of_what_no_example_can_teach_are_refused(editor: Editor, photograph: Image.Image) -> None:
    grain = np.random.default_rng(0).normal(0, 14, (photograph.height, photograph.width, 1))
    noisy = Image.fromarray((floats(photograph) + grain).round().clip(0, 255).astype(np.uint8))
    posterised = photograph.quantize(16).convert("RGB")
    for after in (noisy, posterised, photograph):
        with pytest.raises(ExampleError, match="allow_out_of_scope"):
            editor.adapt(example=[(photograph, after)])


@pytest.mark.slow
def test_the_check_of_examples_tells_what_another_photograph_gains() -> None:
    model = EmbeddedModel.from_pretrained(dtype=native_dtype())
    found = shown_programs(model, load_folder(ROOT / "photos", validation=True), 40, QUICK_SIDE, seed=1)
    taken, refused = ([each.gain for each in found if (each.share >= ACCEPTED) is wanted] for wanted in (True, False))
    assert np.mean(taken) > 8
    assert np.mean(refused) < 3
    assert np.mean([gain > 0 for gain in taken]) > 0.9


@pytest.mark.parametrize(("edit", "least"), [("denoise", 34.0), ("deblur", 25.0)])
def test_a_repair_leaves_alone_what_is_fine(editor: Editor, edit: str, least: float) -> None:
    """On average of three photographs; the weights that had never seen mild damage came to 32 and 21 dB."""
    pictures = [photographed(name) for name in ("astronaut", "coffee", "motorcycle")]
    errors = [np.mean((floats(editor.edit(each, edit=edit).image) - floats(each)) ** 2) for each in pictures]
    assert np.mean(10 * np.log10(255**2 / np.array(errors))) > least


# The files


def test_test_photographs_were_not_trained_on() -> None:
    provenance = json.loads((WEIGHTS / "provenance.json").read_text(encoding="utf-8"))
    # Of pictures; then the first training of what reads words, which had pictures, too.
    trainings = [provenance, *(each for each in provenance["words"] if "photographs" in each)]
    assert [len(each["photographs"]) for each in trainings] == [96, 16]
    for each in trainings:
        names = {file.removesuffix(".jpg").partition("_by_")[0] for file in each["photographs"]}
        assert not names & set(TEST_PHOTOGRAPHS)


def test_files_are_small_and_safe() -> None:
    files = [file for file in WEIGHTS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 32e6
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".py"}


def test_the_recipe_in_the_weights_is_the_recipe_in_the_tree() -> None:
    from openwu.training.record import describe
    from openwu.training.run import load_recipe

    stored = json.loads((WEIGHTS / "provenance.json").read_text(encoding="utf-8"))["recipe"]
    assert stored == describe(load_recipe(ROOT / "recipes" / "embedded_pictures.py", []))


def best_of_three(work: Callable[[], object]) -> float:
    """Seconds of the processor: what else the machine does counts little."""
    seconds = []
    for _ in range(3):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


def test_a_megapixel_takes_at_most_three_seconds(editor: Editor) -> None:
    """Seconds of the processor; eight where it has no bfloat16 units."""
    limit = 3 if native_dtype() == torch.bfloat16 else 8
    generator = np.random.default_rng(0)
    picture = Image.fromarray(generator.integers(0, 256, (1024, 1024, 3), dtype=np.uint8))
    assert best_of_three(lambda: editor.edit(picture, "make it look like an old photograph")) <= limit


def test_loading_takes_at_most_two_seconds() -> None:
    assert best_of_three(Editor.from_pretrained) <= 2


# What it does


def test_each_request_of_a_batch_has_its_own_adapter(editor: Editor, photograph: Image.Image) -> None:
    wanted = ("make it brighter", "make it darker", "变成黑白照片")
    results = editor.edit_batch([EditRequest(images=[photograph], instruction=text) for text in wanted])
    bright, dark, grey = (np.asarray(result.image.convert("RGB")).astype(float) for result in results)
    assert bright.mean() > np.asarray(photograph).mean() + 10 > dark.mean() + 20
    before = np.asarray(photograph).astype(float)
    assert np.abs(grey[..., 0] - grey[..., 2]).mean() < np.abs(before[..., 0] - before[..., 2]).mean() / 4


@pytest.mark.parametrize("options", [["--strength", "9"], ["--steps", "4"], ["--image-size", "512x512"]])
def test_what_the_base_does_not_serve_is_wrong_usage(
    options: list[str], photograph: Image.Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photograph.save(tmp_path / "a.png")
    words = ["--instruction", "warmer", "--output", str(tmp_path / "b.png")]
    assert main(["edit", str(tmp_path / "a.png"), *options, *words]) == USAGE
    assert f"{options[0]}: expected"[2:].replace("-", "_") in capsys.readouterr().err.replace("-", "_")
    assert not (tmp_path / "b.png").exists()


def test_strength_scales_the_edit(editor: Editor, photograph: Image.Image) -> None:
    means = [
        float(floats(editor.edit(photograph, "make it darker", strength=strength).image).mean())
        for strength in (0.0, 0.5, 1.0)
    ]
    assert means[0] > means[1] > means[2]


def test_a_saved_adapter_edits_another_photo_without_an_instruction(
    editor: Editor, photograph: Image.Image, tmp_path: Path
) -> None:
    result = editor.edit(photograph, "turn it into a negative")
    result.adapter.save_pretrained(tmp_path / "negative")
    reused = editor.edit(photograph, adapter=Adapter.from_pretrained(tmp_path / "negative"))
    assert np.array_equal(np.asarray(reused.image), np.asarray(result.image))
    other = photograph.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    negative = np.asarray(editor.edit(other, adapter=result.adapter).image).astype(float)
    assert np.corrcoef(negative.ravel(), np.asarray(other).astype(float).ravel())[0, 1] < -0.8


def test_pieces_of_a_picture_are_the_whole(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    """An edit that depends on where in the picture a pixel lies: in pieces and in one, seams included."""
    large = photographed("chelsea", 512).resize((1000, 700), Image.Resampling.BICUBIC)
    sentence = load_phrases()["sunset"]["en"]["train"][0]
    found = floats(editor.edit(large, sentence).image)
    monkeypatch.setattr(pieces, "WHOLE", 1000 * 700)
    whole = floats(editor.edit(large, sentence).image)
    difference = np.abs(found - whole)
    assert difference.max() <= 2
    assert difference.mean() < 0.05
    # The glow comes from the top of the whole picture, not of every tile.
    change = whole - floats(large)
    red = change[..., 0] - change[..., 2]
    assert red[:128].mean() > red[-128:].mean() + 5


def test_a_reference_gives_its_colours_and_only_through_the_adapter(editor: Editor, photograph: Image.Image) -> None:
    sentence = load_phrases()["take_palette"]["en"]["train"][0]
    before = floats(photograph).mean((0, 1))
    colours = {"blue": (70, 95, 160), "brown": (150, 110, 70)}
    edited: dict[str, Any] = {}
    for name, colour in colours.items():
        other = floats(photographed("chelsea"))
        other += np.array(colour) - other.mean((0, 1))
        reference = Image.fromarray(other.clip(0, 255).astype(np.uint8))
        edited[name] = editor.edit([photograph, reference], sentence)
        wanted = floats(reference).mean((0, 1))
        after = floats(edited[name].image).mean((0, 1))
        assert np.linalg.norm(after - wanted) < 0.75 * np.linalg.norm(before - wanted), name
    # The base alone does not know which reference came.
    zeros = edited["blue"].adapter.scaled(0.0)
    references = (photograph.rotate(90), photograph.convert("L"))
    silent = [editor.edit([photograph, each], sentence, adapter=zeros).image for each in references]
    assert np.array_equal(*(np.asarray(image) for image in silent))
    # What it knows of blue and brown, it knows from the adapters alone: they can be swapped.
    swapped = editor.edit(photograph, adapter=edited["brown"].adapter).image
    assert np.array_equal(np.asarray(swapped), np.asarray(edited["brown"].image))


def test_a_missing_reference_is_asked_for(editor: Editor, photograph: Image.Image) -> None:
    for language in LANGUAGES:
        with pytest.raises(InstructionError, match="--reference FILE"):
            editor.edit(photograph, load_phrases()["take_palette"][language]["train"][0])


def test_a_second_instruction_edits_the_result_of_the_first(editor: Editor, photograph: Image.Image) -> None:
    """Both leave their mark: soften, then black and white."""
    soft, grey = (load_phrases()[name]["en"]["train"][0] for name in ("soften", "black_and_white"))
    both = editor.edit(photograph, soft, then=grey)
    again = editor.edit(editor.edit(photograph, soft).photo, grey)
    assert np.array_equal(both.photo.pixels, again.photo.pixels)
    before, after = floats(photograph), floats(both.image)
    colour_before, colour_after = (np.abs(x[..., 0] - x[..., 2]).mean() for x in (before, after))
    assert colour_after < 0.8 * colour_before
    one = floats(editor.edit(photograph, grey).image)
    assert np.abs(after - one).mean() > 1


def test_words_of_strength_are_heard(editor: Editor, photograph: Image.Image) -> None:
    """From a little to strongly, fog moves the picture further."""
    before = floats(photograph)
    asked = ("add fog, just a little", "add fog", "add fog, very strong")
    moved = [np.abs(before - floats(editor.edit(photograph, text).image)).mean() for text in asked]
    assert 3 < moved[0] < moved[1] < moved[2]


def test_an_impossible_instruction_is_refused(editor: Editor, photograph: Image.Image) -> None:
    with pytest.raises(InstructionError, match=r"does not know how to 'add a dragon'.*--allow-out-of-scope"):
        editor.edit(photograph, "add a dragon")
