"""`openwu audit` and `openwu lab` on an untrained model: what is written, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from openwu.cli import main
from openwu.data.suite.photographs import Photograph, load_folder
from openwu.evaluation.experiments.methods import Budget

EDITS = ["--edit", "warm", "--edit", "cool", "--edit", "fog"]
SMALL = ["--quick", "--side", "48", "--seeds", "0", *EDITS]


@pytest.fixture(scope="module")
def two_photographs() -> list[Photograph]:
    return load_folder(Path("photos"), validation=True)


@pytest.fixture(autouse=True)
def few_photographs(
    request: pytest.FixtureRequest, two_photographs: list[Photograph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading all of them takes seconds; only what is measured in earnest needs them."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr("openwu.evaluation.experiments.runs.load_folder", lambda *_, **__: two_photographs)


def run(*arguments: str) -> int:
    return main(list(arguments))


def test_audit_writes_numbers_and_a_picture(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("audit", "--model", str(model_folder), "--output", str(tmp_path), *SMALL) == 0
    printed = capsys.readouterr().out
    stored = json.loads((tmp_path / "audit.json").read_text())
    assert printed.strip().endswith(stored["verdict"])
    assert {rung["rung"] for rung in stored["rungs"]} == {
        *("none", "random", "average", "other task", "same task", "matched"),
        *("random words", "other words", "other picture"),
    }
    assert {len(values) for values in stored["scores"].values()} == {9}  # three photographs, three edits
    assert stored["settings"]["seeds"] == [0]
    assert stored["torch"]
    assert (tmp_path / "audit.png").stat().st_size > 5000
    page = (tmp_path / "report/audit/report.html").read_text(encoding="utf-8")
    assert "NOT THE WHOLE: the quick setting" in page
    assert "data:image/jpeg" in page


def test_manifold(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("lab", "manifold", "--model", str(model_folder), "--output", str(tmp_path), *SMALL) == 0
    assert "nearest neighbour has the task" in capsys.readouterr().out
    stored = json.loads((tmp_path / "manifold.json").read_text())
    assert len(stored["cases"]) == 9
    assert stored["nearest_neighbour"]["chance"] == pytest.approx(1 / 3)
    assert (tmp_path / "manifold.png").stat().st_size > 5000


def test_gradients(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openwu.evaluation.experiments.runs.QUICK_STEPS", (0, 2))
    monkeypatch.setattr("openwu.evaluation.experiments.probes.gradients.SIDE", 64)
    monkeypatch.setattr("openwu.evaluation.experiments.probes.gradients.REQUESTS", 1)
    small = ["--quick", "--seeds", "0", *EDITS]  # It looks at no test photograph.
    assert run("lab", "gradients", "--model", str(model_folder), "--output", str(tmp_path), *small) == 0
    assert "contradictory pairs" in capsys.readouterr().out
    stored = json.loads((tmp_path / "gradients.json").read_text())
    assert stored["opposites"] == [["warm", "cool"]]
    assert [each["where"] for each in stored["found"]][-1] == "generator, trained"
    assert (tmp_path / "gradients.png").stat().st_size > 5000


def test_wrong_arguments(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--model", str(model_folder), "--output", str(tmp_path), "--quick", "--side", "48"]
    assert run("audit", *common, "--edit", "warmer") == 1
    assert "--edit: expected some of" in capsys.readouterr().err
    assert run("audit", *common, "--edit", "warm") == 1
    assert "cases: expected at least two of each of at least two tasks" in capsys.readouterr().err
    assert run("lab", "gradients", *common[:-2], "--edit", "warm", "--edit", "fog") == 1
    assert "expected both sides of at least one contradictory pair" in capsys.readouterr().err
    for words, ignored in (
        (("gradients", "--steps", "9", "--axis", "base"), "--steps, --axis, --side"),
        (("manifold", "--photos", "photos"), "--photos"),
    ):
        assert run("lab", *words, *common) == 2
        assert f"lab {words[0]}: it does not read {ignored}; leave that out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("lab", "phrenology")
    assert "manifold" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_conflict(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "openwu.evaluation.experiments.runs.QUICK_BUDGET", Budget(steps=1, requests=1, crop=32, wide_rank=5)
    )
    monkeypatch.setattr("openwu.evaluation.experiments.runs.QUICK_OLD", 1)
    monkeypatch.setattr("openwu.evaluation.experiments.methods.SIDE", 64)
    assert run("lab", "conflict", "--model", str(model_folder), "--output", str(tmp_path), *SMALL) == 0
    assert "generated minus it" in capsys.readouterr().out
    stored = json.loads((tmp_path / "conflict.json").read_text())
    assert {each["method"] for each in stored["methods"]} >= {"base", "shared", "generated", "retrieval"}
    assert stored["settings"]["budget"]["steps"] == 1
    assert stored["settings"]["edits"] == ["warm", "cool", "fog"]
    assert {each["old"] for each in stored["outcomes"]} == {True, False}
    assert (tmp_path / "conflict.png").stat().st_size > 5000
    assert (tmp_path / "conflict.jpg").stat().st_size > 3000


@pytest.mark.slow
def test_continual(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openwu.evaluation.experiments.runs.QUICK_GROUP_BUDGET", Budget(steps=1, requests=1, crop=32))
    for place in ("methods", "comparisons.continual"):
        monkeypatch.setattr(f"openwu.evaluation.experiments.{place}.SIDE", 96)
    assert run("lab", "continual", "--model", str(model_folder), "--output", str(tmp_path), *SMALL) == 0
    assert "forgotten, dB" in capsys.readouterr().out
    stored = json.loads((tmp_path / "continual.json").read_text())
    assert stored["settings"]["groups"] == [["warm"], ["cool"], ["fog"]]
    assert (tmp_path / "continual.png").stat().st_size > 5000
    assert run("lab", "continual", "--model", str(model_folder), "--output", str(tmp_path), *SMALL[:-4]) == 1
    assert "expected at least two sub-tasks" in capsys.readouterr().err


@pytest.mark.slow
def test_scaling(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openwu.evaluation.experiments.runs.QUICK_SCALING", Budget(steps=1, requests=1, crop=32))
    monkeypatch.setattr("openwu.evaluation.experiments.runs.GENERATOR_SIZES", ((16, 1), (32, 1)))
    monkeypatch.setattr("openwu.evaluation.experiments.runs.BASE_WIDTHS", (16, 32))
    monkeypatch.setattr("openwu.evaluation.experiments.methods.SIDE", 64)
    assert run("lab", "scaling", "--model", str(model_folder), "--output", str(tmp_path), *SMALL) == 0
    assert "dB for ten times the parameters" in capsys.readouterr().out
    stored = json.loads((tmp_path / "scaling.json").read_text())
    assert {each["axis"] for each in stored["sizes"]} == {"generator", "base"}
    assert "output" not in stored["settings"]
    words = ("lab", "scaling", "--axis", "generator", "--model", str(model_folder), "--output", str(tmp_path))
    assert run(*words, *SMALL) == 0
    alone = json.loads((tmp_path / "scaling.json").read_text())
    assert {each["axis"] for each in alone["sizes"]} == {"generator"}
    assert alone["lines"]["generator"] == stored["lines"]["generator"]  # Its finished parts were found again.
    assert (tmp_path / "scaling.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("lab", "conflict", "--steps", "0"), "--steps: expected a number above 0, got 0"),
        (("lab", "continual", "--steps", "-1"), "--steps: expected a number above 0, got -1"),
        (("audit", "--side", "0"), "--side: expected a number above 0, got 0"),
    ],
)
def test_wrong_numbers_are_refused_before_anything_is_looked_for(
    words: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "output"
    elsewhere = ("--photos", str(tmp_path / "none")) if words[0] == "lab" else ()
    assert run(*words, *elsewhere, "--model", str(tmp_path / "none"), "--output", str(output)) == 2
    assert capsys.readouterr().err == f"openwu: error: {message}\n"
    assert not output.exists()


@pytest.mark.parametrize(
    ("what", "file", "shown"),
    [
        ("conflict", "conflict", "retrieval"),
        ("conflict", "conflict_examples", "perfect bank of 2400"),
        ("continual", "continual", "stored"),
        ("scaling", "scaling", "+0.29"),
    ],
)
def test_tables_are_made_again_from_the_result_files_of_the_tree(
    what: str, file: str, shown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page about evidence shows them."""
    page = Path("docs/evidence.md").read_text(encoding="utf-8")
    assert run("lab", what, "--from", f"docs/results/lab/{file}.json") == 0
    printed = capsys.readouterr().out
    assert shown in printed
    for line in printed.splitlines():
        assert line in page
    (tmp_path / "other.json").write_text('{"points": 3}', encoding="utf-8")
    assert run("lab", what, "--from", str(tmp_path / "other.json")) == 1
    assert f"--from: expected a result file of openwu lab {what}" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "file"),
    [
        (("audit",), "audit"),
        (("lab", "manifold"), "manifold"),
        (("lab", "gradients"), "gradients"),
        (("lab", "conflict"), "conflict"),
        (("lab", "continual"), "continual"),
        (("lab", "scaling"), "scaling"),
    ],
)
def test_the_quick_experiments_hold_on_the_shipped_model(words: tuple[str, ...], file: str, tmp_path: Path) -> None:
    """Minutes each: the commands that docs/evidence.md was made with."""
    assert run(*words, "--quick", "--output", str(tmp_path)) == 0
    stored = json.loads((tmp_path / f"{file}.json").read_text())
    if file == "audit":
        assert stored["verdict"].startswith("conditional: ")
    if file == "manifold":
        assert stored["nearest_neighbour"]["low"] > 2 * stored["nearest_neighbour"]["chance"]
    if file == "gradients":
        first = stored["found"][0]
        # That gradients of one task agree is what makes the cosines between tasks mean something.
        assert first["same_task"]["low"] > max(0.05, first["all_pairs"]["high"])
    if file == "conflict":
        means = {each["method"]: each["new_psnr"]["value"] for each in stored["methods"]}
        assert means["random"] < means["base"] < means["generated"]
    if file == "continual":
        forgotten = {each["way"]: each["forgetting"]["value"] for each in stored["ways"]}
        assert abs(forgotten["retrieval"]) < abs(forgotten["shared"]) + 1
        assert forgotten["generator, past self"] < 0.25 * forgotten["generator"]
    if file == "scaling":
        assert stored["lines"]["generator"]["residual"] < 3
