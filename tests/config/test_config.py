"""The configuration: presets, overrides, errors that carry the remedy, the schema."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from isofast.config.load import load_config, read_stored, validate
from isofast.config.presets import METHODS
from isofast.config.schema import Config, changed_keys, schema_json, to_json
from isofast.errors import UserError
from isofast.methods import Method

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
DATA = {"data": {"dataset": "cifar10", "root": "somewhere"}}


# settings of C where the predictor is trained, and methods that do not exist
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
        *(({**DATA, "method": method}, words) for method, words in WRONG_METHODS),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_errors_name_the_key_and_the_remedy(raw: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        validate(raw)
    for word in words:
        assert word in str(caught.value)
    # and nothing else
    assert str(caught.value).count("\n") == 1


def test_all_errors_are_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        validate({**DATA, "train": {"epochs": 0, "batch_size": 1}, "seed": -1})
    for key in ("train.epochs", "train.batch_size", "seed"):
        assert key in str(caught.value)


def test_overrides_reach_nested_keys_as_json_or_text(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(DATA))
    config = load_config(
        path, ["method.ema=false", "optimizer.lr=0.5", "data.root=/a b", "method.name=directpred"]
    )
    assert config.method.ema is False
    assert (config.optimizer.name, config.optimizer.lr) == ("sgd", 0.5)
    assert config.data.root == Path("/a b")
    assert config.method.name == "directpred"


@pytest.mark.parametrize("override", ["train.epochs", "=3", "train..epochs=3", "seed.x=3"])
def test_malformed_override_is_refused(tmp_path: Path, override: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({**DATA, "seed": 1}))
    with pytest.raises(UserError, match="--set"):
        load_config(path, [override])


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "line 1"), ("[1]", "JSON object"), ("\xff", "as JSON")],
)
def test_a_file_that_is_not_a_config_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        load_config(path)


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match=r"other\.json"):
        load_config(tmp_path / "c.json")


@pytest.mark.parametrize("name", METHODS)
def test_the_resolved_config_reads_back_as_itself(name: str) -> None:
    config = validate({**DATA, "method": {"name": name, "ema": False, "metric": "euclidean"}})
    again = validate(json.loads(to_json(config)))
    assert again == config and changed_keys(again, config) == []


def test_a_trained_predictors_run_from_before_it_had_its_own_keys(tmp_path: Path) -> None:
    """When all methods shared one section, alpha, eps and normalize of some were null."""
    byol = {"name": "byol", "metric": "cosine", "alpha": None, "eps": None, "normalize": None}
    raw = {**DATA, "method": {**byol, "decay": 0.99, "ema": True, "ema_base": 0.99}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    stored = read_stored(tmp_path / "config.json")
    assert changed_keys(stored, validate({**DATA, "method": {"name": "byol"}})) == []


def test_a_null_of_a_method_of_your_own_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mine(Method):
        class Config(Method.Config):
            margin: float | None = 1.0

    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(Mine=Mine))
    config = validate({**DATA, "method": {"name": "mine:Mine", "margin": None}})
    (tmp_path / "config.json").write_text(to_json(config))
    assert changed_keys(read_stored(tmp_path / "config.json"), config) == []


def test_a_config_stored_by_an_older_version_continues() -> None:
    """What runs wrote before trained predictors existed, all keys of the section spelled out."""
    method = {
        "name": "directcopy",
        "metric": "cosine",
        "alpha": 1.0,
        "eps": 0.25,
        "normalize": "spectral",
        "decay": 0.998,
        "ema": True,
        "ema_base": 0.99,
    }
    stored = validate({**DATA, "method": method})
    now = validate({**DATA, "method": {"name": "directcopy"}})
    assert changed_keys(stored, now) == []
    other = validate({**DATA, "method": {"name": "byol"}})
    assert "method.alpha: 1.0 -> None" in changed_keys(stored, other)


def test_a_run_from_before_c_of_directions_has_c_of_embeddings(tmp_path: Path) -> None:
    digits = {"data": {"dataset": "digits", "root": "somewhere"}}
    raw = json.loads(to_json(validate(digits)))
    del raw["method"]["correlation"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    changes = changed_keys(read_stored(tmp_path / "config.json"), validate(digits))
    assert changes == ["method.correlation: 'embeddings' -> 'directions'"]


def test_changed_keys_tells_what_changes_the_result_only() -> None:
    old = validate(DATA)
    new = validate(
        {
            "seed": 1,
            "data": {"dataset": "cifar10", "root": "elsewhere", "threads": 3},
            "train": {"max_steps": 9},
            "logging": {"every_steps": 7},
            "method": {"alpha": 1.0},
        }
    )
    changed = changed_keys(old, new)
    assert [line.partition(":")[0] for line in changed] == ["method.alpha", "method.eps", "seed"]
    assert "0.5 -> 1.0" in changed[0]


@pytest.mark.parametrize(("world", "share"), [(1, 256), (2, 128), (8, 32)])
def test_the_global_batch_is_shared_out(world: int, share: int) -> None:
    assert validate(DATA).batch_size_per_rank(world) == share


@pytest.mark.parametrize(("world", "suggestion"), [(3, "255"), (7, "259"), (256, "512")])
def test_a_batch_that_does_not_divide_is_refused(world: int, suggestion: str) -> None:
    with pytest.raises(UserError, match=f"train.batch_size={suggestion}"):
        validate(DATA).batch_size_per_rank(world)


@pytest.mark.parametrize(
    ("epochs", "given", "expected"), [(1000, None, 10), (30, None, 3), (30, 5.0, 5)]
)
def test_warmup_shrinks_with_a_short_run(epochs: int, given: float | None, expected: float) -> None:
    raw = {**DATA, "train": {"epochs": epochs}, "schedule": {"warmup_epochs": given}}
    assert validate(raw).warmup_epochs == expected


def test_the_schema_is_fresh() -> None:
    """`make schema` writes it."""
    assert (LAUNCH / "config.schema.json").read_text() == schema_json()


def test_every_key_is_documented() -> None:
    schema = Config.model_json_schema()
    for name, section in schema["$defs"].items():
        for key, field in section["properties"].items():
            assert field.get("description"), f"{name}.{key}"


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.json")), ids=lambda path: path.name)
def test_shipped_configs_are_valid(path: Path) -> None:
    if path.name != "config.schema.json":
        assert load_config(path).data.root


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.json")), ids=lambda path: path.name)
def test_shipped_configs_spell_out_nothing_implied(path: Path) -> None:
    """But for the method's name, which a reader changes, and the optimizer's, beside its rate."""
    if path.name == "config.schema.json":
        return
    raw = json.loads(path.read_text())
    whole = validate(raw)
    for section, keys in raw.items():
        for key in keys if isinstance(keys, dict) else ():
            if f"{section}.{key}" not in ("data.root", "method.name", "optimizer.name"):
                less = {**raw, section: {k: v for k, v in keys.items() if k != key}}
                assert validate(less) != whole, f"{section}.{key}"
