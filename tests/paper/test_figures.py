"""Figures of runs: their lines, titles and scales, and the errors if there is nothing to draw."""

import itertools
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from isofast.cli import main
from isofast.config.load import validate
from isofast.config.presets import merge
from isofast.errors import UserError
from isofast.paper.figures import STYLE, figure3, figure4, figure7, figure8
from isofast.run.stored import Run, labels, read_run

pytestmark = pytest.mark.slow


def copied(
    run: Path, to: Path, *, top1: Sequence[float] = (), eigenvalues: Any = None, **changes: Any
) -> Run:
    """Copy a run with other settings, evaluations after 8, 16 ... steps, or other last spectra."""
    alignment = changes.pop("alignment", None)
    shutil.copytree(run, to)
    config = json.loads((run / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(merge(config, changes)))
    if top1:
        path = to / "metrics.jsonl"
        lines = [line for line in path.read_text().splitlines() if "val_top1" not in line]
        for step, accuracy in zip((8, 16, 24), top1, strict=False):
            lines.append(json.dumps({"step": step, "epoch": step / 22, "val_top1": accuracy}))
        path.write_text("\n".join(lines) + "\n")
    if eigenvalues is not None:
        with np.load(to / "spectrum.npz") as stored:
            arrays = {"step": stored["step"][-len(eigenvalues) :], "eigenvalues": eigenvalues}
        if alignment is not None:
            arrays["alignment"] = alignment
        np.savez(to / "spectrum.npz", **arrays)
    return read_run(to)


def accuracies_of(figure: Figure) -> Axes:
    (axes,) = (axes for axes in figure.axes if axes.get_ylabel().startswith("top-1"))
    return axes


@pytest.mark.parametrize(
    "what", ["3 ema no-ema linear", "4 linear", "7 no-ema ema", "8 ema linear"]
)
def test_a_figure_is_drawn_as_png_and_svg(what, spectrum_runs, tmp_path, capsys):
    number, *names = what.split()
    folders = [str(run) for name in names for _, run in spectrum_runs.values() if run.name == name]
    output = tmp_path / "new" / "folder"
    assert main(["figures", number, *folders, "--output", str(output)]) == 0
    paths = [output / f"figure{number}.{kind}" for kind in ("png", "svg")]
    assert capsys.readouterr().out.split() == [str(path) for path in paths]
    with Image.open(paths[0]) as image:
        assert image.width > 600 and image.height > 400
        assert len(np.unique(np.asarray(image.convert("L")))) > 20
    svg = paths[1].read_text()
    assert svg.rstrip().endswith("</svg>") and "<dc:date>" not in svg


@pytest.mark.parametrize("scales", [(1.0, 1e4), (1e4, 1.0)])
@pytest.mark.parametrize(
    ("draw", "names", "titles"),
    [
        (figure3, ["no ema", "ema"], ["IsoLoss, no EMA", "IsoLoss, EMA"]),
        # EMA and the larger weight decay come first, whatever order is given
        (figure7, ["ema", "no ema"], ["IsoLoss, EMA", "IsoLoss, no EMA"]),
        (figure8, ["linear", "ema"], ["weight decay 0.05", "weight decay 0.0001"]),
    ],
)
def test_panels_show_their_runs_in_order_on_one_scale(
    draw, names, titles, scales, spectrum_runs, tmp_path
):
    """The effective rank is (sum of eigenvalues)^2 / (sum of squares): n for n equal ones."""
    ranks, top1 = (5, 3), ((0.31, 0.52, 0.78), (0.2, 0.4, 0.3))
    runs = []
    for name, rank, scale, accuracies in zip(names, ranks, scales, top1, strict=True):
        values_TD = scale * np.array([np.geomspace(4, 0.05, 16), [2.0] * rank + [0] * (16 - rank)])
        run = spectrum_runs[name][1]
        runs.append(copied(run, tmp_path / name, top1=accuracies, eigenvalues=values_TD))
    figure = draw(runs if draw is figure3 else runs[::-1])
    for axes, run, title, rank in zip(figure.axes[:2], runs, titles, ranks, strict=True):
        lines = axes.collections[0].get_segments()
        assert lines[0][:, 0] == pytest.approx(run.epochs_T)
        assert lines[0][:, 1] == pytest.approx(run.eigenvalues_TD[:, 0])
        assert axes.get_yscale() == "log"
        assert title in axes.get_title() and axes.get_title().endswith(f"effective rank {rank}.0")
        low, high = axes.get_ylim()
        assert low <= 0.05 and high >= 4e4 and (low, high) == figure.axes[0].get_ylim()
    axes = accuracies_of(figure)
    assert axes.get_ylabel() == "top-1, validation" and axes.get_ylim() == (0, 1.02)
    for line, accuracies, panel in zip(axes.lines, top1, figure.axes[:2], strict=True):
        assert line.get_label() in panel.get_title().replace("\n", " ")
        assert line.get_xdata() == pytest.approx([8 / 22, 16 / 22, 24 / 22])
        assert line.get_ydata() == pytest.approx(accuracies)
        assert line.get_marker() == "o"


def test_long_names_overlap_nothing_and_are_not_cut_off(spectrum_runs, tmp_path):
    changes = [
        {"method": {"correlation": "embeddings"}},
        {"method": {"correlation": "directions"}},
        {"optimizer": {"weight_decay": 0.0123}},
        {"method": {"metric": "euclidean"}, "optimizer": {"weight_decay": 0.0123}},
    ]
    runs = [
        copied(spectrum_runs["no ema"][1], tmp_path / str(k), top1=(0.3, 0.5), **change)
        for k, change in enumerate(changes)
    ]
    runs.append(copied(spectrum_runs["linear"][1], tmp_path / "linear", top1=(0.3, 0.5)))
    with mpl.rc_context(STYLE):
        figures = figure8(runs), figure3(runs)
    for figure in figures:
        figure.draw_without_rendering()
        titles = [axes.title.get_window_extent() for axes in figure.axes[: len(runs)]]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(titles, 2))
        (legend,) = figure.legends
        inside, whole = legend.get_window_extent(), figure.bbox
        assert whole.x0 <= inside.x0 and inside.x1 <= whole.x1


