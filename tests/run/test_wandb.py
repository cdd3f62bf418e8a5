"""Weights & Biases through its own package, offline: what its run files hold, and resuming."""

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from isofast.errors import UserError
from isofast.run.loggers import make_loggers
from isofast.run.metrics import MetricsWriter, read_metrics
from isofast.run.spectrum import Spectrum

from ..support.runs import train

wandb = pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


def _messages(path: Path) -> Iterator[bytes]:
    """Read a LevelDB log: a 7-byte header, then 32 KB blocks of chunks (checksum, length, kind)."""
    raw, at, message = path.read_bytes(), 7, b""
    while at + 7 <= len(raw):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", raw[at : at + 7])
        message += raw[at + 7 : at + 7 + length]
        at += 7 + length
        # a whole message, or its last chunk
        if kind in (1, 4):
            yield message
            message = b""


def _stored(run_dir: Path) -> list[tuple[str, dict[str, Any], dict[int, dict[str, Any]]]]:
    """Return the id, the config and the rows by step of each process's file, in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    files = run_dir.glob("wandb/offline-run-*/*.wandb")
    for path in sorted(files, key=lambda path: path.stat().st_mtime):
        run_id, config, rows = "", {}, {}
        for message in _messages(path):
            record = Record()
            record.ParseFromString(message)
            if record.HasField("run"):
                run_id = record.run.run_id
            for i in (*record.run.config.update, *record.config.update):
                config[i.key] = json.loads(i.value_json)
            if record.HasField("history"):
                items = record.history.item
                row = {(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in items}
                rows[row["_step"]] = row
        found.append((run_id, config, rows))
    return found


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v for k, v in row.items() if k[0] != "_" and not k.startswith(("spectrum.", "views."))
    }


@pytest.mark.slow
def test_records_config_and_spectrum_and_one_run_for_both_processes(tmp_path, small_config):
    config = small_config(logging={"loggers": ["wandb", "tensorboard"]}, seed=7)
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        writer = MetricsWriter(tmp_path, start, make_loggers(tmp_path, config, start))
        for step in steps:
            writer.write({"step": step, "loss": 0.5 * step, "alignment": None})
            writer.spectrum(step, Spectrum(np.float32([2, 1, 0]) * step))
        writer.write({"step": step, "knn_top1": 0.25})
        writer.close()
    # wandb's own process has written everything by the time it ends
    wandb.teardown()
    (first_id, stored, first), (second_id, _, second) = _stored(tmp_path)
    assert first_id == second_id == (tmp_path / "wandb" / "id").read_text()
    assert stored["seed"] == 7 and stored["encoder"]["width"] == 4
    assert {k: _numbers(row) for k, row in first.items()} == {
        1: {"loss": 0.5},
        2: {"loss": 1.0},
        3: {"loss": 1.5, "knn_top1": 0.25},
    }
    assert {k: _numbers(row) for k, row in second.items()} == {
        3: {"loss": 1.5},
        4: {"loss": 2.0, "knn_top1": 0.25},
    }
    (path,) = tmp_path.glob(f"wandb/offline-run-*/files/{second[4]['spectrum.path']}")
    pixels = np.asarray(Image.open(path).convert("RGB"))
    # not only axes but coloured lines
    assert (pixels.max(2).astype(int) - pixels.min(2) > 100).sum() > 100


@pytest.mark.slow
def test_a_run_of_yours_gets_the_numbers_and_stays(tmp_path, small_config):
    config = small_config(logging={"loggers": ["wandb"]}, seed=7)
    with wandb.init(dir=tmp_path, config={"lr": 0.5}) as mine:
        # of two runs, one after the other
        for loss in (0.5, 0.25):
            (logger,) = make_loggers(tmp_path, config, 0)
            logger.log({"step": 1, "loss": loss})
            logger.close()
        assert wandb.run is mine
        wandb.log({"score": 2.0})
    wandb.teardown()
    ((_, stored, rows),) = _stored(tmp_path)
    assert (stored["lr"], stored["seed"]) == (0.5, 7)
    assert [_numbers(row) for row in rows.values()] == [
        *({"step": 1, "loss": loss} for loss in (0.5, 0.25)),
        {"score": 2.0},
    ]


@pytest.mark.long
def test_a_run_is_in_it_under_tensorboards_names(tmp_path, config_file):
    config = config_file(logging={"loggers": ["wandb", "tensorboard"]})
    for steps in (2, 4):
        train(config, tmp_path / "run", "--set", f"train.max_steps={steps}")
    (first_id, _, first), (second_id, _, second) = _stored(tmp_path / "run")
    assert first_id == second_id and [*first, *second] == [1, 2, 3, 4]
    (path,) = tmp_path.glob(f"run/wandb/offline-run-*/files/{first[2]['views.path']}")
    assert path.read_bytes() == (tmp_path / "run" / "views.png").read_bytes()
    assert not any("views.path" in row for row in second.values())
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    for record in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        row = _numbers((first | second)[record.pop("step")])
        assert row == pytest.approx(record)
        assert {*row} == {*board.Tags()["scalars"]}


def test_without_the_package_the_error_says_how_to_get_it(tmp_path, small_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = small_config(logging={"loggers": ["wandb"]})
    with pytest.raises(UserError, match=r"not installed\. pip install wandb"):
        make_loggers(tmp_path, config, 0)
    assert not (tmp_path / "wandb").exists()
