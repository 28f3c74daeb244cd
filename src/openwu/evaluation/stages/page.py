"""A report as files: JSON, Markdown, a chart, a sheet of pictures where there are some, and one HTML page.

`report.json`, `report.md`, `report.svg`, `report.jpg`, `report.html`, and `measurements.jsonl` behind them.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from openwu.errors import PictureError
from openwu.evaluation.benchmarks.published import published_rows
from openwu.evaluation.cases import image_tensor
from openwu.evaluation.pictures import grid
from openwu.evaluation.stages.chart import chart
from openwu.evaluation.stages.judge import latest_outputs
from openwu.evaluation.stages.measurements import Results, write_measurements
from openwu.evaluation.stages.record import DONE, Output, RunFolder, StoredCase
from openwu.evaluation.stages.report import Report, Row
from openwu.evaluation.statistics import Mean
from openwu.files.markdown import escaped, table, unescaped
from openwu.files.writing import atomic_file, write_text

THUMBNAIL = 160
"""Side in pixels of a picture in the sheet and on the page."""
SHEET_ROWS, PAGE_ROWS = 12, 120
"""Cases that are shown."""
FIGURE = 1200
"""Largest width in pixels of an experiment's own figure on the page."""

STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0 2rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #8885; text-align: left; font-variant-numeric: tabular-nums; }
.scope { border: 2px solid #c60; padding: .5rem 1rem; font-weight: bold; }
svg, .figure { max-width: 100%; height: auto; }
figure { display: inline-block; margin: .3rem; vertical-align: top; width: 160px; }
figcaption { font-size: 12px; overflow-wrap: anywhere; }
h3 { margin: 1.5rem 0 .3rem; font-size: 1rem; }
"""


def shown(mean: Mean, digits: int = 2) -> str:
    """Write a mean with its interval; where cases are missing, with its coverage and bounds."""
    if math.isnan(mean.value):
        return f"none of {mean.total}"
    text = f"{mean.value:.{digits}f}"
    if not math.isnan(mean.interval.low):
        text += f" [{mean.interval.low:.{digits}f}, {mean.interval.high:.{digits}f}]"
    if mean.scored < mean.total:
        bounded = math.isfinite(mean.worst) and math.isfinite(mean.best)
        text += f" ({mean.scored}/{mean.total}"
        text += f"; {mean.worst:.{digits}f} to {mean.best:.{digits}f})" if bounded else ")"
    return text


@dataclass(frozen=True)
class Source:
    """Results to report, and where pictures for the page are."""

    name: str
    """Shown in the terminal: a judge, or a file."""
    results: Results
    record: RunFolder | None = None
    """The run that was judged, for pictures of its cases."""
    figures: Sequence[Path] = ()
    """Pictures that an experiment drew."""


def as_markdown(report: Report, heading: str = "##") -> str:
    """Write all tables; systems and tasks are names of users, so marks of Markdown in them are escaped."""
    said = "".join(f"**{text}**\n\n" for text in _warnings(report))
    tables = "".join(f"{heading} {title}\n\n{table(head, rows)}" for title, head, rows in _tables(report))
    return said + tables + _note(report)


def _warnings(report: Report) -> list[str]:
    return [*_escaped([report.scope] if report.scope else []), *_escaped(report.notes)]


def _note(report: Report) -> str:
    return (
        f"Brackets: 95% intervals of a bootstrap over {report.clusters}. In parentheses, where cases are missing: how "
        "many were scored, and the mean if all missing ones had the worst, or the best score. Nothing missing is a "
        "score.\n"
    )


def _tables(report: Report) -> Iterable[tuple[str, Sequence[str], list[list[str]]]]:
    metrics = list(report.rows[0].overall) if report.rows else []
    rows = [
        [
            *_escaped([row.system, row.subset]),
            *(shown(row.overall[metric], _digits(row.overall[metric])) for metric in metrics),
            _statuses(row),
        ]
        for row in report.rows
    ]
    published = published_rows(report.benchmark)
    judged = f", judged by {report.judge}" if report.judge else ""
    yield f"{report.benchmark}{judged}", ["system", "cases", *metrics, "states"], rows
    if published:
        lines = [
            [each.system, each.judge, *(f"{each.scores[name]:.2f}" if name in each.scores else "-" for name in metrics)]
            for each in published
        ]
        yield "Published by others, neither computed nor verified here", ["system", "judge", *metrics], lines
    subsets = list(dict.fromkeys(row.subset for row in report.rows))
    for subset in subsets:
        own = [row for row in report.rows if row.subset == subset]
        tasks = list(dict.fromkeys(task for row in own for task in row.categories))
        lines = [
            [
                *_escaped([task]),
                *(_category(row, task, report.headline) for row in own),
            ]
            for task in tasks
        ]
        yield f"{report.headline} by category, {subset}", ["category", *_escaped(row.system for row in own)], lines
    if report.differences:
        lines = [
            [
                *_escaped([name]),
                f"{each.value:+.2f} [{each.interval.low:+.2f}, {each.interval.high:+.2f}]",
                str(each.cases),
                f"{report.adjusted.get(name, math.nan):.3f}",
            ]
            for name, each in report.differences.items()
        ]
        yield f"Paired differences in {report.headline}", ["systems", "difference", "cases", "p (Holm)"], lines
    if report.diagnostics:
        yield "The judge", ["measure", "value"], [[k, f"{v:.3f}"] for k, v in report.diagnostics.items()]


def _category(row: Row, task: str, metric: str) -> str:
    if task not in row.categories:
        return "-"
    mean = row.categories[task][metric]
    return shown(mean, _digits(mean))


def _digits(mean: Mean) -> int:
    """Decimals: three for shares and similarities, two for all else."""
    return 3 if abs(mean.value) < 1 else 2


def _statuses(row: Row) -> str:
    return ", ".join(f"{count} {status}" for status, count in sorted(row.statuses.items()))


def _escaped(texts: Iterable[str]) -> list[str]:
    return list(map(escaped, texts))


def write_report(report: Report, folder: Path, source: Source) -> Path:
    """Write all files, each whole or not at all, and return the page's path. `source`: what the report was built of."""
    folder.mkdir(parents=True, exist_ok=True)
    write_measurements(folder / "measurements.jsonl", source.results)
    values = json.dumps(report.as_json(), ensure_ascii=False, indent=1, allow_nan=False)
    write_text(folder / "report.json", values + "\n")
    write_text(folder / "report.md", as_markdown(report))
    drawn = chart(report)
    write_text(folder / "report.svg", drawn)
    pictures = "" if source.record is None else _pictures(source.record, folder / "report.jpg")
    pictures += "".join(_figure(each) for each in source.figures)
    tables = "".join(f"<h2>{html.escape(title)}</h2>{html_table(head, rows)}" for title, head, rows in _tables(report))
    said = "".join(f'<p class="scope">{html.escape(unescaped(text))}</p>' for text in _warnings(report))
    origin = ", ".join(f"{key} {value}" for key, value in report.provenance.items() if isinstance(value, str | int))
    page = folder / "report.html"
    body = f"{said}{drawn}{tables}<p>{html.escape(_note(report))}</p><p>{html.escape(origin)}</p>{pictures}"
    write_text(page, html_page(report.benchmark, body))
    return page


def html_page(title: str, body: str) -> str:
    """Return a page that loads nothing from elsewhere; `body` is HTML, the title plain text."""
    title = html.escape(title)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{title}</title><style>{STYLE}</style>"
        f"<body><h1>{title}</h1>{body}</body></html>\n"
    )


