"""`isofast report` on real runs: what it says, well-formed and self-contained, and in a browser."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from isofast.cli import main
from isofast.config.load import validate
from isofast.evaluation.embed import embed
from isofast.evaluation.intervals import newcombe
from isofast.evaluation.pictures import look
from isofast.run.labelfree import rankme
from isofast.run.metrics import read_metrics
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
