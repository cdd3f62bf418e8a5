"""`isofast evaluate` on a digits run, against scikit-learn."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from isofast.cli import main
from isofast.config.schema import EncoderConfig
from isofast.data import EvalLoader, check_folder, open_dataset, recipe_for
from isofast.evaluation.intervals import wilson
from isofast.evaluation.offline import GRID_C, Report, Result
from isofast.methods.networks import make_encoder
from isofast.run.metrics import read_metrics
from isofast.training.online import clean_loader

from ..support.runs import ISOFAST, call

Array = npt.NDArray[Any]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(evaluated_run: Path) -> dict[str, Any]:
    """The command's output for all protocols and both named baselines."""
    command = [*ISOFAST, "evaluate", str(evaluated_run), "--baselines", "random,pixels", "--json"]
    return json.loads(call(command).stdout)


def results(report: dict[str, Any], baseline: str | None, protocol: str) -> list[dict[str, Any]]:
    what = baseline, protocol
    return [one for one in report["results"] if (one["baseline"], one["protocol"]) == what]


@pytest.fixture(scope="module")
def features(evaluated_run: Path, digits: Path) -> list[Array]:
    """Train and validation features and labels, from torchvision's network in eval mode."""
    (path,) = evaluated_run.glob("checkpoints/step_*44/encoder.safetensors")
    stem = json.loads((evaluated_run / "config.json").read_text())["encoder"]["stem"]
    encoder = make_encoder(EncoderConfig(width=4, stem=stem))
    encoder.load_state_dict(load_file(path))
    splits = []
    for split in ("train", "val"):
        images = check_folder(open_dataset(digits, split))
        options: Any = {"batch_size": 2000, "device": torch.device("cpu"), "threads": 1}
        loader = EvalLoader("dali", images, recipe_for("digits"), range(len(images)), **options)
        ((x_NCHW, y_N),) = loader
        with torch.no_grad():
            splits += [encoder.eval()(x_NCHW).numpy(), y_N.numpy()]
    return splits


def test_knn_is_scikit_learns(report, features):
    train_NF, train_y_N, val_MF, val_y_M = features
    for k, result in zip((20, 200), results(report, None, "knn"), strict=True):
        vote = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
        )
        want = vote.fit(train_NF, train_y_N).score(val_MF, val_y_M)
        # either class may win a tie
        assert result["value"] == pytest.approx(want, abs=1 / 355)


def test_the_linear_probe_is_scikit_learns(report, features):
    train_NF, train_y_N, val_MF, val_y_M = features

    def probe(c: float) -> Any:
        return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=500))

    fit, hold, fit_y, hold_y = train_test_split(
        train_NF, train_y_N, test_size=0.2, stratify=train_y_N, random_state=0
    )
    scores = {c: probe(c).fit(fit, fit_y).score(hold, hold_y) for c in GRID_C}
    (result,) = results(report, None, "linear")
    assert scores[result["C"]] == max(scores.values())
    want = probe(result["C"]).fit(train_NF, train_y_N).score(val_MF, val_y_M)
    assert result["value"] == pytest.approx(want, abs=1 / 355)


def test_few_labels_are_drawn_for_each_seed(report, features):
    """The mean over five draws equals that of thirty by hand, within their spread."""
    train_NF, train_y_N, val_MF, val_y_M = features
    scaler = StandardScaler().fit(train_NF)
    rows = results(report, None, "few")
    assert [row["labels_per_class"] for row in rows] == [1, 5, 10]
    assert [row["value"] for row in rows] == sorted(row["value"] for row in rows)
    for row in rows:
        assert row["seeds"] == [0, 1, 2, 3, 4] and row["std"] > 0
        scores = []
        for seed in (*row["seeds"], *range(100, 130)):
            order = np.random.default_rng(seed).permutation(len(train_NF))
            of_classes = [order[train_y_N[order] == label] for label in range(10)]
            some = np.concatenate([these[: row["labels_per_class"]] for these in of_classes])
            model = LogisticRegression(max_iter=500)
            model.fit(scaler.transform(train_NF[some]), train_y_N[some])
            scores.append(model.score(scaler.transform(val_MF), val_y_M))
        own, scores = scores[:5], scores[5:]
        assert row["std"] == pytest.approx(np.std(own, ddof=1), rel=0.1)
        assert row["value"] == pytest.approx(np.mean(scores), abs=3 * np.std(scores) / 5**0.5)


def test_baselines_and_the_run_are_what_training_knew(report, evaluated_run):
    """The same network before and after training, with the same 200 neighbours voting."""
    records = [r for r in read_metrics(evaluated_run / "metrics.jsonl") if "knn_top1" in r]
    known = {"random": records[0]["knn_top1"], None: records[-1]["knn_top1"], "pixels": 0.972}
    for name, top1 in known.items():
        assert results(report, name, "knn")[1]["value"] == pytest.approx(top1, abs=0.003)
    assert report["step"] == records[-1]["step"] == 44


