"""The lines, scales and titles of the figures, on copies of runs with chosen numbers."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from isofast.config.load import validate
from isofast.config.schema import to_json
from isofast.paper.figures import figure3, figure7, figure8
from isofast.run.stored import Run, read_run

pytestmark = pytest.mark.slow

Runs = dict[str, tuple[dict[str, Any], Path]]

ACCURACIES = {"ema": (0.31, 0.52, 0.78), "no ema": (0.2, 0.4, 0.3), "linear": (0.1, 0.15, 0.25)}


def evaluated(run: Path, to: Path, accuracies: Sequence[float]) -> Run:
    """A copy of a run whose only evaluations are these, at steps 8, 16 and 24."""
    shutil.copytree(run, to)
    path = to / "metrics.jsonl"
    lines = [line for line in path.read_text().splitlines() if "val_top1" not in json.loads(line)]
    for step, accuracy in zip((8, 16, 24), accuracies, strict=False):
        evaluation = {"step": step, "epoch": step / 22, "val_top1": accuracy, "knn_top1": 0.9}
        lines.append(json.dumps(evaluation))
    path.write_text("\n".join(lines) + "\n")
    return read_run(to)


def with_spectra(run: Path, to: Path, eigenvalues_TD: Any) -> Run:
    """A copy of a run whose C has these eigenvalues at its last steps."""
    shutil.copytree(run, to)
    with np.load(to / "spectrum.npz") as stored:
        steps = stored["step"][-len(eigenvalues_TD) :]
    np.savez(to / "spectrum.npz", step=steps, eigenvalues=np.float32(eigenvalues_TD))
    return read_run(to)


def accuracies_of(figure: Figure) -> Axes:
    """The panel of the accuracies."""
    (axes,) = (axes for axes in figure.axes if axes.get_ylabel().startswith("top-1"))
    return axes


@pytest.mark.parametrize(
    ("draw", "names"),
    [
        (figure3, ["no ema", "linear", "ema"]),
        (figure7, ["ema", "no ema"]),
        # the larger weight decay comes first
        (figure8, ["linear", "ema"]),
    ],
)
def test_validation_accuracy_is_drawn_where_every_run_has_a_curve_of_it(
    draw: Callable[[Sequence[Run]], Figure],
    names: list[str],
    spectrum_runs: Runs,
    tmp_path: Path,
) -> None:
    runs = [evaluated(spectrum_runs[n][1], tmp_path / n, ACCURACIES[n]) for n in names]
    axes = accuracies_of(draw(runs))
    assert axes.get_ylabel() == "top-1, validation"
    for line, name in zip(axes.lines, names, strict=True):
        assert line.get_xdata() == pytest.approx([8 / 22, 16 / 22, 24 / 22])
        assert line.get_ydata() == pytest.approx(ACCURACIES[name])
        assert line.get_marker() == "o"
    assert axes.get_ylim() == (0, 1.02)


def test_two_evaluations_of_one_run_are_no_curve(spectrum_runs: Runs, tmp_path: Path) -> None:
    whole, short = (
        evaluated(spectrum_runs[name][1], tmp_path / name, ACCURACIES[name][:count])
        for name, count in (("ema", 3), ("no ema", 2))
    )
    axes = accuracies_of(figure3([whole, short]))
    assert axes.get_ylabel() == "top-1, training views"
    for line, run in zip(axes.lines, (whole, short), strict=True):
        assert line.get_ydata() == pytest.approx([r["probe_top1"] for r in run.records])


def test_simsiam_stands_beside_byol(spectrum_runs: Runs, tmp_path: Path) -> None:
    """Paired, though the methods' names and the optimizers differ."""
    settings, run = spectrum_runs["ema"]
    runs = []
    for name, optimizer in (("simsiam", "sgd"), ("byol", "lars")):
        shutil.copytree(run, tmp_path / name)
        raw = {**settings, "optimizer": {"name": optimizer}, "method": {"name": name}}
        config = validate(raw)
        (tmp_path / name / "config.json").write_text(to_json(config))
        runs.append(read_run(tmp_path / name))
    assert runs[0].config.optimizer.name != runs[1].config.optimizer.name
    titles = [axes.get_title() for axes in figure7(runs).axes[:2]]
    assert titles[0].startswith("BYOL, EMA\n") and titles[1].startswith("BYOL, no EMA\n")


@pytest.mark.parametrize("draw", [figure3, figure7])
def test_a_title_has_the_effective_rank_at_the_end(
    draw: Callable[[Sequence[Run]], Figure], spectrum_runs: Runs, tmp_path: Path
) -> None:
    """(sum of eigenvalues)^2 over the sum of their squares: n for n that are equal."""
    runs = [
        with_spectra(spectrum_runs[name][1], tmp_path / name, [[1] * n + [0] * (16 - n) for n in s])
        for name, s in (("ema", (16, 9, 5)), ("no ema", (1, 8, 3)))
    ]
    first, second = (axes.get_title() for axes in draw(runs).axes[:2])
    assert first.endswith("\neffective rank 5.0") and second.endswith("\neffective rank 3.0")


@pytest.mark.parametrize("draw", [figure3, figure7])
@pytest.mark.parametrize("scales", [(1.0, 1e4), (1e4, 1.0)])
def test_panels_that_are_compared_have_one_scale_that_holds_all_eigenvalues(
    scales: tuple[float, float],
    draw: Callable[[Sequence[Run]], Figure],
    spectrum_runs: Runs,
    tmp_path: Path,
) -> None:
    values_TD = np.geomspace([4, 2], [0.05, 0.01], 16, axis=1)
    runs = [
        with_spectra(spectrum_runs[name][1], tmp_path / name, scale * values_TD)
        for name, scale in zip(("ema", "no ema"), scales, strict=True)
    ]
    panels = draw(runs).axes[:2]
    assert panels[0].get_ylim() == panels[1].get_ylim()
    low, high = panels[0].get_ylim()
    assert low <= 0.01 and high >= 4e4


def test_eigenvalues_are_drawn_to_the_smallest_that_is_no_rounding(
    spectrum_runs: Runs, tmp_path: Path
) -> None:
    values_TD = np.float32(np.geomspace([3, 5], [3e-7, 1e-7], 16, axis=1))
    run = with_spectra(spectrum_runs["ema"][1], tmp_path / "run", values_TD)
    lines = figure3([run]).axes[0].collections[0]
    places = lines.get_array().astype(int)
    assert places[0] == 1 and places[-1] == 16 and len(places) > 8
    for place, points_T2 in zip(places, lines.get_segments(), strict=True):
        assert points_T2[:, 0] == pytest.approx(run.epochs_T)
        assert points_T2[:, 1] == pytest.approx(values_TD[:, place - 1])
    values_TD[:, -1] = 1e-9
    rounding = with_spectra(spectrum_runs["ema"][1], tmp_path / "rounding", values_TD)
    panel = figure3([rounding]).axes[0]
    assert len(panel.collections[0].get_segments()[-1]) == 0 and panel.get_ylim()[0] > 1e-8
