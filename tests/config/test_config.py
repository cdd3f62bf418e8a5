"""The configuration: overrides, errors that name the remedy, stored runs, the schema."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from isofast.config.load import load_config, read_stored, validate
from isofast.config.presets import METHODS
from isofast.config.schema import changed_keys, schema_json, to_json
from isofast.errors import UserError
from isofast.methods import Method

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SHIPPED = sorted(path for path in LAUNCH.glob("*.json") if path.name != "config.schema.json")
DATA = {"data": {"dataset": "cifar10", "root": "somewhere"}}


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a config file from text, or from sections merged over DATA."""

    def write(content: str | dict[str, Any]) -> Path:
        path = tmp_path / "c.json"
        path.write_text(content if isinstance(content, str) else json.dumps({**DATA, **content}))
        return path

    return write


# settings of C for methods with a trained predictor, and methods that do not exist
WRONG_METHODS: list[tuple[dict[str, Any], list[str]]] = [
    *(
        ({"name": name, key: 0.5}, [f"method.{key}: unknown key", "Allowed: method.name, method."])
        for name in ("byol", "simsiam", "linear")
        for key in ("alpha", "eps", "normalize")
    ),
    ({"name": "simsiam", "ema": True}, ["method.ema: got True", "should be False"]),
    ({"name": "isoloss", "alpha": None}, ["method.alpha: got None", "number"]),
    ({"name": "moco"}, ["method.name: got 'moco'", "'byol'", "module:Class"]),
    ({"name": ["byol"]}, ["method.name"]),
    ({"name": "biol"}, ["did you mean 'byol'?"]),
    ({"name": "no_module:X"}, ["method.name: got 'no_module:X'", "No module named"]),
    ({"name": "isofast.errors:X"}, ["no attribute 'X'"]),
    ({"name": "isofast.config.schema:Config"}, ["not a class derived from isofast.methods.Method"]),
    ({"ema": "no"}, ["method.ema: got 'no'"]),
]


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({**DATA, "method": {"alhpa": 1}}, ["method.alhpa: unknown key", "method.alpha"]),
        ({**DATA, "train": {"lr": 1.0}}, ["train.lr: unknown key", "optimizer.lr"]),
        ({**DATA, "mehtod": {}}, ["mehtod: unknown key", "method"]),
        ({**DATA, "train": {"epochs": "ten"}}, ["train.epochs", "'ten'", "integer"]),
        ({**DATA, "train": {"epochs": 1.5}}, ["train.epochs", "1.5", "integer"]),
        ({**DATA, "train": 5}, ["train", "section", "train.epochs"]),
        ({**DATA, "projector": None}, ["projector", "section", "projector.hidden"]),
        ({**DATA, "deepspeed": 3}, ["deepspeed: got 3", "dictionary"]),
        ({"data": {"root": None}}, ["data.root: got None", "path"]),
        ({**DATA, "checkpoint": {"every_steps": 0}}, ["checkpoint.every_steps", "got 0", "1"]),
        ({**DATA, "method": {"metric": "l2"}}, ["method.metric", "'l2'", "'euclidean'"]),
        ({**DATA, "optimizer": {"lr": float("nan")}}, ["optimizer.lr", "nan"]),
        ({}, ["data.root: missing", "--set data.root"]),
        ({**DATA, "encoder": {"name": "resnet50", "width": 16}}, ["encoder.width", "resnet18"]),
        ({**DATA, "logging": {"loggers": ["wanda"]}}, ["'wanda' is not a logger", "tensorboard"]),
        *(({**DATA, "method": method}, words) for method, words in WRONG_METHODS),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_errors_name_the_key_and_the_remedy(raw, words):
    with pytest.raises(UserError) as caught:
        validate(raw)
    for word in words:
        assert word in str(caught.value)
    # and this is the only error
    assert str(caught.value).count("\n") == 1


def test_all_errors_come_at_once():
    with pytest.raises(UserError) as caught:
        validate({**DATA, "train": {"epochs": 0, "batch_size": 1}, "seed": -1})
    for key in ("train.epochs", "train.batch_size", "seed"):
        assert key in str(caught.value)


def test_overrides_reach_nested_keys_as_json_or_text(file):
    overrides = ["method.ema=false", "optimizer.lr=0.5", "data.root=/a b", "method.name=directpred"]
    config = load_config(file({}), overrides)
    assert (config.method.name, config.method.ema) == ("directpred", False)
    assert (config.optimizer.name, config.optimizer.lr) == ("sgd", 0.5)
    assert config.data.root == Path("/a b")
    values = {"method.ema": False, "optimizer.lr": np.float32(0.5), "data.root": Path("/a b")}
    assert load_config(file({}), {**values, "method.name": "directpred"}) == config
    # a section's value changes the keys in it only
    written = file({"train": {"epochs": 7, "batch_size": 64}})
    for overrides in (['train={"epochs": 3}'], {"train": {"epochs": 3}}):
        train = load_config(written, overrides).train
        assert (train.epochs, train.batch_size) == (3, 64)
    other = {"method": {"name": "byol"}}
    assert load_config(file({"method": {"alpha": 0.3}}), other).method.name == "byol"
    scale = {"data.augmentation.view1.crop_scale": np.array([0.2, 1])}
    assert load_config(file({}), scale).data.augmentation.view1.crop_scale == (0.2, 1)
    # a warm-up may last the whole run
    assert load_config(file({"schedule": {"warmup_epochs": 6}}), ["train.epochs=6"])
    python = load_config(file({}), ["method.ema=False", "train.max_steps=None"])
    assert (python.method.ema, python.train.max_steps) == (False, None)


