"""Pictures of experiments: the audit's ladder, the map of adapters, matrices of gradients, curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from openwu.evaluation.experiments.comparisons.conflict import ConflictResults
from openwu.evaluation.experiments.comparisons.continual import ContinualResults
from openwu.evaluation.experiments.comparisons.operators import BASE, OperatorResults
from openwu.evaluation.experiments.comparisons.scaling import Scaling
from openwu.evaluation.experiments.geometry import Mean
from openwu.evaluation.experiments.probes.audit import Ladder
from openwu.evaluation.experiments.probes.examples import ExampleResults
from openwu.evaluation.experiments.probes.gradients import GradientConflict
from openwu.evaluation.experiments.probes.manifold import Manifold
from openwu.evaluation.pictures import grid


def draw_ladder(ladder: Ladder, path: Path) -> Path:
    """Draw the mean score of every rung with its interval, worst at the bottom."""
    means = {rung: ladder.mean(rung) for rung in ladder.scores}
    figure = Figure(figsize=(6.4, 0.4 * len(means) + 1.1), layout="constrained")
    panel = figure.subplots()
    _draw_means(panel, means, "matched")
    panel.set_xlabel(f"mean score ({ladder.unit}), 95% interval over tasks and cases")
    figure.savefig(path, dpi=110)
    return path


def _draw_means(panel: Axes, means: Mapping[str, Mean], marked: str) -> None:
    """Draw a row for each mean with its interval, the largest on top."""
    ordered = sorted(means.items(), key=lambda each: each[1].value)
    for place, (name, mean) in enumerate(ordered):
        ends = [[mean.value - mean.low], [mean.high - mean.value]]
        colour = "tab:orange" if name == marked else "tab:blue"
        panel.errorbar(mean.value, place, xerr=ends, fmt="o", capsize=3, color=colour)
    panel.set_yticks(range(len(ordered)), [name for name, _ in ordered])
    panel.grid(axis="x", alpha=0.3)


def draw_map(found: Manifold, families: Mapping[str, Sequence[str]], path: Path) -> Path:
    """Draw the first two principal components; a colour per family, a name per task."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    panel = figure.subplots()
    for number, (family, tasks) in enumerate(families.items()):
        own = [i for i, task in enumerate(found.tasks) if task in tasks]
        if own:
            x, y = found.points[own].t().tolist()
            panel.scatter(x, y, s=14, color=f"C{number}", label=family)
    for task in dict.fromkeys(found.tasks):
        own = [i for i, other in enumerate(found.tasks) if other == task]
        x, y = found.points[own].mean(0).tolist()
        panel.annotate(task, (x, y), fontsize=6)
    panel.set_xlabel(f"first component ({found.shares[0]:.0%} of the variance)")
    panel.set_ylabel(f"second component ({found.shares[1]:.0%})")
    panel.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    return path


