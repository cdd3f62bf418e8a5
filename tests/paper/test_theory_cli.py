"""`isofast theory simulate`: what it prints and refuses."""

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from isofast.cli import main

pytestmark = pytest.mark.slow

SHORT = ("--steps", "3", "--samples", "20")


def simulate_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["theory", "simulate", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("loss", ["euclidean", "iso_euclidean", "cosine", "iso_cosine"])
def test_json_holds_the_spectrum_at_both_ends(capsys, loss):
    found = simulate_json(capsys, "--loss", loss, *SHORT)
    assert list(found) == ["loss", "matrix", "initial", "final", "trace"]
    assert found["loss"] == loss and found["matrix"] == "V V^T"
    initial, final = np.array(found["initial"]), np.array(found["final"])
    assert initial.shape == final.shape == (10,)
    assert (np.diff(initial) <= 0).all() and (np.diff(final) <= 0).all()
    np.testing.assert_allclose(found["trace"], [initial.sum(), final.sum()], rtol=1e-12)


def test_every_ablation_has_its_own_end(capsys):
    sizes = ("--loss", "cosine", "--inputs", "6", "--outputs", "3", "--lr", "0.2", *SHORT)
    stop = "--no-stop-gradient"
    ablations = ("", stop, f"{stop} --paper-gradient", "--no-predictor")
    found = [simulate_json(capsys, *sizes, *ablation.split()) for ablation in ablations]
    assert len({str(one["final"]) for one in found}) == 4
    (initial,) = {str(one["initial"]) for one in found}
    assert len(json.loads(initial)) == 3
    relu = simulate_json(capsys, *sizes, "--relu")
    assert relu["matrix"] == "E[z z^T], z = relu(V x)"
    # a ReLU passes half of every variance
    assert relu["trace"][0] == pytest.approx(found[0]["trace"][0] / 2)


def test_the_table_says_what_was_run(capsys):
    command = ["theory", "simulate", "--loss", "euclidean", "--no-stop-gradient", "--outputs", "3"]
    assert main([*command, "--steps", "0", "--seed", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "euclidean without stop-gradient, linear 15 -> 3, 0 steps at lr 0.01, seed 4"
    assert lines[1] == "eigenvalues of V V^T"
    rows = [line.split() for line in lines[3:]]
    assert [row[0] for row in rows] == ["1", "2", "3", "trace"]
    assert all(first == last for _, first, last in rows), "no step was taken"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("simulate --loss cosine --paper-gradient", "add --no-stop-gradient"),
        ("simulate --loss euclidean --no-stop-gradient --paper-gradient", "only for loss 'cosine'"),
        ("simulate --loss iso_cosine --no-stop-gradient", "Use 'cosine' for this ablation"),
        ("simulate --loss iso_euclidean --no-predictor", "Use 'euclidean' for this ablation"),
        ("simulate --loss cosine --inputs 0", "inputs: got 0; give a number from 1 to 10,000"),
        ("simulate --loss cosine --outputs 10000000", "outputs: got 10000000"),
        ("simulate --loss cosine --steps -1", "steps: got -1; give a number from 0"),
        ("simulate --loss cosine --lr nan", "lr: got nan; give a finite number above 0"),
        ("simulate --loss cosine --lr inf", "lr: got inf"),
        ("simulate --loss cosine --seed -1", "seed: got -1"),
        ("figure2 --output figures --seed -1", "seed: got -1"),
        ("simulate --loss mse", "invalid choice: 'mse'"),
        ("simulate", "required: --loss"),
        ("figure5", "required: --output"),
        ("", "required: theory"),
        ("figure5 --output new --samples 0", "samples: got 0"),
    ],
)
def test_bad_values_are_refused(refused, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert refused(["theory", *arguments.split()], message) == ""
    assert list(tmp_path.iterdir()) == []


def test_a_simulation_that_diverges_ends_with_exit_code_1(capsys):
    given = ["--loss", "euclidean", "--lr", "5", "--steps", "50"]
    assert main(["theory", "simulate", *given]) == 1
    shown = capsys.readouterr().err
    assert "not finite at step 50: lr 5 is too large; give a smaller --lr" in shown


def test_version_and_help_are_quick():
    code = (
        "import contextlib, sys; from isofast.cli import main\n"
        "for option in ('--version', '--help'):\n"
        "    with contextlib.suppress(SystemExit): main([option])\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'matplotlib', 'pydantic')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
