"""Which kernel scaled dot product attention runs on: queries, keys and values go in, a choice or the result comes out.

All choices compute the same function to rounding. Three cases:

- training on a CPU, at the embedded model's sizes: plain matrix products, whose backward pass is about twice as fast as
  the fused kernel's (docs/log.md);
- inference on a GPU: measured at first use, by about the shape, among the kernels that accept the inputs;
- everywhere else: torch's own choice.

torch keeps what kernels are allowed in flags of the whole process. Whatever sets or depends on them here holds `_FLAGS`
meanwhile, so threads of ours never see one another's; attention that other libraries run in another thread at that very
moment does, since torch has no flags of a thread.

Shapes: s sequences, m heads, q queries, k keys, e head width.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q `[s, m, q, e]`, k and v `[s, m, k, e]` -> `[s, m, q, e]`"""

ON_CPU_IN_TRAINING = SDPBackend.MATH

_FLAGS = threading.RLock()
"""Held while torch's flags of allowed kernels are changed, and while something runs under changed ones."""


class _SharedScope:
    """A scope of the whole process: the first thread to enter sets torch's flags, the last to leave puts them back."""

    def __init__(self, backend: SDPBackend) -> None:
        self.backend = backend
        self._inside = 0
        self._flags: AbstractContextManager[object] = nullcontext()

    def __enter__(self) -> None:
        with _FLAGS:
            if not self._inside:
                self._flags = sdpa_kernel(self.backend)
                self._flags.__enter__()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with _FLAGS:
            self._inside -= 1
            if not self._inside:
                self._flags.__exit__(None, None, None)


_IN_TRAINING = _SharedScope(ON_CPU_IN_TRAINING)


@contextmanager
def training_attention(device: torch.device) -> Iterator[None]:
    """A scope whose attention runs on what trains fastest on this device; several threads may be in it at once."""
    with _IN_TRAINING if device.type == "cpu" else nullcontext():
        yield


def _on(backend: SDPBackend) -> Attend:
    def attend(q_smqe: Tensor, k_smke: Tensor, v_smke: Tensor) -> Tensor:
        # A kernel is chosen before this returns, even where it runs later.
        with _FLAGS, sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q_smqe, k_smke, v_smke)

    return attend


CUDA_BACKENDS: Mapping[str, Attend] = {
    "cudnn": _on(SDPBackend.CUDNN_ATTENTION),
    "flash": _on(SDPBackend.FLASH_ATTENTION),
    "efficient": _on(SDPBackend.EFFICIENT_ATTENTION),
}


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """The shortest of three times, after one run that is not counted."""
    found = []
    for _ in range(4):
        _wait(device)
        began = time.perf_counter()
        run()
        _wait(device)
        found.append(time.perf_counter() - began)
    return min(found[1:])


REMEMBERED = 256
"""Shapes whose choice is kept; what was not used for longest is measured again."""


class MeasuredAttention:
    """Attention without a mask that times its kernels once for about a shape and then keeps to the fastest.

    Numbers of sequences, queries and keys count up to the next power of two, so that prompts of many lengths do not
    measure at each of them. Threads may share one: they wait while one of them measures.
    """

    def __init__(
        self,
        backends: Mapping[str, Attend] = CUDA_BACKENDS,
        timer: Callable[[Callable[[], object], torch.device], float] = seconds_of,
        remembered: int = REMEMBERED,
    ) -> None:
        self.backends = backends
        self.timer = timer
        self.remembered = remembered
        self.chosen: OrderedDict[tuple[object, ...], str | None] = OrderedDict()
        """Name of the fastest kernel by shape, dtype and device; None where none of them takes the inputs."""
        self._lock = threading.Lock()

    def __call__(self, q_smqe: Tensor, k_smke: Tensor, v_smke: Tensor) -> Tensor:
        name = self._choice(q_smqe, k_smke, v_smke)
        if name is None:
            return _torchs_choice(q_smqe, k_smke, v_smke)
        try:
            return self.backends[name](q_smqe, k_smke, v_smke)
        except RuntimeError:
            # It took another shape of those that count as this one. If it was for want of memory, so is the next.
            return _torchs_choice(q_smqe, k_smke, v_smke)

    def _choice(self, q_smqe: Tensor, k_smke: Tensor, v_smke: Tensor) -> str | None:
        s, m, q, e = q_smqe.shape
        key = (bucket(s), m, bucket(q), bucket(k_smke.shape[2]), e, q_smqe.dtype, q_smqe.device)
        with self._lock:
            if key not in self.chosen:
                self.chosen[key] = self._fastest(q_smqe, k_smke, v_smke)
                while len(self.chosen) > self.remembered:
                    self.chosen.popitem(last=False)
            else:
                self.chosen.move_to_end(key)
            return self.chosen[key]

    def _fastest(self, q_smqe: Tensor, k_smke: Tensor, v_smke: Tensor) -> str | None:
        seconds: dict[str, float] = {}
        for name, attend in self.backends.items():
            # A kernel that does not take these shapes or this device says so with a RuntimeError.
            try:
                seconds[name] = self.timer(partial(attend, q_smqe, k_smke, v_smke), q_smqe.device)
            except RuntimeError:
                continue
        return min(seconds, key=lambda name: seconds[name]) if seconds else None


def bucket(count: int) -> int:
    """The next power of two."""
    return 1 << max(0, count - 1).bit_length()


def _torchs_choice(q_smqe: Tensor, k_smke: Tensor, v_smke: Tensor, mask: Tensor | None = None) -> Tensor:
    # On a CPU nothing but a training's scope changes flags, and waiting would keep threads from computing.
    with _FLAGS if q_smqe.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(q_smqe, k_smke, v_smke, attn_mask=mask)


_ON_CUDA = MeasuredAttention()


def inference_attention(q_smqe: Tensor, k_smke: Tensor, v_smke: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of an inference; `mask` broadcasts to `[s, m, q, k]`, False where a key must not be seen."""
    if mask is None and q_smqe.is_cuda:
        return _ON_CUDA(q_smqe, k_smke, v_smke)
    return _torchs_choice(q_smqe, k_smke, v_smke, mask)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
