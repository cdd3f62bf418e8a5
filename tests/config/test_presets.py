"""What a data set, a method and the length of a run imply."""

from pathlib import Path
from typing import Any

import pytest

from isofast.config.load import load_config, validate

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
DATA = {"data": {"dataset": "cifar10", "root": "somewhere"}}


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({}, {"alpha": 0.5, "eps": 0.0, "normalize": "spectral", "decay": 0.998}),
        ({"ema": False}, {"alpha": 0.5, "eps": 0.0, "decay": 0.5}),
        ({"alpha": 1.0}, {"eps": 0.25}),
        ({"name": "directcopy"}, {"alpha": 1.0, "eps": 0.25}),
        ({"alpha": 1.0, "normalize": "none"}, {"eps": 0.0, "normalize": "none"}),
        (
            {"alpha": 1.0, "metric": "euclidean", "normalize": "spectral"},
            {"eps": 0.25, "normalize": "spectral"},
        ),
        ({"metric": "euclidean"}, {"normalize": "none"}),
        ({"ema": False, "decay": 0.9, "eps": 0.1}, {"decay": 0.9, "eps": 0.1}),
    ],
)
def test_presets_fill_in_and_the_user_wins(
    method: dict[str, Any], expected: dict[str, Any]
) -> None:
    config = validate({**DATA, "method": method})
    assert {key: getattr(config.method, key) for key in expected} == expected


# A line a method: what a run without another word has.
PRESETS: dict[str, dict[str, Any]] = {
    "isoloss": {"alpha": 0.5, "eps": 0.0, "normalize": "spectral", "decay": 0.998, "ema": True},
    "directpred": {"alpha": 0.5, "eps": 0.0, "normalize": "spectral", "decay": 0.998, "ema": True},
    "directcopy": {"alpha": 1.0, "eps": 0.25, "normalize": "spectral", "decay": 0.998, "ema": True},
    "byol": {"decay": 0.99, "ema": True},
    "simsiam": {"decay": 0.99, "ema": False},
    "linear": {"decay": 0.99, "ema": True},
}
LARS_RUN = ("lars", 1.0, 0.9, 0.02)
SGD_RUN = ("sgd", 0.1, 0.9)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("name", PRESETS)
def test_each_method_has_its_settings(name: str, metric: str) -> None:
    config = validate({**DATA, "method": {"name": name, "metric": metric}})
    expected = dict(PRESETS[name])
    if metric == "euclidean" and "normalize" in expected:
        expected |= {"normalize": "none", "eps": 0.0}
    assert config.method.model_dump(include=set(expected)) == expected
    optimizer = config.optimizer
    assert optimizer.weight_decay == (1e-5 if name in ("byol", "simsiam") else 1e-4)
    settings = (optimizer.name, optimizer.lr, optimizer.momentum, optimizer.eta)
    if config.method.ema:
        assert settings == LARS_RUN and config.method.ema_base == 0.99
    else:
        assert settings[:3] == SGD_RUN


@pytest.mark.parametrize("name", PRESETS)
def test_without_ema_every_method_trains_by_sgd(name: str) -> None:
    config = validate({**DATA, "method": {"name": name, "ema": False}})
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.momentum) == SGD_RUN
    assert config.method.decay == (0.5 if "alpha" in PRESETS[name] else 0.99)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(
    ("dataset", "epochs", "papers"),
    [
        *(("cifar10", 1000, True), ("stl10", 100, True), ("tinyimagenet", 99, False)),
        *(("cifar100", 1, False), ("imagefolder", 1000, False), ("digits", 1000, False)),
    ],
)
def test_short_runs_and_other_pictures_have_settings_of_ours(
    dataset: str, epochs: int, papers: bool, name: str
) -> None:
    data = {"data": {"dataset": dataset, "root": "somewhere"}, "train": {"epochs": epochs}}
    config = validate({**data, "method": {"name": name}})
    assert config.method.correlation == ("embeddings" if papers else "directions")
    closed = "alpha" in PRESETS[name]
    ours = ("sgd", 0.3 if closed else 0.1)
    if closed and not papers:
        assert (config.method.ema_base, config.method.decay) == (0.9, 0.9)
    else:
        assert config.method.ema_base == 0.99 and config.method.decay == PRESETS[name]["decay"]
    closed_without = validate({**data, "method": {"name": "isoloss", "ema": False}}).optimizer
    assert (closed_without.name, closed_without.lr) == ("sgd", 0.1 if papers else 0.3)
    expected = {True: LARS_RUN, False: SGD_RUN}[config.method.ema][:2] if papers else ours
    assert (config.optimizer.name, config.optimizer.lr) == expected
    euclidean = validate({**data, "method": {"name": name, "metric": "euclidean"}})
    raw = validate({**data, "method": {"name": name, "correlation": "embeddings"}})
    for run in (euclidean, raw):
        assert run.method.ema_base == 0.99 and run.method.decay == PRESETS[name]["decay"]
        paper = {True: LARS_RUN, False: SGD_RUN}[run.method.ema][:2]
        assert run.method.correlation == "embeddings"
        assert (run.optimizer.name, run.optimizer.lr) == paper


def test_the_user_wins_over_every_preset() -> None:
    method = {"name": "byol", "metric": "euclidean", "decay": 0.9, "ema": False, "ema_base": 0.5}
    optimizer = {"name": "lars", "lr": 0.3, "weight_decay": 1e-6}
    config = validate({**DATA, "method": method, "optimizer": optimizer})
    assert config.method.model_dump(include=set(method)) == method
    assert config.optimizer.model_dump(include=set(optimizer)) == optimizer


@pytest.mark.parametrize(("name", "lr"), [("lars", 1.0), ("sgd", 0.1), ("adamw", 1e-3)])
@pytest.mark.parametrize("ema", [True, False])
def test_the_learning_rate_is_the_named_optimizers(name: str, lr: float, ema: bool) -> None:
    config = validate({**DATA, "method": {"ema": ema}, "optimizer": {"name": name}})
    assert (config.optimizer.name, config.optimizer.lr) == (name, lr)


@pytest.mark.parametrize(
    ("crop", "stem"),
    [(32, "cifar"), (48, "tiny"), (64, "tiny"), (96, "imagenet"), (None, "imagenet")],
)
def test_a_folder_has_the_stem_of_its_crop(crop: int | None, stem: str) -> None:
    data = {"dataset": "imagefolder", "root": "x", "crop": crop}
    assert validate({"data": data}).encoder.stem == stem
    assert validate({"data": data, "encoder": {"stem": "imagenet"}}).encoder.stem == "imagenet"


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(
    ("dataset", "stem"),
    [("cifar10", "cifar"), ("cifar100", "cifar"), ("stl10", "imagenet"), ("tinyimagenet", "tiny")],
)
def test_each_data_set_has_the_papers_run_of_each_method(
    dataset: str, stem: str, name: str
) -> None:
    path = LAUNCH / f"{dataset}.json"
    config = load_config(path, [f"method.name={name}"])
    assert config.data.dataset == dataset and config.encoder.name == "resnet18"
    assert (config.encoder.stem, config.encoder.stem_padding) == (stem, 1)
    assert (config.train.epochs, config.train.batch_size) == (1000, 256)
    assert (config.projector.hidden, config.projector.output) == (4096, 256)
    assert config.method.metric == "cosine" and config.warmup_epochs == 10
    assert config.method.model_dump(include=set(PRESETS[name])) == PRESETS[name]
    assert load_config(path).method.name == "isoloss"
