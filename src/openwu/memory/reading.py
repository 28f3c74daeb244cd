"""Turn notes into what an associative generator reads: chunks of tokens, their prompt, and the states of the base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from openwu.backbones.causal_lm.base import CausalLM
from openwu.conditions.note_states import NoteStates
from openwu.errors import OpenwuError
from openwu.generator.associative import NEXT, AssociativeConfig
from openwu.types import Condition

MAX_NOTE = 1024
"""Tokens of a note; longer texts are several notes."""


@dataclass(frozen=True)
class NoteFormat:
    """How notes and questions are put to the base; part of a generator's config, since it is trained with it."""

    states: str
    """Path of the module whose output decides strengths and corrections."""
    note_prompt: str = "<|im_start|>assistant\n"
    """What the base reads in front of a note: answers stand behind the same words."""
    question_prompt: str = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    chunk: int = 128
    """Tokens that are read at once; a longer note is read in parts that know nothing of one another."""
    base: str = ""
    """Digest of the base that the generator was trained on; empty for one that is not trained."""

    @classmethod
    def of(cls, config: AssociativeConfig) -> NoteFormat:
        """Read the format from a generator's config; OpenwuError where it has none."""
        try:
            return cls(**config.condition_encoder)
        except TypeError as error:
            raise OpenwuError(
                f"generator: expected condition_encoder with the fields of NoteFormat: {error}"
            ) from error

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class NoteReader:
    """Reads notes with a base, for a generator of certain targets."""

    def __init__(
        self,
        base: CausalLM,
        config: AssociativeConfig,
        scope: Callable[[], AbstractContextManager[None] | None] = lambda: None,
    ) -> None:
        """`scope`: entered whenever the base reads; applies the generator's reader LoRA where it has one."""
        self.base, self.format, self._scope = base, NoteFormat.of(config), scope
        self._encoder = NoteStates(base.model, self.format.states, config.targets, base.output_rows, NEXT)
        self._prompt = self._ids(self.format.note_prompt) or [base.end]

    def chunks(self, text: str) -> list[list[int]]:
        """Split a note into token ids of at most `format.chunk` each, after a sentence where there is one.

        Raises OpenwuError for texts that are empty, not text, or longer than MAX_NOTE tokens.
        """
        problem = _problem(text)
        ids = [] if problem else self._ids(text.strip())
        if not problem and len(ids) > MAX_NOTE:
            problem = f"at most {MAX_NOTE} tokens, got {len(ids)}: remember it as several notes"
        if problem:
            raise OpenwuError(f"note: expected {problem}")
        parts = []
        while ids:
            cut = self.format.chunk
            if len(ids) > cut:
                stops = [n for n in range(cut // 2, cut) if self.base.tokenizer.decode(ids[n - 1 : n]).strip() == "."]
                cut = stops[-1] if stops else cut
            parts.append(ids[:cut])
            ids = ids[cut:]
        return parts

    def __call__(self, chunks: Sequence[Sequence[int]]) -> Condition:
        """Read chunks of token ids, one sample of the condition for each."""
        # The prompt's last token stays: its successor is the note's first.
        return self._read([[*self._prompt, *chunk] for chunk in chunks], len(self._prompt) - 1)

    def following(self, notes: Sequence[str]) -> torch.Tensor:
        """Return the token after each token of the condition of notes of one chunk `[b, L]`."""
        chunks = [self.chunks(note)[0] for note in notes]
        longest = max(map(len, chunks))
        rows = [[*chunk, *[self.base.end] * (longest + 1 - len(chunk))] for chunk in chunks]
        return torch.tensor(rows, device=self.base.device)

    def dialogues(self, questions: Sequence[str], answers: Sequence[str]) -> Condition:
        """Read questions and their answers as the base sees them when it answers, one sample of the condition each.

        The first token is left out: its activations are many times those of the others.
        """
        pairs = zip(questions, answers, strict=True)
        return self._read([self._ids(self.question(question) + answer) for question, answer in pairs], 1)

    def _read(self, rows: Sequence[Sequence[int]], skip: int) -> Condition:
        """Read rows of token ids; the first `skip` of each are left out of the condition."""
        longest = max(map(len, rows))
        empty = [[0] * (longest - len(row)) for row in rows]
        device = self.base.device
        ids = torch.tensor([[*row, *blank] for row, blank in zip(rows, empty, strict=True)], device=device)
        mask = torch.tensor([[1] * len(row) + blank for row, blank in zip(rows, empty, strict=True)], device=device)
        following = torch.tensor(
            [[*row[1:], self.base.end, *blank] for row, blank in zip(rows, empty, strict=True)], device=device
        )
        return self._encoder(ids, mask, following, skip=skip, scope=self._scope())

    def question(self, question: str) -> str:
        """Return the prompt of a question; OpenwuError for one that is empty."""
        if problem := _problem(question):
            raise OpenwuError(f"question: expected {problem}")
        return self.format.question_prompt.format(question=question.strip())

    def _ids(self, text: str) -> list[int]:
        return list(self.base.tokenizer(text, add_special_tokens=False)["input_ids"])


def _problem(text: object) -> str:
    """Say what was expected instead of this text; empty where it is one."""
    if not isinstance(text, str):
        return f"text, got {type(text).__name__}"
    if not text.strip():
        return "text, got an empty one"
    if "\0" in text or "\ufffd" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        return "text, got bytes of another kind: save it as UTF-8"
    return ""
