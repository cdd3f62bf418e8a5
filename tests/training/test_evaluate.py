"""k-NN against scikit-learn's, evaluation in eval mode, label-free metrics."""

import json
import time
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from isofast.config.schema import Config
from isofast.data import UNLABELLED, Recipe, recipe_for
from isofast.data.images import Images, check_images, list_images
from isofast.distributed import World, gather_rows
from isofast.errors import UserError
from isofast.run.labelfree import label_free
from isofast.run.metrics import read_metrics
from isofast.training.build import build
from isofast.training.online import Evaluator, knn_top1
from isofast.training.stall import StallWatch

from ..data.conftest import eval_loader
from ..support.runs import ALONE, fit_apart


@pytest.mark.parametrize("k", [1, 7, 200], ids=lambda k: f"k{k}")
def test_knn_is_a_weighted_vote(k):
    torch.manual_seed(0)
    bank, bank_y = torch.randn(60, 8), torch.randint(5, (60,))
    query, query_y = torch.randn(40, 8), torch.randint(5, (40,))
    kind = {"metric": "cosine", "weights": lambda distance: np.exp((1 - distance) / 0.5)}
    arrays = (tensor.numpy() for tensor in (bank, bank_y, query, query_y))
    known, known_y, asked, asked_y = arrays
    expected = KNeighborsClassifier(min(k, 60), **kind).fit(known, known_y).score(asked, asked_y)
    got = knn_top1(bank, bank_y, query, query_y, classes=5, k=k, temperature=0.5)
    assert got == pytest.approx(expected)


def test_knn_votes_do_not_overflow_at_low_temperatures():
    bank, bank_y = torch.tensor([[1.0, 0.0], [0.9, 0.436]]), torch.tensor([1, 0])
    query = torch.tensor([[1.0, 0.0]])
    for temperature in (0.02, 0.01, 0.001):
        got = knn_top1(bank, bank_y, query, torch.tensor([1]), classes=2, temperature=temperature)
        assert got == 1.0


def test_knn_in_pieces_counts_every_query():
    bank = torch.eye(4)
    query_y = torch.arange(2500) % 4
    assert knn_top1(bank, torch.arange(4), bank[query_y], query_y, classes=4, k=1) == 1.0
    assert knn_top1(bank, torch.arange(4), bank[query_y], (query_y + 1) % 4, classes=4, k=1) == 0.0


KNN = {"knn_images": 99, "knn_k": 40, "knn_temperature": 0.5}


def evaluator_of(config: Config, world: World = ALONE) -> tuple[Evaluator, Images, Recipe]:
    images = check_images(config, list_images(config))
    recipe = recipe_for("digits", augmentation=config.data.augmentation)
    watch = StallWatch(config.data, 0)
    evaluator = Evaluator(config, images.train, images.val, recipe, world, watch, backend="dali")
    return evaluator, images, recipe


def test_metrics_without_labels_are_of_a_fixed_sample(small_config):
    """The sample here is all 355 validation images; no random number is drawn."""

    def config(**evaluation: int) -> Config:
        sections = {"evaluation": {"every_epochs": 1, **KNN, **evaluation}}
        return small_config(**sections, seed=3, train={"cuda_graph": "on", "precision": "fp32"})

    evaluator, images, recipe = evaluator_of(config())
    online = build(config(), ALONE, 10).online.train()
    before = torch.get_rng_state(), [buffer.clone() for buffer in online.buffers()]
    with mock.patch("isofast.training.online.gather_rows", wraps=gather_rows) as gathered:
        evaluation = evaluator(online)
    assert gathered.call_count == 5
    found = evaluation.label_free()
    assert len(evaluator._views.flatten(1).unique(dim=0)) == 1000
    assert torch.equal(torch.get_rng_state(), before[0]) and online.training
    assert all(map(torch.equal, online.buffers(), before[1]))

    ((x_NCHW, y_N),) = eval_loader(images.val, recipe, range(355), batch_size=355)
    bank = np.random.default_rng(config().seed).permutation(len(images.train))[:99]
    ((bank_NCHW, bank_y_N),) = eval_loader(images.train, recipe, bank, batch_size=99)
    online.eval()
    with torch.no_grad():
        h_NF, z_ND = online.branch(x_NCHW)
        bank_NF = online.branch.features(bank_NCHW)
        right = (online.probe(h_NF).argmax(1) == y_N).sum().item()
    assert evaluation.val_top1 == right / 355
    kind = {"k": 40, "temperature": 0.5}
    right = knn_top1(bank_NF, bank_y_N, h_NF, y_N, classes=10, **kind)
    # another batch size may round features, and so a vote, differently
    assert evaluation.knn_top1 == pytest.approx(right, abs=2 / 355)
    right = knn_top1(bank_NCHW.flatten(1), bank_y_N, x_NCHW.flatten(1), y_N, classes=10, **kind)
    assert evaluator.pixels() == pytest.approx(right, abs=1 / 355)
    views = torch.zeros(2, 2, 2)
    for suffix, x in (("", h_NF), ("_z", z_ND)):
        want = label_free(x, views)
        for name in ("rankme", "alpha_req", "uniformity"):
            assert found[name + suffix] == pytest.approx(want[name], rel=1e-3), name + suffix
        assert 1 < found[f"lidar{suffix}"] < 100
        assert 0 < found[f"view_alignment{suffix}"] < 2
    assert len(found) == 10

    # another evaluator uses the same images and views, a smaller sample different ones
    assert evaluator_of(config())[0](online).label_free() == found
    evaluator = evaluator_of(config(metrics_images=60))[0]
    fewer = evaluator(online).label_free()
    sampled = label_free(h_NF[evaluator._sample], views)
    assert fewer["rankme"] == pytest.approx(sampled["rankme"], rel=1e-3)
    assert fewer.keys() == found.keys() and not fewer.items() & found.items()
    without = evaluator_of(config(metrics_images=0))[0](online)
    assert without.label_free() == {}
    accuracies = [(one.val_top1, one.knn_top1) for one in (without, evaluation)]
    assert accuracies[0] == accuracies[1]