@pytest.mark.parametrize(
    ("content", "overrides", "words"),
    [
        *(({"seed": 1}, [o], "--set") for o in ("train.epochs", "=3", "train..epochs=3")),
        ({"seed": 1}, ["seed.x=3"], "seed is a value, not a section"),
        ('{"seed": 1, "seed": 2}', [], "'seed' is there twice"),
        ({"schedule": {"warmup_epochs": 6}}, ["train.epochs=5"], "warmup_epochs=6 is more than"),
        *(("{", [], "line 1"), ("[1]", [], "JSON object"), ("\xff", [], "as JSON")),
    ],
)
def test_malformed_files_and_overrides_are_refused(file, content, overrides, words):
    with pytest.raises(UserError, match=words):
        load_config(file(content), overrides)


def test_a_missing_file_names_its_neighbours(file):
    with pytest.raises(UserError, match=r"c\.json"):
        load_config(file({}).with_name("d.json"))


@pytest.mark.parametrize("name", METHODS)
def test_the_resolved_config_reads_back_as_itself(name):
    metric = {} if name == "sigreg" else {"metric": "euclidean"}
    # a folder's name need not be text
    root = {"data.root": "caf\udce9"}
    config = validate({**DATA, "method": {"name": name, "ema": False, **metric}}, root)
    assert os.fsencode(config.data.root) == b"caf\xe9"
    again = validate(json.loads(to_json(config)))
    assert again == config and changed_keys(again, config) == []


@pytest.mark.parametrize(
    ("dataset", "method", "changes"),
    [
        ("cifar10", {"name": "directcopy"}, []),
        # when all methods shared one section, methods with a trained predictor had null C keys
        ("cifar10", {"name": "byol"} | dict.fromkeys(["alpha", "eps", "normalize"]), []),
        ("digits", {"name": "isoloss"}, ["method.correlation: 'embeddings' -> 'directions'"]),
    ],
    ids=["directcopy", "byol", "isoloss"],
)
def test_runs_of_earlier_versions_stay_readable(file, dataset, method, changes):
    data = {"data": {"dataset": dataset, "root": "x"}}
    now = validate({**data, "method": {"name": method["name"]}})
    raw = json.loads(to_json(now))
    raw["method"] |= method
    del raw["method"]["correlation"]
    raw["logging"]["tensorboard"] = True
    assert changed_keys(read_stored(file(raw)), now) == changes


def test_a_stored_method_of_your_own_reads_back_as_itself(file, monkeypatch):
    """Including nulls, and tuples, which config.json stores as lists."""

    class Mine(Method):
        class Config(Method.Config):
            margin: float | None = 1.0
            betas: tuple[float, float] = (0.5, 0.25)

    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(Mine=Mine))
    mine = {"name": "mine:Mine", "margin": None}
    config = validate({**DATA, "method": mine})
    stored = read_stored(file(to_json(config)))
    assert stored == config and changed_keys(stored, config) == []
    assert validate({**DATA, "method": {**mine, "betas": [1, 0]}}) != config


def test_changed_keys_tells_only_what_changes_the_result():
    changes = {
        "seed": 1,
        "data": DATA["data"] | {"root": "elsewhere", "threads": 3, "on_bad_image": "skip"},
        "train": {"max_steps": 9},
        "logging": {"every_steps": 7},
        "method": {"alpha": 1.0},
    }
    changed = changed_keys(validate(DATA), validate(changes))
    assert changed[0] == "data.on_bad_image: 'stop' -> 'skip'" and "0.5 -> 1.0" in changed[1]
    keys = [line.partition(":")[0] for line in changed[1:]]
    assert keys == ["method.alpha", "method.eps", "seed"]
    byol = validate({**DATA, "method": {"name": "byol"}})
    assert "method.alpha: 0.5 -> None" in changed_keys(validate(DATA), byol)


@pytest.mark.parametrize(("world", "share"), [(1, 256), (2, 128), (8, 32)])
def test_the_global_batch_is_shared_out(world, share):
    assert validate(DATA).batch_size_per_rank(world) == share


@pytest.mark.parametrize(("world", "suggestion"), [(3, "255"), (7, "259"), (256, "512")])
def test_a_batch_that_does_not_divide_is_refused(world, suggestion):
    with pytest.raises(UserError, match=f"train.batch_size={suggestion}"):
        validate(DATA).batch_size_per_rank(world)


def test_the_schema_is_fresh():
    """If this fails, run `make schema`."""
    assert (LAUNCH / "config.schema.json").read_text() == schema_json()


def test_every_key_is_documented():
    for name, section in json.loads(schema_json())["$defs"].items():
        for key, field in section["properties"].items():
            assert field.get("description"), f"{name}.{key}"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configs_spell_out_nothing_implied(path):
    """Except the method's name, for users to change, and the optimizer's, next to its ``lr``."""
    assert load_config(path).data.root
    raw = json.loads(path.read_text())
    whole = validate(raw)
    for section, keys in raw.items():
        for key in keys if isinstance(keys, dict) else ():
            if f"{section}.{key}" not in ("data.root", "method.name", "optimizer.name"):
                less = {**raw, section: {k: v for k, v in keys.items() if k != key}}
                assert validate(less) != whole, f"{section}.{key}"
