"""metrics.jsonl and spectrum.npz across a crash and a resume."""

import errno
import io
import json
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NoReturn

import numpy as np
import pytest

from isofast.config.schema import Config
from isofast.errors import UserError
from isofast.run.loggers import Record, make_loggers
from isofast.run.metrics import MetricsWriter, read_metrics, read_spectra
from isofast.run.spectrum import Spectrum


def _write(run_dir: Path, start: int, steps: range) -> None:
    with closing(MetricsWriter(run_dir, start)) as writer:
        for step in steps:
            writer.write({"step": step, "loss": 0.5 * step})
            writer.spectrum(step, Spectrum(np.float32([2, 1, 0]) * step))


def test_a_resumed_run_drops_what_was_written_after_its_checkpoint(tmp_path):
    _write(tmp_path, 0, range(1, 6))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    _write(tmp_path, 3, range(4, 8))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(1, 8)]
    with np.load(tmp_path / "spectrum.npz") as spectrum:
        assert spectrum["step"].tolist() == [*range(1, 8)]
        assert spectrum["eigenvalues"].shape == (7, 3)
        assert spectrum["eigenvalues"][1].tolist() == [4.0, 2.0, 0.0]
    _write(tmp_path, 3, range(5, 6))
    assert [*read_spectra(tmp_path / "spectrum.npz")] == [1, 2, 3, 5]
    _write(tmp_path, 0, range(1, 2))
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def _uneven() -> bytes:
    """Return a spectrum.npz with fewer eigenvalues than steps."""
    np.savez(buffer := io.BytesIO(), step=[1, 2, 3, 4], eigenvalues=np.ones((2, 3)))
    return buffer.getvalue()


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04cut", _uneven()])
def test_a_damaged_spectrum_is_named_and_left_alone(tmp_path, content):
    _write(tmp_path, 0, range(1, 5))
    (tmp_path / "spectrum.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"spectrum\.npz.*move it away"):
        MetricsWriter(tmp_path, 4)
    assert (tmp_path / "spectrum.npz").read_bytes() == content
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 4
    _write(tmp_path, 0, range(1, 2))


class Recording:
    """A custom logger."""

    seen: ClassVar[list[Any]] = []

    def __init__(self, run_dir: Path, config: Config, step: int) -> None:
        self.seen.append((run_dir, config.seed, step))

    def log(self, record: Record) -> None:
        self.seen.append(record)

    def flush(self) -> None:
        self.seen.append("flush")

    def close(self) -> None:
        self.seen.append("close")


def test_nan_becomes_null(tmp_path, monkeypatch):
    monkeypatch.setattr(Recording, "seen", [])
    logger = Recording(tmp_path, SimpleNamespace(seed=0), 0)
    with closing(MetricsWriter(tmp_path, 0, [logger])) as writer:
        writer.write({"step": 1, "loss": float("nan"), "lr": float("inf")})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": None, "lr": None}]
    # loggers get the numbers
    assert np.isnan(Recording.seen[1]["loss"])


def test_a_disk_with_no_room_and_then_little_loses_no_record(tmp_path, monkeypatch):
    monkeypatch.setattr(Recording, "seen", [])
    room = [0, 5]

    def write(data: bytes) -> int:
        if not (left := room.pop(0) if room else len(data)):
            raise OSError(errno.ENOSPC, "full")
        return file.write(data[:left])

    logger = Recording(tmp_path, SimpleNamespace(seed=0), 0)
    with closing(MetricsWriter(tmp_path, 0, [logger])) as writer:
        file, records = writer._file, [{"step": step, "loss": 0.5} for step in (1, 2)]
        writer._file = SimpleNamespace(write=write, fileno=file.fileno, close=file.close)
        for record in records:
            writer.write(record)
    assert read_metrics(tmp_path / "metrics.jsonl") == Recording.seen[1:3] == records


def test_a_logger_of_your_own_gets_every_record(tmp_path, small_config, monkeypatch):
    synced: list[int] = []
    monkeypatch.setattr("isofast.run.metrics.os", SimpleNamespace(fsync=synced.append))
    monkeypatch.setitem(sys.modules, "my_loggers", SimpleNamespace(Recording=Recording))
    config = small_config(logging={"loggers": ["my_loggers:Recording", "tensorboard"]}, seed=3)
    with closing(MetricsWriter(tmp_path, 2, make_loggers(tmp_path, config, 2))) as writer:
        writer.write({"step": 3, "loss": 0.5})
    assert Recording.seen == [(tmp_path, 3, 2), {"step": 3, "loss": 0.5}, "flush", "close"]
    assert list((tmp_path / "tensorboard").iterdir()) and len(synced) == 1


def test_a_logger_that_fails_is_dropped(tmp_path, small_config, monkeypatch):
    def failing(*_: object) -> NoReturn:
        raise RuntimeError("the server is gone")

    logger = SimpleNamespace(log=failing, flush=failing, close=failing)
    monkeypatch.setitem(sys.modules, "my_loggers", SimpleNamespace(Failing=lambda *_: logger))
    config = small_config(logging={"loggers": ["my_loggers:Failing"]})
    told: list[str] = []
    writer = MetricsWriter(tmp_path, 0, make_loggers(tmp_path, config, 0), told.append)
    with closing(writer):
        writer.write({"step": 1, "loss": 0.5})
    assert len(told) == 1 and "receives no more records (the server is gone)" in told[0]


def test_a_logger_that_does_not_start_is_named(tmp_path, small_config):
    config = small_config(logging={"loggers": ["no_logger:Here"]})
    with pytest.raises(UserError, match=r"cannot start 'no_logger:Here'.*No module named"):
        make_loggers(tmp_path, config, 0)
