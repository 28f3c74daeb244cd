"""Continual learning: tasks arrive one group after another; forgetting, transfer, and what is stored for it.

- `shared`: one LoRA that goes on with every group. `sft`: the whole base does.
- `retrieval`: a new LoRA per task, chosen by the nearest training sentences among those seen so far.
- `generator`: goes on with every group and nothing else, the control. `generator, replay`: half of the batches are of
  earlier groups. `generator, past self`: the same, but the targets of earlier groups are edits by the generator as it
  was before the group, on the photographs at hand; of earlier groups only sentences are known, and no edited picture
  (Li and Hoiem 2016, learning without forgetting). `generator, distilled`: conditions and adapters of earlier groups
  are stored, and the generator is kept close to them; no picture of them is shown to the base again.

Shapes: b requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from openwu.data.suite.batches import PairBatch, PairSampler
from openwu.data.suite.photographs import Photograph
from openwu.evaluation.cases import Case, draw_cases, score
from openwu.evaluation.experiments.geometry import Mean, mean_over, update_distances
from openwu.evaluation.experiments.methods import (
    SIDE,
    AdapterBank,
    Budget,
    Method,
    fit,
    new_method,
    precision,
    retrieved,
    sampler,
)
from openwu.evaluation.experiments.results import UNCACHED, ResultCache, TrialResult, columns
from openwu.training.embedded.model import EmbeddedModel
from openwu.training.embedded.picture_stages import Batches
from openwu.training.embedded.rehearsal import PastSelf
from openwu.types import Adapter

STRATEGIES: Mapping[str, str] = {
    "shared": "shared",
    "sft": "sft",
    "retrieval": "single",
    "generator": "generated",
    "generator, replay": "generated",
    "generator, past self": "generated",
    "generator, distilled": "generated",
}
"""Strategy -> the method of `methods.py` that it trains."""
REHEARSING = ("generator, replay", "generator, past self")
"""Strategies whose every other batch is of earlier groups."""
STORED = 4
"""Requests of every earlier task whose condition and adapter are stored for distillation."""
DISTILLED_AT_ONCE = 8
DRIFT_FLOOR = 1e-3
"""Floor of the squared relative distance from a stored adapter, below which its loss hardly falls."""


@dataclass(frozen=True)
class Memory:
    """Conditions of earlier groups and the adapters generated for them, stored for distillation."""

    pictures: Tensor
    """[b, 3, s, s] uint8"""
    sentences: tuple[str, ...]
    adapter: Adapter
    """float16, b samples"""

    @property
    def stored_bytes(self) -> int:
        factors = sum(part.nbytes for part in self.adapter.state_dict().values())
        return self.pictures.nbytes + factors + sum(len(sentence.encode()) for sentence in self.sentences)

    def join(self, other: Memory) -> Memory:
        """Append another group's."""
        pictures = torch.cat([self.pictures, other.pictures])
        return Memory(pictures, self.sentences + other.sentences, Adapter.stack([self.adapter, other.adapter]))


@dataclass(frozen=True)
class Interleaved:
    """Batches of which every other one is of earlier groups."""

    new: Batches
    earlier: Batches

    def batch(self, step: int) -> PairBatch:
        """Return the batch of a step."""
        return (self.earlier if step % 2 else self.new).batch(step)

    def size(self, step: int) -> int:
        """Return the number of requests of a step."""
        return (self.earlier if step % 2 else self.new).size(step)


@dataclass(frozen=True)
class TaskScore:
    """The mean PSNR in dB of one task over the test photographs, after one group."""

    way: str
    seed: int
    after: int
    """Number of groups learned; 0 is before the first."""
    task: str
    group: int
    """When the task is learned, from 1."""
    psnr: float


