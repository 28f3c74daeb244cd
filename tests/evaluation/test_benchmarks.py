"""Benchmarks' layouts, complete and broken; tables recomputed from their scorers' files; our own case set."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from openwu.errors import DatasetError
from openwu.evaluation.benchmarks import gedit, imgedit, listing, own
from openwu.evaluation.benchmarks.own import drafts
from openwu.evaluation.stages.record import SCORED, UNPARSED
from openwu.evaluation.stages.report import Report, build
from openwu.files.hashing import of_json


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade % 256, shade // 256, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def rows(**changes: Any) -> list[dict[str, Any]]:
    found = []
    for task, count in gedit.COUNTS.items():
        for language in gedit.LANGUAGES:
            for i in range(count):
                shade = len(found) // 2
                image = {"bytes": png(shade), "path": None}
                row = {"task_type": task, "key": f"{task}{i}", "instruction": "do", "instruction_language": language}
                found.append({**row, "input_image": image, "input_image_raw": image, "Intersection_exist": i % 2 == 0})
    found[5] |= changes
    return found


def write_parquet(folder: Path, table: list[dict[str, Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder.mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(table), folder / "train-00000.parquet")
    return folder


def test_gedit_is_read_from_its_parquet_files(tmp_path: Path) -> None:
    cases = gedit.load(write_parquet(tmp_path / "data", rows()), tmp_path / "work")
    assert len(cases) == 1212
    assert {case.language for case in cases} == {"en", "zh"}
    assert sum("intersection" in case.tags for case in cases) == 2 * sum(
        math.ceil(n / 2) for n in gedit.COUNTS.values()
    )
    first, second = cases[0], cases[40]
    assert (first.key, second.key) == ("en/background_change0", "cn/background_change0")
    assert first.image().size == (4, 4)
    again = gedit.load(tmp_path / "data", tmp_path / "work")
    assert [case.key for case in again] == [case.key for case in cases]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": "background_change1"}, "twice"),
        ({"instruction": " "}, "expected an instruction"),
        ({"instruction_language": "fr"}, "expected a language"),
        ({"task_type": "unknown"}, "expected a language of"),
        ({"input_image": {"bytes": b"", "path": "x"}}, "bytes of input_image"),
        ({"input_image": {"bytes": png(1)[:40], "path": "x"}}, "background_change5"),
    ],
)
def test_a_broken_row_of_gedit_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    table = rows(**changes)[:20]
    with pytest.raises(DatasetError, match=message):
        gedit.load(write_parquet(tmp_path / "data", table), tmp_path / "work", partial=True)


def test_a_partial_or_truncated_gedit_is_refused_unless_asked_for(tmp_path: Path) -> None:
    folder = write_parquet(tmp_path / "data", rows()[:1000])
    with pytest.raises(DatasetError, match=r"en, tone_transfer: expected 40 cases, got 0"):
        gedit.load(folder, tmp_path / "work")
    assert len(gedit.load(folder, tmp_path / "work", partial=True)) == 1000
    file = folder / "train-00000.parquet"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(DatasetError, match="download it again"):
        gedit.load(folder, tmp_path / "work", partial=True)
    with pytest.raises(DatasetError, match="found none"):
        gedit.load(tmp_path / "work", tmp_path / "work")


def write_scores(folder: Path, *, skip: int = 0) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """CSV files as upstream's scorer writes them; every `skip`-th row is left out, as it does for missing files."""
    folder.mkdir(exist_ok=True)
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for t, (task, count) in enumerate(gedit.COUNTS.items()):
        with (folder / f"m_{task}_gpt_score.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["source_image", "edited_image", *gedit.CSV_COLUMNS[1:]])
            writer.writeheader()
            for language in ("en", "cn"):
                for i in range(count):
                    scores = (float((i * 7 + t) % 11), float((i * 5 + 3 * t) % 11))
                    if skip and i % skip == 0:
                        continue
                    found.setdefault((language, task), []).append(scores)
                    path = f"r/fullset/{task}/{language}/k{i}.png"
                    row = [path, path, 'say "hi",\nnow', *scores, i % 3 == 0, language]
                    writer.writerow(
                        dict(zip(["source_image", "edited_image", *gedit.CSV_COLUMNS[1:]], row, strict=True))
                    )
    return found


def reported(folder: Path) -> Report:
    return build(gedit.read_upstream_scores(folder, "m"))


def test_tables_of_gedit_are_recomputed_from_its_csv_files(tmp_path: Path) -> None:
    """O is the mean of sqrt(SC * PQ) of samples, then of categories: not the root of mean SC times mean PQ."""
    stored = write_scores(tmp_path)
    report = reported(tmp_path)
    row = next(each for each in report.rows if each.subset == "en")
    means = []
    for task in gedit.COUNTS:
        scores = stored["en", task]
        means.append(sum(math.sqrt(s * p) for s, p in scores) / len(scores))
        assert row.categories[task]["O"].value == pytest.approx(means[-1])
    assert row.overall["O"].value == pytest.approx(sum(means) / 11)
    assert row.overall["O"].value != pytest.approx(
        math.sqrt(row.overall["SC"].value * row.overall["PQ"].value), abs=0.01
    )
    assert {each.subset for each in report.rows} == {"en", "en, intersection", "zh", "zh, intersection", "all"}


def test_rows_that_gedit_skipped_are_missing_and_bound_the_mean(tmp_path: Path) -> None:
    stored = write_scores(tmp_path, skip=4)
    row = next(each for each in reported(tmp_path).rows if each.subset == "en")
    there = sum(len(stored["en", task]) for task in gedit.COUNTS)
    overall = row.overall["O"]
    assert (overall.scored, overall.total) == (there, 606)
    assert row.statuses == {SCORED: there, "missing": 606 - there}
    assert overall.worst < overall.value < overall.best


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("k1.png,", "k2.png,", "twice"),
        (",False,", ",,", None),
        ("sementics_score", "semantics_score", "expected columns"),
        ("1.0,3.0", "nan,3.0", "expected a number from 0 to 10"),
        ("1.0,3.0", "11,3.0", "expected a number from 0 to 10"),
    ],
)
def test_broken_csv_files_of_gedit_are_named(tmp_path: Path, old: str, new: str, message: str | None) -> None:
    write_scores(tmp_path)
    file = tmp_path / "m_color_alter_gpt_score.csv"
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")
    if message is None:
        reported(tmp_path)
        return
    with pytest.raises(DatasetError, match=message):
        reported(tmp_path)
    file.unlink()
    with pytest.raises(DatasetError, match="expected one file"):
        reported(tmp_path)