def test_two_evaluations_of_one_run_are_no_curve(spectrum_runs, tmp_path):
    three, two = {"top1": (0.31, 0.52, 0.78)}, {"top1": (0.2, 0.4)}
    runs = [copied(spectrum_runs["ema"][1], tmp_path / "ema", **three)]
    runs.append(copied(spectrum_runs["no ema"][1], tmp_path / "no ema", **two))
    axes = accuracies_of(figure3(runs))
    assert axes.get_ylabel() == "top-1, training views"
    for line, run in zip(axes.lines, runs, strict=True):
        assert line.get_ydata() == pytest.approx([r["probe_top1"] for r in run.records])


def test_figure_4_shows_the_alignment(spectrum_runs, tmp_path):
    run = read_run(spectrum_runs["linear"][1])
    same = {"eigenvalues": np.ones((3, 16)), "alignment": np.ones((3, 16))}
    other = copied(run.path, tmp_path / "other", **same)
    _, above, _, below = figure4([other, run]).axes[:4]
    assert below.collections[0].get_segments()[0][:, 1] == pytest.approx(run.eigenvalues_TD[:, 0])
    assert above.collections[0].get_segments()[3][:, 1] == pytest.approx(run.alignment_TD[:, 3])
    known = [record["predictor_alignment"] for record in run.records]
    assert above.lines[0].get_ydata()[[1, 3, 5]] == pytest.approx(known, rel=1e-4)


def test_eigenvalues_are_drawn_down_to_rounding(spectrum_runs, tmp_path):
    ema = spectrum_runs["ema"][1]
    values_TD = np.float32(np.geomspace([3, 5], [3e-7, 1e-7], 16, axis=1))
    run = copied(ema, tmp_path / "run", eigenvalues=values_TD)
    lines = figure3([run]).axes[0].collections[0]
    places = lines.get_array().astype(int)
    assert places[0] == 1 and places[-1] == 16 and len(places) > 8
    for place, points_T2 in zip(places, lines.get_segments(), strict=True):
        assert points_T2[:, 1] == pytest.approx(values_TD[:, place - 1])
    values_TD[:, -1] = 1e-9
    panel = figure3([copied(ema, tmp_path / "rounding", eigenvalues=values_TD)]).axes[0]
    assert len(panel.collections[0].get_segments()[-1]) == 0 and panel.get_ylim()[0] > 1e-8


