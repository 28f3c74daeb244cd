"""benchmarks/device.sh: steps, time limits, going on where it stopped, and a whole rehearsal without a device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from openwu_bench.report import read_results
from openwu_bench.result import read_result

SCRIPT = Path(__file__).parents[2] / "benchmarks/device.sh"
STEPS = ["kernels", "generator-speed", "generator-memory", "experts", "batch"]
STEPS += ["klein-step", "kontext-step", "qwen-step", "decoder-layer", "embedded-step"]


def run(folder: Path, python: str | Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *options, str(folder)],
        env={**os.environ, "PYTHON": str(python), **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )


def stub(path: Path, lines: str) -> Path:
    path.write_text(f'#!/usr/bin/env bash\necho "$*" >> "{path.parent}/calls"\n{lines}\n')
    path.chmod(0o755)
    return path


def test_every_step_runs_in_order_and_once(tmp_path: Path) -> None:
    python = stub(tmp_path / "python", "exit 0")
    first = run(tmp_path / "out", python, "--rehearse")
    assert first.returncode == 0, first.stderr
    assert [line.partition(":")[0] for line in first.stdout.splitlines()] == STEPS
    calls = (tmp_path / "calls").read_text()
    assert calls.count("--rehearse") == 9
    again = run(tmp_path / "out", python, "--rehearse")
    assert again.stdout == "".join(f"{name}: done before\n" for name in STEPS)
    assert (tmp_path / "calls").read_text() == calls


def test_a_step_that_fails_or_hangs_is_named_and_run_again(tmp_path: Path) -> None:
    python = stub(tmp_path / "python", 'case "$*" in *G4*) sleep 60;; *G2*) exit 3;; esac')
    assert "LIMIT: expected a whole number" in run(tmp_path / "out", python, "--rehearse", LIMIT="0.5").stderr
    script = SCRIPT.read_text()
    short = tmp_path / "benchmarks" / "device.sh"
    short.parent.mkdir()
    short.write_text(script.replace("bench generator-memory 90", "bench generator-memory 1"))
    done = subprocess.run(
        ["bash", str(short), "--rehearse", "out"],
        env={**os.environ, "PYTHON": str(python)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "generator-memory: stopped after 1 s" in done.stdout
    assert "experts: exit code 3" in done.stdout
    assert "batch: done" in done.stdout
    stub(tmp_path / "python", "exit 0")
    again = subprocess.run(
        ["bash", str(short), "--rehearse", "out"],
        env={**os.environ, "PYTHON": str(python)},
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0
    assert again.stdout.count("done before") == len(STEPS) - 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_device_it_says_so(tmp_path: Path) -> None:
    done = run(tmp_path / "out", sys.executable)
    assert done.returncode == 2
    assert "expected a CUDA device" in done.stderr


@pytest.mark.slow
def test_a_rehearsal_runs_everything(tmp_path: Path) -> None:
    done = run(tmp_path / "out", sys.executable, "--rehearse")
    logs = {path.name: path.read_text()[-2000:] for path in (tmp_path / "out").glob("*.log")}
    assert done.returncode == 0, (done.stdout, logs)
    rows = {name for file in (tmp_path / "out").glob("*.json") if (each := read_result(file)) for name in each.rows}
    assert rows == {f"G{number}" for number in range(1, 10)}
    assert read_results(tmp_path / "out") == []  # a rehearsal is no evidence
