"""The collapse watch against recorded runs, and on made-up spectra."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isofast.config.load import validate
from isofast.config.schema import Config
from isofast.run.collapse import CollapseWatch, Finding, remedies
from isofast.run.loggers import Record

RESULTS = Path(__file__).parents[2] / "bench" / "results"
RECORDED = json.loads((RESULTS / "first-steps.json").read_text())
RUNS = [
    {**run, "records": [dict(zip(RECORDED["columns"], r, strict=True)) for r in run["records"]]}
    for run in RECORDED["runs"]
]
HEALTHY = 1 / np.sqrt(128)


@pytest.fixture
def config(tmp_path: Any) -> Callable[..., Config]:
    """Of runs on the digits; keyword arguments are the method's."""

    def make(**method: Any) -> Config:
        return validate(
            {
                "data": {"dataset": "digits", "root": str(tmp_path)},
                "method": {"decay": 0.99} | method,
                "projector": {"output": 128},
                "train": {"epochs": 12},
                "optimizer": {"name": "adamw", "lr": 8e-3},
            }
        )

    return make


def findings(run: dict[str, Any]) -> list[tuple[int, Finding]]:
    """Of a recorded run, whose embeddings have 256 dimensions."""
    method = {"name": run["method"], "ema": run["ema"], "correlation": run["correlation"]}
    config = validate(
        {
            "data": {"dataset": "imagefolder", "root": "somewhere"},
            "method": method | {"decay": run["decay"]},
            "train": {"epochs": run["epochs"]},
            "schedule": {"warmup_epochs": float(run["warmup_epochs"])},
        }
    )
    watch = CollapseWatch(config, run["steps_per_epoch"])
    found = [(record["step"], watch.judge(record)) for record in run["records"]]
    return [(step, finding) for step, finding in found if finding is not None]


def name_of(run: dict[str, Any]) -> str:
    ema = "ema" if run["ema"] else "no-ema"
    place = "cifar" if "CIFAR" in run["data"] else "tiny" if "stem" in run["data"] else "folder"
    words = (place, run["method"], ema, run["correlation"], run["optimizer"], run["lr"])
    return "-".join(map(str, (*words, run["warmup_epochs"])))


# First warning of the runs that were lost, and of which kind; the two of a trained predictor are
# missed.
WARNED = {
    "folder-isoloss-no-ema-embeddings-sgd-0.1-1.5": (312, "torn"),
    "folder-isoloss-no-ema-embeddings-sgd-0.1-7.5": (481, "torn"),
    "folder-isoloss-no-ema-embeddings-sgd-0.1-15.0": (559, "torn"),
    "folder-isoloss-no-ema-embeddings-adamw-0.002-7.5": (299, "dimensional"),
    "folder-isoloss-no-ema-directions-adamw-0.004-3.0": (260, "dimensional"),
}
MISSED = {
    "folder-byol-ema-embeddings-adamw-0.004-1.5",
    "folder-simsiam-no-ema-embeddings-sgd-0.1-1.5",
}


@pytest.mark.parametrize("run", RUNS, ids=name_of)
def test_recorded_runs_are_judged_by_what_became_of_them(run: dict[str, Any]) -> None:
    found = findings(run)
    gained = run["knn_top1"][-1][1] - run["knn_top1"][0][1]
    expected = WARNED.get(name_of(run))
    if expected is None:
        assert found == []
        assert gained > 0.03 or name_of(run) in MISSED
    else:
        assert (found[0][0], found[0][1].kind) == expected


def record_at(step: int, spread: float | None = HEALTHY, **more: float) -> Record:
    known = {"norm_spread": 2.0, "prediction_norm": 0.9, "embedding_norm": 4.0}
    return {"step": step, "embedding_std": spread, "effective_rank": 2.0} | known | more


def kinds(watch: CollapseWatch, *records: Record) -> list[str | None]:
    findings = [watch.judge(record) for record in records]
    return [None if finding is None else finding.kind for finding in findings]


def test_one_point_for_all_images_is_told_at_once(config: Callable[..., Config]) -> None:
    watch = CollapseWatch(config(), steps_per_epoch=22)
    finding = watch.judge(record_at(10, 0.005 * HEALTHY))
    assert finding is not None and finding.kind == "complete" and "one point" in finding.message


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({"correlation": "embeddings"}, "torn"),
        ({"correlation": "directions"}, None),
        ({"correlation": "embeddings", "metric": "euclidean"}, None),
        ({"correlation": "embeddings", "name": "byol"}, None),
    ],
)
def test_long_embeddings_own_a_raw_c_alone_and_after_two_records(
    method: dict[str, Any], expected: str | None, config: Callable[..., Config]
) -> None:
    watch = CollapseWatch(config(**method), steps_per_epoch=22)
    torn = {"norm_spread": 9.0, "prediction_norm": 0.0}
    records = [record_at(10, **torn), record_at(20), record_at(30, **torn), record_at(40, **torn)]
    assert kinds(watch, *records) == [None, None, None, expected]


@pytest.mark.parametrize(
    ("decay", "end", "expected"),
    [(0.99, 0.20, "dimensional"), (0.99, 0.30, None), (0.998, 0.20, None)],
)
def test_a_low_spread_is_left_in_peace_while_it_grows_or_c_settles(
    decay: float, end: float, expected: str | None, config: Callable[..., Config]
) -> None:
    watch = CollapseWatch(config(decay=decay), steps_per_epoch=22)
    records = record_at(100, 0.2 * HEALTHY), record_at(220, end * HEALTHY)
    assert kinds(watch, *records) == [None, expected]


def test_without_an_earlier_record_nothing_is_known_of_growth(
    config: Callable[..., Config],
) -> None:
    watch = CollapseWatch(config(), steps_per_epoch=22)
    assert kinds(watch, record_at(1000, 0.2 * HEALTHY)) == [None]


def test_norms_that_grow_a_thousandfold_or_are_lost_are_a_blow_up(
    config: Callable[..., Config],
) -> None:
    watch = CollapseWatch(config(), steps_per_epoch=22)
    records = [record_at(k, embedding_norm=norm) for k, norm in ((1, 4.0), (2, 3e3), (3, 5e3))]
    assert kinds(watch, *records, record_at(4, None)) == [None, None, "blow-up", "blow-up"]


@pytest.mark.parametrize(
    ("method", "kind", "expected"),
    [
        ({"correlation": "embeddings"}, "torn", ["method.correlation directions"]),
        ({"ema": False}, "dimensional", ["method.ema true"]),
        (
            {"name": "directpred", "ema": False, "decay": 0.5},
            *("complete", ["method.name isoloss", "method.ema true"]),
        ),
        ({"name": "simsiam"}, "complete", ["method.name byol", "optimizer.name sgd"]),
        ({"name": "byol"}, "complete", ["optimizer.name sgd"]),
        ({}, "complete", ["optimizer.lr below 0.008", "a longer"]),
        ({}, "blow-up", ["optimizer.lr below 0.008", "a longer"]),
    ],
)
def test_what_to_try_fits_the_method(
    method: dict[str, Any], kind: Any, expected: list[str], config: Callable[..., Config]
) -> None:
    tries = remedies(config(**method), kind)
    assert len(tries) == len(expected)
    assert all(text.startswith(first) for text, first in zip(tries, expected, strict=True))