def test_a_long_run_is_thinned_out_over_all_its_epochs(spectrum_runs):
    run, epochs_T = read_run(spectrum_runs["ema"][1]), np.arange(2000.0)
    values_TD = 1 + epochs_T[:, None] * np.ones(16)
    long = replace(run, epochs_T=epochs_T, eigenvalues_TD=values_TD)
    points_T2 = figure3([long]).axes[0].collections[0].get_segments()[0]
    assert len(points_T2) <= 500 and points_T2[[0, -1], 0].tolist() == [0, 1999]
    assert points_T2[:, 1] == pytest.approx(1 + points_T2[:, 0])


def test_figure_7_pairs_what_differs_only_in_ema(spectrum_runs, tmp_path):
    ema, no_ema = (spectrum_runs[name][1] for name in ("ema", "no ema"))
    both = [read_run(ema), read_run(no_ema)]
    # the presets choose these depending on EMA
    with_sgd = copied(no_ema, tmp_path / "sgd", optimizer={"name": "sgd", "lr": 0.1})
    assert len(figure7([both[0], with_sgd]).axes) == 4
    for name, changes in {
        "decay": {"optimizer": {"weight_decay": 0.05}},
        "epochs": {"train": {"epochs": 3}},
        "width": {"encoder": {"width": 8}},
        "seed": {"seed": 1},
    }.items():
        other = copied(no_ema, tmp_path / name, **changes)
        # neither paired nor silently left out
        for runs in ([both[0], other], [*both, other]):
            with pytest.raises(UserError, match=f"figure 7 needs, .*{other.path}"):
                figure7(runs)
    with pytest.raises(UserError, match="exactly one without"):
        figure7([*both, copied(no_ema, tmp_path / "again")])
    # one pair per seed
    seeds = [copied(run, tmp_path / f"1-{run.name}", seed=1) for run in (ema, no_ema)]
    rows = figure7([both[0], *seeds[::-1], both[1]]).axes[:6]
    assert "seed 0, EMA" in rows[0].get_title() and "seed 1, no EMA" in rows[4].get_title()
    # SimSiam is BYOL without EMA, with another optimizer
    pair = []
    for name, optimizer in (("simsiam", "sgd"), ("byol", "lars")):
        settings = {"optimizer": {"name": optimizer}, "method": {"name": name}}
        config = validate(spectrum_runs["ema"][0] | settings)
        run = copied(ema, tmp_path / name).path
        (run / "config.json").write_text(config.model_dump_json())
        pair.append(read_run(run))
    titles = [axes.get_title() for axes in figure7(pair).axes[:2]]
    assert titles[0].startswith("BYOL, EMA\n") and titles[1].startswith("BYOL, no EMA\n")


@pytest.mark.parametrize("draw", [figure3, figure4])
def test_a_run_that_blew_up_says_so_on_the_same_epochs(draw, spectrum_runs, tmp_path):
    sound = read_run(spectrum_runs["linear"][1])
    values_TD, alignment_TD = sound.eigenvalues_TD.copy(), np.copy(sound.alignment_TD)
    values_TD[2:] = alignment_TD[2:] = np.nan
    lost = {"eigenvalues": values_TD, "alignment": alignment_TD}
    runs = [sound, copied(sound.path, tmp_path / "blown", seed=1, **lost)]
    panels = [axis for axis in draw(runs).axes if axis.get_label() != "<colorbar>"]
    titles = [axis.get_title() for axis in panels[:2]]
    assert "NaN" not in titles[0] and f"NaN from epoch {runs[1].epochs_T[2]:.3g}" in titles[1]
    assert len({axis.get_xlim() for axis in panels}) == 1
    assert panels[0].get_xlim()[1] > 24 / 22


