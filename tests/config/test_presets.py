"""The defaults implied by a data set, a method and the length of a run."""

from typing import Any

import pytest

from isofast.config.load import load_config, validate

from ..support.runs import ROOT

DATA = {"data": {"dataset": "cifar10", "root": "somewhere"}}
# one line per method: its settings in the paper
PRESETS: dict[str, dict[str, Any]] = {
    "isoloss": {"alpha": 0.5, "eps": 0.0, "normalize": "spectral", "decay": 0.998, "ema": True},
    "directpred": {"alpha": 0.5, "eps": 0.0, "normalize": "spectral", "decay": 0.998, "ema": True},
    "directcopy": {"alpha": 1.0, "eps": 0.25, "normalize": "spectral", "decay": 0.998, "ema": True},
    "byol": {"decay": 0.99, "ema": True},
    "simsiam": {"decay": 0.99, "ema": False},
    "linear": {"decay": 0.99, "ema": True},
}


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({"alpha": 1.0}, {"eps": 0.25}),
        ({"alpha": 1.0, "normalize": "none"}, {"eps": 0.0, "normalize": "none"}),
        (
            {"alpha": 1.0, "metric": "euclidean", "normalize": "spectral"},
            {"eps": 0.25, "normalize": "spectral"},
        ),
        ({"ema": False, "decay": 0.9, "eps": 0.1}, {"decay": 0.9, "eps": 0.1}),
        (
            {"name": "byol", "metric": "euclidean", "decay": 0.9, "ema": False, "ema_base": 0.5},
            {"metric": "euclidean", "decay": 0.9, "ema": False, "ema_base": 0.5},
        ),
    ],
)
def test_presets_fill_in_and_the_user_wins(method, expected):
    config = validate({**DATA, "method": method})
    assert config.method.model_dump(include=set(expected)) == expected


@pytest.mark.parametrize("given", [{}, {"correlation": "embeddings"}, {"metric": "euclidean"}])
@pytest.mark.parametrize("without_ema", [False, True], ids=["", "no-ema"])
@pytest.mark.parametrize(
    ("dataset", "epochs", "papers"),
    [
        *(("cifar10", 1000, True), ("stl10", 100, True), ("tinyimagenet", 99, False)),
        *(("cifar100", 1, False), ("imagefolder", 1000, False), ("digits", 1000, False)),
    ],
)
@pytest.mark.parametrize("name", PRESETS)
def test_short_runs_and_other_pictures_have_settings_of_ours(
    name, dataset, epochs, papers, without_ema, given
):
    method = {"name": name, **given} | ({"ema": False} if without_ema else {})
    data = {"dataset": dataset, "root": "somewhere"}
    config = validate({"data": data, "train": {"epochs": epochs}, "method": method})
    ema, closed = PRESETS[name]["ema"] and not without_ema, "alpha" in PRESETS[name]
    ours = not papers and not given
    expected = PRESETS[name] | {"ema": ema, "ema_base": 0.99}
    expected["correlation"] = "directions" if ours else "embeddings"
    if closed and "metric" in given:
        expected |= {"normalize": "none", "eps": 0.0}
    if closed and not ema:
        expected["decay"] = 0.0 if ours and dataset != "digits" else 0.5
    elif closed and ours:
        expected |= {"decay": 0.0 if dataset == "imagefolder" else 0.9, "ema_base": 0.9}
    assert config.method.model_dump(include=set(expected)) == expected
    optimizer = config.optimizer
    lars = ema and not ours
    lr = 1.0 if lars else 0.3 if closed and ours else 0.1
    assert (optimizer.name, optimizer.lr) == ("lars" if lars else "sgd", lr)
    assert (optimizer.momentum, optimizer.eta) == (0.9, 0.02)
    assert optimizer.weight_decay == (1e-5 if name in ("byol", "simsiam") else 1e-4)


@pytest.mark.parametrize(("name", "lr"), [("lars", 1.0), ("sgd", 0.1), ("adamw", 1e-3)])
@pytest.mark.parametrize("ema", [True, False])
def test_the_learning_rate_is_the_named_optimizers(name, lr, ema):
    chosen = {"method": {"ema": ema}, "optimizer": {"name": name}}
    config = validate({**DATA, **chosen})
    assert (config.optimizer.name, config.optimizer.lr) == (name, lr)
    short = validate({**DATA, **chosen, "train": {"epochs": 30}})
    assert short.optimizer.lr == (0.3 if name == "sgd" else lr)


@pytest.mark.parametrize("epochs", [30, 1000])
def test_a_custom_method_has_simsiams_optimizer_and_c_of_embeddings(epochs):
    method = {"name": "isofast.methods:Method", "ema": True}
    config = validate({**DATA, "train": {"epochs": epochs}, "method": method})
    optimizer = config.optimizer
    assert config.method.correlation == "embeddings"
    assert (optimizer.name, optimizer.lr, optimizer.weight_decay) == ("sgd", 0.1, 1e-5)


@pytest.mark.parametrize(
    ("crop", "stem"),
    [(32, "cifar"), (48, "tiny"), (64, "tiny"), (96, "imagenet"), (None, "imagenet")],
)
def test_a_folder_has_the_stem_of_its_crop(crop, stem):
    data = {"dataset": "imagefolder", "root": "x", "crop": crop}
    assert validate({"data": data}).encoder.stem == stem
    assert validate({"data": data, "encoder": {"stem": "imagenet"}}).encoder.stem == "imagenet"


@pytest.mark.parametrize(
    ("epochs", "given", "expected"), [(1000, None, 10), (30, None, 3), (30, 5.0, 5)]
)
def test_warmup_shrinks_with_a_short_run(epochs, given, expected):
    raw = {**DATA, "train": {"epochs": epochs}, "schedule": {"warmup_epochs": given}}
    assert validate(raw).warmup_epochs == expected


@pytest.mark.parametrize(
    ("dataset", "stem"),
    [("cifar10", "cifar"), ("cifar100", "cifar"), ("stl10", "imagenet"), ("tinyimagenet", "tiny")],
)
def test_each_data_set_has_the_papers_run(dataset, stem):
    config = load_config(ROOT / "launch" / f"{dataset}.json")
    assert config.data.dataset == dataset and config.encoder.name == "resnet18"
    assert (config.encoder.stem, config.encoder.stem_padding) == (stem, 1)
    assert (config.train.epochs, config.train.batch_size) == (1000, 256)
    assert (config.projector.hidden, config.projector.output) == (4096, 256)
    assert config.method.metric == "cosine" and config.warmup_epochs == 10
    assert config.method.model_dump(include=set(PRESETS["isoloss"])) == PRESETS["isoloss"]
