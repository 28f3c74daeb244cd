"""The plan of a blind comparison, fixed and digested before the first vote, and the votes.

    ARENA/shuffle.json   every comparison: which case, which system stands where; its digest is published beforehand
    ARENA/arena.json     the digest, and the run that it is about
    ARENA/votes.jsonl    one vote a line; append-only

Beside real comparisons there are repeated ones, with the sides swapped (does a rater agree with herself?), and planted
ones: twice the same picture, and an edit against a broken one.
"""

from __future__ import annotations

import json
import random
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from openwu.errors import OpenwuError
from openwu.evaluation.stages.journal import Journal
from openwu.evaluation.stages.judge import latest_outputs
from openwu.evaluation.stages.record import DONE, SCORED, RunFolder
from openwu.files.hashing import of_bytes
from openwu.files.writing import write_json, write_text

REAL, REPEAT, IDENTICAL, BROKEN = "real", "repeat", "identical", "broken"
LEFT, RIGHT, BOTH_GOOD, BOTH_BAD = "left", "right", "both good", "both bad"
VOTES = (LEFT, RIGHT, BOTH_GOOD, BOTH_BAD)
SPOILED = "(broken)"
"""Name of the broken picture's side in a planted comparison."""
MAX_NAME = 40


@dataclass(frozen=True)
class Comparison:
    """One question to a rater."""

    id: str
    """Random: says nothing about the systems."""
    case: str
    left: str
    """System on the left, or SPOILED."""
    right: str
    kind: str
    of: str = ""
    """Of a repeat: the id of the first time."""


@dataclass(frozen=True)
class Vote:
    """One answer of one rater."""

    rater: str
    id: str
    vote: str
    """One of VOTES."""
    seconds: float = 0.0
    time: str = ""


def make_comparisons(
    pairs: Sequence[tuple[str, str, str]], *, repeats: float = 0.1, planted: float = 0.05, seed: int | None = None
) -> list[Comparison]:
    """Shuffle (case, system, system) into comparisons. `repeats`, `planted`: shares of them that are added.

    `seed`: None draws from the operating system, as a blind test should.
    """
    draw: random.Random = random.SystemRandom() if seed is None else random.Random(seed)

    def name() -> str:
        return f"{draw.getrandbits(64):016x}"

    real = [
        Comparison(name(), case, *((first, second) if draw.random() < 0.5 else (second, first)), REAL)
        for case, first, second in draw.sample(list(pairs), len(pairs))
    ]
    half = len(real) // 2
    again = draw.sample(real[:half], min(half, round(repeats * len(real))))
    later = [Comparison(name(), each.case, each.right, each.left, REPEAT, each.id) for each in again]
    for i, each in enumerate(draw.sample(real, min(len(real), round(planted * len(real))))):
        system = each.left
        sides = (system, system) if i % 2 else (system, SPOILED) if draw.random() < 0.5 else (SPOILED, system)
        later.append(Comparison(name(), each.case, *sides, IDENTICAL if i % 2 else BROKEN))
    # What is repeated is of the first half, and what is added comes somewhere in the second one.
    tail = [*real[half:], *later]
    draw.shuffle(tail)
    return [*real[:half], *tail]


