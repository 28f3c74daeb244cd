"""One page on what an edit costs on a machine: for a terminal, as Markdown, as HTML, as JSON."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from openwu.errors import OpenwuError
from openwu.evaluation.experiments.results import columns
from openwu.evaluation.machine.hardware import described
from openwu.evaluation.machine.measure import SIZES, MachineCost
from openwu.evaluation.stages.page import html_page, html_table
from openwu.files.markdown import escaped, table, unescaped
from openwu.files.writing import write_text

BUSY_LOAD, BUSY_SHARE = 0.25, 0.9
"""A load per core above which a machine is busy, and the share of its core below which one thread had to wait."""
SCALES = 0.75
"""Share of the cores' number that all threads should bring, where nobody else computes."""
ARITHMETIC = 0.5
"""Share of the products' rate from which on arithmetic is what an edit waits for."""


class Finding(NamedTuple):
    """Something that limits edits here, and what would help."""

    limit: str
    why: str
    helps: str


def findings(cost: MachineCost) -> list[Finding]:
    """Return what limits edits on this machine, the most important first."""
    found = []
    cores, threads = cost.machine["cores"], cost.threads
    got, load = cost.one_thread.share_of_cores, cost.machine["load"]
    if got < BUSY_SHARE or (load is not None and load > BUSY_LOAD * cores):
        known = "" if load is None else f"; the load was {load} before the measurement, on {_counted(cores, 'core')}"
        found.append(
            Finding(
                "other programs",
                f"one thread got {100 * got:.0f} % of a core{known}",
                "stop what else is running, then measure again: the times here are those of a busy machine",
            )
        )
    if threads > 1 and cost.speedup < SCALES * threads:
        found.append(
            Finding(
                "cores that are not free",
                f"{threads} threads are {cost.speedup:.2f} times as fast as one; on a quiet machine two are 1.8 times",
                "a second core that nothing else uses; cores of a virtual machine may be halves of one",
            )
        )
    if threads < cores:
        found.append(
            Finding(
                "threads",
                f"openwu uses {_counted(threads, 'thread')} of {_counted(cores, 'core')}",
                "unset OMP_NUM_THREADS, or set it to the number of cores",
            )
        )
    if cost.dtype != "bfloat16":
        ratio = cost.product_rates["bfloat16, 1"] / cost.product_rates["float32, 1"]
        found.append(
            Finding(
                "no bfloat16 units",
                f"matrix products in bfloat16 run at {ratio:.2f} times the rate of float32 here, so edits are float32",
                "a processor with AMX or AVX-512 bfloat16: about a third of the time",
            )
        )
    if cost.peak_memory is not None and cost.free_memory is not None and cost.peak_memory > cost.free_memory:
        found.append(
            Finding(
                "memory",
                f"an edit needs {_size(cost.peak_memory)}, and {_size(cost.free_memory)} were free",
                "close other programs",
            )
        )
    if cost.share_of_limit >= ARITHMETIC:
        found.append(
            Finding(
                "arithmetic",
                f"an edit computes at {100 * cost.share_of_limit:.0f} % of the rate of large matrix products",
                "more cores, or faster ones: little else is left to gain",
            )
        )
    else:
        found.append(
            Finding(
                "moving data, and small operations",
                f"an edit computes at {100 * cost.share_of_limit:.0f} % of the rate of large matrix products",
                "faster memory helps as much as faster cores",
            )
        )
    return found


def warning(cost: MachineCost) -> str | None:
    """Return a sentence about a busy machine; None for a quiet one."""
    first = findings(cost)[0]
    return f"Measured on a busy machine: {first.why}." if first.limit == "other programs" else None


def cost_rows(cost: MachineCost) -> list[tuple[str, str]]:
    """What an edit costs, as (what, how much)."""
    rows = [
        (f"one photo of {cost.megapixels:.0f} megapixel, {_counted(each.threads, 'thread')}", _time(each.median))
        for each in cost.edits
    ]
    start = cost.import_seconds + cost.load_seconds
    rows.append(("starting: importing and loading", f"{_time(start)}, once for all photos of a command"))
    rows.append(("the first edit of a new process", _time(cost.first_seconds)))
    free = _time(cost.one_thread.processor_median)
    rows.append(("processor time of one photo", f"{free}: about what it takes on a free core"))
    for size in SIZES:
        free = _time(cost.photographs_on_a_free_core(100, size))
        took = f"{_time(cost.photographs(100, size))} as measured; {free} on one free core"
        rows.append((f"100 photos of {size} megapixels (estimated)", took))
    if cost.peak_memory is not None:
        free = "" if cost.free_memory is None else f", of {_size(cost.free_memory)} free"
        rows.append(("memory at its peak", _size(cost.peak_memory) + free))
    return rows


