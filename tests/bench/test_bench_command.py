"""`openwu bench` with rows of its own making: what is measured, skipped, written, and how it fails."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openwu import cli
from openwu.cli import bench as bench_verb
from openwu.errors import OpenwuError
from openwu_bench import CURVES, ROWS, PlannedRow, command, needs_gpu
from openwu_bench.measurement import Curve, Row, Timing

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
QUICK: list[bool] = []


def c1(quick: bool) -> Row:
    QUICK.append(quick)
    sides = {"ours": Timing((0.25, 0.5, 0.125)), "plain": Timing((2.0, 1.0))}
    return Row("C1", "ours, against plain", 4.0, "x", 1.1, sides=sides, error=1e-6, details={"d": [256, "bf16"]})


def c2(quick: bool) -> Row:
    return Row("C2", "bytes", 0.5, "x", 0.45, at_least=False)


def broken(quick: bool) -> Row:
    raise OpenwuError("both sides differ by 0.5")


def unable(quick: bool) -> Row:
    raise ModuleNotFoundError("No module named 'peft'", name="peft")


def misnamed(quick: bool) -> Row:
    return Row("C9", "", 1.0, "x", 1.0)


def endless(quick: bool) -> Row:
    return Row("C3", "", float("nan"), "x", 1.0)


def tensors(quick: bool) -> Row:
    return Row("C3", "", 1.0, "x", 1.0, details={"shape": torch.zeros(2)})


def stopped(quick: bool) -> Row:
    raise KeyboardInterrupt


def curve(quick: bool) -> Curve:
    points = [(1, [0.5], 1), (2, [1.0, 1.0], 2), (4, [2.0], 4)]
    return Curve.from_json({"what": "a loop; linear", "unit": "tokens", "points": points})


def planned(name: str, function: str) -> PlannedRow:
    return replace(ROWS[name], measure=f"made_up_rows:{function}")


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> dict[str, PlannedRow]:
    """Rows and curves that take no time, in place of the real ones."""
    module = types.ModuleType("made_up_rows")
    for made in (c1, c2, broken, unable, misnamed, endless, tensors, stopped, curve):
        setattr(module, made.__name__, made)
    monkeypatch.setitem(sys.modules, "made_up_rows", module)
    found = {"C1": planned("C1", "c1"), "C2": planned("C2", "c2")}
    monkeypatch.setattr(command, "ROWS", found)
    monkeypatch.setattr(command, "CURVES", {"loop": "made_up_rows:curve"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    QUICK.clear()
    return found


def bench(folder: Path, *words: str) -> int:
    return cli.main(["bench", *words, "--output", str(folder)])


def stored(folder: Path) -> dict[str, object]:
    """Theme -> what its JSON holds."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*.json")]
    return {each["theme"]: each for each in found}


def test_every_row_and_curve_can_be_resolved() -> None:
    assert not set(ROWS) & set(CURVES)
    for path in (*(row.measure for row in ROWS.values()), *CURVES.values()):
        assert callable(command.resolve(path))
    assert [name for name in ROWS if needs_gpu(name)] == [f"G{number}" for number in range(1, 10)]


