"""Figures from real runs, and the errors where there is nothing to draw."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from isofast.cli import main
from isofast.errors import UserError
from isofast.paper.figures import figure3, figure4, figure7, figure8
from isofast.run.stored import Run, labels, read_run

pytestmark = pytest.mark.slow

Runs = dict[str, tuple[dict[str, Any], Path]]


@pytest.mark.parametrize(
    ("number", "names"),
    [
        ("3", ["ema", "no ema", "linear"]),
        ("4", ["linear"]),
        ("7", ["no ema", "ema"]),
        ("8", ["ema", "linear"]),
    ],
)
def test_a_figure_is_drawn_as_png_and_svg(
    number: str,
    names: list[str],
    spectrum_runs: Runs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folders = [str(spectrum_runs[name][1]) for name in names]
    output = tmp_path / "new" / "folder"
    assert main(["figures", number, *folders, "--output", str(output)]) == 0
    paths = [output / f"figure{number}.{kind}" for kind in ("png", "svg")]
    assert capsys.readouterr().out.split() == [str(path) for path in paths]
    with Image.open(paths[0]) as image:
        assert image.width > 600 and image.height > 400
        assert len(np.unique(np.asarray(image.convert("L")))) > 20
    assert paths[1].read_text().rstrip().endswith("</svg>")


def test_figure_4_shows_the_alignment(spectrum_runs: Runs) -> None:
    run = read_run(spectrum_runs["linear"][1])
    assert run.alignment_TD is not None
    above = figure4([run]).axes[0]
    assert above.collections[0].get_segments()[3][:, 1] == pytest.approx(run.alignment_TD[:, 3])
    known = [record["predictor_alignment"] for record in run.records]
    assert above.lines[0].get_ydata()[[1, 3, 5]] == pytest.approx(known, rel=1e-4)


@pytest.mark.parametrize(
    ("draw", "names", "titles"),
    [
        (figure3, ["no ema", "ema"], ["IsoLoss, no EMA\n", "IsoLoss, EMA\n"]),
        (figure7, ["ema", "no ema"], ["IsoLoss, EMA\n", "IsoLoss, no EMA\n"]),
        (figure8, ["linear", "ema"], ["weight decay 0.05\n", "weight decay 0.0001\n"]),
    ],
)
def test_panels_show_their_runs_in_order(
    draw: Callable[[Sequence[Run]], Figure],
    names: list[str],
    titles: list[str],
    spectrum_runs: Runs,
) -> None:
    """Figure 7 puts the run with EMA first, figure 8 the larger decay, in whatever order given."""
    runs = [read_run(spectrum_runs[name][1]) for name in names]
    given = runs if draw is figure3 else runs[::-1]
    for axes, run, title in zip(draw(given).axes[:2], runs, titles, strict=True):
        first = axes.collections[0].get_segments()[0]
        assert first[:, 0] == pytest.approx(run.epochs_T)
        assert first[:, 1] == pytest.approx(run.eigenvalues_TD[:, 0])
        assert axes.get_yscale() == "log" and title in axes.get_title()


def test_figure_7_pairs_what_differs_in_ema_alone(spectrum_runs: Runs, tmp_path: Path) -> None:
    ema, no_ema = (spectrum_runs[name][1] for name in ("ema", "no ema"))
    both = [read_run(ema), read_run(no_ema)]
    config = both[1].config.model_dump(mode="json")
    # the presets choose these by EMA
    chosen = config["optimizer"] | {"name": "sgd", "lr": 0.1}
    with_sgd = read_run(_copy(no_ema, tmp_path / "sgd", optimizer=chosen))
    assert len(figure7([both[0], with_sgd]).axes) == 4
    others = {
        "decay": {"optimizer": config["optimizer"] | {"weight_decay": 0.05}},
        "epochs": {"train": config["train"] | {"epochs": 3}},
        "width": {"encoder": config["encoder"] | {"width": 8}},
        "seed": {"seed": 1},
    }
    for name, changes in others.items():
        other = read_run(_copy(no_ema, tmp_path / name, **changes))
        # neither paired nor left out silently
        for runs in ([both[0], other], [*both, other]):
            with pytest.raises(UserError, match=f"figure 7 needs .*{other.path}"):
                figure7(runs)
    again = read_run(_copy(no_ema, tmp_path / "again"))
    with pytest.raises(UserError, match="exactly one without"):
        figure7([*both, again])
    # a pair of each seed
    seeds = [read_run(_copy(run, tmp_path / f"1-{run.name}", seed=1)) for run in (ema, no_ema)]
    rows = figure7([both[0], *seeds[::-1], both[1]]).axes[:6]
    assert "seed 0, EMA" in rows[0].get_title() and "seed 1, no EMA" in rows[4].get_title()


@pytest.mark.parametrize("draw", [figure3, figure4])
def test_a_run_that_blew_up_says_so_on_the_same_epochs(
    draw: Callable[[Sequence[Run]], Figure], spectrum_runs: Runs, tmp_path: Path
) -> None:
    sound = spectrum_runs["linear"][1]
    blown = _copy(sound, tmp_path / "blown", seed=1)
    with np.load(blown / "spectrum.npz") as stored:
        spectra = dict(stored)
    for name in ("eigenvalues", "alignment"):
        spectra[name][2:] = np.nan
    np.savez(blown / "spectrum.npz", **spectra)
    runs = [read_run(sound), read_run(blown)]
    panels = [axis for axis in draw(runs).axes if axis.get_label() != "<colorbar>"]
    titles = [axis.get_title() for axis in panels[:2]]
    since = runs[1].epochs_T[2]
    assert "NaN" not in titles[0] and f"NaN from epoch {since:.3g}" in titles[1]
    assert len({axis.get_xlim() for axis in panels}) == 1
    assert panels[0].get_xlim()[1] > 24 / 22


def test_labels_say_what_differs_and_no_more(spectrum_runs: Runs, tmp_path: Path) -> None:
    ema, no_ema, linear = (read_run(spectrum_runs[n][1]) for n in ("ema", "no ema", "linear"))
    assert labels([ema]) == ["IsoLoss"]
    assert labels([ema, no_ema]) == ["IsoLoss, EMA", "IsoLoss, no EMA"]
    assert labels([ema, linear]) == ["IsoLoss", "linear predictor"]
    assert labels([ema, ema]) == ["IsoLoss (ema)", "IsoLoss (ema)"]
    seed = _copy(ema.path, tmp_path / "other", seed=3)
    assert labels([ema, read_run(seed)]) == ["IsoLoss, seed 0", "IsoLoss, seed 3"]


def test_a_folders_name_is_no_formula(spectrum_runs: Runs, tmp_path: Path) -> None:
    ema = spectrum_runs["ema"][1]
    folders = [_copy(ema, tmp_path / name) for name in ("a$b_{$", "c$d_{$")]
    assert main(["figures", "3", *map(str, folders), "--output", str(tmp_path)]) == 0
    titles = [axis.get_title() for axis in figure3([read_run(run) for run in folders]).axes]
    assert r"(a\$b_{\$)" in titles[0] and r"(c\$d_{\$)" in titles[1]


@pytest.mark.parametrize("value", [np.nan, 0.0, np.inf])
@pytest.mark.parametrize("number", ["3", "4"])
@pytest.mark.filterwarnings("error")
def test_a_run_without_one_sound_number_is_drawn_without_warnings(
    number: str, value: float, spectrum_runs: Runs, tmp_path: Path
) -> None:
    run = _copy(spectrum_runs["linear"][1], tmp_path / "run")
    with np.load(run / "spectrum.npz") as stored:
        spectra = dict(stored)
    spectra["eigenvalues"][:] = value
    spectra["alignment"][:] = np.nan
    np.savez(run / "spectrum.npz", **spectra)
    assert main(["figures", number, str(run), "--output", str(tmp_path)]) == 0


def _copy(run: Path, to: Path, **settings: Any) -> Path:
    shutil.copytree(run, to)
    config = json.loads((run / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | settings))
    return to


def test_what_cannot_be_drawn_is_refused(
    spectrum_runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ema, no_ema, linear = (str(spectrum_runs[name][1]) for name in ("ema", "no ema", "linear"))
    empty = tmp_path / "empty"
    empty.mkdir()
    bare = _copy(Path(ema), tmp_path / "bare")
    (bare / "metrics.jsonl").write_text("")
    blind = _copy(Path(ema), tmp_path / "blind")
    (blind / "spectrum.npz").unlink()
    torn = _copy(Path(ema), tmp_path / "torn")
    (torn / "spectrum.npz").write_bytes(b"PK\x03\x04cut")
    old = _copy(Path(linear), tmp_path / "old")
    with np.load(old / "spectrum.npz") as stored:
        kept = {name: stored[name] for name in ("step", "eigenvalues")}
    np.savez(old / "spectrum.npz", **kept)
    (tmp_path / "file").write_text("")
    out = ["--output", str(tmp_path / "figures")]
    for arguments, words in (
        (["3", str(tmp_path / "nowhere"), *out], ["nowhere is no run", "not a folder"]),
        (["3", ema, str(empty), *out], ["empty is no run", "config.json", "--run-dir"]),
        (["3", str(bare), *out], ["no records in metrics.jsonl"]),
        (["3", str(blind), *out], ["no eigenvalues in spectrum.npz"]),
        (["3", str(torn), *out], ["cannot read the run", "torn"]),
        (["4", linear, ema, *out], ["has method isoloss", "--set method.name=linear"]),
        (["4", str(old), *out], ["old has method linear and no alignment"]),
        (["7", ema, linear, *out], ["one without", "--set method.ema=false", "IsoLoss"]),
        (["8", ema, no_ema, *out], ["all runs have 0.0001", "--set optimizer.weight_decay"]),
        (["3", ema, "--output", str(tmp_path / "file")], ["cannot write", "--output"]),
    ):
        assert main(["figures", *arguments]) == 2
        shown = capsys.readouterr()
        assert shown.out == "" and "Traceback" not in shown.err
        assert all(word in shown.err for word in words), (words, shown.err)
    assert not (tmp_path / "figures").exists()
    with pytest.raises(SystemExit, match="2"):
        main(["figures", "5", ema, *out])
    assert "choose from 3, 4, 7, 8" in capsys.readouterr().err
