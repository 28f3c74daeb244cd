"""GEdit-Bench: its parquet files or our listing as cases, and tables recomputed from its scorer's CSV files.

The hub data set is stepfun-ai/GEdit-Bench: 606 cases in English and 606 in Chinese ("cn") in 11 categories. Sources are
`input_image`, as its scorer takes them; cases whose instruction exists in both languages are tagged "intersection".
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from openwu.errors import DatasetError, PictureError
from openwu.evaluation.benchmarks import check_complete, listing
from openwu.evaluation.cases import Case
from openwu.evaluation.judges.rubrics import GEdit
from openwu.evaluation.stages.measurements import Measurement, Results, plain_case
from openwu.evaluation.stages.record import StoredCase
from openwu.extras import library
from openwu.files.hashing import of_bytes
from openwu.files.writing import atomic_file
from openwu.images import read_picture

COUNTS = {
    "background_change": 40,
    "color_alter": 40,
    "material_alter": 40,
    "motion_change": 40,
    "ps_human": 70,
    "style_change": 60,
    "subject-add": 60,
    "subject-remove": 57,
    "subject-replace": 60,
    "text_change": 99,
    "tone_transfer": 40,
}
LANGUAGES = {"en": "en", "cn": "zh"}
"""Upstream's name -> ours."""
INTERSECTION = "intersection"
COLUMNS = ("task_type", "key", "instruction", "instruction_language", "input_image", "Intersection_exist")

CSV_COLUMNS = (
    "edited_image",
    "instruction",
    "sementics_score",
    "quality_score",
    "intersection_exist",
    "instruction_language",
)


def load(folder: Path, work: Path, *, partial: bool = False) -> list[Case]:
    """Read the parquet files below a folder, or a folder with our `cases.jsonl`.

    `work`: where pictures are unpacked. Raises DatasetError for broken rows, duplicate keys and, without `partial`,
    numbers of cases other than the benchmark's.
    """
    if (folder / listing.LISTING).is_file():
        cases = listing.load(folder, work, partial=partial)
    else:
        cases = list(_read_parquet(folder, work))
    if not partial:
        expected = {(language, task): count for language in LANGUAGES.values() for task, count in COUNTS.items()}
        check_complete("gedit", cases, expected)
    return cases


def _read_parquet(folder: Path, work: Path) -> Iterator[Case]:
    files = sorted(folder.rglob("*.parquet"))
    if not files:
        raise DatasetError(f"gedit: expected parquet files or {listing.LISTING} below {folder}, found none")
    parquet = library("pyarrow.parquet", "benchmarks")
    seen: set[str] = set()
    for file in files:
        try:
            opened = parquet.ParquetFile(file)
            missing = sorted(set(COLUMNS) - set(opened.schema_arrow.names))
            if missing:
                raise DatasetError(f"{file}: expected columns {', '.join(COLUMNS)}, got none of {missing}")
            for batch in opened.iter_batches(batch_size=16, columns=list(COLUMNS)):
                for row in batch.to_pylist():
                    case = _case(row, work, str(file))
                    if case.key in seen:
                        raise DatasetError(f"{file}: expected keys of their own, got {case.key!r} twice")
                    seen.add(case.key)
                    yield case
        except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
            raise DatasetError(f"{file}: expected a complete parquet file ({error}); download it again") from error


def _case(row: Mapping[str, Any], work: Path, where: str) -> Case:
    key, language = row["key"], row["instruction_language"]
    if language not in LANGUAGES or row["task_type"] not in COUNTS:
        raise DatasetError(f"{where}: {key}: expected a language of {list(LANGUAGES)} and a task of {list(COUNTS)}")
    if not isinstance(row["instruction"], str) or not row["instruction"].strip() or not isinstance(key, str):
        raise DatasetError(f"{where}: {key}: expected an instruction, got {row['instruction']!r}")
    data = (row["input_image"] or {}).get("bytes")
    if not data:
        raise DatasetError(f"{where}: {key}: expected the bytes of input_image, got none")
    digest = of_bytes([data]).hexdigest()
    file = work / f"{digest}.png"
    if not file.exists():
        work.mkdir(parents=True, exist_ok=True)
        try:
            picture = read_picture(data).to_image()
        except PictureError as error:
            raise DatasetError(f"{where}: {key}: {error}") from error
        with atomic_file(file) as part:
            picture.save(part, "PNG")
    tags = frozenset([INTERSECTION] if row["Intersection_exist"] else [])
    return Case(
        row["task_type"],
        row["instruction"],
        (file,),
        photograph=digest[:16],
        language=LANGUAGES[language],
        key=f"{language}/{key}",
        tags=tags,
    )


