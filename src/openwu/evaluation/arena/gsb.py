"""What votes mean: three definitions of the per cent, intervals, tests, Davidson's model, agreement, fragility.

Articles report one number ("78.4%") without saying which: (G - B) / N, (G + S / 2) / N or G / (G + B). All stand here.

Shapes: d bootstrap draws, n systems.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from openwu.evaluation.arena.plan import (
    BOTH_BAD,
    BOTH_GOOD,
    BROKEN,
    IDENTICAL,
    LEFT,
    REAL,
    REPEAT,
    RIGHT,
    SPOILED,
    Comparison,
    Vote,
)
from openwu.evaluation.statistics import (
    DRAWS,
    Interval,
    Values,
    cluster_weights,
    holm,
    krippendorff,
    percentiles,
    sign_test,
    wilson,
)
from openwu.files.markdown import escaped, table

DEFINITIONS = ("(G - B) / N", "(G + S / 2) / N", "G / (G + B)")
PSEUDO = 0.1
"""Votes of each kind that Davidson's model adds to every compared pair, so that its strengths stay finite."""


@dataclass(frozen=True)
class PairResult:
    """Votes on two systems; good means that the first one is better."""

    first: str
    second: str
    good: int
    same: int
    bad: int
    shares: tuple[float, float, float]
    """By DEFINITIONS."""
    intervals: tuple[Interval, Interval, Interval]
    """Cluster bootstrap over photographs."""
    wilson: Interval
    """Of G / (G + B), as if all votes were independent."""
    p: float
    """Two-sided sign test over photographs: each counts once, for the side that has more of its votes."""
    adjusted: float
    """The same after Holm over all pairs."""
    to_turn: int
    """Fewest votes that would have to be given to the other side to turn the ranking."""
    to_lose: int
    """Fewest such votes until a sign test over votes is no longer below 0.05; 0 where it is not now."""


@dataclass(frozen=True)
class Rater:
    """How far one rater can be relied on."""

    name: str
    votes: int
    self_agreement: float
    """Share of repeated comparisons with the same answer; NaN where none was answered."""
    identical_same: float
    """Share of identical pairs that were called equal."""
    broken_right: float
    """Share of broken pictures that lost."""


@dataclass(frozen=True)
class Gsb:
    """Everything that votes say."""

    pairs: list[PairResult]
    strengths: dict[str, tuple[float, Interval]]
    """Davidson's log strengths, mean 0."""
    tie: float
    """Davidson's tie parameter."""
    raters: list[Rater]
    agreement: float
    """Krippendorff's alpha of raters, nominal: first, same, second."""
    missing: int
    """Votes that the plan's raters have not given yet."""


def analyse(
    comparisons: Sequence[Comparison], votes: Sequence[Vote], cluster_of: Mapping[str, str], *, seed: int = 0
) -> Gsb:
    """Analyse votes. `cluster_of`: case -> photograph. Only real comparisons count; the others are about the raters."""
    by_id = {each.id: each for each in comparisons}
    outcomes: dict[tuple[str, str], list[tuple[str, str, float]]] = defaultdict(list)
    ratings: dict[tuple[str, str, str], dict[Hashable, float]] = defaultdict(dict)
    for vote in votes:
        each = by_id[vote.id]
        if each.kind != REAL:
            continue
        first, second = sorted((each.left, each.right))
        value = _value(vote.vote) * (1 if each.left == first else -1)
        outcomes[first, second].append((each.case, vote.rater, value))
        # One judge's two orders are two units: agreement is between raters who saw the same thing.
        ratings[each.id, first, second][vote.rater] = value
    systems = sorted({system for pair in outcomes for system in pair})
    pairs = [_pair(*pair, outcomes[pair], cluster_of, seed) for pair in combinations(systems, 2) if pair in outcomes]
    adjusted = holm({f"{each.first}|{each.second}": each.p for each in pairs})
    pairs = [PairResult(**{**vars(each), "adjusted": adjusted[f"{each.first}|{each.second}"]}) for each in pairs]
    strengths, tie = fit_strengths(systems, outcomes, cluster_of, seed)
    names = list(dict.fromkeys(vote.rater for vote in votes))
    raters = [_rater(name, by_id, votes) for name in names]
    alpha = krippendorff(list(ratings.values()), nominal=True)
    return Gsb(pairs, strengths, tie, raters, alpha, len(names) * len(by_id) - len(votes))