@dataclass
class ContinualResults:
    """Scores of every task after every group, under every strategy."""

    seen: list[TaskScore] = field(default_factory=list)
    stored_bytes: dict[str, int] = field(default_factory=dict)
    """What a strategy stores besides the base and one generator: adapters, conditions, or pictures for replay."""

    @property
    def ways(self) -> list[str]:
        return list(dict.fromkeys(each.way for each in self.seen))

    def _of(self, way: str) -> dict[tuple[int, str], dict[int, TaskScore]]:
        """(seed, task) -> groups learned -> score."""
        found: dict[tuple[int, str], dict[int, TaskScore]] = {}
        for each in self.seen:
            if each.way == way:
                found.setdefault((each.seed, each.task), {})[each.after] = each
        return found

    def final(self, way: str) -> Mean:
        """Return the mean PSNR over all tasks after the last group."""
        each = self._of(way)
        return mean_over([after[max(after)].psnr for after in each.values()], [task for _, task in each])

    def forgetting(self, way: str) -> Mean:
        """Return the dB lost since a task's own group, over tasks of all groups but the last.

        As in Chaudhry et al. 2018, with the quality right after learning in place of the best.
        """
        lost = {
            key: after[after[max(after)].group].psnr - after[max(after)].psnr
            for key, after in self._of(way).items()
            if after[max(after)].group < max(after)
        }
        return mean_over(list(lost.values()), [task for _, task in lost])

    def transfer(self, way: str) -> Mean:
        """Return the dB that earlier groups bring to a task before it is learned, over all groups but the first."""
        gained = {
            key: after[after[0].group - 1].psnr - after[0].psnr
            for key, after in self._of(way).items()
            if after[0].group > 1
        }
        return mean_over(list(gained.values()), [task for _, task in gained])

    def table(self) -> str:
        """Return every strategy, best first, as plain text."""
        rows = [
            (
                way,
                str(self.final(way)),
                str(self.forgetting(way)),
                str(self.transfer(way)),
                f"{self.stored_bytes[way] / 1e6:.1f} MB",
            )
            for way in sorted(self.ways, key=lambda way: self.final(way).value, reverse=True)
        ]
        head = ("strategy", "all tasks at the end, dB", "forgotten, dB", "gained before learning, dB", "stored")
        return columns(head, rows)

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as JSON."""
        return {
            "ways": [
                {
                    "way": way,
                    "final": self.final(way).to_json(),
                    "forgetting": self.forgetting(way).to_json(),
                    "transfer": self.transfer(way).to_json(),
                    "stored_bytes": self.stored_bytes[way],
                }
                for way in self.ways
            ],
            "seen": [vars(each) for each in self.seen],
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> ContinualResults:
        """Read what `to_json` returned: the table can be made again."""
        kept = {each["way"]: each["stored_bytes"] for each in stored["ways"]}
        return cls([TaskScore(**each) for each in stored["seen"]], kept)


def continual(
    model: EmbeddedModel,
    photographs: list[Photograph],
    test: dict[str, Tensor],
    groups: Sequence[Sequence[str]],
    budget: Budget,
    seeds: Sequence[int],
    cache: ResultCache = UNCACHED,
) -> ContinualResults:
    """Train every strategy with every seed on one group after another.

    groups: tasks in the order in which they arrive, at least two groups; `budget.steps` for each. cache: where results
    of finished trials are found again; a trial is one strategy with one seed.
    """
    found, tasks = ContinualResults(), [task for group in groups for task in group]

    def run(way: str, seed: int) -> TrialResult:
        method, cases = new_method(model, STRATEGIES[way], tasks, budget, seed), draw_cases(test, tasks, seed)
        memory: Memory | None = None
        past: PastSelf | None = None
        seen = _measure(way, method, cases, groups, 0, seed)
        for number, group in enumerate(groups, start=1):
            earlier = tuple(task for done in groups[: number - 1] for task in done)
            batches: Batches = sampler(photographs, group, budget, 100 * seed + number)
            if earlier and way in REHEARSING:
                rehearsed = sampler(photographs, earlier, budget, 100 * seed + number)
                past = PastSelf(method.model.copy(), rehearsed) if way == "generator, past self" else None
                batches = Interleaved(batches, past or rehearsed)
            penalty = None if memory is None else partial(_drift, method, memory)
            label = f"{way}, group {number}, seed {seed}"
            fit(method, batches, budget, budget.steps, method.rates, label, penalty)
            if way == "generator, distilled":
                fresh = _remember(method, photographs, group, seed)
                memory = fresh if memory is None else memory.join(fresh)
            seen += _measure(way, method, cases, groups, number, seed)
        stored = _stored_bytes(way, method, past or memory, photographs)
        return TrialResult({"seen": [vars(each) for each in seen], "stored_bytes": stored})

    for seed in seeds:
        for way in STRATEGIES:
            trial = cache.get(f"{way}, seed {seed}", partial(run, way, seed))
            found.seen += [TaskScore(**each) for each in trial.values["seen"]]
            found.stored_bytes[way] = trial.values["stored_bytes"]
    return found


def _drift(method: Method, memory: Memory, step: int) -> Tensor:
    """Return the mean log distance of the generator's adapters for some stored conditions from the stored ones.

    The pictures' loss is a logarithm too: beside it the gradient of a plain distance vanishes long before it is small.
    """
    generator = torch.Generator().manual_seed(step)
    chosen = torch.randint(len(memory.sentences), (DISTILLED_AT_ONCE,), generator=generator).tolist()
    with torch.no_grad():
        text = method.model.instruction([memory.sentences[i] for i in chosen])
    with precision():
        generated = method.model.adapt(memory.pictures[chosen].float() / 255, text)
    return (update_distances(generated, memory.adapter.select(chosen)) + DRIFT_FLOOR).log().mean()


@torch.no_grad()
def _remember(method: Method, photographs: list[Photograph], group: Sequence[str], seed: int) -> Memory:
    """Store conditions of a group's tasks and the adapters that the generator makes for them now."""
    count = STORED * len(group)
    batch: PairBatch = PairSampler(photographs, tuple(group), ((count, SIDE // 3),), SIDE, 500 + seed).batch(0)
    pictures = (batch.whole * 255).round().byte()
    text = method.model.instruction(batch.sentences)
    adapter = method.model.adapt(pictures.float() / 255, text)
    return Memory(pictures, batch.sentences, adapter.detach().to(torch.float16))


@torch.inference_mode()
def _measure(
    way: str,
    method: Method,
    cases: Sequence[Case],
    groups: Sequence[Sequence[str]],
    number: int,
    seed: int,
) -> list[TaskScore]:
    """Score every task, learned already or not."""
    known = [task for done in groups[:number] for task in done]
    if way == "retrieval":
        adapter = retrieved(method, cases, known) if known else None
    else:
        # Before the first group, an untrained generator is no more than noise: the base is where all ways begin.
        adapter = method.serve(cases) if number else None
    with precision():
        scores = score(method.model, cases, adapter)
    seen = []
    for at, group in enumerate(groups, start=1):
        for task in group:
            own = [value for case, value in zip(cases, scores, strict=True) if case.task == task]
            seen.append(TaskScore(way, seed, number, task, at, sum(own) / len(own)))
    return seen


def _stored_bytes(way: str, method: Method, kept: Memory | PastSelf | None, photographs: list[Photograph]) -> int:
    if isinstance(method.trained, AdapterBank) or way == "shared":
        return sum(parameter.nbytes for parameter in method.trained.parameters())
    if way == "generator, replay":  # the photographs that pairs of earlier tasks are made of
        return sum(scale.nbytes for photograph in photographs for scale in photograph.scales)
    return kept.stored_bytes if kept is not None else 0