def entries() -> dict[str, dict[str, str]]:
    kinds = [kind for kind, count in imgedit.COUNTS.items() for _ in range(count)]
    return {str(i): {"id": f"a/{i % 30}.jpg", "prompt": f"do {i}", "edit_type": kind} for i, kind in enumerate(kinds)}


def imgedit_folder(folder: Path) -> Path:
    (folder / "a").mkdir(parents=True)
    for i in range(30):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"a/{i}.jpg")
    (folder / imgedit.LISTING).write_text(json.dumps(entries()), encoding="utf-8")
    return folder


def test_imgedit_is_read_complete_or_refused(tmp_path: Path) -> None:
    folder = imgedit_folder(tmp_path / "b")
    cases = imgedit.load(folder, tmp_path)
    assert len(cases) == 737
    assert len({case.cluster for case in cases}) == 30
    (folder / "a/3.jpg").write_bytes(b"broken")
    with pytest.raises(DatasetError, match="pictures cannot be read"):
        imgedit.load(folder, tmp_path)
    assert len(imgedit.load(folder, tmp_path, partial=True)) == 737 - 25
    text = json.dumps(entries())
    for broken, message in (
        (text.replace('"1": ', '"0": ', 1), "'0' twice"),
        (text.replace('"edit_type": "style"', '"edit_type": "stile"', 1), "1 broken entries"),
        (text.replace('"a/0.jpg"', '"../../etc/passwd"', 1), "1 broken entries"),
        (text[:-9], "expected a JSON object"),
        ("[]", "expected a JSON object"),
    ):
        (folder / imgedit.LISTING).write_text(broken, encoding="utf-8")
        with pytest.raises(DatasetError, match=message):
            imgedit.load(folder, tmp_path, partial=True)
    short = dict(list(entries().items())[:700])
    (folder / imgedit.LISTING).write_text(json.dumps(short), encoding="utf-8")
    (folder / "a/3.jpg").write_bytes((folder / "a/4.jpg").read_bytes())
    with pytest.raises(DatasetError, match="en, action: expected 36 cases, got 22"):
        imgedit.load(folder, tmp_path)


