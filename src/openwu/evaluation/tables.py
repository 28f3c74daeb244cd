"""What evaluations found, as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from openwu.data.edits import FAMILIES
from openwu.data.phrases import LANGUAGES
from openwu.evaluation.composition import Composed, mean_gap
from openwu.evaluation.goals import Goal
from openwu.evaluation.strength import Graded, by_strength
from openwu.evaluation.suite import Report
from openwu.evaluation.wording import SPLITS, Wording, mean_psnr
from openwu.files.markdown import table


def goals_table(goals: Sequence[Goal]) -> str:
    rows = [
        (goal.name, f"{goal.wanted:.2f}", f"{goal.measured:.2f}", "yes" if goal.met else "**no**") for goal in goals
    ]
    return table(("goal", "at least", "measured", "met"), rows)


def suite_table(report: Report, seeds: Sequence[int], photographs: Sequence[str]) -> str:
    """Mean PSNR (dB) / SSIM of every sub-task under every method."""
    text = (
        f"Mean PSNR in dB / SSIM over {len(photographs)} test photographs ({', '.join(photographs)}) and seeds "
        f"{', '.join(map(str, seeds))}; half of the requests in Chinese, half with held-out phrasings.\n\n"
    )
    rows = []
    for family, members in FAMILIES.items():
        for edit in (member.name for member in members if member.name in report.edits):
            means = [(report.mean("psnr", m, [edit]), report.mean("ssim", m, [edit])) for m in report.methods]
            cells = [f"{psnr:.1f} / {ssim:.3f}" for psnr, ssim in means]
            rows.append((family, edit, *cells))
    text += table(("family", "sub-task", *report.methods), rows)
    return text + table(
        ("summary", "dB"), [(name.replace("_", " "), f"{v:.2f}") for name, v in report.summary().items()]
    )


def families_table(report: Report) -> str:
    """Mean PSNR of every family under every method."""
    rows = []
    for family, members in FAMILIES.items():
        names = [member.name for member in members if member.name in report.edits]
        if names:
            rows.append((family, str(len(names)), *(f"{report.mean('psnr', m, names):.1f}" for m in report.methods)))
    return table(("family", "sub-tasks", *report.methods), rows)


def wording_table(wordings: Sequence[Wording], shares: Mapping[str, float]) -> str:
    cells = [
        (lang, *(f"{mean_psnr(wordings, language=lang, split=split):.2f}" for split in SPLITS)) for lang in LANGUAGES
    ]
    text = table(("generated, PSNR in dB", "training phrasings", "held-out phrasings"), cells)
    names = ("accepted", "right_edit", "right_degree", "refused")
    rows = [
        (f"{called}, {lang}", *(_percent(shares.get(f"{prefix}{name}_{lang}")) for name in names))
        for called, prefix in (("held out", ""), ("fresh", "fresh_"))
        for lang in LANGUAGES
    ]
    head = ("sentences", "in scope: accepted", "right sub-task", "right degree", "out of scope: refused")
    return text + table(head, rows)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def strength_table(found: Sequence[Graded]) -> str:
    rows = [
        (by, f"{s:g}", f"{psnr:.1f}", "-" if math.isnan(share) else f"{share:.2f}")  # at 0, no change is wanted
        for by, s, psnr, share in by_strength(found)
    ]
    text = table(("by", "strength", "PSNR against the edit of this strength (dB)", "change made / change wanted"), rows)
    edits = len({each.edit for each in found})
    return f"{edits} graded sub-tasks, one photograph each.\n\n{text}"


def composition_table(found: Sequence[Composed]) -> str:
    if not found:
        return "The model knows both edits of none of the combinations.\n\n"
    rows = [
        (f"{c.first}, then {c.second}", *(f"{v:.1f}" for v in (c.input, c.first_only, c.one_pass, c.two_passes)))
        for c in found
    ]
    text = table(("combination", "input", "first edit only", "one pass", "two passes"), rows)
    better = sum(c.one_pass >= max(c.input, c.first_only) for c in found)
    return (
        f"{text}One pass comes closer than the input and than the first edit alone in {better} of {len(found)} "
        f"combinations; on average it is {mean_gap(found):+.1f} dB against two passes.\n\n"
    )


def missed_list(report: Report) -> str:
    missed = report.missed()
    return f"Sub-tasks that do not beat copying their input: {', '.join(missed) if missed else 'none'}.\n\n"