def _value(vote: str) -> float:
    return {LEFT: 1.0, RIGHT: -1.0, BOTH_GOOD: 0.0, BOTH_BAD: 0.0}[vote]


def _pair(
    first: str,
    second: str,
    outcomes: Sequence[tuple[str, str, float]],
    cluster_of: Mapping[str, str],
    seed: int,
) -> PairResult:
    names = {
        cluster: i for i, cluster in enumerate(dict.fromkeys(cluster_of.get(case, case) for case, _, _ in outcomes))
    }
    counts = np.zeros((len(names), 3))
    for case, _, value in outcomes:
        counts[names[cluster_of.get(case, case)], 1 - int(value)] += 1
    good, same, bad = (int(total) for total in counts.sum(0))
    drawn = cluster_weights(len(names), DRAWS, seed) @ counts
    intervals = [percentiles(each, len(names)) for each in shares(drawn)]
    values = [float(each[0]) for each in shares(counts.sum(0)[None])]
    leads = counts[:, 0] - counts[:, 2]
    p = sign_test(int((leads > 0).sum()), int((leads < 0).sum()))
    more, less = max(good, bad), min(good, bad)
    to_lose = 0
    while sign_test(more - to_lose, less + to_lose) < 0.05:
        to_lose += 1
    return PairResult(
        first,
        second,
        good,
        same,
        bad,
        (values[0], values[1], values[2]),
        (intervals[0], intervals[1], intervals[2]),
        wilson(good, good + bad),
        p,
        p,
        (more - less) // 2 + 1,
        to_lose,
    )


def shares(counts: Values) -> tuple[Values, Values, Values]:
    """Return the three definitions of counts `[d, 3]` (good, same, bad): `[d]` each; NaN where nothing was decided."""
    good, same, bad = counts.T
    total = counts.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (good - bad) / total, (good + same / 2) / total, good / (good + bad)


def fit_strengths(
    systems: Sequence[str],
    outcomes: Mapping[tuple[str, str], Sequence[tuple[str, str, float]]],
    cluster_of: Mapping[str, str],
    seed: int = 0,
    draws: int = 400,
) -> tuple[dict[str, tuple[float, Interval]], float]:
    """Fit Davidson's model; return log strengths with cluster-bootstrap intervals, and the tie parameter."""
    if not systems:
        return {}, math.nan
    index = {system: i for i, system in enumerate(systems)}
    found = [(case, *pair, value) for pair, each in outcomes.items() for case, _, value in each]
    names = {cluster: i for i, cluster in enumerate(dict.fromkeys(cluster_of.get(case, case) for case, *_ in found))}
    wins, ties = (np.zeros((len(names), len(systems), len(systems))) for _ in range(2))
    for case, first, second, value in found:
        cluster, i, j = names[cluster_of.get(case, case)], index[first], index[second]
        if value == 0:
            ties[cluster, i, j] += 1
            ties[cluster, j, i] += 1
        else:
            winner, loser = (i, j) if value > 0 else (j, i)
            wins[cluster, winner, loser] += 1
    weights = np.concatenate([np.ones((1, len(names))), cluster_weights(len(names), draws, seed)])
    strengths, tie = davidson(np.tensordot(weights, wins, 1), np.tensordot(weights, ties, 1))
    return {
        system: (float(strengths[0, i]), percentiles(strengths[1:, i], len(names))) for system, i in index.items()
    }, float(tie[0])