def test_tables_of_imgedit_are_recomputed_from_its_result_file(tmp_path: Path) -> None:
    """Upstream averages whatever digits it finds; here an answer without its three scores is unparsed."""
    replies: dict[str, Any] = {
        key: f"Reasoning: {i} hats.\nCompliance: {1 + i % 5}\nVisual: Naturalness: {1 + i % 3}\nIntegrity: 4"
        for i, key in enumerate(entries())
    }
    replies["3"] = "Prompt Compliance: 5\nVisual Naturalness: 5"
    replies["4"] = "Prompt Compliance: 9\nVisual Naturalness: 5\nIntegrity: 5"
    replies["5"] = {"error": "timeout"}
    del replies["6"]
    file = tmp_path / "result.json"
    file.write_text(json.dumps(replies), encoding="utf-8")
    report = build(imgedit.read_upstream_scores(file, entries(), "m"))
    (row,) = report.rows
    assert row.statuses == {SCORED: 733, UNPARSED: 3, "missing": 1}
    style = [(1 + i % 5, 1 + i % 3, 4) for i in range(117, 217)]
    assert row.categories["style"]["overall"].value == pytest.approx(sum(map(sum, style)) / 300)
    capped = sum(sum(min(score, each[0]) for score in each) for each in style) / 300
    assert row.categories["style"]["capped"].value == pytest.approx(capped)
    means = [means["overall"].value for means in row.categories.values()]
    assert row.overall["overall"].value == pytest.approx(sum(means) / 9)
    file.write_text(json.dumps({"unknown": ""}), encoding="utf-8")
    with pytest.raises(DatasetError, match="expected keys of"):
        imgedit.read_upstream_scores(file, entries(), "m")


def test_our_own_set_has_the_form_of_the_articles_and_stays_as_it_is() -> None:
    found = drafts()
    assert len(found) == 410
    assert sum(bool(draft.second) for draft in found) == 64
    assert len({draft.task for draft in found}) == 60
    assert {language: sum(d.language == language for d in found) for language in ("en", "zh")} == {"en": 205, "zh": 205}
    assert len({(d.task, d.photograph, d.second, d.instruction) for d in found}) == 410
    assert of_json([[d.key, d.instruction, d.photograph] for d in found]).hexdigest()[:12] == "6e63f1151522"


def test_our_own_set_is_written_and_read_as_a_case_set(tmp_path: Path) -> None:
    """What is made is what is read: pictures as files, targets, and the noise that targets were made with."""
    made = own.load(None, tmp_path, partial=True, side=24)
    assert len({case.task for case in made}) == len(made) == 60
    read = listing.load(own.write_own(tmp_path / "set", partial=True, side=24).parent, tmp_path)
    for one, two in zip(made, read, strict=True):
        assert (one.key, one.instruction, one.photograph, len(one.pictures)) == (
            two.key,
            two.instruction,
            two.photograph,
            len(two.pictures),
        )
        assert one.image().tobytes() == two.image().tobytes()
        assert (one.target - two.target).abs().max() <= 0.5 / 255 + 1e-6
        assert one.noise.equal(two.noise)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "cases.jsonl:2: Expecting"),
        ("[]", "expected an object"),
        ('{"key": "a", "key": "b"}', "'key' twice"),
        ('{"key": "a", "task": "t", "instruction": "i", "images": ["a.png"]}', "'a' twice"),
        ('{"key": "b", "task": "t", "instruction": " ", "images": ["a.png"]}', "instruction: expected text"),
        ('{"key": "b", "task": "t", "instruction": "i", "images": []}', "images: expected a list"),
        ('{"key": "b", "task": "t", "instruction": "i", "images": ["a.png"], "tags": "x"}', "tags: expected"),
        ('{"key": "b", "task": "t", "instruction": "i", "images": ["a.png"], "target": 1}', "target: expected"),
        ('{"key": "b", "task": "t", "instruction": "i", "images": ["none.png"]}', "none.png"),
        ('{"key": "b", "task": "t", "instruction": "i", "images": ["a.png"], "target": "text.png"}', "text.png"),
        ('{"key": "b", "task": "t", "instruction": "i", "images": ["a.png"], "wrong": 1}', "expected fields of"),
    ],
)
def test_a_broken_line_of_a_case_set_is_named(tmp_path: Path, line: str, message: str) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("text")
    good = '{"key": "a", "task": "t", "instruction": "i", "images": ["a.png"]}'
    (tmp_path / listing.LISTING).write_text(f"{good}\n{line}\n", encoding="utf-8")
    with pytest.raises(DatasetError, match=message):
        listing.load(tmp_path, tmp_path)