def draw_gradients(found: Sequence[GradientConflict], path: Path) -> Path:
    """Draw a matrix of cosines for each set of parameters, opposites beside one another."""
    figure = Figure(figsize=(4.6 * len(found), 4.8), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for panel, each in zip(panels, found, strict=True):
        order = [task for pair in each.opposites for task in pair]
        order += [task for task in each.tasks if task not in order]
        index = [each.tasks.index(task) for task in order]
        shown = panel.imshow(each.cosine.mean(0)[index][:, index].numpy(), vmin=-1, vmax=1, cmap="RdBu")
        panel.set_title(f"{each.where}\nopposites {each.contradictory.value:.2f}", fontsize="small")
        panel.set_xticks(range(len(order)), order, rotation=90, fontsize=4)
        panel.set_yticks(range(len(order)), order, fontsize=4)
    figure.colorbar(shown, ax=panels, shrink=0.7, label="cosine of gradients")
    figure.savefig(path, dpi=110)
    return path


def draw_gradient_curves(found: Sequence[GradientConflict], path: Path) -> Path:
    """Draw the mean cosine over contradictory pairs and over all pairs along a training, told and untold apart."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, told in zip(panels, (True, False), strict=True):
        own = [each for each in found if each.step is not None and each.told == told]
        for label, means in (
            ("contradictory pairs", [each.contradictory for each in own]),
            ("all pairs", [each.all_pairs for each in own]),
            ("within a task", [each.same_task for each in own]),
        ):
            steps = [each.step or 0 for each in own]
            panel.plot(steps, [mean.value for mean in means], marker="o", label=label)
            panel.fill_between(steps, [mean.low for mean in means], [mean.high for mean in means], alpha=0.2)
        panel.axhline(0, color="grey", linewidth=0.8)
        panel.set_xscale("symlog", linthresh=1)
        panel.set_xlim(left=-0.1)
        panel.set_title("the base reads the instruction" if told else "the base is not told", fontsize="medium")
        panel.set_xlabel("steps of the shared LoRA")
    panels[0].set_ylabel("cosine of gradients")
    panels[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    return path


def draw_conflict(found: ConflictResults, path: Path) -> Path:
    """Draw every method's PSNR on the new tasks and on the base's old ones."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for panel, old in zip(figure.subplots(1, 2), (False, True), strict=True):
        names = [name for name in found.methods if any(o.method == name and o.old == old for o in found.outcomes)]
        _draw_means(panel, {name: found.mean(name, old=old) for name in names}, "generated")
        panel.set_title("the base's old tasks" if old else "contradictory tasks", fontsize="medium")
        panel.set_xlabel("PSNR (dB), 95% interval")
    figure.savefig(path, dpi=110)
    return path


def draw_methods(found: ConflictResults, path: Path) -> Path:
    """Draw every method's PSNR on tasks that no training saw, best first."""
    means = {name: found.mean(name) for name in found.methods}
    figure = Figure(figsize=(6, 1 + 0.25 * len(means)), layout="constrained")
    panel = figure.subplots()
    _draw_means(panel, dict(sorted(means.items(), key=lambda each: each[1].value)), "generated")
    panel.set_xlabel("PSNR (dB) on unseen programs, 95% interval")
    figure.savefig(path, dpi=110)
    return path


def draw_cells(found: ConflictResults, path: Path) -> Path:
    """Draw a row per new task: input, every method, target."""
    titles = list(dict.fromkeys(["input", *found.methods, "target"]))
    rows = {task: [cells[title] for title in titles] for task, cells in found.cells.items()}
    grid(rows, titles).save(path, quality=85)
    return path


def draw_continual(found: ContinualResults, path: Path) -> Path:
    """Draw every strategy's mean over the first group's tasks, and over all tasks learned so far, after each group."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    first, learned = figure.subplots(1, 2)
    for way in found.ways:
        seen = [each for each in found.seen if each.way == way]
        steps = sorted({each.after for each in seen})
        for panel, chosen in (
            (first, {step: [s.psnr for s in seen if s.after == step and s.group == 1] for step in steps}),
            (learned, {step: [s.psnr for s in seen if s.after == step and s.group <= step] for step in steps[1:]}),
        ):
            panel.plot(list(chosen), [sum(values) / len(values) for values in chosen.values()], "o-", label=way)
    first.set_title("the first group's tasks", fontsize="medium")
    learned.set_title("all tasks learned so far", fontsize="medium")
    for panel in (first, learned):
        panel.set_xlabel("groups learned")
        panel.set_ylabel("PSNR (dB)")
        panel.grid(alpha=0.3)
    learned.legend(fontsize="x-small")
    figure.savefig(path, dpi=110)
    return path


def draw_scaling(found: Scaling, path: Path) -> Path:
    """Draw quality against parameters, a panel for each axis, with its fitted line."""
    figure = Figure(figsize=(4 * len(found.axes), 3.2), layout="constrained")
    for panel, axis in zip(figure.subplots(1, len(found.axes), squeeze=False)[0], found.axes, strict=True):
        sizes, line = found.sizes(axis), found.line(axis)
        for size, parameters in sizes.items():
            mean = found.mean(axis, size)
            panel.errorbar(
                parameters, mean.value, yerr=[[mean.value - mean.low], [mean.high - mean.value]], fmt="o", capsize=3,
                color="tab:blue",
            )  # fmt: skip
        ends = [min(sizes.values()), max(sizes.values())]
        panel.plot(ends, [line.offset + line.slope * math.log10(n) for n in ends], "--", color="tab:gray")
        panel.set_xscale("log")
        panel.set_title(f"{axis}: {line.slope:+.2f} dB for ten times the parameters", fontsize="small")
        panel.set_xlabel(f"parameters of the {axis}")
        panel.set_ylabel("mean PSNR (dB)")
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    return path


def draw_operators(found: OperatorResults, path: Path) -> Path:
    """Draw quality against the numbers written for each request, and the base alone as a line."""
    figure = Figure(figsize=(7.2, 4), layout="constrained")
    panel = figure.subplots()
    counts = [found.numbers(kind)[0] for kind in found.kinds if kind != BASE] or [1]
    smallest, largest = min(counts), max(counts)
    for kind in found.kinds:
        mean, (numbers, shared) = found.mean(kind), found.numbers(kind)
        if kind == BASE:
            panel.axhline(mean.value, linestyle="--", color="tab:gray")
            panel.annotate(f"{kind}, 0 numbers", (1, mean.value), xycoords=("axes fraction", "data"), ha="right",
                           va="bottom", fontsize="small")  # fmt: skip
            continue
        panel.errorbar(
            numbers, mean.value, yerr=[[mean.value - mean.low], [mean.high - mean.value]], fmt="s" if shared else "o",
            capsize=3, color="tab:orange" if shared else "tab:blue",
        )  # fmt: skip
        right = numbers**2 > smallest * largest  # labels stay inside the panel
        panel.annotate(
            kind, (numbers, mean.value), textcoords="offset points", xytext=(-5 if right else 5, 4),
            ha="right" if right else "left", fontsize="small",
        )  # fmt: skip
    panel.set_xscale("log")
    panel.set_xlabel("numbers generated for each request (orange: beside bases learned once)")
    panel.set_ylabel("mean PSNR (dB), 95% interval over tasks")
    panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    return path


def draw_examples(found: ExampleResults, path: Path, rows: int = 10) -> Path:
    """Draw a row for each of the first programs: the pair that shows it, the photograph, the edit, the right answer."""
    some = dict(list(found.pictures.items())[:rows])
    grid(some, ("before", "after", "photograph", "edited like it", "the program itself")).save(path, quality=85)
    return path
