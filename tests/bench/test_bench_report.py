"""The page on performance: made from result files alone, the newest of each row; what is missing is not guessed."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from PIL import Image

from openwu import cli
from openwu.errors import OpenwuError
from openwu.evaluation.machine.hardware import described, hardware, short_name
from openwu.files.markdown import filled
from openwu_bench import ROWS
from openwu_bench.figures import round_numbers, share
from openwu_bench.measurement import Curve, Row, Timing
from openwu_bench.report import CURVES_FIGURE, ROWS_FIGURE, read_results, sections
from openwu_bench.result import Result, number, read_result, seconds

ROOT = Path(__file__).parents[2]
MACHINE = {
    "processor": "Intel(R) Core(TM) i7 CPU @ 3.0GHz",
    "cores": 4,
    "memory": 16 * 2**30,
    "system": "Linux 6",
    "load": 0.1,
}
MARKS = "".join(f"<!-- {name}: begin -->\nold\n<!-- {name}: end -->\nkept\n" for name in ("rows", "growth", "runs"))


def result(day: int, *rows: Row, quick: bool = False, theme: str = "edit") -> Result:
    ran = {"openwu": "0.1.0", "commit": "abcdef0123456789", "uncommitted": False, "threads": 4, "processor": "x"}
    versions = {"python": "3.12.1", "torch": "2.9.0"}
    return Result(
        theme, datetime(2026, 1, day, tzinfo=UTC), quick, dict(MACHINE), versions, ran, {row.name: row for row in rows}
    )


def c7(value: float) -> Row:
    sides = {"whole edit": Timing((1.0, 1.5, 2.0)), "base alone": Timing((0.5, 0.75, 1.0))}
    return Row("C7", "an edit", value, "%", 25.0, at_least=False, sides=sides, details={"floor": 0.25})


CURVE = Curve.from_json({"what": "a loop", "unit": "tokens", "points": [(1, [0.5], 1), (2, [1.0], 2), (4, [4.0], 4)]})


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = result(3, c7(18.0))
    written.curves["loop"] = CURVE
    written.failed["C8"] = "too hard"
    written.write(tmp_path)
    assert written.file == tmp_path / "edit_intel-core-i7-4-cores_2026-01-03.json"
    assert read_result(tmp_path / "edit_intel-core-i7-4-cores_2026-01-03.json") == written


def test_the_newest_measurement_counts_and_the_rest_is_not_measured(tmp_path: Path) -> None:
    for day, value, quick in ((5, 30.0, False), (9, 20.5, False), (7, 99.0, False), (12, 1.0, True)):
        result(day, c7(value), quick=quick).write(tmp_path)
    text = sections(read_results(tmp_path), tmp_path / "page.md")["rows"]
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert lines["C7"].startswith(
        "| C7 | an edit | 20.5 % | at most 25 % | yes | edit_intel-core-i7-4-cores_2026-01-09"
    )
    for name in set(ROWS) - {"C7"}:
        assert "| not measured |" in lines[name]


def test_the_command_fills_the_page_and_draws(tmp_path: Path) -> None:
    made = result(3, c7(30.0))
    made.curves["loop"] = CURVE
    made.write(tmp_path / "results_of_runs")
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "page.md"
    page.write_text(MARKS, encoding="utf-8")
    words = ["bench", "--report", str(tmp_path / "results_of_runs"), "--page", str(page)]
    assert cli.main(words) == 0
    text = page.read_text(encoding="utf-8")
    assert "| **no** |" in text
    assert "| 4 | 4 s | 2.52 s | 1.59 |" in text  # factor: the geometric mean of 0.5, 0.5 and 1
    assert "(../results_of_runs/edit_intel-core-i7-4-cores_2026-01-03.md)" in text
    assert text.count("kept") == 3
    for picture in (ROWS_FIGURE, CURVES_FIGURE):
        assert f"]({picture.as_posix()})" in text
        with Image.open(page.parent / picture) as image:
            assert min(image.size) > 100
    assert cli.main(words) == 0
    assert page.read_text(encoding="utf-8") == text
    for file in (tmp_path / "results_of_runs").iterdir():
        file.unlink()
    assert cli.main(words) == 0
    assert "Not measured yet." in page.read_text(encoding="utf-8")
    assert not (page.parent / ROWS_FIGURE).exists()


def test_the_page_in_the_docs_is_what_the_committed_results_make() -> None:
    page = ROOT / "docs" / "performance.md"
    results = read_results(ROOT / "benchmarks" / "results")
    assert filled(page, sections(results, page), "--page") == page.read_text(encoding="utf-8")
    for picture in (ROWS_FIGURE, CURVES_FIGURE):
        assert (page.parent / picture).exists() == (picture.as_posix() in page.read_text(encoding="utf-8"))


def test_other_json_is_left_alone_and_damaged_results_are_not(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"scores": []}')
    assert read_results(tmp_path) == []
    for text in ("{", '{"theme": "edit"}', '{"theme": "edit", "rows": [{"name": "C7"}]}'):
        (tmp_path / "edit.json").write_text(text)
        with pytest.raises(OpenwuError, match=r"edit\.json: expected a result file of openwu bench"):
            read_results(tmp_path)


def test_a_page_or_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, words in (("nowhere", "--report: expected a folder"), (".", "--page: expected a Markdown file")):
        report = str(tmp_path / folder)
        assert cli.main(["bench", "--report", report, "--page", str(tmp_path / "none.md")]) == cli.FAILED
        assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "goal", "at_least", "expected"),
    [(40.0, 20.0, True, 2.0), (10.0, 20.0, True, 0.5), (12.5, 25.0, False, 2.0), (50.0, 25.0, False, 0.5)],
)
def test_the_picture_shows_how_much_better_than_the_goal(
    value: float, goal: float, at_least: bool, expected: float
) -> None:
    assert share(Row("C1", "", value, "x", goal, at_least)) == pytest.approx(expected)


def test_a_cost_of_nothing_can_be_drawn() -> None:
    assert share(Row("C7", "", -0.1, "%", 25.0, at_least=False)) > 1
    assert 0 < share(Row("C1", "", 0.0, "x", 1.1)) < 1


def test_numbers_in_words() -> None:
    assert [number(value) for value in (0.0, 1234.5, 0.012345, -3.0, 25.0)] == ["0", "1,230", "0.0123", "-3", "25"]
    assert [seconds(value) for value in (12.345, 0.5, 2e-3, 3.21e-5)] == ["12.3 s", "500 ms", "2 ms", "32.1 µs"]


def test_the_machine_here_has_a_name() -> None:
    machine = hardware(gpu=False)
    assert short_name(machine).replace("-", "").isalnum()
    assert f"{machine['cores']} core" in described(machine)
    gpu = {**machine, "gpu": {"name": "NVIDIA H200", "memory": 1, "cuda": "13.0"}}
    assert short_name(gpu) == "nvidia-h200"
    assert described(gpu).startswith("NVIDIA H200; ")


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (0.13, 0.22, [0.14, 0.16, 0.18, 0.2]),
        (1, 12, [1, 2, 5, 10]),
        (2e-3, 0.6, [0.01, 0.1]),
        (1, 1e9, [1, 1e3, 1e6, 1e9]),
        (1.21, 1.25, [1.21, 1.25]),
    ],
)
def test_ticks_are_few_and_round(first: float, last: float, expected: list[float]) -> None:
    assert round_numbers(first, last) == pytest.approx(expected)