@pytest.mark.parametrize("value", [np.nan, 0.0, np.inf])
@pytest.mark.parametrize("number", ["3", "4"])
@pytest.mark.filterwarnings("error")
def test_a_run_without_one_sound_number_is_drawn_without_warnings(
    number, value, spectrum_runs, tmp_path
):
    lost = {"eigenvalues": np.full((5, 16), value), "alignment": np.full((5, 16), np.nan)}
    run = copied(spectrum_runs["linear"][1], tmp_path / "run", **lost).path
    assert main(["figures", number, str(run), "--output", str(tmp_path)]) == 0


def test_labels_say_what_differs_and_no_more(spectrum_runs, tmp_path):
    ema, no_ema, linear = (read_run(spectrum_runs[n][1]) for n in ("ema", "no ema", "linear"))
    assert labels([ema]) == ["IsoLoss"]
    assert labels([ema, no_ema]) == ["IsoLoss, EMA", "IsoLoss, no EMA"]
    assert labels([ema, linear]) == ["IsoLoss", "linear predictor"]
    assert labels([ema, ema]) == ["IsoLoss (ema)", "IsoLoss (ema)"]
    moved = [replace(ema, path=tmp_path / name) for name in ("a/seed-0", "b/seed-0")]
    assert labels(moved) == ["IsoLoss (a/seed-0)", "IsoLoss (b/seed-0)"]
    moved = [replace(ema, path=tmp_path / name) for name in ("a", "\udcff")]
    assert labels(moved) == ["IsoLoss (a)", r"IsoLoss (\udcff)"]
    other = copied(ema.path, tmp_path / "raw", method={"correlation": "embeddings"})
    assert labels([ema, other]) == ["IsoLoss, C of directions", "IsoLoss, C of embeddings"]
    seed = copied(ema.path, tmp_path / "other", seed=3)
    assert labels([ema, seed]) == ["IsoLoss, seed 0", "IsoLoss, seed 3"]
    # a folder's name is not a formula
    runs = [copied(ema.path, tmp_path / name) for name in ("a$b_{$", "c$d_{$")]
    titles = [axis.get_title() for axis in figure3(runs).axes]
    assert r"(a\$b_{\$)" in titles[0] and r"(c\$d_{\$)" in titles[1]
    folders = [str(run.path) for run in runs]
    assert main(["figures", "3", *folders, "--output", str(tmp_path)]) == 0


def test_what_cannot_be_drawn_is_refused(spectrum_runs, tmp_path, refused):
    ema, no_ema, linear = (str(spectrum_runs[name][1]) for name in ("ema", "no ema", "linear"))
    empty = tmp_path / "empty"
    empty.mkdir()
    bare, blind, torn = (copied(Path(ema), tmp_path / n).path for n in ("bare", "blind", "torn"))
    (bare / "metrics.jsonl").write_text("")
    (blind / "spectrum.npz").unlink()
    (torn / "spectrum.npz").write_bytes(b"PK\x03\x04cut")
    old = copied(Path(linear), tmp_path / "old", eigenvalues=np.ones((2, 16))).path
    (tmp_path / "file").write_text("")
    out = ["--output", str(tmp_path / "figures")]
    for arguments, words in (
        (["3", str(tmp_path / "nowhere"), *out], ["nowhere is not a run", "not a folder"]),
        (["3", ema, str(empty), *out], ["empty is not a run", "config.json", "--run-dir"]),
        (["3", str(bare), *out], ["no records in metrics.jsonl"]),
        (["3", str(blind), *out], ["no eigenvalues in spectrum.npz"]),
        (["3", str(torn), *out], ["cannot read", "torn", "restore it"]),
        (["4", linear, ema, *out], ["has method isoloss", "--set method.name=linear"]),
        (["4", str(old), *out], ["old has method linear and no alignment"]),
        (["7", ema, linear, *out], ["one without", "--set method.ema=false", "IsoLoss"]),
        (["8", ema, no_ema, *out], ["all runs have 0.0001", "--set optimizer.weight_decay"]),
        (["3", ema, "--output", str(tmp_path / "file")], ["cannot write", "--output"]),
        (["5", ema, *out], ["invalid choice: '5'"]),
    ):
        assert refused(["figures", *arguments], *words) == ""
    assert not (tmp_path / "figures").exists()