class Arena:
    """The folder of a blind comparison."""

    def __init__(self, folder: str | Path) -> None:
        """Load a plan. Raises OpenwuError for a folder without one, or whose shuffle file changed."""
        self.folder = Path(folder)
        try:
            settings = json.loads((self.folder / "arena.json").read_text(encoding="utf-8"))
            data = (self.folder / "shuffle.json").read_bytes()
            self.digest, self.run = str(settings["shuffle"]), RunFolder(settings["run"])
            if of_bytes([data]).hexdigest() != self.digest:
                raise OpenwuError(f"{self.folder}: shuffle.json is not the one that was published ({self.digest})")
            plan = json.loads(data)
            self.salt = str(plan["salt"])
            self.comparisons = [Comparison(**each) for each in plan["comparisons"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OpenwuError(f"{self.folder}: expected the folder of `openwu arena plan` ({error!r})") from error
        self.by_id = {each.id: each for each in self.comparisons}
        self._votes = Journal(self.folder / "votes.jsonl")

    @classmethod
    def create(
        cls,
        folder: str | Path,
        run: RunFolder,
        systems: Sequence[str] | None = None,
        *,
        limit: int | None = None,
        repeats: float = 0.1,
        planted: float = 0.05,
        seed: int | None = None,
    ) -> Arena:
        """Plan all pairs of systems on all cases that both edited. `limit`: of cases, drawn at random.

        Raises OpenwuError for fewer than two systems, or a folder that has a plan already.
        """
        folder = Path(folder)
        if (folder / "arena.json").exists():
            raise OpenwuError(f"{folder}: expected a new folder, got one with a plan; a plan is never changed")
        outputs = latest_outputs(run, systems)
        names = list(dict.fromkeys(system for system, _ in outputs))
        cases = [case.key for case in run.cases()]
        if limit is not None and limit < len(cases):
            draw: random.Random = random.SystemRandom() if seed is None else random.Random(seed)
            cases = draw.sample(cases, limit)
        there = {where for where, output in outputs.items() if output.status == DONE}
        pairs = [
            (case, *pair) for case in cases for pair in combinations(names, 2) if all((s, case) in there for s in pair)
        ]
        if not pairs:
            raise OpenwuError(f"{run.folder}: expected two systems with pictures of the same cases, got {names}")
        plan = {
            "salt": secrets.token_hex(16),
            "comparisons": [
                asdict(each) for each in make_comparisons(pairs, repeats=repeats, planted=planted, seed=seed)
            ],
        }
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(plan, ensure_ascii=False, indent=0) + "\n"
        write_text(folder / "shuffle.json", text)
        shuffle = of_bytes([text.encode()]).hexdigest()
        write_json(folder / "arena.json", {"shuffle": shuffle, "run": str(run.folder.resolve()), "arena": 1})
        return cls(folder)

    def order(self, rater: str) -> list[Comparison]:
        """Return the comparisons in this rater's order; each half is shuffled alone, so repeats stay in the second."""
        half = sum(each.kind == REAL for each in self.comparisons) // 2
        draw = random.Random(f"{self.salt}/{rater}")
        first, second = self.comparisons[:half], self.comparisons[half:]
        return [*draw.sample(first, len(first)), *draw.sample(second, len(second))]

    def votes(self) -> list[Vote]:
        """Read all votes. Raises OpenwuError for a vote on what is not in the plan, or two by one rater."""
        found: dict[tuple[str, str], Vote] = {}
        for line in self._votes.lines():
            vote = _vote(line, self._votes.path)
            if vote.id not in self.by_id or (vote.rater, vote.id) in found:
                raise OpenwuError(f"{self._votes.path}: expected one vote a comparison and rater, got {line}")
            found[vote.rater, vote.id] = vote
        return list(found.values())

    def add(self, vote: Vote) -> None:
        """Record a vote. Raises OpenwuError for one that is not valid or was given before."""
        check_rater(vote.rater)
        if vote.id not in self.by_id or vote.vote not in VOTES:
            raise OpenwuError(f"vote: expected one of {', '.join(VOTES)} on a planned comparison, got {vote}")
        if any((each.rater, each.id) == (vote.rater, vote.id) for each in self.votes()):
            raise OpenwuError("vote: given before; votes are not changed")
        self._votes.append(asdict(vote))


def check_rater(name: str) -> None:
    """Refuse names that are empty, long or unprintable. Raises OpenwuError."""
    if not name.strip() or len(name) > MAX_NAME or not name.isprintable():
        raise OpenwuError(f"rater: expected a name of 1 to {MAX_NAME} printable characters, got {name[:60]!r}")


def judge_votes(run: RunFolder, judge: str) -> tuple[list[Comparison], list[Vote]]:
    """Return a comparing judge's answers as comparisons and votes; each repeat is a rater of its own.

    Raises OpenwuError where there are none.
    """
    comparisons: dict[str, Comparison] = {}
    votes = []
    for each in run.judgements().values():
        if each.judge != judge or len(each.systems) != 2 or each.status != SCORED:
            continue
        value = each.scores["preference"]
        name = of_bytes([repr((each.case, each.systems)).encode()]).hexdigest()[:16]
        comparisons[name] = Comparison(name, each.case, each.systems[0], each.systems[1], REAL)
        votes.append(Vote(f"repeat {each.repeat}", name, LEFT if value > 0 else RIGHT if value < 0 else BOTH_GOOD))
    if not votes:
        raise OpenwuError(f"{run.folder}: expected answers of a comparing judge {judge!r}, got none")
    return list(comparisons.values()), votes


def _vote(line: dict[str, Any], path: Path) -> Vote:
    try:
        vote = Vote(**line)
    except TypeError as error:
        raise OpenwuError(f"{path}: expected votes ({error})") from error
    if vote.vote not in VOTES:
        raise OpenwuError(f"{path}: expected a vote of {', '.join(VOTES)}, got {vote.vote!r}")
    return vote
