"""Which kernel scaled dot product attention runs on: queries, keys and values go in, a choice or the result comes out.

All choices compute the same function to rounding. Three cases:

- training on a CPU, at the embedded model's sizes: plain matrix products, whose backward pass is about twice as fast as
  the fused kernel's (docs/log.md);
- inference on a GPU: measured at first use, by shape, among the kernels that accept the inputs;
- everywhere else: torch's own choice.

Shapes: s sequences, m heads, q queries, k keys, e head width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q `[s, m, q, e]`, k and v `[s, m, k, e]` -> `[s, m, q, e]`"""

ON_CPU_IN_TRAINING = SDPBackend.MATH


@contextmanager
def training_attention(device: torch.device) -> Iterator[None]:
    """A scope whose attention runs on what trains fastest on this device."""
    if device.type == "cpu":
        with sdpa_kernel(ON_CPU_IN_TRAINING):
            yield
    else:
        yield


def _on(backend: SDPBackend) -> Attend:
    def attend(q_smqe: Tensor, k_smke: Tensor, v_smke: Tensor) -> Tensor:
        with sdpa_kernel(backend):
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


class MeasuredAttention:
    """Attention without a mask that times its kernels once per shape and then keeps to the fastest."""

    def __init__(
        self,
        backends: Mapping[str, Attend] = CUDA_BACKENDS,
        timer: Callable[[Callable[[], object], torch.device], float] = seconds_of,
    ) -> None:
        self.backends = backends
        self.timer = timer
        self.chosen: dict[tuple[object, ...], str | None] = {}
        """Name of the fastest kernel by shape, dtype and device; None where none of them takes the inputs."""

    def __call__(self, q_smqe: Tensor, k_smke: Tensor, v_smke: Tensor) -> Tensor:
        key = (*q_smqe.shape, k_smke.shape[2], q_smqe.dtype, q_smqe.device)
        if key not in self.chosen:
            self.chosen[key] = self._fastest(q_smqe, k_smke, v_smke)
        name = self.chosen[key]
        attend = F.scaled_dot_product_attention if name is None else self.backends[name]
        return attend(q_smqe, k_smke, v_smke)

    def _fastest(self, q_smqe: Tensor, k_smke: Tensor, v_smke: Tensor) -> str | None:
        seconds: dict[str, float] = {}
        for name, attend in self.backends.items():
            # A kernel that does not take these shapes or this device says so with a RuntimeError.
            try:
                seconds[name] = self.timer(partial(attend, q_smqe, k_smke, v_smke), q_smqe.device)
            except RuntimeError:
                continue
        return min(seconds, key=lambda name: seconds[name]) if seconds else None


_ON_CUDA = MeasuredAttention()


def inference_attention(q_smqe: Tensor, k_smke: Tensor, v_smke: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of an inference; `mask` broadcasts to `[s, m, q, k]`, False where a key must not be seen."""
    if mask is None and q_smqe.is_cuda:
        return _ON_CUDA(q_smqe, k_smke, v_smke)
    return F.scaled_dot_product_attention(q_smqe, k_smke, v_smke, attn_mask=mask)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
