"""Which kernel attention runs on: the choice by time, kernels that refuse, and the scope of training."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from openwu.kernels.attention import MeasuredAttention, _on, inference_attention, training_attention
from openwu.kernels.autotune import seconds_of

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


def flags() -> list[bool]:
    cuda = torch.backends.cuda
    return [cuda.flash_sdp_enabled(), cuda.math_sdp_enabled(), cuda.mem_efficient_sdp_enabled()]


def together(*runs: Callable[[], object]) -> None:
    """All at once, each in a thread; what one raises is raised here."""
    with ThreadPoolExecutor(len(runs)) as threads:
        for started in [threads.submit(run) for run in runs]:
            started.result()


def by_name(seconds: dict[Callable[..., Tensor], float]) -> Callable[[Callable[[], object], torch.device], float]:
    """A timer that runs the kernel, as a real one does, and reads the time off a table."""

    def timer(run: Callable[[], object], device: torch.device) -> float:
        run()
        return seconds[run.func]  # type: ignore[attr-defined]

    return timer


def test_the_fastest_kernel_that_accepts_is_measured_once_for_about_a_shape() -> None:
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
    for alike in (inputs(queries=4), inputs(keys=6), inputs(queries=4, keys=8)):
        torch.testing.assert_close(attention(*alike), plain(*alike))
    assert calls.count("slow") == 1
    for other in (inputs(queries=5), inputs(keys=9), inputs(keys=4), inputs(dtype=torch.float32)):
        torch.testing.assert_close(attention(*other), plain(*other))
    assert calls.count("slow") == 5
    assert set(attention.chosen.values()) == {"fast"}


def test_a_choice_that_refuses_a_shape_that_counts_as_measured_is_left_to_torch() -> None:
    def choosy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return refuses(q, k, v) if k.shape[2] == 7 else plain(q, k, v)

    attention = MeasuredAttention({"choosy": choosy})
    attention(*inputs(keys=5))
    torch.testing.assert_close(attention(*inputs(keys=7)), plain(*inputs(keys=7)))
    assert list(attention.chosen.values()) == ["choosy"]


def test_no_more_than_so_many_choices_are_remembered() -> None:
    measured: list[int] = []

    def counting(run: Callable[[], object], device: torch.device) -> float:
        measured.append(1)
        return seconds_of(run, device)

    attention = MeasuredAttention({"plain": plain}, counting, cached_shapes=2)
    for keys in (1, 2, 4, 2, 8, 2):
        attention(*inputs(keys=keys))
    assert len(measured) == 4  # 2 was used again and again, and stayed
    assert len(attention.chosen) == 2
    attention(*inputs(keys=1))
    assert len(measured) == 5


def test_threads_measure_one_after_another() -> None:
    """Times that are taken side by side say nothing; and each shape is measured once."""
    running, most = [], []

    def slow(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain(q, k, v)

    def timer(run: Callable[[], object], device: torch.device) -> float:
        running.append(1)
        time.sleep(0.02)
        most.append(len(running))
        running.pop()
        return 1.0

    attention = MeasuredAttention({"slow": slow}, timer)
    together(*[lambda: attention(*inputs())] * 3, lambda: attention(*inputs(keys=20)))
    assert most == [1, 1]


def test_threads_that_use_different_kernels_get_them_and_leave_the_flags_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The inputs ask for gradients: the name of the kernel that ran is in the result's grad_fn."""
    plainly = F.scaled_dot_product_attention

    def hesitating(*inputs: Any, **options: Any) -> Tensor:
        time.sleep(0.002)  # the flags are set, and another thread takes over
        return plainly(*inputs, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", hesitating)
    before = flags()
    q, k, v = (each.requires_grad_() for each in inputs(dtype=torch.float32))

    def fused(backend: SDPBackend) -> set[bool]:
        return {"FlashAttention" in str(_on(backend)(q, k, v).grad_fn) for _ in range(10)}

    kinds = (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION)
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(fused, kinds)) == [{False}, {True}]
    assert flags() == before


def test_the_scope_of_training_ends_when_the_last_thread_leaves_it() -> None:
    before = flags()
    entered, may_leave = threading.Event(), threading.Event()

    def first() -> None:
        with training_attention(CPU):
            entered.set()
            assert may_leave.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    assert entered.wait(10)
    with training_attention(CPU):
        inside = flags()
        may_leave.set()
        thread.join()
        assert flags() == inside != before  # the first has left, this one is still inside
    assert flags() == before


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
