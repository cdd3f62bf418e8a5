"""Runs the tests of kernels under Triton's interpreter, to be chosen before the import."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "at_least"), [("test_triton.py", 90), ("test_augment_triton.py", 25)]
)
def test_kernels_in_the_interpreter(file, at_least):
    here = Path(__file__).parent
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", here / file],
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
    assert passed and int(passed[1]) >= at_least, output
