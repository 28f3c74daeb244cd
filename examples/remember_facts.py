"""Facts that a language model knows only through an adapter: functional memory outside pictures.

A small language model (Qwen3's architecture, random weights) first learns the language of a small world: sentences such
as "visits anna paris .", verb first, in which what was said once stays true. Then it is frozen. A generator reads four
facts as the model's own hidden states and writes an adapter for them; under the adapter the model is asked "visits
anna" with nothing in its context. Contexts of the test are ones that the generator never read.

    python examples/remember_facts.py [results.json] [--seed N] [--experts N]

With experts the model is a mixture (Qwen3-MoE's architecture), and the adapter is one for each of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import openwu
from openwu.backbones.causal_lm.base import CausalLM, TokenBatch
from openwu.evaluation.experiments.geometry import Mean, mean_over
from openwu.evaluation.experiments.probes.audit import Ladder, Subject, audit
from openwu.memory.language import LanguageMemory
from openwu.training.config import StageConfig
from openwu.training.loop import LoopConfig, train_stage
from openwu.training.objectives import NextToken
from openwu.training.stage import GeneratorStage, ModuleStage

NAMES = (
    "anna", "ben", "carla", "david", "emma", "felix", "greta", "hugo",
    "ida", "jonas", "karin", "leo", "mona", "nils", "olga", "paul",
)  # fmt: skip
WORLD = {
    "visits": ["paris", "london", "rome", "oslo", "cairo", "lima", "tokyo", "delhi"],
    "drinks": ["tea", "coffee", "milk", "juice", "water", "cocoa", "cider", "soda"],
    "plays": ["chess", "piano", "tennis", "drums", "cards", "golf", "guitar", "hockey"],
}
"""Verb -> what it may be followed by, after the name."""
SPECIAL = ("<pad>", "<start>", "<end>", ".")
BINDS = 0.1
"""The loss below which a base has begun to look up whose a thing is; without it the loss ends near 0.4."""
HELD_BACK = 5
"""One in so many sets of four facts is kept for the test."""


@dataclass(frozen=True)
class Fact:
    verb: str
    name: str
    thing: str

    @property
    def sentence(self) -> str:
        return f"{self.asked} {self.thing} ."

    @property
    def asked(self) -> str:
        return f"{self.verb} {self.name}"


@dataclass(frozen=True)
class Case:
    """A context of facts, and one of them to be asked for."""

    facts: tuple[Fact, ...]
    asked: Fact

    @property
    def context(self) -> str:
        return " ".join(fact.sentence for fact in self.facts)


@dataclass(frozen=True)
class Plan:
    """Sizes and lengths."""

    seed: int = 0
    width: int = 64
    layers: int = 2
    experts: int = 0
    """Experts of every MLP, two of them for each word; 0: a dense model."""
    base: StageConfig = StageConfig(  # noqa: RUF009
        steps=300, shapes=((64, 0),), learning_rate=5e-3, matrix_learning_rate=1e-2, decay=0.3
    )
    starts: int = 4
    """How many random beginnings the base may take: not every one comes to look things up."""
    generator: StageConfig = StageConfig(  # noqa: RUF009
        steps=2400, shapes=((32, 0),), learning_rate=3e-3, matrix_learning_rate=5e-3, decay=0.5
    )
    cases: int = 192
    """Contexts of the test."""
    repeats: int = 8
    """Sentences after the facts in a text that the base learns from; each repeats a fact."""


def facts(random: Random, held_back: bool | None = None) -> tuple[Fact, ...]:
    """Two people and two verbs, four facts in any order: neither the name alone nor the verb alone tells the thing.

    `held_back`: only what is kept for the test (True) or for the training (False); None: any.
    """
    while True:
        names, verbs = random.sample(NAMES, 2), random.sample(list(WORLD), 2)
        drawn = [
            Fact(verb, name, thing)
            for verb in verbs
            for name, thing in zip(names, random.sample(WORLD[verb], 2), strict=True)
        ]
        random.shuffle(drawn)
        if held_back is None or is_held_back(drawn) == held_back:
            return tuple(drawn)


def is_held_back(told: Sequence[Fact]) -> bool:
    """One set of four facts in HELD_BACK, whatever their order: by a hash, so that no rule can be learned from the
    training about what is left out."""
    return zlib.crc32(" ".join(sorted(fact.sentence for fact in told)).encode()) % HELD_BACK == 0


def new_base(plan: Plan, start: int = 0) -> CausalLM:
    """A language model that knows nothing yet. `start`: which of the plan's random beginnings."""
    words = [*SPECIAL, *NAMES, *WORLD, *itertools.chain(*WORLD.values())]
    tokens = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<end>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens.post_processor = processors.TemplateProcessing(single="<start> $A", special_tokens=[("<start>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", bos_token="<start>", eos_token="<end>"
    )
    sizes: dict[str, Any] = dict(  # noqa: C408
        vocab_size=len(words), hidden_size=plan.width, intermediate_size=2 * plan.width,
        num_hidden_layers=plan.layers, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        max_position_embeddings=128, rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        attention_bias=True, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(plan.seed + 1000 * start)
    model = Qwen3ForCausalLM(Qwen3Config(**sizes)) if not plan.experts else mixture(plan.experts, plan.width, sizes)
    # Words far apart from the start, so that attention can tell them apart at once.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.5)
    look_back(model)
    return CausalLM(model, tokenizer)


def mixture(experts: int, width: int, sizes: dict[str, Any]) -> Qwen3MoeForCausalLM:
    """For a word, two experts of half the dense MLP's width each compute as much as that does."""
    own = Qwen3MoeConfig(**sizes, num_experts=experts, num_experts_per_tok=2, moe_intermediate_size=width)
    return Qwen3MoeForCausalLM(own)


@torch.no_grad()
def look_back(model: Qwen3ForCausalLM | Qwen3MoeForCausalLM) -> None:
    """Let two heads of the first layer begin by looking one and two words back.

    Training finds such heads by itself, but only after many minutes; looking things up begins with them (Olsson et al.
    2022, on induction heads). A query turned back by d words fits best to a key that stands d words before it; the
    fast turns alone are used, which tell neighbours apart.
    """
    turns = model.model.rotary_emb.inv_freq
    fast = (torch.arange(len(turns)) < 6).float()
    first, width = model.model.layers[0].self_attn, 2 * len(turns)
    for layer in model.model.layers:
        layer.self_attn.q_norm.weight.fill_(2.0)
        layer.self_attn.k_norm.weight.fill_(2.0)
    first.k_proj.bias[:width] = torch.cat([fast, 0 * fast])
    for head in (0, 1):
        angles = (head + 1) * turns
        first.q_proj.bias[head * width : (head + 1) * width] = torch.cat([fast * angles.cos(), -fast * angles.sin()])


def trained_base(plan: Plan, log: Log) -> tuple[CausalLM, int]:
    """A base that looks things up, and how many beginnings that took; the best of them where none does."""
    found: list[tuple[float, int, CausalLM]] = []
    for start in range(plan.starts):
        base = new_base(plan, start)
        found.append((train_base(base, plan, log), start, base))
        if found[-1][0] < BINDS:
            break
    return min(found)[2], len(found)


def train_base(base: CausalLM, plan: Plan, log: Log) -> float:
    """TokenBatch in which sentences come again: what a thing was at first, it is later. Frozen when done.

    Returns the mean loss of the last steps.
    """
    objective, means = NextToken(), list[float]()

    def batches(step: int) -> TokenBatch:
        random = Random(f"base {plan.seed} {step}")
        return base.tokenize_dialogues([story(random, plan.repeats) for _ in range(plan.base.shapes[0][0])])

    def losses(texts: TokenBatch) -> Tensor:
        found = objective.losses(base.logits(texts), objective.sample(texts.labels, torch.Generator()))
        log.say("base", len(means), found.mean())
        means.append(float(found.mean().detach()))
        return found

    base.model.requires_grad_(True)
    train_stage(ModuleStage("base", base.model, batches, losses), plan.base)
    base.model.requires_grad_(False)
    return sum(means[-10:]) / len(means[-10:])


def story(random: Random, repeats: int) -> list[tuple[str, str]]:
    """Facts, and then some of them asked for. What cannot be known, the facts themselves, is not asked for."""
    told = facts(random)
    asked = random.choices(told, k=repeats)
    context = " ".join(fact.sentence for fact in told)
    first, *others = [(fact.asked, f"{fact.thing} .") for fact in asked]
    return [(f"{context} {first[0]}", first[1]), *others]


@dataclass(frozen=True)
class Lesson:
    """A batch of the generator's training: contexts, and all their facts to be asked for without them."""

    contexts: tuple[str, ...]
    texts: TokenBatch


def lesson(base: CausalLM, seed: int, step: int, count: int) -> Lesson:
    random = Random(f"generator {seed} {step}")
    cases = [facts(random, held_back=False) for _ in range(count)]
    turns = [[(fact.asked, f"{fact.thing} .") for fact in random.sample(told, len(told))] for told in cases]
    return Lesson(tuple(" ".join(fact.sentence for fact in told) for told in cases), base.tokenize_dialogues(turns))


def new_memory(base: CausalLM, plan: Plan) -> LanguageMemory:
    """A generator for the second linear map of every MLP, or of its experts.

    There a fact can be one key and one value of rank one.
    """
    torch.manual_seed(plan.seed)
    config = openwu.GeneratorConfig(
        rank=8, alpha=8, token_dim=base.width, input_dim=base.width, d_model=96, head_dim=24, dim_accumulation=2,
        num_pg_layers=2, groups=base.layer_groups(only=("down_proj",)),
    )  # fmt: skip
    return LanguageMemory(base, openwu.ParameterGenerator(config, b_init_std=3e-2), condition_module=base.layers[-1])


def train_generator(memory: LanguageMemory, plan: Plan, log: Log, folder: Path) -> None:
    base, count = memory.base, plan.generator.shapes[0][0]

    def adapt(some: Lesson) -> openwu.Adapter:
        return memory.adapt(some.contexts)

    stage = GeneratorStage(
        "generator",
        memory.generator,
        memory.handle,
        lambda step: lesson(base, plan.seed, step, count),
        adapt,
        target=lambda some: some.texts.labels,
        predict=lambda some, _: log.heard("generator", base.logits(some.texts), some.texts.labels),
        objective=NextToken(),
    )
    train_stage(stage, plan.generator, LoopConfig(log_every=50), folder)


class Log:
    """Says now and then how far a training is."""

    def __init__(self, every: int = 50) -> None:
        self.every, self.began, self.count = every, time.monotonic(), 0

    def say(self, name: str, step: int, value: Tensor, what: str = "loss") -> None:
        if (step + 1) % self.every == 0:
            seconds = time.monotonic() - self.began
            sys.stderr.write(f"{name} {step + 1}: {what} {float(value.detach()):.3f}, {seconds:.0f} s\n")

    def heard(self, name: str, logits: Tensor, wanted: Tensor) -> Tensor:
        """The logits themselves; how many of the wanted words are the likeliest is said."""
        asked = wanted[:, 1:] > SPECIAL.index(".")
        self.say(name, self.count, (logits[:, :-1].argmax(-1) == wanted[:, 1:])[asked].float().mean(), "right")
        self.count += 1
        return logits


def test_cases(count: int) -> list[Case]:
    """Contexts that were held back; verbs are asked for in turn."""
    random, cases = Random("test"), []
    while len(cases) < count:
        verb = list(WORLD)[len(cases) % len(WORLD)]
        told = facts(random, held_back=True)
        fitting = [fact for fact in told if fact.verb == verb]
        if fitting:
            cases.append(Case(told, random.choice(fitting)))
    return cases


def others_facts(case: Case) -> Case:
    """The same facts of the other person: the two names change places."""
    first, second = sorted({fact.name for fact in case.facts})
    swapped = {first: second, second: first}
    return replace(case, facts=tuple(replace(fact, name=swapped[fact.name]) for fact in case.facts))


def right(memory: LanguageMemory, cases: Sequence[Case], adapter: openwu.Adapter | None) -> list[float]:
    """1 for every case that is answered with the right word, without the facts in the context."""
    said = memory.answer([case.asked.asked for case in cases], adapter, max_new_tokens=1)
    return [float(word == case.asked.thing) for word, case in zip(said, cases, strict=True)]


def told(memory: LanguageMemory, cases: Sequence[Case]) -> list[float]:
    """The same with the facts in the context and no adapter."""
    said = memory.answer([f"{case.context} {case.asked.asked}" for case in cases], max_new_tokens=1)
    return [float(word == case.asked.thing) for word, case in zip(said, cases, strict=True)]


def exchanged(memory: LanguageMemory, cases: Sequence[Case]) -> list[float]:
    """1 where the adapter of the swapped names answers what was the other person's: what a memory that binds does."""
    swapped = [others_facts(case) for case in cases]
    wanted = [
        replace(case, asked=next(fact for fact in case.facts if fact.asked == asked))
        for case, asked in zip(swapped, (case.asked.asked for case in cases), strict=True)
    ]
    return right(memory, wanted, memory.adapt([case.context for case in swapped]))


@dataclass(frozen=True)
class Examination:
    """What the adapters of some contexts are worth."""

    ladder: Ladder
    exchanged: Mean
    in_context: Mean

    def __str__(self) -> str:
        return (
            f"{self.ladder.table()}names swapped, the other person's thing is answered: {self.exchanged}\n"
            f"the facts in the context, no adapter: {self.in_context}\n"
        )

    def to_json(self) -> dict[str, Any]:
        means = {"exchanged": asdict(self.exchanged), "facts_in_context": asdict(self.in_context)}
        return {**means, "audit": self.ladder.to_json()}


def examine(memory: LanguageMemory, cases: Sequence[Case]) -> Examination:
    verbs = [case.asked.verb for case in cases]
    subject = Subject(
        name="facts",
        cases=cases,
        tasks=verbs,
        adapt=lambda some: memory.adapt([case.context for case in some]),
        score=lambda some, adapter: right(memory, some, adapter),
        unit="share of right answers",
        variants={"names swapped": lambda case, _: others_facts(case)},
    )
    return Examination(
        audit(subject), mean_over(exchanged(memory, cases), verbs), mean_over(told(memory, cases), verbs)
    )


def run(plan: Plan | None = None) -> tuple[dict[str, Any], str]:
    """Everything: the numbers, and the table that is shown."""
    plan = plan or Plan()
    log = Log()
    base, starts = trained_base(plan, log)
    memory = new_memory(base, plan)
    with tempfile.TemporaryDirectory() as folder:
        train_generator(memory, plan, log, Path(folder))
    trained, computed = time.monotonic() - log.began, time.process_time()
    found = examine(memory, test_cases(plan.cases))
    numbers = {
        "plan": asdict(plan),
        "training_seconds": round(trained, 1),
        "cpu_seconds": round(computed, 1),
        "base_starts": starts,
        "base_parameters": sum(parameter.numel() for parameter in base.model.parameters()),
        "generator_parameters": memory.generator.num_parameters,
        **found.to_json(),
    }
    return numbers, str(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("results", type=Path, nargs="?", help="JSON file for the numbers")
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.add_argument("--experts", type=int, default=Plan.experts, help="in every MLP (default: dense)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    numbers, table = run(Plan(seed=options.seed, experts=options.experts))
    sys.stdout.write(table)
    if options.results is not None:
        options.results.write_text(json.dumps(numbers), encoding="utf-8")


if __name__ == "__main__":
    main()
