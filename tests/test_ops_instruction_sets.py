"""The kernels of every instruction set that this CPU has: PyTorch is told of less than there is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
SUBSET = "fixed_cases or head_dims or strides or large_scores or errors_beside_eager_code"
# From the best that this CPU has, which all other tests run on, downward.
SETS = {"AVX512": ["avx2", "default"], "AVX2": ["default"]}


@pytest.mark.parametrize("capability", SETS.get(torch.backends.cpu.get_cpu_capability(), []))
def test_subset(capability: str) -> None:
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    report = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.backends.cpu.get_cpu_capability())"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert report.stdout.strip().lower() == capability
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-k", f"({SUBSET}) and not cuda",
         TESTS / "test_ops.py", TESTS / "test_ops_precision.py", TESTS / "test_ops_decode_step.py"],
        env=environment,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-5000:]
