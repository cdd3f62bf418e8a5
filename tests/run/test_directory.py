"""Run directories: chosen, locked, cleared of an interruption's leftovers."""

from pathlib import Path

import pytest

from isofast.errors import UserError
from isofast.run.directory import choose_run_dir, open_run_dir


def test_run_dirs_are_named_after_the_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for fresh in (False, True):
        assert choose_run_dir(Path("launch/x.json"), None, fresh) == Path("runs/x")
    for taken in ("runs/x", "runs/x-2"):
        Path(taken).mkdir(parents=True)
    assert choose_run_dir(Path("launch/x.json"), None, fresh=False) == Path("runs/x")
    assert choose_run_dir(Path("launch/x.json"), None, fresh=True) == Path("runs/x-3")
    assert choose_run_dir(Path("launch/x.json"), Path("y"), fresh=True) == Path("y")


def test_a_requeued_job_goes_on_in_the_fresh_folder_that_it_began(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    run = tmp_path / "run"
    assert choose_run_dir(Path("x.json"), run, fresh=True) == run
    for taken in (run, tmp_path / "run-2"):
        taken.mkdir()
        assert choose_run_dir(Path("x.json"), run, fresh=True) == taken


def test_one_run_at_a_time(small_config, tmp_path):
    for name in (".lock", ".config.json.123.part.json"):
        (tmp_path / name).touch()
    with open_run_dir(tmp_path, small_config()):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        with pytest.raises(UserError, match="another process is training"):
            open_run_dir(tmp_path, small_config())
    open_run_dir(tmp_path, small_config()).close()