def _figure(file: Path) -> str:
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    image.thumbnail((FIGURE, 8 * FIGURE), Image.Resampling.LANCZOS)
    return f'<h2>{html.escape(file.stem)}</h2><img class="figure" alt="" src="{_jpeg_url(image)}">'


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of HTML; marks of Markdown in the cells are escaped ones, as `escaped` leaves them."""

    def line(cells: Sequence[str], tag: str) -> str:
        plain = map(unescaped, cells)
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in plain) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _pictures(record: RunFolder, sheet: Path) -> str:
    """Write the sheet of the first cases, and return the page's pictures."""
    outputs = latest_outputs(record)
    systems = list(dict.fromkeys(system for system, _ in outputs))
    text = "<h2>Pictures</h2>"
    rows: dict[str, list[torch.Tensor]] = {}
    for case in record.cases()[:PAGE_ROWS]:
        cells = _cells(record, case, systems, outputs)
        figures = "".join(
            f'<figure><img alt="" src="{_jpeg_url(image)}"><figcaption>{html.escape(name)}</figcaption></figure>'
            if image is not None
            else f"<figure><figcaption>{html.escape(name)}</figcaption></figure>"
            for name, image in cells
        )
        text += f"<h3>{html.escape(case.key)}: {html.escape(case.instruction)}</h3>{figures}"
        if len(rows) < SHEET_ROWS:
            white = torch.ones(3, THUMBNAIL, THUMBNAIL)
            rows[case.task[:18] if case.task[:18] not in rows else case.key[:18]] = [
                white if image is None else _square(image) for _, image in cells
            ]
    if rows:
        titles = ["source", *systems, "target"]
        with atomic_file(sheet) as part:
            grid(rows, titles[: max(map(len, rows.values()))]).save(part, "JPEG", quality=85)
    return text


def _cells(
    record: RunFolder, case: StoredCase, systems: Sequence[str], outputs: dict[tuple[str, str], Output]
) -> list[tuple[str, Image.Image | None]]:
    found = [("source", _thumbnail(record, case.pictures[0]))]
    for system in systems:
        output = outputs.get((system, case.key))
        image = _thumbnail(record, output.picture) if output is not None and output.status == DONE else None
        state = "not run" if output is None else output.status
        found.append((system if image is not None else f"{system}: {state}", image))
    if case.answer:
        found.append(("target", _thumbnail(record, case.answer)))
    return found


def _thumbnail(record: RunFolder, digest: str) -> Image.Image | None:
    try:
        image = record.picture(digest)
    except PictureError:
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return image


def _square(image: Image.Image) -> torch.Tensor:
    cell = torch.ones(3, THUMBNAIL, THUMBNAIL)
    cell[:, : image.height, : image.width] = image_tensor(image)
    return cell


def _jpeg_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
