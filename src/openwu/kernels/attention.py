"""Scaled dot product attention on the fastest backend: a fixed one for training on a CPU, a measured one on a GPU.

All backends compute the same function to rounding. Three cases:

- training on a CPU, at the embedded model's sizes: plain matrix products, whose backward pass is about twice as fast as
  the fused kernel's (docs/log.md);
- inference on a GPU: measured at first use, per shape bucket, among the backends that accept the inputs;
- everywhere else: torch's own choice.

torch keeps the allowed backends in flags of the whole process. Whatever sets or depends on them here holds `_FLAGS`, so
threads of ours never see one another's flags; attention that other libraries run in another thread at that very moment
does, since torch has no thread-local flags.

Shapes: s sequences, m heads, q queries, k keys, e head width.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from openwu.kernels.autotune import CACHED_SHAPES, bucket, seconds_of

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q `[s, m, q, e]`, k and v `[s, m, k, e]` -> `[s, m, q, e]`"""

_FLAGS = threading.RLock()
"""Held while torch's flags of allowed backends are changed, and while something runs under changed ones."""


class _BackendScope:
    """Process-wide scope of one backend: the first thread in it sets torch's flags, the last out restores them."""

    def __init__(self, backend: SDPBackend) -> None:
        self.backend = backend
        self._threads = 0
        self._flags: AbstractContextManager[object] = nullcontext()

    def __enter__(self) -> None:
        with _FLAGS:
            if not self._threads:
                self._flags = sdpa_kernel(self.backend)
                self._flags.__enter__()
            self._threads += 1

    def __exit__(self, *_: object) -> None:
        with _FLAGS:
            self._threads -= 1
            if not self._threads:
                self._flags.__exit__(None, None, None)


_TRAINING_ON_CPU = _BackendScope(SDPBackend.MATH)


@contextmanager
def training_attention(device: torch.device) -> Iterator[None]:
    """Run attention in this scope on the backend that trains fastest on the device; threads may share the scope."""
    with _TRAINING_ON_CPU if device.type == "cpu" else nullcontext():
        yield


def _on(backend: SDPBackend) -> Attend:
    def attend(q_smqe: Tensor, k_smke: Tensor, v_smke: Tensor) -> Tensor:
        # The backend is chosen before this returns, even where it runs later.
        with _FLAGS, sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q_smqe, k_smke, v_smke)

    return attend


CUDA_BACKENDS: Mapping[str, Attend] = {
    "cudnn": _on(SDPBackend.CUDNN_ATTENTION),
    "flash": _on(SDPBackend.FLASH_ATTENTION),
    "efficient": _on(SDPBackend.EFFICIENT_ATTENTION),
}


class MeasuredAttention:
    """Attention without a mask on the fastest of several backends, timed once per shape bucket.

    Numbers of sequences, queries and keys are rounded up to powers of two, so that prompts of many lengths share a
    measurement. Thread-safe: threads wait while one of them measures.
    """

    def __init__(
        self,
        backends: Mapping[str, Attend] = CUDA_BACKENDS,
        timer: Callable[[Callable[[], object], torch.device], float] = seconds_of,
        cached_shapes: int = CACHED_SHAPES,
    ) -> None:
        self.backends = backends
        self.timer = timer
        self.cached_shapes = cached_shapes
        self.chosen: OrderedDict[tuple[object, ...], str | None] = OrderedDict()
        """Shape bucket, dtype and device -> name of the fastest backend; None where none accepts the inputs."""
        self._lock = threading.Lock()

    def __call__(self, q_smqe: Tensor, k_smke: Tensor, v_smke: Tensor) -> Tensor:
        name = self._choice(q_smqe, k_smke, v_smke)
        if name is None:
            return _default_attention(q_smqe, k_smke, v_smke)
        try:
            return self.backends[name](q_smqe, k_smke, v_smke)
        except RuntimeError:
            # It accepted another shape of this bucket. Where memory was lacking, the next call raises too.
            return _default_attention(q_smqe, k_smke, v_smke)

    def _choice(self, q_smqe: Tensor, k_smke: Tensor, v_smke: Tensor) -> str | None:
        s, m, q, e = q_smqe.shape
        key = (bucket(s), m, bucket(q), bucket(k_smke.shape[2]), e, q_smqe.dtype, q_smqe.device)
        with self._lock:
            if key not in self.chosen:
                self.chosen[key] = self._fastest(q_smqe, k_smke, v_smke)
                while len(self.chosen) > self.cached_shapes:
                    self.chosen.popitem(last=False)
            else:
                self.chosen.move_to_end(key)
            return self.chosen[key]

    def _fastest(self, q_smqe: Tensor, k_smke: Tensor, v_smke: Tensor) -> str | None:
        seconds: dict[str, float] = {}
        for name, attend in self.backends.items():
            # A backend that does not accept these shapes or this device raises RuntimeError.
            try:
                seconds[name] = self.timer(partial(attend, q_smqe, k_smke, v_smke), q_smqe.device)
            except RuntimeError:
                continue
        return min(seconds, key=lambda name: seconds[name]) if seconds else None


def _default_attention(q_smqe: Tensor, k_smke: Tensor, v_smke: Tensor, mask: Tensor | None = None) -> Tensor:
    # On a CPU only `training_attention` changes flags, and a lock would keep threads from computing.
    with _FLAGS if q_smqe.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(q_smqe, k_smke, v_smke, attn_mask=mask)


_ON_CUDA = MeasuredAttention()


def inference_attention(q_smqe: Tensor, k_smke: Tensor, v_smke: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute attention without gradients; `mask` broadcasts to `[s, m, q, k]`, False where a key is masked."""
    if mask is None and q_smqe.is_cuda:
        return _ON_CUDA(q_smqe, k_smke, v_smke)
    return _default_attention(q_smqe, k_smke, v_smke, mask)
