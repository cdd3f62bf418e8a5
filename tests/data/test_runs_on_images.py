"""Runs with unlabelled images, and with images that cannot be read."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from isofast.config.load import load_config, validate
from isofast.data.images import data_set_notes
from isofast.run.metrics import read_metrics
from isofast.training.build import build
from isofast.training.loop import fit

from ..support.runs import forked, launched, train

pytestmark = pytest.mark.slow


@pytest.fixture
def half_labelled(own_digits: Path) -> Path:
    """The digits, with the last five classes unlabelled and one of their images damaged."""
    root = own_digits
    (root / "unlabeled").mkdir()
    for label in "56789":
        for path in sorted((root / "train" / label).iterdir()):
            path.rename(root / "unlabeled" / f"{label}-{path.name}")
        shutil.rmtree(root / "train" / label)
        shutil.rmtree(root / "val" / label)
    (root / "unlabeled" / "7-000.png").write_text("no picture")
    return root


@pytest.mark.long
def test_half_labelled_digits_train_on_two_ranks(config_file, half_labelled, tmp_path):
    (half_labelled / "val" / "3" / "004.png").write_text("no picture")
    config = config_file(
        data={"root": str(half_labelled), "on_bad_image": "skip"},
        evaluation={"every_epochs": 1, "knn_images": 2000},
    )
    printed = train(config, tmp_path / "run", ranks=2)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert printed.count("1 of 1442 train images cannot be read: unlabeled/7-000.png") == 1
    val = len(list((half_labelled / "val").glob("?/*.png")))
    assert printed.count(f"1 of {val} val images cannot be read: val/3/004.png") == 1
    unlabelled = len(list((half_labelled / "unlabeled").iterdir())) - 1
    assert f"1,441 images ({unlabelled:,} without a label) of 5 classes" in printed
    assert summary["completed"] is True
    # chance is 0.2, and labels of -1 in the bank would make the vote impossible
    assert summary["knn_top1"] > 0.5
    assert all(record["probe_loss"] > 0 for record in records if "probe_loss" in record)


def test_ranks_are_told_of_uneven_labels(small, half_labelled, tmp_path):
    data = {"root": str(half_labelled), "on_bad_image": "skip"}
    settings = small(data=data, train={"max_steps": 1})
    assert forked(_fit_uneven, settings, tmp_path / "run", environments=launched(2)) == [0, 0]


def _fit_uneven(settings: dict[str, Any], folder: Path) -> None:
    with mock.patch("isofast.training.loop.build", wraps=build) as built:
        fit(validate(settings), folder)
    assert built.call_args.kwargs == {"uneven_labels": True}


def test_without_validation_images_the_way_out_is_said(
    config_file, half_labelled, tmp_path, refused
):
    shutil.rmtree(half_labelled / "val")
    config = config_file(data={"root": str(half_labelled)}, evaluation={"every_epochs": 1})
    command = ["train", "--config", config, "--run-dir", tmp_path / "run"]
    way_out = ["--set", "evaluation.every_epochs=0"]
    refused(command, " ".join(way_out))
    # and without on_bad_image=skip, a bad image stops the run
    refused([*command, *way_out], "7-000.png", "data.on_bad_image=skip")
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_root_of_another_data_set_is_noted(digits, config_file, tmp_path):
    """A note, not an error: a recipe may be tried on other images."""
    other = load_config(config_file(data={"dataset": "cifar10", "crop": 16}), [])
    (note,) = data_set_notes(other)
    assert f"{digits} holds digits, but data.dataset is cifar10" in note
    for name in ("digits", "imagefolder"):
        assert data_set_notes(load_config(config_file(data={"dataset": name}), [])) == []
    (tmp_path / ".isofast-prepared.json").write_text("{")
    assert data_set_notes(load_config(config_file(data={"root": str(tmp_path)}), [])) == []
    printed = train(
        config_file(data={"dataset": "cifar10", "crop": 16}, train={"max_steps": 1}),
        tmp_path / "run",
    )
    assert printed.count(note) == 1
