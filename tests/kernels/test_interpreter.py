"""Runs test_triton.py under Triton's interpreter, which has to be chosen before the import."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    here = Path(__file__).parent
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", here / "test_triton.py"],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        },
        cwd=here.parents[1],
        capture_output=True,
        text=True,
        timeout=900,
    )
    output = process.stdout + process.stderr
    assert process.returncode == 0, output
    passed = re.search(r"(\d+) passed", output)
    assert passed and int(passed[1]) >= 90, output
