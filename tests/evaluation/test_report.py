"""`isofast report` on real runs: what it says, well-formed and self-contained, and in a browser."""

import base64
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from markupsafe import Markup
from matplotlib.colors import to_rgb
from PIL import Image
from sklearn.neighbors import NearestNeighbors

from isofast.cli import main
from isofast.config.load import validate
from isofast.evaluation.chart import Line, chart
from isofast.evaluation.embed import embed
from isofast.evaluation.intervals import newcombe
from isofast.evaluation.pictures import CLASS_COLORS, Measured, Pictures, _map, _Sample, look
from isofast.evaluation.report import write_report
from isofast.evaluation.verdict import Verdict, judge
from isofast.run.labelfree import rankme
from isofast.run.metrics import read_metrics
from isofast.run.stored import read_run
from isofast.training.online import knn_top1

from ..support.runs import train

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium")


class Page(HTMLParser):
    """A parsed page: its text in order, its tags and their attributes; no tag may stay open."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        assert path.stat().st_size < 3e6
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert self._open == []
        self.text = " ".join(" ".join(self.words).split())
        self._check()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "title"} & set(self._open):
            self.words.append(data)

    def _check(self) -> None:
        """Nothing is loaded from elsewhere, and a screen reader has text for everything."""
        for tag, attributes in self.tags:
            for name in ("src", "href", "xlink:href"):
                assert str(attributes.get(name, "#")).startswith(("data:", "#")), tag
            assert tag != "script"
            assert tag != "img" or attributes["alt"]
            assert tag != "svg" or (attributes["role"] == "img" and attributes["aria-label"])
            assert tag != "th" or attributes["scope"] in ("row", "col")
        assert ("html", {"lang": "en"}) in self.tags

    @property
    def images(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == "img"]


def report(tmp_path: Path, *runs: Path, options: tuple[str, ...] = ()) -> Page:
    output = tmp_path / "report.html"
    assert main(["report", *map(str, runs), "--output", str(output), *options]) == 0
    return Page(output)


def test_a_run_is_judged_by_what_it_gained(evaluated_run, tmp_path, digits, monkeypatch):
    # a run is named after its folder, even from inside it
    monkeypatch.chdir(evaluated_run)
    page = report(tmp_path, Path())
    records = [json.loads(line) for line in (evaluated_run / "metrics.jsonl").open()]
    before, *_, after = (one["knn_top1"] for one in records if "knn_top1" in one)
    low, high = newcombe(after, before, 355, 355)
    assert f"{after:.3f}, before {before:.3f}: {after - before:+.3f}" in page.text
    assert f"interval [{low:+.3f}, {high:+.3f}] from 355 images" in page.text
    said = "Learned" if low > 0 else "Worse" if high < 0 else "No gain"
    assert page.text.startswith(f"Run evaluated {said}")
    assert "has not ended" not in page.text and "on the sample" not in page.text
    assert f"before training k-NN, k = 200 {before:.3f} " in page.text
    steps = [one for one in records if "loss" in one]
    first, last = (steps[k]["effective_rank"] for k in (0, -1))
    assert f"effective rank of C, participation ratio {first:.3g} {last:.3g} " in page.text
    probe = records[-1]["val_top1"]
    assert f" {steps[-1]['probe_top1']:.3g} {probe:.3g} {after:.3g} {last:.3g} " in page.text
    # as they do on digits in so short a run
    assert "Raw pixels do at least as well: 0.9" in page.text
    # eight queries with six neighbours each, and the map
    assert len(page.images) == 8 * 7 + 1


def test_a_run_is_compared_with_the_weights_it_began_with(evaluated_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(evaluated_run, run)
    config = json.loads((run / "config.json").read_text())
    # the weights it ended with, so that it gained nothing
    config["encoder"]["init"] = str(run)
    (run / "config.json").write_text(json.dumps(config))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if "knn" not in line))
    page = report(tmp_path, run)
    assert page.text.startswith("Run run No gain over the initial weights can be shown")
    assert ": +0.000, 95 % interval" in page.text
    assert "Too short to be judged for a collapse to few dimensions: 44 of 200" in page.text
    # which may be gone
    config["encoder"]["init"] = str(tmp_path / "gone.pth")
    (run / "config.json").write_text(json.dumps(config))
    text = report(tmp_path, run).text
    assert "the untrained network" in text and "initial weights" not in text
    summary = json.loads((run / "summary.json").read_text()) | {"failure": "a rank was lost"}
    (run / "summary.json").write_text(json.dumps(summary))
    assert report(tmp_path, run).text.startswith("Run run Failed: a rank was lost.")


def test_a_sample_stands_in_for_evaluations(evaluated_run):
    run = replace(read_run(evaluated_run), evaluations=[])
    names = ("this run", "untrained network", "raw pixels")

    def judged(*top1: float | None) -> Verdict:
        measured = [
            Measured(name, one, rank, -rank / 10)
            for name, one, rank in zip(names, top1, (20.0, 10.0, 5.0), strict=True)
        ]
        return judge(run, {"failure": None}, None, Pictures("", 355, [], "", "", [], measured))

    learned = judged(0.9, 0.5, 0.95)
    assert learned.word == "learned" and "0.900, before 0.500: +0.400" in learned.headline
    pixels = "Raw pixels do at least as well: 0.950, this run 0.900, on a sample."
    assert pixels in learned.reasons
    reasons = " ".join(judged(None, None, None).reasons)
    assert "features: 20.0, untrained network 10.0; uniformity -2.00, untrained" in reasons
    last = run.records[-1]
    assert f"embeddings: {4 * last['embedding_std']:.0%} of the healthy" in reasons
    assert f"Effective rank of C: {last['effective_rank']:.1f} of 16." in reasons
    first = {**last, "step": 1, "embedding_std": 0.0}
    recovered = judge(replace(run, records=[first, last]), {"failure": None}, 355, None).reasons
    assert "Earlier records show a collapse (see the warnings); the last one does not." in recovered
    # a run still going on has no summary
    collapsed = replace(run, records=[*run.records[:-1], last | {"embedding_std": 0.0}])
    verdict = judge(collapsed, {}, 355, None)
    assert verdict.word == "collapsed" and "The run has not ended: epoch 2 of 2." in verdict.reasons


def test_charts_show_each_run_in_its_colour(spectrum_runs, tmp_path, monkeypatch):
    drawn: list[list[Line]] = []

    def chart(lines: list[Line], **_: Any) -> Markup:
        drawn.append(lines)
        return Markup()

    monkeypatch.setattr("isofast.evaluation.report.chart", chart)
    folders = [spectrum_runs[name][1] for name in ("ema", "linear")]
    write_report(folders, tmp_path / "report.html", pictures=False)
    runs = [read_run(folder) for folder in folders]
    for lines, run in zip(drawn, runs, strict=False):
        assert lines[-1].label == "1" and len(lines) > 8
        for line in lines:
            assert np.array_equal(line.values_T, run.eigenvalues_TD[:, int(line.label) - 1])
    for place, (line, run) in enumerate(zip(drawn[2], runs, strict=True)):
        assert line.values_T.tolist() == [record["loss"] for record in run.records]
        assert line.color == place


def test_a_chart_shows_all_of_a_curve():
    epochs_T = np.arange(1000.0)
    values_T = 10 ** (-epochs_T / 100 + np.random.default_rng(0).random(1000) / 5)
    svg = chart([Line("a", epochs_T, values_T)], log=True)
    assert f"a: from {values_T[0]:.3g} to {values_T[-1]:.3g}, between " in svg
    path = max(re.findall(r'd="([^"]*)"', svg), key=len)
    x, y = np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", path), float).T
    # SVG's y grows downwards
    assert np.corrcoef(x, y)[0, 1] > 0.99
    assert ">800</text>" in svg


def test_a_map_frames_images_in_their_classes_colours():
    labels_N = np.arange(40) % 10
    pixels_NHW3 = np.broadcast_to(25 * labels_N[:, None, None, None], (40, 8, 8, 3))
    sample = _Sample(np.uint8(pixels_NHW3), labels_N, [""] * 40)
    uri, _ = _map(torch.randn(40, 5), sample, True)
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        sheet = np.asarray(image.convert("RGBA")).astype(int)
    tiles = sheet.reshape(20, 30, 30, 30, 4).swapaxes(1, 2).reshape(-1, 30, 30, 4)
    shown = [tile for tile in tiles if tile[15, 15, 3]]
    assert len(shown) > 20
    for tile in shown:
        hues = 255 * np.array([to_rgb(color) for color in CLASS_COLORS])
        frame = np.abs(hues - tile[1, 1:-1, :3].mean(0)).sum(1).argmin()
        assert frame == round(tile[15, 15, 0] / 25)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [(0.5, 0.9, "Learned: better"), (0.9, 0.5, "Worse than"), (0.5, 0.52, "No gain over")],
)
def test_a_gain_must_exceed_chance(evaluated_run, tmp_path, before, after, said):
    """In a run whose first record shows a collapse, from which it recovered."""
    run = shutil.copytree(evaluated_run, tmp_path / "run")
    records = read_metrics(run / "metrics.jsonl")
    for record in records:
        record |= {"knn_top1": after if record["step"] else before} if "knn_top1" in record else {}
        record |= {"embedding_std": 0.0} if record["step"] == 1 else {}
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    page = report(tmp_path, run, options=("--root", str(tmp_path / "gone")))
    assert page.text.startswith(f"Run run {said}")


def test_neighbours_are_scikit_learns(evaluated_run, digits, tmp_path):
    config = validate(json.loads((evaluated_run / "config.json").read_text()))
    found = {}
    for split in ("train", "val"):
        embed(evaluated_run, digits / split, tmp_path / "f.npz")
        with np.load(tmp_path / "f.npz") as stored:
            names = [f"{split}/{name}" for name in stored["filenames"]]
            found[split] = dict(zip(names, stored["embeddings"], strict=True))
    pictures = look(evaluated_run, config, digits)
    drawn = np.sort(np.random.default_rng(0).permutation(1442)[:1000])
    bank = [[*found["train"]][k] for k in drawn]
    search = NearestNeighbors(n_neighbors=6, metric="cosine")
    search.fit(np.stack([found["train"][name] for name in bank]))
    for query, *near in pictures.rows:
        distances, places = search.kneighbors(found["val"][query.alt][None])
        want = [
            f"{bank[place]}, similarity {1 - distance:.2f}"
            for distance, place in zip(distances[0], places[0], strict=True)
        ]
        assert [thumb.alt for thumb in near] == want
        assert [thumb.agrees for thumb in near] == [t.caption == query.caption for t in near]

    # 1,000 of the 1,442 that an evaluation searches: as many fewer neighbours vote
    def rows(split: str, names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        classes = torch.tensor([int(name.split("/")[-2]) for name in names])
        return torch.from_numpy(np.stack([found[split][name] for name in names])), classes

    top1 = knn_top1(*rows("train", bank), *rows("val", [*found["val"]]), classes=10, k=139)
    assert pictures.measured[0].knn_top1 == pytest.approx(top1, abs=0.003)
    queries, _ = rows("val", [*found["val"]])
    assert pictures.measured[0].rankme == pytest.approx(rankme(queries), rel=1e-3)
    variance = np.linalg.svd((queries - queries.mean(0)).numpy(), compute_uv=False) ** 2
    shares = variance[:2] / variance.sum()
    assert f"({shares[0]:.0%} and {shares[1]:.0%} of the variance)" in pictures.map_alt
    assert config.evaluation.knn_k == 200


def test_runs_stand_side_by_side_and_need_no_data(spectrum_runs, evaluated_run, digits, tmp_path):
    moved = tmp_path / "<b>moved"
    shutil.copytree(evaluated_run, moved)
    text = (moved / "config.json").read_text()
    (moved / "config.json").write_text(text.replace(str(digits), str(tmp_path / "gone")))
    # as in runs of earlier versions
    (moved / "environment.json").unlink()
    page = report(tmp_path, moved, spectrum_runs["linear"][1])
    assert "2 runs: <b>moved, linear" in page.text
    assert "No pictures: the data root" in page.text and "gone is not a folder" in page.text
    assert "No interval: the number of validation images is not known" in page.text
    assert "on a sample of 355 validation images" in page.text
    assert len(page.images) == 8 * 7 + 1
    page = report(tmp_path, moved, options=("--root", str(digits)))
    assert "No pictures" not in page.text and "from 355 images" in page.text
    # as if the run had failed before its first evaluation
    metrics = moved / "metrics.jsonl"
    kept = [r for r in read_metrics(metrics) if r["step"] == 0 or "knn_top1" not in r]
    metrics.write_text("".join(json.dumps(record) + "\n" for record in kept))
    text = report(tmp_path, moved).text
    assert "nothing to compare it with: the trained network was not evaluated" in text


def test_without_labels_it_says_so(config_file, digits, tmp_path):
    """The report that a run writes into its folder, without any validation images."""
    root = tmp_path / "pictures"
    (root / "unlabeled").mkdir(parents=True)
    for path in sorted(digits.glob("train/*/*"))[::10]:
        shutil.copy(path, root / "unlabeled" / f"{path.parent.name}-{path.name}")
    config = config_file(data={"dataset": "imagefolder", "root": str(root), "crop": 16})
    shown = train(config, tmp_path / "run", report=True)
    assert f"report: {tmp_path / 'run' / 'report.html'}" in shown
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "images without labels" in shown
    assert summary["completed"] is True and summary["val_top1"] is None
    assert [record["probe_loss"] for record in records] == [None] * summary["steps"]
    assert "probe" not in shown
    page = Page(tmp_path / "run" / "report.html")
    assert page.text.startswith("Run run Judged without labels")
    assert "Probe top-1, training views" not in page.text
    assert all(word in page.text for word in ("RankMe of the features", "no number says"))
    for queried in (page.images[k : k + 7] for k in range(0, 56, 7)):
        # no image is its own neighbour
        assert len({one["alt"].split(",")[0] for one in queried}) == 7


def test_a_collapsed_run_says_so_first(config_file, tmp_path):
    """Weight decay alone shrinks the projector to its bias: all embeddings become equal."""
    config = config_file(
        optimizer={"name": "sgd", "lr": 1e-9, "weight_decay": 2e9},
        schedule={"warmup_epochs": 0},
        train={"on_collapse": "stop", "max_steps": 20},
    )
    assert "collapsed" in train(config, tmp_path / "run", code=1, report=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["completed"] is False and "collapsed completely" in summary["failure"]
    assert summary["collapse"] == summary["failure"]
    for page in (Page(tmp_path / "run" / "report.html"), report(tmp_path, tmp_path / "run")):
        assert page.text.startswith("Run run Collapsed: the embeddings have collapsed completely")
        assert "Try " in page.text
    blown = dict.fromkeys(("collapse", "failure"), "the loss became NaN")
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary | blown))
    text = report(tmp_path, tmp_path / "run").text
    assert text.startswith("Run run Diverged: the loss became NaN.")


def test_what_has_no_report_is_told(evaluated_run, tmp_path, refused):
    young = tmp_path / "young"
    young.mkdir()
    shutil.copy(evaluated_run / "config.json", young)
    elsewhere = tmp_path / "no" / "report.html"
    refused(["report", tmp_path], "is not a run")
    refused(["report", young], "no records in metrics.jsonl yet")
    refused(["report", evaluated_run, "--output", elsewhere], "there is no folder")


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on PATH")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_asks_for_nothing_and_cuts_nothing_off(evaluated_run, tmp_path, width):
    report(tmp_path, evaluated_run, evaluated_run.parent / "evaluated")
    page = tmp_path / "report.html"
    # measured inside an iframe: headless Chromium's window cannot be as narrow as a phone
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe id="f" src="report.html" width="{width}" height="900"></iframe><script>'
        "f.onload = () => { const d = f.contentDocument.documentElement; document.title = "
        "d.scrollWidth + ' ' + d.clientWidth + ' ' + "
        "f.contentWindow.performance.getEntriesByType('resource')"
        ".filter(e => !e.name.startsWith('data:')).length }</script>"
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    flags += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += ["--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run(
        [CHROMIUM, *flags, frame.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert page.is_file() and "CONSOLE" not in done.stderr, done.stderr
    title = re.search(r"<title>(\d+) (\d+) (\d+)</title>", done.stdout)
    assert title is not None, done.stdout[:500]
    scroll, client, requests = map(int, title.groups())
    assert scroll <= client and requests == 0
