"""What the service asks of an engine, and the plain data that travels to its workers and back.

An engine owns the processes that hold an Editor. The service chooses the order and the batches; an engine runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from openwu.serving.errors import Failure

Report = Callable[[str, int, int], None]
"""Called with (task id, parts done, parts in all)."""

CACHE_BYTES = 32 * 2**20
"""Default size of the adapter cache that each API key has in each worker; the 16 keys that were seen last have one."""

Metadata = Literal["keep", "no_location", "strip"]
"""What of a photograph's metadata the answer keeps."""


@dataclass(frozen=True)
class ModelSource:
    """Which model the workers load; fields as the arguments of `Editor.from_pretrained`."""

    model: str | None = None
    base: str | None = None
    generator: str | None = None
    device: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    quantise: str | None = None
    offload: bool = False
    steps: int | None = None
    guidance: float | None = None
    pixels: int | None = None


@dataclass(frozen=True)
class ModelInfo:
    """What the service has to know of the loaded model."""

    name: str
    edits: tuple[Mapping[str, object], ...] = ()
    """The edits that the base knows: name, example sentences by language, whether a reference picture is needed."""
    max_pictures: int | None = None
    refuses_out_of_scope: bool = False
    reads_examples: bool = False
    """Whether an edit may be shown by a pair of pictures."""
    default_seed: int = 0
    seconds_per_unit: float = 1.0
    """Measured on a warm edit; see `schema.cost_of`."""
    max_batch: int = 1
    """Requests that gain from sharing a pass; 1 on a CPU, where a batch saves nothing."""


@dataclass(frozen=True)
class Task:
    """One picture to make, or one adapter to generate or convert."""

    id: str
    tenant: str
    kind: Literal["edit", "adapt", "export"] = "edit"
    images: tuple[bytes, ...] = ()
    """Files as they came: the picture to edit, then references; none for the adapter of a whole series."""
    instruction: str = ""
    then: tuple[str, ...] = ()
    examples: tuple[tuple[bytes, bytes], ...] = ()
    """Pairs of files before and after an edit that is shown."""
    strength: float = 1.0
    seed: int = 0
    allow_out_of_scope: bool = False
    adapter: tuple[str, bytes] | None = None
    """A generated adapter to use again: the id that it was encoded under, and its bytes."""
    mask: bytes | None = None
    size: tuple[int, int] | None = None
    """Width and height of the answer; None: as the picture came."""
    output_format: str = "png"
    compression: int | None = None
    opaque: bool = False
    metadata: Metadata = "no_location"
    export_format: str = "openwu"
    cost: float = 1.0
    """Units of work, known before running: see `schema.cost_of`."""
    batch_key: Hashable = None
    """Tasks with equal keys may share a pass of the base; None: never. It names no adapter."""


@dataclass(frozen=True)
class Outcome:
    """What a worker made of a task."""

    data: bytes = field(repr=False)
    """The picture's file, the adapter as encoded under the task's id, or an archive of the exported adapter."""
    size: tuple[int, int] = (0, 0)
    adapter: bytes = field(default=b"", repr=False)
    edit: str | None = None
    """Names of the edits that the instruction was taken for, by a base that tells edits apart."""
    words: str | None = None
    """What the adapter was generated for."""
    example: Mapping[str, float | bool] | None = None
    """Of an edit that was shown: `reproduced`, the share of the example's own change that the adapter makes, and
    whether it is only `partly` understood."""
    timings: Mapping[str, float] = field(default_factory=dict)
    cache: str = "miss"
    notes: tuple[str, ...] = ()
    batch: int = 1
    """Requests that shared the pass."""


@dataclass(frozen=True)
class Health:
    """How an engine is."""

    ready: bool
    reason: str = ""
    workers: int = 0
    restarts: int = 0


class Engine(Protocol):
    """Runs tasks somewhere."""

    @property
    def info(self) -> ModelInfo:
        """What is loaded; known once `start` has returned."""
        ...

    @property
    def capacity(self) -> int:
        """Batches that can run at once."""
        ...

    async def start(self) -> None:
        """Start the workers and wait until each has made a warm edit. Raises OpenwuError where a model cannot load."""
        ...

    async def submit(self, tasks: Sequence[Task], report: Report) -> list[Outcome | Failure]:
        """Run tasks of one batch key together. Raises WorkerLostError when their worker dies."""
        ...

    def cancel(self, task: str) -> None:
        """Stop a task at its next tile or step; its neighbours in a batch go on, and their results do not change."""
        ...

    def health(self) -> Health: ...

    async def stop(self) -> None:
        """End the workers; nothing runs any more."""
        ...
