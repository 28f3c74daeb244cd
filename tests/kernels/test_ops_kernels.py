"""The Triton kernels without a GPU: what they compute, by the interpreter, and that they compile for two generations.

How fast they are is not tested here or anywhere without a device; `openwu bench G1 G2` measures it on one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

BF16, F32, I32 = "*bf16", "*fp32", "i32"
NUMBERS = {
    "rotate": "x_row x_head out_row out_head heads width inner period",
    "norm": "second third first_stride second_stride third_stride width",
    "norm_backward": "rows width",
    "add_sorted": "groups in_dim out_dim rank y_row x_row outputs",
}
ODD = {"heads", "inner", "period", "second", "third", "rows", "groups"}
"""Whole numbers that need not be multiples of 16; the others are, at the released size."""
ONES = {
    "rotate": ("heads", "inner", "period"),
    "norm": ("second", "third"),
    "norm_backward": ("rows",),
    "add_sorted": ("groups", "rank"),
}


def test_kernels_compute_what_their_references_do() -> None:
    """In a process of its own, since the interpreter is chosen when a kernel is made."""
    folder = Path(__file__).parent / "interpreted"
    command = [sys.executable, "-m", "pytest", "--noconftest", "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(folder / "kernels_interpreted.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout)
    assert "skipped" not in done.stdout


def kernel_of(name: str, floats: str) -> tuple[Any, dict[str, str], dict[str, object], int]:
    """A kernel at the released size: itself, types of its arguments, constants, warps."""
    from openwu.kernels import low_rank_triton as lora
    from openwu.kernels import norm_triton as norm
    from openwu.kernels import rotary_triton as rotary

    types = dict.fromkeys(NUMBERS[name].split(), I32)
    constants: dict[str, object]
    if name == "rotate":
        kernel, constants, warps = rotary._rotate_kernel, {"inverse": False, "block_heads": 32, "block_width": 128}, 4
        types |= {"x": floats, "out": floats, "rotations": F32}
    elif name == "norm":
        kernel, constants, warps = norm._forward, {"adds": True, "keeps": True, "block": 4096}, norm._warps(4096)
        types |= dict.fromkeys(("x", "update", "total", "out"), floats) | {"weight": F32, "inverse": F32, "eps": "fp32"}
    elif name == "norm_backward":
        kernel, constants, warps = norm._backward, {"adds": True, "block": 4096}, norm._warps(4096)
        types |= dict.fromkeys(("total", "weight", "grad_out", "grad_total", "grad_x"), floats)
        types |= {"inverse": F32, "grad_weight": F32}
    else:
        kernel, warps = lora._add_sorted, 4
        constants = {"block_groups": 64, "block_rows": 64, "block_rank": lora.SMALLEST, "block": lora.BLOCK}
        types |= dict.fromkeys(("y", "x", "a", "b", "out"), floats) | {"ends": "*i32", "scale": "fp32"}
    return kernel, types, constants, warps


def compiled(name: str, floats: str, capability: int, ones: bool) -> Any:
    """`ones`: with the arguments of `ONES` equal to 1, for which Triton compiles another kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, types, constants, warps = kernel_of(name, floats)
    order = kernel.arg_names
    assert set(order) == set(types) | set(constants)
    if ones:
        constants = constants | dict.fromkeys(ONES[name], 1)
    arguments = {argument: kind for argument, kind in types.items() if argument not in constants}
    source = ASTSource(
        fn=kernel,
        signature={argument: arguments.get(argument, "constexpr") for argument in order},
        constexprs={(order.index(argument),): value for argument, value in constants.items()},
        attrs={
            (order.index(argument),): [["tt.divisibility", 16]]
            for argument, kind in arguments.items()
            if kind != "fp32" and argument not in ODD
        },
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def resources(cubin: Path) -> dict[str, int]:
    """Registers of a thread (REG), and bytes of its stack and of what it spilled (STACK, LOCAL)."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    said = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}


CASES = [
    *((name, BF16, capability, False) for name in NUMBERS for capability in (80, 90)),
    *((name, BF16, 90, True) for name in NUMBERS),
    *((name, F32, 90, False) for name in ("rotate", "norm", "norm_backward")),
]


@pytest.mark.parametrize(("name", "floats", "capability", "ones"), CASES)
def test_kernels_compile_without_spilling(
    name: str, floats: str, capability: int, ones: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    found = compiled(name, floats, capability, ones)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(found.asm["cubin"])
    used = resources(cubin)
    assert (used["STACK"], used["LOCAL"]) == (0, 0)
    assert used["REG"] <= 128
    assert found.metadata.shared <= 48 * 1024
    if not ones:
        assert re.search(r"ld\.global\S*\.v4", found.asm["ptx"])
    if name == "add_sorted":
        assert re.search(r"(wg)?mma", found.asm["ptx"])  # tensor cores