def test_everything_is_in_the_json(report, evaluated_run):
    assert (report["classes"], report["train_images"], report["val_images"]) == (10, 1442, 355)
    assert report["run"] == str(evaluated_run) and report["notes"] == []
    assert len(report["results"]) == 3 * (2 + 1 + 3)
    for result in report["results"]:
        low, high = result["interval"]
        assert 0 <= low < result["value"] < high <= 1 and result["n"] == 355
        assert (low, high) == wilson(result["value"], 355)
        given = {key for key, value in result.items() if value is not None}
        few = {"C", "labels_per_class", "std", "seeds"}
        own = {"knn": {"k"}, "linear": {"C"}, "few": few}
        always = {"protocol", "value", "interval", "n"}
        assert given - {"baseline"} == always | own[result["protocol"]]


def test_a_file_of_weights_is_a_baseline(evaluated_run, tmp_path, capsys):
    """The first checkpoint with a classifier, as in torchvision's files; in 80 columns."""
    path = tmp_path / f"{'long-' * 20}name.safetensors"
    (early,) = evaluated_run.glob("checkpoints/step_*22/encoder.safetensors")
    save_file(load_file(early) | {"fc.weight": torch.zeros(10, 32)}, path)
    options = ["--protocol", "knn", "--baselines", str(path), "--train-images", "150"]
    assert main(["evaluate", str(evaluated_run), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "150 training and 355 validation images, 10 classes" in lines[1]
    assert all(len(line) <= 80 for line in lines[1:])
    settings = [line.split("  ")[1] for line in lines if "k-NN" in line]
    # a bank of 150 images cannot give 200 neighbours
    assert settings == ["k-NN, k = 20", "k-NN, k = 150"]
    assert sum("...name.safetensors"[-14:] in line for line in lines) == 2


def test_the_printed_table_has_the_numbers():
    result = Result(None, "few", 0.5, (0.4, 0.6), 355, labels_per_class=5, std=0.0123)
    *_, line = str(Report("run", "", 44, "", 10, 1442, 355, [result], [])).splitlines()
    few = "few labels, 5 a class the run 0.500 [0.400, 0.600] 0.012"
    assert " ".join(line.split()) == few


def test_what_cannot_be_evaluated_is_told(evaluated_run, digits, tmp_path, refused):
    young, wide, bad = (tmp_path / name for name in ("young", "wide.safetensors", "bad.pth"))
    young.mkdir()
    shutil.copy(evaluated_run / "config.json", young)
    save_file(make_encoder(EncoderConfig(width=8, stem="cifar")).state_dict(), wide)
    bad.write_bytes(b"no weights")
    unlabelled, no_val = tmp_path / "unlabelled", tmp_path / "no_val"
    shutil.copytree(digits / "train" / "0", unlabelled / "unlabeled")
    shutil.copytree(digits / "train", no_val / "train")
    for split in ("train", "val"):
        shutil.copytree(digits / split / "0", tmp_path / "one" / split / "0")
    refused(["evaluate", tmp_path], "is not a run")
    refused(["evaluate", young], "no checkpoint yet", "every 22 steps")
    for options, words in (
        (["--baselines", "random,nets"], ["no file nets", "random, pixels"]),
        (["--baselines", wide], ["do not fit the encoder", "bn1.bias (4 here, 8 there)"]),
        (["--baselines", bad], ["cannot read the weights"]),
        (["--root", unlabelled], ["no labels", "isofast figures 3"]),
        (["--root", tmp_path / "one"], ["have one class", "two classes or more"]),
        (["--root", no_val], ["no folder val", "--root"]),
        (["--root", tmp_path / "gone"], ["is not a folder"]),
        (["--train-images", "20"], ["at least one of each class", "--protocol knn"]),
        (["--train-images", "5", "--protocol", "few"], ["none of the 5"]),
    ):
        assert refused(["evaluate", evaluated_run, *options], *words) == ""


def test_images_have_the_size_of_the_run(evaluated_run, tmp_path, monkeypatch):
    run, sizes = tmp_path / "run", []
    shutil.copytree(evaluated_run, run)
    config = json.loads((run / "config.json").read_text())
    config["data"]["crop"] = 12
    (run / "config.json").write_text(json.dumps(config))

    def loader(config: Any, images: Any, recipe: Any, *rest: Any) -> EvalLoader:
        sizes.append(recipe.crop)
        return clean_loader(config, images, recipe, *rest)

    monkeypatch.setattr("isofast.evaluation.offline.clean_loader", loader)
    assert main(["evaluate", str(run), "--protocol", "knn"]) == 0
    assert sizes == [12, 12]


def test_unlabelled_images_take_no_part(evaluated_run, own_digits, capsys):
    (own_digits / "unlabeled").mkdir()
    for path in (own_digits / "train" / "3").glob("00*.png"):
        path.rename(own_digits / "unlabeled" / path.name)
    options = ["--protocol", "knn", "--root", str(own_digits), "--json"]
    assert main(["evaluate", str(evaluated_run), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    left = 1442 - len(list((own_digits / "unlabeled").iterdir()))
    assert report["train_images"] == left < 1442


def test_too_few_labels_are_left_out_and_noted(evaluated_run, capsys):
    options = ["--protocol", "few", "--train-images", "110", "--json"]
    assert main(["evaluate", str(evaluated_run), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [result["labels_per_class"] for result in report["results"]] == [1, 5]
    assert any("no 10 labels per class" in note for note in report["notes"])
