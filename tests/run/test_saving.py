"""Checkpoints written while training continues."""

from concurrent.futures import Future
from threading import Timer
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from isofast.config.schema import CheckpointConfig
from isofast.errors import RunError
from isofast.run.checkpoint import newest_checkpoint
from isofast.run.saving import Saver

from ..support.runs import train


def test_a_checkpoint_holds_what_there_was_when_it_was_asked_for(tmp_path):
    about = {"format": "pt", "name": "resnet18"}
    saver = Saver(tmp_path, CheckpointConfig(max_failures=0), print, about)
    module = torch.nn.Linear(1000, 1000)
    for step in (1, 2):
        torch.nn.init.constant_(module.weight, step)
        state = module.state_dict()
        saver.save(step, {"online": state}, state)
        torch.nn.init.zeros_(module.weight)
    saver.wait()
    saver.close()
    found = newest_checkpoint(tmp_path)
    assert found.step == 2
    with safe_open(found.path / "encoder.safetensors", framework="pt") as file:
        assert file.metadata() == about
    state = found.load()["online"]
    assert (state["weight"] == 2).all()
    # by which modules recognise state saved by an older version of themselves
    assert state._metadata == module.state_dict()._metadata


def test_a_disk_that_fails_is_borne_for_a_while(tmp_path):
    said: list[str] = []
    folder = tmp_path / "checkpoints"
    saver = Saver(folder, CheckpointConfig(max_failures=2), said.append)

    def save(step: int) -> None:
        saver.save(step, {}, {"weight": torch.zeros(2)})

    # no folder can be created in place of a file
    folder.touch()
    for step in (1, 2, 3):
        save(step)
    assert len(said) == 2 and all("could not write the checkpoint" in line for line in said)
    with pytest.raises(RunError, match="could not write"):
        save(4)
    folder.unlink()
    for step in (5, 6):
        save(step)
    saver.wait()
    folder.rename(tmp_path / "away")
    folder.touch()
    for step in (7, 8, 9):
        save(step)
    # a successful save resets the count
    assert len(said) == 4
    with pytest.raises(RunError, match="could not write"):
        saver.wait()
    saver.close()


def test_a_checkpoint_is_due_minutes_after_the_last(tmp_path, monkeypatch):
    clock = [0.0]
    fake = SimpleNamespace(monotonic=lambda: clock[0])
    monkeypatch.setattr("isofast.run.saving.time", fake)
    saver = Saver(tmp_path, CheckpointConfig(every_minutes=10.0), print)

    def is_due(now: float) -> bool:
        clock[0] = now
        return saver.is_due()

    assert [is_due(now) for now in (599, 601, 602)] == [False, True, False]
    clock[0] = 1000
    saver.save(1, {}, {"weight": torch.zeros(2)})
    assert [is_due(now) for now in (1599, 1601)] == [False, True]
    saver.close()


def test_a_checkpoint_waits_for_the_records_before_it(tmp_path):
    saver, records = Saver(tmp_path, CheckpointConfig(), print), Future()
    saver.save(1, {}, {"weight": torch.zeros(2)}, records=records)
    Timer(0.2, records.set_result, [OSError("no room")]).start()
    with pytest.raises(RunError, match="could not write the records up to step 1: no room"):
        saver.wait()
    assert newest_checkpoint(tmp_path) is None
    saver.close()


@pytest.mark.slow
def test_a_run_saves_by_the_clock_too(config_file, tmp_path):
    config = config_file(checkpoint={"every_steps": 1000, "every_minutes": 1e-9, "keep": 10})
    train(config, tmp_path / "run")
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 6
