"""Our own editor as a system: the embedded model, or a large base with its generator."""

from __future__ import annotations

import copy
import zlib

from PIL import Image
from torch import Tensor

from openwu.editor.editor import Editor
from openwu.errors import InstructionError
from openwu.evaluation.cases import Case
from openwu.evaluation.systems import RefusedError, System
from openwu.files.fingerprint import code_digest
from openwu.generator.inference.fast import FastGenerator
from openwu.types import Adapter, Condition, SamplingOptions


class EditorSystem(System):
    """Edits every case with an adapter of its own."""

    def __init__(self, editor: Editor, *, name: str = "openwu", strength: float = 1.0, adapter: bool = True) -> None:
        """`adapter`: False leaves the frozen base alone, which reads the instruction too, as the baseline."""
        self.editor, self.name = editor if adapter else base_alone(editor), name
        self.strength, self.adapter = strength, adapter

    def identity(self) -> dict[str, object]:
        return {
            "kind": "openwu",
            "base": str(self.editor.backbone.identity),
            "generator": self._generator_digest(),
            "code": code_digest("openwu.editor.editor", type(self.editor.backbone).__module__),
            "strength": self.strength,
            "adapter": self.adapter,
            "sampling": repr(SamplingOptions() if self.editor.sampling is None else self.editor.sampling),
        }

    def _generator_digest(self) -> str:
        from openwu.files.weights import sampled_digest

        return sampled_digest({"generator": self.editor.generator})

    def edit(self, case: Case) -> Image.Image:
        """Edit one case; noise is drawn with the case's key as seed, so that it is that of `Case.noise`."""
        images = [case.image(i) for i in range(len(case.pictures))]
        seed = zlib.crc32(case.key.encode())
        try:
            return self.editor.edit(images, case.instruction, strength=self.strength, seed=seed).image
        except InstructionError as error:
            raise RefusedError(str(error)) from error


class _Silent(FastGenerator):
    """Writes adapters that change nothing."""

    def __call__(self, condition: Condition | Tensor) -> Adapter:
        return super().__call__(condition).scaled(0.0)


def base_alone(editor: Editor) -> Editor:
    """Return the same editor with adapters that change nothing: the base does what it does of an instruction.

    That is not strength 0, at which a base that tells shares of an edit apart leaves the picture as it is.
    """
    alone = copy.copy(editor)
    alone.fast, alone.cache = _Silent(editor.generator), None
    return alone
