"""`isofast theory`: what it prints and the files it writes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from isofast.cli import main
from isofast.paper.toy_figures import panels_of

pytestmark = pytest.mark.slow

SHORT = ("--steps", "3", "--samples", "20")
VARIANTS = {
    "euclidean": ("no_stop_gradient", "no_predictor", "plain", "iso"),
    "cosine": ("no_stop_gradient", "paper_gradient", "no_predictor", "plain", "iso"),
}


def simulate_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert main(["theory", "simulate", *arguments, "--json"]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("loss", ["euclidean", "iso_euclidean", "cosine", "iso_cosine"])
def test_json_holds_the_spectrum_at_both_ends(
    capsys: pytest.CaptureFixture[str], loss: str
) -> None:
    found = simulate_json(capsys, "--loss", loss, *SHORT)
    assert list(found) == ["loss", "matrix", "initial", "final", "trace"]
    assert found["loss"] == loss and found["matrix"] == "V V^T"
    initial, final = np.array(found["initial"]), np.array(found["final"])
    assert initial.shape == final.shape == (10,)
    assert (np.diff(initial) <= 0).all() and (np.diff(final) <= 0).all()
    np.testing.assert_allclose(found["trace"], [initial.sum(), final.sum()], rtol=1e-12)


@pytest.mark.parametrize(
    "ablation",
    [("--no-stop-gradient",), ("--no-stop-gradient", "--paper-gradient"), ("--no-predictor",)],
    ids=["no_stop_gradient", "paper_gradient", "no_predictor"],
)
def test_every_ablation_has_its_own_end(
    capsys: pytest.CaptureFixture[str], ablation: tuple[str, ...]
) -> None:
    sizes = ("--loss", "cosine", "--inputs", "6", "--outputs", "3", "--lr", "0.2", *SHORT)
    plain, other = simulate_json(capsys, *sizes), simulate_json(capsys, *sizes, *ablation)
    assert plain["initial"] == other["initial"] and len(plain["initial"]) == 3  # type: ignore[arg-type]
    assert plain["final"] != other["final"]


def test_relu_shows_the_embeddings_correlation(capsys: pytest.CaptureFixture[str]) -> None:
    linear = simulate_json(capsys, "--loss", "cosine", *SHORT)
    relu = simulate_json(capsys, "--loss", "cosine", "--relu", *SHORT)
    assert relu["matrix"] == "E[z z^T], z = relu(V x)"
    # half of every variance passes a ReLU
    assert relu["trace"][0] == pytest.approx(linear["trace"][0] / 2)  # type: ignore[index]


def test_the_table_says_what_was_run(capsys: pytest.CaptureFixture[str]) -> None:
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
        ("simulate --loss cosine --outputs -3", "outputs: got -3"),
        ("simulate --loss cosine --outputs 10000000", "outputs: got 10000000"),
        ("simulate --loss cosine --samples 0", "samples: got 0"),
        ("simulate --loss cosine --steps -1", "steps: got -1; give a number from 0"),
        ("simulate --loss cosine --lr nan", "lr: got nan; give a finite number above 0"),
        ("simulate --loss cosine --lr inf", "lr: got inf"),
        ("simulate --loss cosine --lr -0.1", "lr: got -0.1"),
        ("simulate --loss cosine --seed -1", "seed: got -1"),
        ("simulate --loss mse", "invalid choice: 'mse'"),
        ("simulate --loss cosine --inputs many", "invalid int value: 'many'"),
        ("simulate", "required: --loss"),
        ("figure5", "required: --output"),
        ("", "required: WHAT"),
        ("figure5 --output new --samples 0", "samples: got 0"),
        ("figure5 --output new --steps -1", "steps: got -1"),
    ],
)
def test_bad_values_are_refused(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code: object = main(["theory", *arguments.split()])
    except SystemExit as ended:
        code = ended.code
    shown = capsys.readouterr()
    assert code == 2
    assert message in shown.err and "Traceback" not in shown.err and not shown.out
    assert list(tmp_path.iterdir()) == []


def test_a_simulation_that_diverges_ends_with_exit_code_1(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["theory", "simulate", "--loss", "euclidean", "--lr", "9", "--steps", "50"]) == 1
    assert "give a smaller --lr" in capsys.readouterr().err


@pytest.mark.parametrize("figure", ["figure2", "figure5", "figure6"])
def test_a_figure_is_a_picture_and_its_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], figure: str
) -> None:
    folder = tmp_path / "new" / "figures"
    assert main(["theory", figure, "--output", str(folder), *SHORT]) == 0
    assert capsys.readouterr().out.split() == [
        str(folder / f"{figure}.{e}") for e in ("png", "npz")
    ]
    assert sorted(path.name for path in folder.iterdir()) == [f"{figure}.npz", f"{figure}.png"]
    with Image.open(folder / f"{figure}.png") as picture:
        assert picture.width > 1500 and len(picture.convert("L").getcolors() or []) > 50
    arrays = dict(np.load(folder / f"{figure}.npz"))
    if figure == "figure5":
        assert arrays["cosine_eigenvalues"].shape == (4, 3, 2)
        assert arrays["euclidean_points"].shape == (4, 3, 20, 2)
        return
    for metric, variants in VARIANTS.items():
        for variant in variants:
            name = f"{metric}_{variant}"
            assert arrays[f"{name}_spectrum_eigenvalues"].shape == (4, 1, 10)
            assert arrays[f"{name}_plane_points"].shape == (4, 1, 20, 2)
            assert arrays[f"{name}_plane_steps"].tolist() == [0, 1, 2, 3]
    assert len(arrays) == 9 * (3 + 4)
    positive = arrays["cosine_plain_plane_points"].min() >= 0
    assert positive == (figure == "figure6")


@pytest.mark.filterwarnings("error")
def test_figures_of_no_step_are_drawn_without_warnings(tmp_path: Path) -> None:
    for figure in ("figure2", "figure5"):
        given = ("--output", str(tmp_path), "--steps", "0", "--samples", "5")
        assert main(["theory", figure, *given]) == 0
    assert np.load(tmp_path / "figure5.npz")["cosine_steps"].tolist() == [0]


def test_figure5_starts_from_v0_twice_v0_and_another(tmp_path: Path) -> None:
    assert main(["theory", "figure5", "--output", str(tmp_path), *SHORT]) == 0
    first = np.load(tmp_path / "figure5.npz")["euclidean_points"][0]
    np.testing.assert_allclose(first[1], 2 * first[0], rtol=1e-12)
    assert not np.allclose(first[2] / first[0], (first[2] / first[0])[0, 0])


def test_figures_follow_the_papers_settings() -> None:
    by_name = {panel.name: panel.toy for panel in panels_of("figure2")}
    assert by_name["cosine_plain_plane"].samples == 10_000
    assert by_name["cosine_plain_spectrum"].default_lr == 0.1
    assert by_name["euclidean_plain_spectrum"].default_lr == 0.01
    assert by_name["euclidean_no_predictor_spectrum"].default_lr == 0.1
    assert by_name["cosine_no_predictor_spectrum"].default_steps == 100_000
    assert {toy.lr for name, toy in by_name.items() if name.endswith("plane")} == {0.01}
    assert not any(toy.relu for toy in by_name.values())
    assert all(panel.toy.relu for panel in panels_of("figure6"))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc: not Linux")
@pytest.mark.parametrize("output", ["file", "/proc"])
def test_an_output_that_takes_no_file_is_refused_before_anything_is_simulated(
    output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even root makes no file in /proc."""
    (tmp_path / "file").write_text("here")
    assert main(["theory", "figure5", "--output", str(tmp_path / output), *SHORT]) == 2
    shown = capsys.readouterr().err
    assert "cannot write to" in shown and "--output" in shown
    assert "simulated" not in shown and "Traceback" not in shown


def test_version_and_help_are_quick() -> None:
    code = (
        "import contextlib, sys; from isofast.cli import main\n"
        "for option in ('--version', '--help'):\n"
        "    with contextlib.suppress(SystemExit): main([option])\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'matplotlib', 'pydantic')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