def machine_rows(cost: MachineCost) -> list[tuple[str, str]]:
    """The machine, as (what, value); marks of Markdown in names are escaped."""
    units = ", ".join(cost.units) or "none that torch knows"
    rates = [
        f"{rate / 1e9:.0f} GFLOP/s in {name.replace(', ', ' on ')} thread{'' if name.endswith(', 1') else 's'}"
        for name, rate in cost.product_rates.items()
    ]
    load = cost.machine["load"]
    return [
        ("processor", escaped(described(cost.machine))),
        ("matrix units", f"{units}; edits are computed in {cost.dtype}"),
        ("matrix products", ", ".join(rates)),
        ("threads", str(cost.threads)),
        ("load before", "unknown" if load is None else str(load)),
        ("software", f"openwu {cost.origin['openwu']}, torch {cost.origin['torch']}, {cost.machine['system']}"),
    ]


ADVICE = (
    ("many photos", "name them all, or their folder, in one `openwu edit`: the model is loaded once"),
    ("the same edit of the same photo again", "`--cache`: its adapter is found and not generated"),
    ("a number of threads of your own", "OMP_NUM_THREADS=N before the command"),
)
"""What helps on every machine."""
TITLE = "What an edit costs on this machine"
HEAD_COST, HEAD_LIMITS, HEAD_HELP = ("what", "how much"), ("limit", "seen here", "what would help"), ("for", "use")


def as_text(cost: MachineCost) -> str:
    """Return the page for a terminal."""
    parts = [f"{TITLE}\n"]
    if (busy := warning(cost)) is not None:
        parts.append(f"WARNING: {busy}\n")
    parts.append(columns(HEAD_COST, cost_rows(cost)))
    limits = [f"{i}. {each.limit}: {each.why}.\n   Helps: {each.helps}." for i, each in enumerate(findings(cost), 1)]
    parts.append("What limits it\n" + "\n".join(limits) + "\n")
    parts.append(columns(HEAD_HELP, ADVICE))
    parts.append(columns(("machine", ""), [(what, unescaped(value)) for what, value in machine_rows(cost)]))
    return "\n".join(parts)


def as_markdown(cost: MachineCost) -> str:
    """Return the page as Markdown."""
    busy = warning(cost)
    text = f"# {TITLE}\n\n" + (f"**{busy}**\n\n" if busy else "")
    return text + "".join(f"## {title}\n\n{table(head, rows)}" for title, head, rows in _sections(cost))


def as_html(cost: MachineCost) -> str:
    """Return the page as HTML that loads nothing from elsewhere."""
    busy = warning(cost)
    body = f'<p class="scope">{html.escape(busy)}</p>' if busy else ""
    body += "".join(f"<h2>{title}</h2>{html_table(head, rows)}" for title, head, rows in _sections(cost))
    return html_page(TITLE, body)


def as_json(cost: MachineCost) -> str:
    """Return every number, and the limits in words, as JSON."""
    values = {**cost.to_json(), "limits": [each._asdict() for each in findings(cost)]}
    return json.dumps(values, indent=1, allow_nan=False) + "\n"


WRITERS: Mapping[str, Callable[[MachineCost], str]] = {".html": as_html, ".md": as_markdown, ".json": as_json}
"""Suffix of a file -> what is written into it."""


def check_suffix(path: Path) -> None:
    """Raise OpenwuError for a file that `write_page` has no form for."""
    if path.suffix.lower() not in WRITERS:
        raise OpenwuError(f"--output: expected a file that ends in {', '.join(WRITERS)}, got {path}")


def write_page(cost: MachineCost, path: Path) -> None:
    """Write the page in the form that the suffix names; the file appears whole or not at all."""
    check_suffix(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, WRITERS[path.suffix.lower()](cost))


def _sections(cost: MachineCost) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    return [
        ("Cost", HEAD_COST, list(cost_rows(cost))),
        ("What limits it", HEAD_LIMITS, list(findings(cost))),
        ("What helps everywhere", HEAD_HELP, list(ADVICE)),
        ("The machine", ("what", "value"), list(machine_rows(cost))),
    ]


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