def test_several_ranks_measure_the_same_sample(small_config):
    config = small_config(evaluation={"every_epochs": 1, "metrics_images": 60})
    evaluator, *_ = evaluator_of(config, World(0, 2, 0, torch.device("cpu")))
    gathered = np.concatenate([np.arange(355)[rank::2] for rank in (0, 1)])
    drawn = np.random.default_rng(0).permutation(355)[:60]
    assert sorted(gathered[evaluator._sample]) == sorted(drawn)
    assert len(evaluator._views) == 300
    with pytest.raises(UserError, match="and 355 validation images"):
        evaluator_of(config, World(0, 356, 0, torch.device("cpu")))


def test_only_labelled_images_are_in_the_bank(small_config):
    config = small_config(evaluation={"every_epochs": 1, "metrics_images": 0, "knn_images": 2000})
    _, (train, val), recipe = evaluator_of(config)
    labels = np.where(train.labels < 5, train.labels, UNLABELLED)
    watch, options = StallWatch(config.data, 0), {"backend": "dali"}
    half = Evaluator(config, replace(train, labels=labels), val, recipe, ALONE, watch, **options)
    assert half.images == (train.labels < 5).sum() + 355


def test_views_are_of_the_recipes_first_view(small_config):
    """With a first view that changes nothing, an image's views coincide."""
    still = {"crop_scale": [1.0, 1.0], "crop_ratio": [1.0, 1.0], "jitter_p": 0.0, "gray_p": 0.0}
    still |= {"degrees": 0.0, "translate": 0.0, "scale": [1.0, 1.0], "shear": 0.0, "flip_p": 0.0}
    config = small_config(
        data={"augmentation": {"view1": still}},
        evaluation={"every_epochs": 1},
        train={"cuda_graph": "on"},
    )
    evaluator, _, _ = evaluator_of(config)
    found = evaluator(build(config, ALONE, 10).online).label_free()
    assert found["view_alignment"] == pytest.approx(0, abs=1e-10)
    assert found["uniformity"] < -1e-3


@pytest.mark.slow
def test_a_slow_loader_is_not_taken_for_one_that_hangs(small_config, monkeypatch):
    ended: list[int] = []
    monkeypatch.setattr("isofast.training.stall.os", SimpleNamespace(_exit=ended.append))
    with StallWatch(small_config(data={"stall_seconds": 2.0}).data, 0) as watch:
        for _ in watch.over(map(time.sleep, [0.6] * 7)):
            pass
        # nor is a step, or what follows the last batch
        time.sleep(3.5)
    assert ended == []


@pytest.mark.slow
def test_the_best_of_a_run_that_gets_worse_is_kept(small, tmp_path):
    settings = small(
        method={"name": "simsiam"},
        optimizer={"name": "sgd", "lr": 3.0},
        train={"epochs": 3, "max_steps": None, "precision": "fp32"},
        evaluation={"every_epochs": 1, "knn_pixels": True},
        checkpoint={"every_steps": 1000, "keep": 1},
    )
    fit_apart(settings, tmp_path)
    records = read_metrics(tmp_path / "metrics.jsonl")
    knn = {record["step"]: record["knn_top1"] for record in records if "knn_top1" in record}
    summary = json.loads((tmp_path / "summary.json").read_text())
    best = summary["best_step"]
    assert summary["knn_top1_pixels"] > 0.95
    assert summary["knn_top1_best"] == knn[best] == max(knn.values()) > knn[66]
    kept = {int(path.name.removeprefix("step_")) for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {best, 66}
