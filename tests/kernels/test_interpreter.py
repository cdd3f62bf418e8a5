"""Runs the tests of kernels under Triton's interpreter, to be chosen before the import."""

import importlib.util
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from isofast_kernels import dispatch

AT_LEAST = {"test_triton.py": 100, "test_augment_triton.py": 25}
"""How many tests of a file run in the interpreter; the others need a GPU."""


def run_in_the_interpreter(file):
    here = Path(__file__).parent
    return subprocess.run(
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
        check=False,
    )


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    with ThreadPoolExecutor() as pool:
        # side by side: each takes most of a minute of one core
        processes = dict(zip(AT_LEAST, pool.map(run_in_the_interpreter, AT_LEAST), strict=True))
    for file, process in processes.items():
        output = process.stdout + process.stderr
        assert process.returncode == 0, output
        passed = re.search(r"(\d+) passed", output)
        assert passed and int(passed[1]) >= AT_LEAST[file], output


@pytest.mark.parametrize("word", ["1", "true", "ON", "yes", "0", "false", "2", ""])
def test_what_asks_for_the_interpreter_is_what_triton_takes(word, monkeypatch):
    triton = pytest.importorskip("triton")
    from triton.runtime.interpreter import InterpretedFunction

    def kernel():
        pass

    monkeypatch.setenv("TRITON_INTERPRET", word)
    # a copy: the module itself was imported under another word
    spec = importlib.util.spec_from_file_location("isofast_kernels.another", dispatch.__file__)
    another = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(another)
    assert another.INTERPRET is isinstance(triton.jit(kernel), InterpretedFunction)
