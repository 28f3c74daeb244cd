"""Tasks that arrive one group after another: what is remembered, and at what price.

Enters: a model whose base is frozen, groups of tasks in their order. Leaves: for every way to go on how good each task
is after each group, and from that what has been forgotten.

- `shared`: one LoRA that goes on with every group. `sft`: the whole base does.
- `retrieval`: a new LoRA per task, chosen by the nearest training sentences among those seen so far.
- `generator`: goes on with every group and nothing else, the control. `generator, replay`: half of the batches are of
  earlier groups. `generator, past self`: the same, but how they should come out is said by the generator as it was
  before the group, through the base, on the photographs at hand; of earlier groups only sentences are known, and no
  edited picture (Li and Hoiem 2016, learning without forgetting). `generator, distilled`: conditions and adapters of
  earlier groups are stored, and the generator shall go on writing those adapters; no picture of them is shown to the
  base again.

Shapes: b requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from openwu.data.suite.batches import PairBatch, PairSampler
from openwu.data.suite.photographs import Photograph
from openwu.evaluation.experiments.embedded import EmbeddedCase, draw, score
from openwu.evaluation.experiments.geometry import Mean, mean_over, update_distances
from openwu.evaluation.experiments.methods import (
    FIRST_FLOOR,
    SIDE,
    AdapterBank,
    Budget,
    Method,
    batch_loss,
    copied,
    new_method,
    retrieved,
)
from openwu.evaluation.experiments.results import Keep, Part, keep_nothing
from openwu.training.config import StageConfig
from openwu.training.embedded.losses import falling_floor
from openwu.training.embedded.model import EmbeddedModel
from openwu.training.loop import part_of_peak
from openwu.training.optimizers import StageOptimizer
from openwu.types import Adapter

WAYS: Mapping[str, str] = {
    "shared": "shared",
    "sft": "sft",
    "retrieval": "single",
    "generator": "generated",
    "generator, replay": "generated",
    "generator, past self": "generated",
    "generator, distilled": "generated",
}
"""Way to go on -> the method of `methods.py` that it trains."""
REHEARSING = ("generator, replay", "generator, past self")
"""Ways whose every other batch is of earlier groups."""
STORED = 4
"""Requests of every earlier task whose condition and adapter are stored for distillation."""
DISTILLED_AT_ONCE = 8
DRIFT_FLOOR = 1e-3
"""Of a squared relative distance: below it a stored adapter is close enough."""


@dataclass(frozen=True)
class Memory:
    """What is kept of earlier groups for distillation: conditions and what was written for them."""

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
        pictures = torch.cat([self.pictures, other.pictures])
        return Memory(pictures, self.sentences + other.sentences, Adapter.stack([self.adapter, other.adapter]))


class PastSelf:
    """Condition encoder and generator as they are when this is made. They say how requests should come out."""

    def __init__(self, method: Method, requests: PairSampler) -> None:
        self._model, self._requests = copied(method.model), requests

    @property
    def stored_bytes(self) -> int:
        parts = self._model.condition, self._model.generator
        return sum(parameter.nbytes for part in parts for parameter in part.parameters())

    @torch.no_grad()
    def batch(self, step: int) -> PairBatch:
        """The requests of a step, with what was made of them then for their answers."""
        batch, model = self._requests.batch(step), self._model
        text = model.instruction(batch.sentences)
        with torch.autocast("cpu", torch.bfloat16):
            edited = model.edit(batch.picture, batch.planes, text, model.adapt(batch.whole, text))
        return replace(batch, target=edited.float())


@dataclass(frozen=True)
class Seen:
    """One task after one group: the mean PSNR in dB over the test photographs."""

    way: str
    seed: int
    after: int
    """Number of groups learned; 0 is before the first."""
    task: str
    group: int
    """When the task is learned, from 1."""
    psnr: float


@dataclass
class Course:
    """All that was found."""

    seen: list[Seen] = field(default_factory=list)
    stored_bytes: dict[str, int] = field(default_factory=dict)
    """What a way keeps besides the base and one generator: adapters, or conditions, or pictures to be shown again."""

    @property
    def ways(self) -> list[str]:
        return list(dict.fromkeys(each.way for each in self.seen))

    def _of(self, way: str) -> dict[tuple[int, str], dict[int, Seen]]:
        """(seed, task) -> groups learned -> what was seen."""
        found: dict[tuple[int, str], dict[int, Seen]] = {}
        for each in self.seen:
            if each.way == way:
                found.setdefault((each.seed, each.task), {})[each.after] = each
        return found

    def final(self, way: str) -> Mean:
        """Mean PSNR over all tasks after the last group."""
        each = self._of(way)
        return mean_over([after[max(after)].psnr for after in each.values()], [task for _, task in each])

    def forgetting(self, way: str) -> Mean:
        """dB lost since a task's own group, over tasks of all groups but the last (Chaudhry et al. 2018, with the
        quality right after learning in place of the best)."""
        lost = {
            key: after[after[max(after)].group].psnr - after[max(after)].psnr
            for key, after in self._of(way).items()
            if after[max(after)].group < max(after)
        }
        return mean_over(list(lost.values()), [task for _, task in lost])

    def transfer(self, way: str) -> Mean:
        """dB that earlier groups bring to a task before it is learned, over tasks of all groups but the first."""
        gained = {
            key: after[after[0].group - 1].psnr - after[0].psnr
            for key, after in self._of(way).items()
            if after[0].group > 1
        }
        return mean_over(list(gained.values()), [task for _, task in gained])

    def to_json(self) -> dict[str, Any]:
        return {
            "ways": [
                {
                    "way": way,
                    **{
                        name: {"value": mean.value, "low": mean.low, "high": mean.high}
                        for name, mean in (
                            ("final", self.final(way)),
                            ("forgetting", self.forgetting(way)),
                            ("transfer", self.transfer(way)),
                        )
                    },
                    "stored_bytes": self.stored_bytes[way],
                }
                for way in self.ways
            ],
            "seen": [vars(each) for each in self.seen],
        }


def continual(
    model: EmbeddedModel,
    photographs: list[Photograph],
    test: dict[str, Tensor],
    groups: Sequence[Sequence[str]],
    budget: Budget,
    seeds: Sequence[int],
    keep: Keep = keep_nothing,
) -> Course:
    """`groups`: tasks in the order in which they arrive, at least two groups; `budget.steps` for each.

    `keep`: where finished parts are found again; a part is one way with one seed.
    """
    found, tasks = Course(), [task for group in groups for task in group]

    def gone(way: str, seed: int) -> Part:
        method, cases = new_method(model, WAYS[way], tasks, budget, seed), draw(test, tasks, seed)
        memory: Memory | None = None
        old: PairSampler | PastSelf | None = None
        seen = _look(way, method, cases, groups, 0, seed)
        for number, group in enumerate(groups, start=1):
            earlier = tuple(task for done in groups[: number - 1] for task in done)
            if earlier and way in REHEARSING:
                shapes = ((budget.requests, budget.crop),)
                requests = PairSampler(photographs, earlier, shapes, SIDE, 100 * seed + number)
                old = requests if way == "generator, replay" else PastSelf(method, requests)
            _learn(method, photographs, group, old, memory, budget, (way, number, seed))
            if way == "generator, distilled":
                fresh = _remember(method, photographs, group, seed)
                memory = fresh if memory is None else memory.join(fresh)
            seen += _look(way, method, cases, groups, number, seed)
        stored = _stored_bytes(way, method, old if isinstance(old, PastSelf) else memory, photographs)
        return Part({"seen": [vars(each) for each in seen], "stored_bytes": stored})

    for seed in seeds:
        for way in WAYS:
            part = keep(f"{way}, seed {seed}", partial(gone, way, seed))
            found.seen += [Seen(**each) for each in part.values["seen"]]
            found.stored_bytes[way] = part.values["stored_bytes"]
    return found


def _learn(
    method: Method,
    photographs: list[Photograph],
    group: Sequence[str],
    old: PairSampler | PastSelf | None,
    memory: Memory | None,
    budget: Budget,
    which: tuple[str, int, int],
) -> None:
    """One group; `old`: what every other batch is taken from; `memory`: adapters that shall stay as they were."""
    way, number, seed = which
    steps = budget.steps
    config = StageConfig(
        steps=steps,
        shapes=((budget.requests, budget.crop),),
        warmup=min(50, steps // 5),
        **dict[str, Any](method.rates),
    )
    optimizer = StageOptimizer(method.trained, config)
    new = PairSampler(photographs, tuple(group), config.shapes, SIDE, 100 * seed + number)
    for step in tqdm(range(steps), desc=f"{way}, group {number}, seed {seed}", unit="step"):
        batch = (old if old is not None and step % 2 else new).batch(step)
        loss = batch_loss(method.model, batch, method.adapt, falling_floor(FIRST_FLOOR, step / steps))
        if memory is not None:
            loss = loss + _drift(method, memory, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(method.trained.parameters(), config.clip)
        optimizer.step(part_of_peak(config, step))


def _drift(method: Method, memory: Memory, generator: torch.Generator) -> Tensor:
    """How far the generator's adapters for some stored conditions are from the stored ones, as a mean logarithm.

    The pictures' loss is a logarithm too: against it a plain distance stops pulling long before it is small.
    """
    chosen = torch.randint(len(memory.sentences), (DISTILLED_AT_ONCE,), generator=generator).tolist()
    with torch.no_grad():
        text = method.model.instruction([memory.sentences[i] for i in chosen])
    with torch.autocast("cpu", torch.bfloat16):
        written = method.model.adapt(memory.pictures[chosen].float() / 255, text)
    return (update_distances(written, memory.adapter.select(chosen)) + DRIFT_FLOOR).log().mean()


@torch.no_grad()
def _remember(method: Method, photographs: list[Photograph], group: Sequence[str], seed: int) -> Memory:
    """Conditions of a group's tasks, and what the generator writes for them now."""
    count = STORED * len(group)
    batch: PairBatch = PairSampler(photographs, tuple(group), ((count, SIDE // 3),), SIDE, 500 + seed).batch(0)
    pictures = (batch.whole * 255).round().byte()
    text = method.model.instruction(batch.sentences)
    adapter = method.model.adapt(pictures.float() / 255, text)
    return Memory(pictures, batch.sentences, adapter.detach().to(torch.float16))


@torch.inference_mode()
def _look(
    way: str,
    method: Method,
    cases: Sequence[EmbeddedCase],
    groups: Sequence[Sequence[str]],
    number: int,
    seed: int,
) -> list[Seen]:
    """Every task, learned already or not."""
    known = [task for done in groups[:number] for task in done]
    if way == "retrieval":
        adapter = retrieved(method, cases, known) if known else None
    else:
        # Before the first group, an untrained generator is no more than noise: the base is where all ways begin.
        adapter = method.serve(cases) if number else None
    with torch.autocast("cpu", torch.bfloat16):
        scores = score(method.model, cases, adapter)
    seen = []
    for at, group in enumerate(groups, start=1):
        for task in group:
            own = [value for case, value in zip(cases, scores, strict=True) if case.edit == task]
            seen.append(Seen(way, seed, number, task, at, sum(own) / len(own)))
    return seen


def _stored_bytes(way: str, method: Method, kept: Memory | PastSelf | None, photographs: list[Photograph]) -> int:
    if isinstance(method.trained, AdapterBank) or way == "shared":
        return sum(parameter.nbytes for parameter in method.trained.parameters())
    if way == "generator, replay":  # the photographs that pairs of earlier tasks are made of
        return sum(scale.nbytes for photograph in photographs for scale in photograph.scales)
    return kept.stored_bytes if kept is not None else 0
