"""`isofast figures metrics` draws and writes what the runs recorded."""

import csv
import json
import shutil
from typing import Any

import numpy as np
import pytest
from PIL import Image

from isofast.cli import main
from isofast.errors import UserError
from isofast.paper.metrics_figure import metrics_figure, spearman, table
from isofast.run.metrics import read_metrics, read_spectra
from isofast.run.stored import labels, read_run

NAMES = ("rankme", "lidar", "alpha_req", "uniformity", "view_alignment")


def rows_of(*pairs: tuple[float | None, float]) -> list[dict[str, Any]]:
    return [{"m": value, "knn_top1": accuracy} for value, accuracy in pairs]


def test_spearman_is_the_correlation_of_ranks():
    random = np.random.default_rng(0)
    values, accuracies = random.exponential(size=(2, 30))
    ranks = values.argsort().argsort(), accuracies.argsort().argsort()
    rows = rows_of(*zip(values, accuracies, strict=True), (None, 0.5))
    found, count = spearman(rows, "m")
    assert found == pytest.approx(np.corrcoef(*ranks)[0, 1]) and count == 30
    assert spearman(rows_of((1, 0.1), (20, 0.2), (300, 0.9)), "m") == (pytest.approx(1), 3)
    for none in (rows_of((1, 0.1), (2, 0.2)), rows_of((1, 0.1), (1, 0.2), (1, 0.3))):
        assert np.isnan(spearman(none, "m")[0])


@pytest.mark.slow
def test_metrics_of_two_runs(evaluated_run, tmp_path, capsys):
    # the same run as from an earlier version, without the metrics
    old = tmp_path / "old"
    shutil.copytree(evaluated_run, old)
    records = read_metrics(old / "metrics.jsonl")
    kept = [{k: v for k, v in one.items() if k.removesuffix("_z") not in NAMES} for one in records]
    (old / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in kept))

    output = tmp_path / "new" / "folder"
    command = ["figures", "metrics", str(evaluated_run), str(old), "--output", str(output)]
    assert main(command) == 0
    paths = [output / "metrics.png", output / "metrics.csv"]
    assert capsys.readouterr().out.split() == [str(path) for path in paths]
    with Image.open(paths[0]) as image:
        assert image.width > 1500 and len(np.unique(np.asarray(image.convert("L")))) > 20

    with paths[1].open(newline="") as file:
        rows = list(csv.DictReader(file))
    evaluations = [one for one in records if "knn_top1" in one]
    assert [int(row["step"]) for row in rows] == [0, 22, 44] * 2
    assert [row["final"] for row in rows] == ["False", "False", "True"] * 2
    spectra = read_spectra(evaluated_run / "spectrum.npz")
    for row, want in zip(rows[:3], evaluations, strict=True):
        for name in ("knn_top1", "val_top1", *NAMES, *(f"{name}_z" for name in NAMES)):
            assert float(row[name]) == want[name]
        rank = spectra[want["step"]].effective_rank if want["step"] else None
        assert row["effective_rank"] == ("" if rank is None else str(rank))
    assert all(row["rankme"] == "" for row in rows[3:])

    panels = metrics_figure(table([read_run(evaluated_run), read_run(old)])).axes
    titles = [axis.get_title() for axis in panels if axis.get_title()]
    assert len(titles) == 12 and titles[0] == "rankme of features"
    # of the last evaluations alone, where the metric rises and the accuracy falls
    three = [
        row | {"run": str(k), "name": "no" * 40, "rankme": row["rankme"] + 100 * k, "knn_top1": -k}
        for k in range(3)
        for row in table([read_run(evaluated_run)])
    ]
    figure = metrics_figure(three)
    assert figure.axes[0].get_title() == "rankme of features\nSpearman -1.00 (n = 3 runs)"
    # long names lie within the figure, below the panels
    figure.draw_without_rendering()
    inside, whole = figure.legends[0].get_window_extent(), figure.bbox
    assert whole.x0 <= inside.x0 and inside.x1 <= whole.x1
    assert inside.y1 <= figure.axes[-1].get_window_extent().y0
    for panel, key in ((panels[0], "rankme"), (panels[5], "rankme_z")):
        points = [[one[key], one["knn_top1"]] for one in evaluations]
        assert panel.lines[0].get_xydata().tolist() == points
        assert panel.collections[0].get_offsets().tolist() == points[-1:]
    named = [dots.get_label() for dots in panels[0].collections]
    assert named == labels([read_run(evaluated_run), read_run(old)])
    assert len(metrics_figure(table([read_run(old)])).axes) == 2
    with pytest.raises(UserError, match=r"evaluation\.metrics_images"):
        metrics_figure(table([read_run(old)])[:1])


@pytest.mark.slow
def test_runs_without_evaluations_are_told(spectrum_runs, tmp_path, refused):
    command = ["figures", "metrics", spectrum_runs["ema"][1], "--output", tmp_path / "o"]
    refused(command, "evaluation.every_epochs=1")
    assert not (tmp_path / "o").exists()
