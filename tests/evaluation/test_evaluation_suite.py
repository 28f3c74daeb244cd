"""The table of the edit suite: means, cases, methods, marks of a card, and the command from end to end."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from openwu import cli
from openwu.data.phrases import load_phrases
from openwu.embedded import EmbeddedModel
from openwu.errors import CheckpointError, OpenwuError
from openwu.evaluation import command
from openwu.evaluation.suite import METHODS, Report, Score, draw_cases, evaluate_suite, run_methods, sorted_position
from openwu.training.shared import SharedAdapter
from openwu.types import Adapter

EDITS = ("brighten", "darken", "blur")


def score(edit: str, method: str, psnr: float, language: str = "en", split: str = "train") -> Score:
    return Score(edit, "coffee", method, 0, language, split, psnr, psnr / 100)


@pytest.fixture
def source() -> torch.Tensor:
    return torch.rand(3, 24, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def shared(embedded_model: EmbeddedModel) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    return SharedAdapter(embedded_model.generator.targets, 4, 1.0, generator)().detach()


@pytest.fixture
def model_with_baseline(model_folder: Path, shared: Adapter, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    shared.save_pretrained(folder / "shared")
    return folder


def test_means_are_over_what_was_asked_for() -> None:
    report = Report([score("blur", "base", 10), score("fog", "base", 20), score("blur", "generated", 40)])
    assert report.mean("psnr", "base") == 15
    assert report.mean("psnr", "base", ["fog"]) == 20
    assert report.mean("ssim", "generated", ["blur"], language="en") == pytest.approx(0.4)
    assert math.isnan(report.mean("psnr", "generated", language="zh"))


def test_the_summary_is_about_pairs_and_differences() -> None:
    scores = [score(edit, method, 10) for edit in ("blur", "deblur", "pencil") for method in METHODS]
    scores += [score("blur", "generated", 40, "zh"), score("blur", "generated", 25, split="held_out")]
    scores += [score("pencil", "shuffled", 90)]  # no pair: must not count
    summary = Report(scores).summary()
    assert summary["pairs_psnr_input"] == 10
    assert summary["pairs_psnr_generated"] == pytest.approx((10 + 10 + 40 + 25) / 4)
    assert summary["generated_minus_shared"] == pytest.approx(summary["pairs_psnr_generated"] - 10)
    assert summary["generated_minus_shuffled"] == pytest.approx(summary["pairs_psnr_generated"] - 10)
    assert summary["held_out_minus_train"] == pytest.approx(25 - (10 + 10 + 10 + 40) / 4)
    assert summary["zh_minus_en"] == pytest.approx(40 - (10 + 10 + 10 + 25) / 4)


def test_cases_depend_on_their_names_alone(source: torch.Tensor) -> None:
    some = draw_cases("coffee", source, 1, ("darken", "denoise"))
    more = draw_cases("coffee", source, 1, ("brighten", "darken", "denoise"))
    assert some.sentences == more.sentences[1:]
    for name in ("picture", "noise", "target"):
        assert torch.equal(getattr(some, name), getattr(more, name)[1:])
    again = draw_cases("coffee", source, 5, ("darken", "denoise"))
    assert not torch.equal(again.picture, some.picture)


def test_languages_and_splits_take_turns(source: torch.Tensor) -> None:
    cases = [draw_cases("astronaut", source, seed, EDITS) for seed in range(4)]
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


@torch.inference_mode()
@pytest.mark.parametrize("edits", [("brighten", "blur"), EDITS, (*EDITS, *("fog", "age", "sepia", "warm", "cool"))])
def test_methods_are_what_they_say(
    embedded_model: EmbeddedModel, shared: Adapter, source: torch.Tensor, edits: tuple[str, ...]
) -> None:
    """Shuffled above all: never the adapter of the same sub-task, also where rows go in blocks."""
    cases = draw_cases("coffee", source, 0, edits)
    outputs = dict(run_methods(embedded_model, shared, cases))
    assert set(outputs) == set(METHODS) - {"input"}
    text = embedded_model.instruction(cases.sentences)
    own = [embedded_model.adapt(cases.picture[i : i + 1], text[i : i + 1]) for i in range(len(edits))]

    def alone(i: int, adapter: Adapter | None) -> torch.Tensor:
        row = slice(i, i + 1)
        return embedded_model.edit(cases.picture[row], cases.noise[row], text[row], adapter)[0]

    for i in range(len(edits)):
        torch.testing.assert_close(outputs["base"][i], alone(i, None), atol=1e-4, rtol=0)
        torch.testing.assert_close(outputs["shared"][i], alone(i, shared), atol=1e-4, rtol=0)
        torch.testing.assert_close(outputs["generated"][i], alone(i, own[i]), atol=1e-4, rtol=0)
        distances = [float((outputs["shuffled"][i] - alone(i, adapter)).abs().max()) for adapter in own]
        assert min(distances) < 1e-4
        assert distances.index(min(distances)) != i
        assert distances[i] > 1e-3


def test_scores_are_those_of_the_8_bit_picture(
    embedded_model: EmbeddedModel, shared: Adapter, source: torch.Tensor
) -> None:
    report = evaluate_suite(embedded_model, shared, {"coffee": source}, [0, 1], EDITS)
    assert len(report.scores) == len(EDITS) * len(METHODS) * 2
    cases = draw_cases("coffee", source, 1, EDITS)
    eight_bit = (cases.picture[1] * 255).round() / 255
    expected = float(-10 * (eight_bit - cases.target[1]).square().mean().log10())
    copied = [each for each in report.scores if (each.edit, each.method, each.seed) == ("darken", "input", 1)]
    assert [each.psnr for each in copied] == pytest.approx([expected], abs=1e-3)
    assert 0 < copied[0].ssim < 1
    assert list(report.grid) == list(EDITS)
    assert all(len(cells) == len(METHODS) + 1 for cells in report.grid.values())
    with pytest.raises(OpenwuError, match="at least two sub-tasks"):
        evaluate_suite(embedded_model, shared, {"coffee": source}, [0], ["blur"])


def test_the_table_has_a_row_per_sub_task() -> None:
    scores = [score(edit, method, 20 + i) for edit in ("blur", "fog") for i, method in enumerate(METHODS)]
    cell = torch.zeros(3, 4, 4)
    table = command.as_markdown(Report(scores, {"blur": [cell], "fog": [cell]}), [0, 1], ["coffee"])
    rows = table.splitlines()
    assert "| sub-task | input | base | shared | generated | shuffled |" in rows
    assert "| blur | 20.0 / 0.200 | 21.0 / 0.210 | 22.0 / 0.220 | 23.0 / 0.230 | 24.0 / 0.240 |" in rows
    assert any(row.startswith("| fog | ") for row in rows)
    assert "| generated minus shared | 1.00 |" in rows


def test_only_what_stands_between_the_marks_is_replaced(tmp_path: Path) -> None:
    card = tmp_path / "card.md"
    card.write_text(f"# Card\n{command.BEGIN}\nold\n{command.END}\nrest\n", encoding="utf-8")
    for _ in range(2):
        command._replace_between_marks(card, "| 新 |\n")
        assert card.read_text(encoding="utf-8") == f"# Card\n{command.BEGIN}\n| 新 |\n{command.END}\nrest\n"
    for text in ("no marks", command.BEGIN, f"{command.END} {command.BEGIN}"):
        card.write_text(text)
        with pytest.raises(OpenwuError, match="expected the marks"):
            command._replace_between_marks(card, "table\n")
        assert card.read_text() == text


def test_the_command_writes_table_numbers_and_pictures(
    model_with_baseline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = tmp_path / "card.md"
    card.write_text(f"{command.BEGIN}{command.END}")
    options = ["--side", "40", "--seeds", "3", "--photograph", "coffee", "--card", str(card)]
    output = tmp_path / "out"
    assert cli.main(["eval", "suite", "--model", str(model_with_baseline), "--output", str(output), *options]) == 0
    table = (output / "suite.md").read_text()
    assert table == capsys.readouterr().out
    assert table in card.read_text()
    numbers = json.loads((output / "suite.json").read_text())
    assert (numbers["seeds"], numbers["side"]) == ([3], 40)
    assert {each["edit"] for each in numbers["scores"]} == set(EDITS)
    assert {each["photograph"] for each in numbers["scores"]} == {"coffee"}
    assert {each["method"] for each in numbers["scores"]} == set(METHODS)
    with Image.open(output / "suite.jpg") as sheet:
        assert sheet.size[0] > 6 * 40


def test_what_cannot_be_evaluated_is_refused(model_with_baseline: Path, model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OpenwuError, match=r"--photograph: expected some of .*, got \['lena'\]"):
        command.run(["suite", "--model", str(model_with_baseline), "--side", "32", "--photograph", "lena"])
    with pytest.raises(CheckpointError, match="shared"):
        command.run(["suite", "--model", str(model_folder)])
    with pytest.raises(CheckpointError, match=r"config\.json"):
        command.run(["suite", "--model", str(tmp_path / "nowhere")])
