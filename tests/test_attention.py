"""Which kernel attention runs on: the choice by time, kernels that refuse, and the scope of training."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from openwu.attention import MeasuredAttention, inference_attention, seconds_of, training_attention

CPU = torch.device("cpu")


def inputs(queries: int = 3, keys: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q = torch.randn(2, 4, queries, 8, dtype=dtype)
    k, v = torch.randn(2, 2, 4, keys, 8, dtype=dtype).unbind()
    return q, k, v


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


def refuses(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise RuntimeError("No available kernel.")


def by_name(seconds: dict[Callable[..., Tensor], float]) -> Callable[[Callable[[], object], torch.device], float]:
    """A timer that runs the kernel, as a real one does, and reads the time off a table."""

    def timer(run: Callable[[], object], device: torch.device) -> float:
        run()
        return seconds[run.func]  # type: ignore[attr-defined]

    return timer


def test_the_fastest_kernel_that_accepts_is_measured_once_per_shape() -> None:
    calls: list[str] = []

    def slow(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append("slow")
        return plain(q, k, v)

    def fast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append("fast")
        return plain(q, k, v)

    attention = MeasuredAttention({"refuses": refuses, "slow": slow, "fast": fast}, by_name({slow: 2.0, fast: 1.0}))
    q, k, v = inputs()
    torch.testing.assert_close(attention(q, k, v), plain(q, k, v))
    assert calls == ["slow", "fast", "fast"]
    attention(q, k, v)
    assert calls == ["slow", "fast", "fast", "fast"]
    attention(*inputs(queries=4))
    attention(*inputs(keys=6))
    attention(*inputs(dtype=torch.float32))
    assert calls.count("slow") == 4
    assert set(attention.chosen.values()) == {"fast"}


def test_without_a_kernel_that_accepts_torch_chooses() -> None:
    attention = MeasuredAttention({"refuses": refuses})
    q, k, v = inputs()
    torch.testing.assert_close(attention(q, k, v), plain(q, k, v))
    assert list(attention.chosen.values()) == [None]


def test_other_errors_are_not_swallowed() -> None:
    def broken(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise TypeError("wrong call")

    with pytest.raises(TypeError, match="wrong call"):
        MeasuredAttention({"broken": broken})(*inputs())


def test_the_shortest_of_three_after_a_warm_up_counts() -> None:
    calls: list[int] = []
    assert seconds_of(lambda: calls.append(1), CPU) >= 0
    assert len(calls) == 4


def test_inference_attention_takes_masks() -> None:
    q, k, v = inputs()
    torch.testing.assert_close(inference_attention(q, k, v), plain(q, k, v))
    mask = torch.tensor([[True, True, False, True, False], [True, False, False, False, False]])
    came = inference_attention(q, k, v, mask[:, None, None, :])
    torch.testing.assert_close(came[0], plain(q[:1], k[:1, :, mask[0]], v[:1, :, mask[0]])[0])
    torch.testing.assert_close(came[1], plain(q[1:], k[1:, :, mask[1]], v[1:, :, mask[1]])[0])


def test_training_runs_on_products_on_a_cpu_only_within_the_scope() -> None:
    q, k, v = (each.requires_grad_() for each in inputs(dtype=torch.float32))

    def kernel() -> str:
        return str(F.scaled_dot_product_attention(q, k, v).grad_fn)

    assert "FlashAttention" in kernel()
    with training_attention(CPU):
        assert "FlashAttention" not in kernel()
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v), plain(q, k, v))
    assert "FlashAttention" in kernel()
