"""The one record: written and read whole, broken lines named; every stored result of the tree becomes a report."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from openwu import cli
from openwu.errors import OpenwuError
from openwu.evaluation.benchmarks.published import PUBLISHED
from openwu.evaluation.judges.rubrics import RUBRICS
from openwu.evaluation.stages.measurements import (
    UNBOUNDED,
    Measurement,
    Results,
    gather,
    plain_case,
    read_measurements,
    write_measurements,
)
from openwu.evaluation.stages.page import Source, as_markdown, write_report
from openwu.evaluation.stages.report import build
from openwu.evaluation.stages.stored import read_results

STORED = Path("docs/results")


def results(**changes: Any) -> Results:
    """Two systems on four cases of two photographs; B failed once."""
    cases = [plain_case(f"c{i}", "add" if i < 2 else "remove", cluster=f"p{i % 2}", tags=("new",)) for i in range(4)]
    found = [Measurement(f"c{i}", "A", "score", float(i)) for i in range(4)]
    found += [Measurement(f"c{i}", "B", "score", i / 2, seed=1) for i in range(3)]
    found.append(Measurement("c3", "B", "score", None, "failed"))
    made = Results("x", "", {"score": (0, 10)}, "score", cases, found, provenance={"commit": "abc"})
    return replace(made, **changes)


def test_the_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "measurements.jsonl"
    for made in (results(), results(scales={"score": UNBOUNDED}, whole=9, notes=("quick",), reference="A")):
        write_measurements(path, made)
        assert read_measurements(path) == made
        assert build(read_measurements(path)) == build(made)


@pytest.mark.parametrize(
    ("number", "changes", "message"),
    [
        (1, {"version": 2}, "jsonl:1: .*expected openwu-measurements 1"),
        (3, {"value": None}, "jsonl:3: .*exactly where the status is"),
        (3, {"status": "failed"}, "jsonl:3: .*exactly where the status is"),
        (2, {"value": 11}, "jsonl:2: .*from 0.0 to 10.0, got 11"),
        (2, {"measure": "other"}, "jsonl:2: .*expected a measure of"),
        (6, {"task": "other"}, "jsonl:6: .*another task"),
    ],
)
def test_a_broken_line_of_the_record_is_named(
    tmp_path: Path, number: int, changes: dict[str, object], message: str
) -> None:
    path = tmp_path / "measurements.jsonl"
    write_measurements(path, results())
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[number - 1] = json.dumps({**json.loads(lines[number - 1]), **changes})
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(OpenwuError, match=message):
        read_measurements(path)
    path.write_text("", encoding="utf-8")
    with pytest.raises(OpenwuError, match="expected a line of"):
        read_measurements(path)


def test_what_is_missing_is_counted_and_bounds_the_mean() -> None:
    report = build(results())
    b = next(row for row in report.rows if (row.system, row.subset) == ("B", "all"))
    mean = b.overall["score"]
    assert (mean.scored, mean.total) == (3, 4)
    assert mean.value == pytest.approx((0.25 + 1) / 2)
    assert (mean.worst, mean.best) == (pytest.approx((0.25 + 0.5) / 2), pytest.approx((0.25 + 5.5) / 2))
    assert b.statuses == {"scored": 3, "failed": 1}
    assert report.differences["A minus B"].cases == 3
    unbounded = build(results(scales={"score": UNBOUNDED}))
    assert "(3/4)" in as_markdown(unbounded)
    assert next(row for row in unbounded.rows if row.system == "A").overall["score"].worst == pytest.approx(1.5)


def test_numbers_that_are_none_are_no_scores() -> None:
    case = plain_case("a", "t", cluster="a")
    assert gather([(case, "A", {"x": math.nan, "y": 1.0}, 0)])[1] == [
        Measurement("a", "A", "x", None, "undefined"),
        Measurement("a", "A", "y", 1.0),
    ]


def test_a_part_is_never_taken_for_the_whole(tmp_path: Path) -> None:
    """The table, the JSON, the chart and the page say so; a complete run says nothing of the kind."""
    said = "4 of 606 cases were run"
    for name, made, expected in (("part", results(whole=606), True), ("whole", results(whole=4), False)):
        page = write_report(build(made), tmp_path / name, Source(name, made))
        files = [page.with_name(f"report.{kind}").read_text(encoding="utf-8") for kind in ("md", "json", "svg", "html")]
        assert [said in text for text in files] == [expected] * 4
        assert ["NOT THE WHOLE" in text for text in files] == [expected] * 4
        drawn = ElementTree.fromstring(files[2])
        assert len(drawn.findall("{http://www.w3.org/2000/svg}circle")) == len(build(made).rows)


def test_published_scores_stand_apart_and_on_the_benchmarks_scale() -> None:
    for benchmark, rows in PUBLISHED.items():
        rubric = RUBRICS[benchmark]
        for row in rows:
            assert rubric.headline in row.scores
            assert all(
                rubric.metrics[name][0] <= score <= rubric.metrics[name][1] for name, score in row.scores.items()
            )
    scales = RUBRICS["gedit"].metrics
    made = results(name="gedit (partial)", scales=scales, headline="O", measurements=[Measurement("c0", "A", "O", 5)])
    text = as_markdown(build(made))
    table = text[text.index("## Published by others, neither computed nor verified here") :]
    assert "| Step1X-Edit v1.1 | GPT-4.1, en | 7.66 | 7.35 | 6.97 |" in table
    assert "Published" not in as_markdown(build(results()))


@pytest.mark.parametrize(
    ("file", "found"),
    [
        (
            "suite.json",
            {
                ("suite", "generated"): 34.5254,
                ("suite", "shuffled"): 22.9399,
                ("wording", "generated"): None,
                ("strength", "words 0.5"): 38.1533,
                ("composition", "one pass"): None,
            },
        ),
        ("lab/audit.json", {("audit of embedded", "matched"): 33.9781, ("audit of embedded", "other task"): 20.5898}),
        ("lab/conflict-quick.json", {("conflict", "single"): None}),
        (
            "lab/continual.json",
            {("continual", "retrieval"): 36.9430, ("continual, forgetting", "shared"): 18.6614},
        ),
        ("lab/scaling.json", {("scaling", "generator: width 128, 1 blocks"): 28.2650}),
        ("lab/gradients.json", {("gradients", "generator, trained"): None}),
        (
            "lab/manifold.json",
            {("manifold", "generated"): 0.9510, ("manifold, arithmetic of adapters", "matched"): None},
        ),
        ("remember_facts.json", {("audit of facts", "matched"): 0.9167, ("audit of facts", "none"): 0.0885}),
    ],
)
def test_stored_results_become_one_record(file: str, found: dict[tuple[str, str], float | None]) -> None:
    """Means are those that the files give themselves, where they give the same ones."""
    made = read_results(STORED / file)
    assert {each.name for each in made} == {name for name, _ in found}
    for each in made:
        assert each.provenance
        report = build(replace(each, reference="nobody"))
        assert ("quick" in file) == bool(report.notes)
        rows = {(each.name, row.system): row for row in report.rows if row.subset == "all"}
        for (_, system), expected in ((key, value) for key, value in found.items() if key[0] == each.name):
            mean = rows[each.name, system].overall[report.headline]
            assert mean.scored == mean.total > 10
            assert mean.value == pytest.approx(expected if expected is not None else mean.value, abs=1e-4)


def test_opposite_gradients_and_old_tasks_are_apart() -> None:
    """Means of the files: of contradictory pairs, and of tasks that no method trained on."""
    (gradients,) = (build(each) for each in read_results(STORED / "lab/gradients.json"))
    stored = json.loads((STORED / "lab/gradients.json").read_text(encoding="utf-8"))["found"]
    for row, one in zip(gradients.rows, stored, strict=True):
        found = row.categories["contradictory"]["cosine"].value
        assert found == pytest.approx(one["contradictory"]["value"], abs=1e-4)
    (conflict,) = (build(each) for each in read_results(STORED / "lab/conflict-quick.json"))
    methods = json.loads((STORED / "lab/conflict-quick.json").read_text(encoding="utf-8"))["methods"]
    old = {row.system: row.overall["PSNR"].value for row in conflict.rows if row.subset == "all, retention"}
    assert old == pytest.approx({each["method"]: each["old_psnr"]["value"] for each in methods})


def test_sentences_are_counted_one_by_one(tmp_path: Path) -> None:
    shares = {"writer": "fresh", "language": "en", "threshold": 90, "asked": 10, "right": 8, "wrong": 1}
    file = tmp_path / "sentences.json"
    file.write_text(json.dumps({"own": 90, "shares": [{**shares, "outside": 4, "accepted": 1}]}), encoding="utf-8")
    inside, outside = (build(each) for each in read_results(file))
    assert {name: mean.value for name, mean in inside.rows[0].overall.items()} == {"right": 0.8, "silently wrong": 0.1}
    assert outside.rows[0].overall["accepted"].value == 0.25
    assert "10 sentences" in as_markdown(inside)


def test_a_folder_of_results_is_reported_file_by_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The experiment's own figure is on the page; what is no result is left out with a word."""
    (tmp_path / "continual.json").write_bytes((STORED / "lab/continual.json").read_bytes())
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    Image.new("RGB", (30, 20), "red").save(tmp_path / "continual.png")
    assert cli.main(["eval", "report", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "| retrieval | all | 36.94 [" in shown.out
    assert "other.json: no results that are known" in shown.err
    page = tmp_path / "report/continual-continual/report.html"
    text = page.read_text(encoding="utf-8")
    assert "<svg" in text
    assert "data:image/jpeg" in text
    assert "16 sub-tasks" in text
    again = page.with_name("measurements.jsonl")
    assert cli.main(["eval", "report", str(again), "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again/measurements/report.md").read_text(encoding="utf-8") == page.with_name(
        "report.md"
    ).read_text(encoding="utf-8")


def test_the_page_shows_what_the_real_photographs_file_says(tmp_path: Path) -> None:
    page = Path("docs/evaluation.md").read_text(encoding="utf-8")
    card = tmp_path / "card.md"
    card.write_text(page, encoding="utf-8")
    words = ["eval", "report", str(STORED / "real.jsonl"), "--output", str(tmp_path / "report"), "--card", str(card)]
    assert cli.main(words) == 0
    assert card.read_text(encoding="utf-8") == page
    assert "| openwu minus input | +0.51 [" in page


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected a result file in JSON"),
        ("[]", "found neither"),
        ('{"seen": [{}], "ways": []}', "expected results as openwu writes them"),
    ],
)
def test_a_broken_result_file_is_named(
    tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.json"
    file.write_text(text, encoding="utf-8")
    assert cli.main(["eval", "report", str(file)]) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [file]
