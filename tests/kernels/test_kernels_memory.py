"""Memory plans: bytes of tensors, free bytes, and what is reported, estimated and refused."""

from __future__ import annotations

import pytest
import torch

from openwu.errors import OpenwuError
from openwu.kernels.memory import MemoryPlan, free_memory, gigabytes, tensor_bytes

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GB = 10**9


def test_bytes_of_tensors_follow_the_header_and_only_floats_are_converted() -> None:
    assert tensor_bytes("F32", (3, 5)) == 60
    assert tensor_bytes("F32", (3, 5), torch.bfloat16) == tensor_bytes("BF16", (3, 5)) == 30
    assert tensor_bytes("I64", (4,), torch.bfloat16) == 32
    assert tensor_bytes("F8_E4M3", (4,)) == 4
    assert tensor_bytes("F32", ()) == 4


def test_free_memory_is_a_plausible_number_or_unknown() -> None:
    free = free_memory(CPU)
    assert free is None or 10**6 < free < 10**14
    assert free_memory(torch.device("meta")) is None


def test_a_plan_is_its_largest_phase_and_the_estimate_is_on_top_of_the_last() -> None:
    plan = MemoryPlan(
        {"encoding": {"encoders": 3 * GB}, "training": {"denoiser": GB, "generator": GB}}, {"pass": 2 * GB}
    )
    assert (plan.certain, plan.total) == (3 * GB, 4 * GB)
    assert MemoryPlan({"training": {"denoiser": GB}}).total == GB
    text = plan.report(CUDA, 80 * GB)
    assert text.startswith("memory on cuda: about 4.00 GB of 80.0 GB free\n")
    assert "  training: 2.00 GB (denoiser 1.00 GB, generator 1.00 GB)\n" in text
    assert "unknown" in plan.report(CUDA, None)


def test_what_cannot_fit_is_refused_and_what_may_not_is_told() -> None:
    plan = MemoryPlan({"encoding": {"encoders": 3 * GB}, "training": {"denoiser": GB}}, {"pass": 3 * GB})
    assert plan.check(CUDA, None, "")
    assert plan.check(CUDA, 4 * GB, "")
    assert not plan.check(CUDA, 3 * GB, "")
    with pytest.raises(
        OpenwuError, match=r"^base: expected 3.00 GB free on cuda \(encoders 3.00 GB\), got 2.50 GB; buy"
    ):
        plan.check(CUDA, 25 * 10**8, "buy more", "base")
    assert gigabytes(12 * GB) == "12.0 GB"