def test_a_run_prints_a_table_and_writes_every_timing(
    rows: dict[str, PlannedRow], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(tmp_path / "new", "C2", "C1", "loop", "C1") == 0
    assert QUICK == [False]
    captured = capsys.readouterr()
    lines = [line.split() for line in captured.out.splitlines()]
    assert ["C1", "4", "x", "at", "least", "1.1", "x", "yes", "ours,", "against", "plain"] in lines
    assert ["C2", "0.5", "x", "at", "most", "0.45", "x", "no", "bytes"] in lines
    assert "2 s at 4 tokens, grows as size ^ 1.00, at most 0 % off its law" in captured.out
    assert "C1" in captured.err  # as it went
    generator, growth = (stored(tmp_path / "new")[theme] for theme in ("generator", "growth"))
    assert isinstance(generator, dict)
    assert isinstance(growth, dict)
    row = next(row for row in generator["rows"] if row["name"] == "C1")
    assert row["sides"] == {"ours": [0.25, 0.5, 0.125], "plain": [2.0, 1.0]}
    assert (row["value"], row["goal"], row["reached"], row["error"]) == (4.0, 1.1, True, 1e-6)
    assert row["details"] == {"d": [256, "bf16"]}
    assert generator["machine"]["cores"] >= 1
    assert generator["machine"]["memory"] > 2**28
    assert generator["versions"]["torch"] == torch.__version__
    assert {"commit", "uncommitted", "date", "threads", "began"} <= set(generator)
    assert growth["growths"][0]["points"] == [[1, [0.5], 1], [2, [1.0, 1.0], 2], [4, [2.0], 4]]
    page = next((tmp_path / "new").glob("generator_*.md")).read_text(encoding="utf-8")
    assert "| C1 | ours | 250 ms | 188 ms to 375 ms | 3 |" in page
    assert generator["began"][:10] in page


def test_without_names_everything_that_can_be_measured_is(
    rows: dict[str, PlannedRow], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(tmp_path, "--quick") == 0
    assert QUICK == [True]
    files = {file.name.split("_")[0] for file in tmp_path.iterdir()}
    assert files == {"quick-generator", "quick-growth"}
    rows["G1"] = planned("G1", "c1")
    assert bench(tmp_path, "--all") == 0
    assert "G1: skipped, it needs a GPU, and no CUDA device is here" in capsys.readouterr().err
    assert bench(tmp_path, "G1") == 1  # asked for by name


def test_a_run_never_replaces_another_one_s_files(rows: dict[str, PlannedRow], tmp_path: Path) -> None:
    for _ in range(3):
        assert bench(tmp_path, "C1") == 0
    names = sorted(file.name for file in tmp_path.glob("*.json"))
    assert len(names) == 3
    assert names[0].removesuffix(".json") + "_2.json" in names
    assert len(list(tmp_path.glob("*.md"))) == 3


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ("broken", "C3: OpenwuError: both sides differ by 0.5"),
        ("unable", "C3: the Python package 'peft' is not installed"),
        ("misnamed", "C3: OpenwuError: expected a row named C3, got 'C9'"),
        ("endless", "expected finite value, goal and error, got nan"),
        ("tensors", "not JSON serializable"),
    ],
)
def test_a_row_that_fails_is_said_and_stored_and_stops_no_other(
    rows: dict[str, PlannedRow], tmp_path: Path, capsys: pytest.CaptureFixture[str], made: str, words: str
) -> None:
    rows["C3"] = planned("C3", made)
    assert bench(tmp_path, "C3", "C1") == 1
    captured = capsys.readouterr()
    assert words in captured.err
    assert "C1 " in captured.out
    adapters = stored(tmp_path)["adapters"]
    assert isinstance(adapters, dict)
    assert (adapters["rows"], list(adapters["failed"])) == ([], ["C3"])


def test_what_was_measured_before_a_stop_is_kept(rows: dict[str, PlannedRow], tmp_path: Path) -> None:
    rows["C3"] = planned("C3", "stopped")
    assert bench(tmp_path, "C1", "C3", "C2") == cli.STOPPED
    generator = stored(tmp_path)["generator"]
    assert isinstance(generator, dict)
    assert [row["name"] for row in generator["rows"]] == ["C1"]


def test_the_list_measures_nothing(
    rows: dict[str, PlannedRow], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(tmp_path, "--list") == 0
    output = capsys.readouterr().out
    assert all(name in output for name in (*rows, "loop"))
    assert not QUICK
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["C99"], ["c1"], ["--fast"]])
def test_unknown_names_are_usage_errors(
    rows: dict[str, PlannedRow], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    try:
        code: object = bench(tmp_path, *words)
    except SystemExit as stop:  # an option: argparse itself refuses it
        code = stop.code
    assert code == cli.USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("openwu: error: ")
    assert words[0] in line
    assert words[0].startswith("-") or all(name in line for name in (*rows, "loop"))


def test_without_a_source_checkout_the_verb_says_where_the_benchmarks_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_verb, "FOLDER", tmp_path / "benchmarks")
    assert cli.main(["bench", "--list"]) == cli.FAILED
    assert "not of the installed package; run `pip install -e .` in a checkout" in capsys.readouterr().err


def test_the_row_that_the_page_shows_is_measured(
    rows: dict[str, PlannedRow],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    section = PAGE.read_text(encoding="utf-8").partition("## Adding a row or a curve")[2]
    code, entry = (block.partition("```")[0] for block in section.split("```python\n")[1:3])
    module = types.ModuleType("my_row")
    exec(compile(code, str(PAGE), "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, "my_row", module)
    exec(entry, {"ROWS": rows, "PlannedRow": PlannedRow})
    assert bench(tmp_path, "C17", "--quick") == 0
    assert "addmm, against a product and an addition" in capsys.readouterr().out
    example = stored(tmp_path)["example"]
    assert isinstance(example, dict)
    assert list(example["rows"][0]["sides"]) == ["fused", "plain"]