def davidson(wins: Values, ties: Values, iterations: int = 300) -> tuple[Values, Values]:
    """Fit Davidson's (1970) model to many tables at once, by its fixed-point equations.

    wins, ties: `[d, n, n]`; wins[., i, j] counts i over j, ties are symmetric. Returns log strengths `[d, n]`, mean 0,
    and tie parameters `[d]`: i beats j with pi_i / (pi_i + pi_j + nu sqrt(pi_i pi_j)).
    """
    compared = (wins[0] + wins[0].T + ties[0]) > 0
    wins, ties = wins + PSEUDO * compared, ties + PSEUDO * compared
    total = wins + wins.transpose(0, 2, 1) + ties
    score = 2 * wins.sum(2) + ties.sum(2)
    tied = ties.sum((1, 2)) / 2
    pi, nu = np.ones(score.shape), np.ones(len(score))
    for _ in range(iterations):
        before = pi
        root = np.sqrt(pi[:, :, None] * pi[:, None, :])
        share = total / (pi[:, :, None] + pi[:, None, :] + nu[:, None, None] * root)
        ratio = np.sqrt(pi[:, None, :] / pi[:, :, None])
        pi = score / (share * (2 + nu[:, None, None] * ratio)).sum(2)
        pi /= np.exp(np.log(pi).mean(1, keepdims=True))
        root = np.sqrt(pi[:, :, None] * pi[:, None, :])
        share = total / (pi[:, :, None] + pi[:, None, :] + nu[:, None, None] * root)
        nu = tied / ((share * root).sum((1, 2)) / 2)
        if np.abs(pi - before).max() < 1e-8:
            break
    return np.log(pi), nu


def _rater(name: str, by_id: Mapping[str, Comparison], votes: Sequence[Vote]) -> Rater:
    own = {vote.id: vote.vote for vote in votes if vote.rater == name}
    same, identical, broken = [], [], []
    for key, vote in own.items():
        each = by_id[key]
        if each.kind == REPEAT and each.of in own:
            same.append(_value(vote) == -_value(own[each.of]))
        elif each.kind == IDENTICAL:
            identical.append(_value(vote) == 0)
        elif each.kind == BROKEN:
            broken.append(vote == (RIGHT if each.left == SPOILED else LEFT))
    return Rater(name, len(own), _share(same), _share(identical), _share(broken))


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else math.nan


def as_markdown(found: Gsb) -> str:
    """Write the tables of a report."""
    rows = [
        (
            f"{each.first} against {each.second}",
            f"{each.good} / {each.same} / {each.bad}",
            *(
                f"{100 * share:.1f} [{100 * edge.low:.1f}, {100 * edge.high:.1f}]"
                for share, edge in zip(each.shares, each.intervals, strict=True)
            ),
            f"[{100 * each.wilson.low:.1f}, {100 * each.wilson.high:.1f}]",
            f"{each.adjusted:.3f}",
            f"{each.to_turn} / {each.to_lose}",
        )
        for each in found.pairs
    ]
    head = ("systems", "G / S / B", *(f"{each} (%)" for each in DEFINITIONS), "Wilson", "p (Holm)", "turn / lose")
    text = "## Votes\n\n" + table(head, [tuple(map(escaped, row)) for row in rows])
    ranked = sorted(found.strengths.items(), key=lambda item: -item[1][0])
    strengths = [(escaped(name), f"{v:+.2f} [{edge.low:+.2f}, {edge.high:+.2f}]") for name, (v, edge) in ranked]
    text += f"## Strengths (Davidson, tie parameter {found.tie:.2f})\n\n" + table(("system", "log strength"), strengths)
    raters = [
        (
            escaped(each.name),
            str(each.votes),
            *(_percent(v) for v in (each.self_agreement, each.identical_same, each.broken_right)),
        )
        for each in found.raters
    ]
    head = ("rater", "votes", "agrees with herself", "sees identical ones as equal", "sees broken ones")
    text += "## Raters\n\n" + table(head, raters)
    return (
        f"{text}Agreement of raters (Krippendorff's alpha, nominal): {found.agreement:.2f}. Votes not given: "
        f"{found.missing}. Turn / lose: how many votes would have to change sides to turn the ranking, or to lose "
        "significance. Intervals draw photographs: they are about other photographs judged by these raters.\n"
    )


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.0f}%"
