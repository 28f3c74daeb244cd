"""How many numbers does a fact need? Fit operators of every kind to notes, inside a frozen language model.

    python examples/fit_notes.py FOLDER [--steps 30] [--notes 4] [--seeds 0] [--kinds 0 2 ...] [--part]

No generator: the numbers of one adapter for each note are trained themselves, on questions about its two people and
their answers, for equal steps at the better of two learning rates (by the loss of the last steps). Asked afterwards in
a wording that was not trained, and with ordinary questions, which no note answers. Adapted are the maps that leave the
attention and the MLP in layers 20 to 25 of SmolLM2-135M-Instruct; what is below is computed once. Writes
operators-notes.json; finished fits are kept in FOLDER/fits. `--part`: fit the `--kinds` (places in `KINDS`) only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openwu.adapters.inject import AdapterHandle, attach
from openwu.backbones.causal_lm.base import IGNORED, CausalLM
from openwu.config import GeneratorConfig
from openwu.evaluation.experiments.comparisons.operators import KINDS, Kind, neutral_adapter
from openwu.evaluation.experiments.geometry import Mean, mean_over
from openwu.evaluation.experiments.recall import RecallCase
from openwu.evaluation.experiments.results import ResultCache, TrialResult, columns, write_findings
from openwu.memory.facts import ORDINARY_TEST, Fact, FactSource, vocabulary_words
from openwu.training.retention import token_divergence
from openwu.types import Adapter

LAYERS, NAMES = range(20, 26), ("o_proj", "down_proj")
RATES, LAST, ORDINARY, TOKENS = (1e-2, 5e-2), 5, 8, 16
"""Learning rates; steps whose loss chooses between them; ordinary questions; tokens of an answer."""
PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
NONE = "no adapter"


@dataclass(frozen=True)
class Upper:
    """The layers above the first adapted one, with what enters them for some texts, computed once."""

    base: CausalLM
    entering: Tensor
    """`[b, n, d]`"""
    beside: Mapping[str, Any]
    """What else the layers are called with."""
    labels: Tensor
    """Labels of the next token `[b, n]`."""

    @classmethod
    @torch.no_grad()
    def of(cls, base: CausalLM, pairs: Sequence[tuple[str, str]]) -> Upper:
        """Read questions with their answers as far as the first adapted layer."""
        texts = base.tokenize_dialogues([[pair] for pair in pairs])
        found: list[Any] = []

        def stop(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            found.extend((given[0] if given else named.pop("hidden_states"), named))
            raise StopIteration

        layer = base.model.get_submodule(base.layers[LAYERS[0]])
        hook = layer.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            base.model(input_ids=texts.ids, attention_mask=texts.mask, use_cache=False)
        except StopIteration:
            pass
        finally:
            hook.remove()
        labels = F.pad(texts.labels[:, 1:], (0, 1), value=IGNORED)
        return cls(base, found[0], found[1], labels)

    def logits(self) -> tuple[Tensor, Tensor]:
        """Return logits `[b, m, V]` where some row has a label, and the labels `[b, m]`."""
        model: Any = self.base.model
        states = self.entering
        for path in self.base.layers[LAYERS[0] :]:
            out = self.base.model.get_submodule(path)(states, **self.beside)
            states = out[0] if isinstance(out, tuple) else out
        wanted = (self.labels != IGNORED).any(0)
        return model.lm_head(model.model.norm(states[:, wanted])), self.labels[:, wanted]


def layout(base: CausalLM, kind: Kind) -> GeneratorConfig:
    """Return the adapted maps, as a generator of this rank would write to them."""
    return GeneratorConfig(
        rank=kind.rank, alpha=kind.rank, token_dim=64, input_dim=8, d_model=64, head_dim=32,
        dim_accumulation=1, num_pg_layers=1, groups=tuple(base.layer_groups(NAMES, layers=LAYERS)),
    )  # fmt: skip


def fitted(
    upper: Upper,
    handle: AdapterHandle,
    adapter: Adapter,
    trained: list[Tensor],
    rows: list[int],
    steps: int,
    rate: float,
) -> float:
    """Train in place; return the loss of the last steps, per token of an answer."""
    optimizer, losses = torch.optim.Adam(trained, lr=rate), []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, 2 * (steps - step) / steps)
        with handle.applied(adapter, rows=rows):
            logits, labels = upper.logits()
            each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
        per_row = each.view_as(labels).sum(1) / (labels != IGNORED).sum(1)
        optimizer.zero_grad()
        torch.autograd.backward(per_row.sum() / adapter.batch)  # notes do not touch one another
        optimizer.step()
        losses.append(float(per_row.mean().detach()))
    return sum(losses[-LAST:]) / len(losses[-LAST:])


class Notes:
    """The notes of a seed, their questions, and the ordinary ones."""

    def __init__(self, base: CausalLM, count: int, seed: int) -> None:
        source = FactSource(vocabulary_words(base.tokenizer.get_vocab()), 900 + seed, test=True)
        self.base, self.count = base, count
        self.notes = [source.note(2, same_relation=1.0, reworded=0.0, fillers=0.0) for _ in range(count)]
        self.facts = [fact for note in self.notes for fact in note.facts]
        self.rows = [number for number, note in enumerate(self.notes) for _ in note.facts]
        self.upper = Upper.of(base, [(PROMPT.format(fact.question(0)), fact.answer) for fact in self.facts])
        asked = [PROMPT.format(question) for question in ORDINARY_TEST[:ORDINARY]]
        answers = base.generate(asked, max_new_tokens=TOKENS)
        self.ordinary = Upper.of(base, list(zip(asked, answers, strict=True)))
        with torch.no_grad():
            self.own, labels = self.ordinary.logits()
        self.mask = labels != IGNORED

    @torch.no_grad()
    def judged(self, scope: Callable[[list[int]], Any]) -> dict[str, Any]:
        """Ask in both wordings and measure the ordinary answers, under what `scope` applies to rows."""
        found: dict[str, Any] = {}
        groups = [f"{row}" for row in self.rows]
        for name, wording in (("trained wording", 0), ("new wording", -1)):
            with scope(self.rows):
                answers = self.base.generate(
                    [PROMPT.format(fact.question(wording)) for fact in self.facts], max_new_tokens=TOKENS
                )
            right, mistaken = zip(*map(self._marks, self.facts, self.rows, answers), strict=True)
            found[name] = {
                "right": mean_over(right, groups).to_json(),
                "mistaken": mean_over(mistaken, groups).to_json(),
            }
            found.setdefault("answers", []).append(answers)
        with scope([number % self.count for number in range(ORDINARY)]):
            changed, _ = self.ordinary.logits()
        divergence = token_divergence(changed, self.own, self.mask).tolist()
        return {**found, "divergence": mean_over(divergence, [str(i) for i in range(ORDINARY)]).to_json()}

    def _marks(self, fact: Fact, row: int, answer: str) -> tuple[float, float]:
        case = RecallCase(self.notes[row], fact, "")
        return case.right(answer), case.mistaken(answer)


def run(notes: Notes, kind: Kind | None, steps: int, seed: int) -> TrialResult:
    """Fit a kind at every rate, and judge the better one; None: the model without an adapter."""
    if kind is None:
        from contextlib import nullcontext

        return TrialResult({"kind": NONE, "numbers": 0, "seed": seed, **notes.judged(lambda _: nullcontext())})
    best: tuple[float, float, Adapter] | None = None
    config = layout(notes.base, kind)
    drawn = partial(neutral_adapter, config, kind)
    with attach(notes.base.model, drawn(torch.Generator())[0].targets) as handle:
        for rate in RATES:
            adapter, trained = drawn(torch.Generator().manual_seed(seed), notes.count)
            loss = fitted(notes.upper, handle, adapter, trained, notes.rows, steps, rate)
            if best is None or loss < best[0]:
                best = loss, rate, adapter.detach()
        assert best is not None
        loss, rate, adapter = best
        judged = notes.judged(lambda rows: handle.applied(adapter, rows=rows))
    values = {"kind": kind.name, "numbers": adapter.parameters_per_sample, "seed": seed, "loss": loss, "rate": rate}
    sys.stdout.write(f"{values} {judged['new wording']['right']['value']:.2f}\n")
    sys.stdout.flush()
    return TrialResult({**values, **judged})


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Format the results, best first."""
    rows = [
        (
            each["kind"], f"{each['numbers']:,}",
            *(str(Mean(**each[wording]["right"])) for wording in ("trained wording", "new wording")),
            str(Mean(**each["new wording"]["mistaken"])), str(Mean(**each["divergence"])),
        )
        for each in sorted(found, key=lambda each: -float(each["new wording"]["right"]["value"]))
    ]  # fmt: skip
    head = ("operator", "numbers", "right", "right, new wording", "another's value", "KL of ordinary answers, nats")
    return columns(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--notes", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--kinds", type=int, nargs="+", default=list(range(len(KINDS))))
    parser.add_argument("--part", action="store_true", help="fit only, write no result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    base, cache, found = CausalLM.packaged(), ResultCache(options.folder / "fits"), []
    nn.Module.float(base.model)  # transformers refuses it of what was read from a quantised file
    for seed in options.seeds:
        notes = Notes(base, options.notes, seed)
        for kind in [None, *(KINDS[i] for i in options.kinds)]:
            name = f"{kind.name if kind else NONE}, {options.steps} steps, {options.notes} notes, seed {seed}"
            found.append(cache.get(name, partial(run, notes, kind, options.steps, seed)).values)
    if not options.part:
        settings = {**vars(options), "folder": None, "rates": RATES, "layers": list(LAYERS), "maps": NAMES}
        write_findings(options.folder / "operators-notes.json", settings, {"fits": found})
        sys.stdout.write(table(found))


if __name__ == "__main__":
    main()