def upstream_path(case: StoredCase, *, source: bool = False) -> str:
    """Return where upstream's scorer looks for a picture below the model's folder."""
    language, key = case.key.split("/")
    return f"fullset/{case.task}/{language}/{key}{'_SRCIMG' if source else ''}.png"


def read_upstream_scores(folder: Path, system: str) -> Results:
    """Read the CSV files `{model}_{category}_gpt_score.csv` of upstream's scorer as results of one system.

    Rows that upstream skipped in silence are cases of status "missing". Raises DatasetError for a missing category, a
    broken number, a row that is there twice, or more rows than cases.
    """
    rows = {task: list(_csv_rows(folder, task)) for task in COUNTS}
    languages = {row["instruction_language"] for each in rows.values() for row in each}
    if not languages or languages - LANGUAGES.keys():
        raise DatasetError(f"{folder}: expected rows of languages {list(LANGUAGES)}, got {sorted(languages)}")
    cases: list[StoredCase] = []
    found: list[Measurement] = []
    for upstream in sorted(languages):
        for task, count in COUNTS.items():
            own = [row for row in rows[task] if row["instruction_language"] == upstream]
            if len(own) > count:
                raise DatasetError(f"{folder}: {task}, {upstream}: expected at most {count} rows, got {len(own)}")
            keys = set()
            for row in own:
                case, scores = _scored_row(row, task, upstream)
                if case.key in keys:
                    raise DatasetError(f"{folder}: {task}: expected every case once, got {case.key!r} twice")
                keys.add(case.key)
                cases.append(case)
                found += [Measurement(case.key, system, metric, value) for metric, value in scores.items()]
            for number in range(len(own), count):
                key = f"{upstream}/{task}-missing-{number}"
                cases.append(plain_case(key, task, cluster=key, language=LANGUAGES[upstream]))
                found += [Measurement(key, system, metric, None, "missing") for metric in GEdit.metrics]
    return Results("gedit", "upstream's scorer", GEdit.metrics, GEdit.headline, cases, found)


def _scored_row(row: Mapping[str, str], task: str, upstream: str) -> tuple[StoredCase, dict[str, float]]:
    key = f"{upstream}/{task}/{Path(row['edited_image']).stem}"
    tags = (INTERSECTION,) if row["intersection_exist"].strip().lower() in ("true", "1") else ()
    case = plain_case(key, task, cluster=key, language=LANGUAGES[upstream], tags=tags, instruction=row["instruction"])
    semantics, quality = (_number(row, name, task) for name in ("sementics_score", "quality_score"))
    return case, {"SC": semantics, "PQ": quality, "O": math.sqrt(semantics * quality)}


def _csv_rows(folder: Path, task: str) -> Iterator[dict[str, str]]:
    files = sorted(folder.glob(f"*_{task}_gpt_score.csv"))
    if len(files) != 1:
        raise DatasetError(f"{folder}: expected one file *_{task}_gpt_score.csv, got {len(files)}")
    try:
        text = files[0].read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{files[0]}: expected CSV in UTF-8 ({error})") from error
    for row in csv.DictReader(io.StringIO(text, newline="")):
        needed = ("edited_image", "instruction", "sementics_score", "quality_score", "intersection_exist")
        if any(row.get(name) is None for name in (*needed, "instruction_language")):
            raise DatasetError(
                f"{files[0]}: expected columns {', '.join(needed)}, instruction_language; got {list(row)}"
            )
        yield row


def _number(row: Mapping[str, str], name: str, task: str) -> float:
    try:
        value = float(row[name])
    except ValueError:
        value = math.nan
    if not 0 <= value <= 10:
        raise DatasetError(f"{task}: {row['edited_image']}: {name}: expected a number from 0 to 10, got {row[name]!r}")
    return value


def save_source(image: Image.Image, file: Path) -> None:
    """Write a source picture where upstream's scorer expects it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as part:
        image.save(part, "PNG")
