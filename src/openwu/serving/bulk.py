"""Spread work over a Ray cluster with Ray Data: very many inputs, one result for each, whatever dies meanwhile."""

from __future__ import annotations

import io
import pickle
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, Generic, TextIO, TypeVar

from openwu.extras import library
from openwu.serving.engines.cluster import ClusterOptions, join_cluster

In = TypeVar("In")
Out = TypeVar("Out")

BLOCKS, LARGEST_BLOCK = 1000, 16
"""Inputs travel in about so many blocks of at most so many; results come, and are lost, block by block."""
RETRIES = 2
"""How often a block whose worker died is run again."""


@contextmanager
def cluster(options: ClusterOptions) -> Iterator[Cluster]:
    """Join a Ray cluster for the time of a block; what still runs at its end is stopped.

    Raises OpenwuError without Ray, and where no cluster answers.
    """
    ray = library("ray", "ray")
    library("ray.data", "ray")
    join_cluster(options.address)
    try:
        with redirect_stdout(OwnOutput()):
            yield Cluster(options)
    finally:
        ray.shutdown()


class OwnOutput(io.TextIOBase):
    """Standard output for the thread that makes this; what others print, as Ray does, goes to standard error."""

    def __init__(self) -> None:
        self._thread, self._own, self._others = threading.get_ident(), sys.stdout, sys.stderr

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of standard output."""
        return self._own.encoding if self._own is not None else "utf-8"

    def write(self, text: str) -> int:
        """Write text to whichever of both; to neither where that is closed."""
        stream = self._stream
        return len(text) if stream is None else stream.write(text)

    def flush(self) -> None:
        """Flush whichever of both."""
        if (stream := self._stream) is not None:
            stream.flush()

    @property
    def _stream(self) -> TextIO | None:
        return self._own if threading.get_ident() == self._thread else self._others


class Cluster:
    """Workers on a Ray cluster."""

    def __init__(self, options: ClusterOptions) -> None:
        self._options = options

    def spread(
        self, inputs: Sequence[In], worker: Callable[[], Callable[[In], Out]]
    ) -> Iterator[tuple[int, Out | None]]:
        """Yield (index, result) of every input exactly once, in the order in which they are done.

        `worker` is called once in every worker process and returns what is called with the inputs; it, the inputs and
        the results are pickled, and its calls raise nothing. None: the worker died every time, also when the input
        was alone with it.
        """
        lost = set(range(len(inputs)))
        for size in (min(LARGEST_BLOCK, max(1, len(inputs) // BLOCKS)), 1):
            if not lost:
                return
            for index, result in self._run({index: inputs[index] for index in sorted(lost)}, worker, size):
                if index in lost:
                    lost.remove(index)
                    yield index, result
        for index in sorted(lost):
            yield index, None

    def _run(
        self, inputs: dict[int, In], worker: Callable[[], Callable[[In], Out]], size: int
    ) -> Iterator[tuple[int, Out]]:
        """Run inputs in blocks of `size`; a block whose worker dies again and again is left out."""
        from ray import data

        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        context.max_errored_blocks = -1
        options = self._options
        rows = [{"index": index, "value": pickle.dumps(value)} for index, value in inputs.items()]
        least, most = options.replicas, options.max_replicas or options.replicas
        done = data.from_items(rows, override_num_blocks=-(-len(rows) // size)).map(
            Spread,
            fn_constructor_args=(worker, options.threads),
            compute=data.ActorPoolStrategy(min_size=least, max_size=most),
            num_cpus=options.threads,
            num_gpus=options.gpus or None,
            max_restarts=-1,
            max_task_retries=RETRIES,
        )
        for row in done.iter_rows():
            yield int(row["index"]), pickle.loads(row["value"])


class Spread(Generic[In, Out]):
    """What Ray Data keeps in each worker process."""

    def __init__(self, worker: Callable[[], Callable[[In], Out]], threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._call = worker()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Turn an input's row into its result's."""
        return {"index": row["index"], "value": pickle.dumps(self._call(pickle.loads(row["value"])))}
