"""The documentation's notebook runs from top to bottom."""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from ..support.runs import ROOT


@pytest.mark.long
def test_the_notebook_runs_and_its_encoder_knows_digits(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # so that its shell commands find isofast, as in an activated environment
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    notebook = nbformat.read(ROOT / "docs" / "guide" / "digits.ipynb", as_version=4)
    NotebookClient(notebook, timeout=500).execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert "isoloss (ema True" in printed and "collect2" not in printed
    accuracy = printed.partition("logistic regression on 355 embeddings: ")[2].split()[0]
    assert float(accuracy) > 0.9
