"""Run directories: chosen, locked, cleared of an interruption's leftovers."""

import errno
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest

from isofast.data import files
from isofast.data.files import write_text
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
    assert choose_run_dir(Path("x.json"), Path("."), fresh=True) == tmp_path.with_name(
        f"{tmp_path.name}-2"
    )


def test_a_requeued_job_goes_on_in_the_fresh_folder_that_it_began(
    tmp_path, monkeypatch, small_config
):
    run, second, third = (tmp_path / name for name in ("run", "run-2", "run-3"))
    for job, folder in (("", run), ("17", second), ("18", third)):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        assert choose_run_dir(Path("x.json"), run, fresh=True) == folder
        open_run_dir(folder, small_config()).close()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    # the last one was stopped before it had a folder
    for job, folder in (("17", second), ("18", third), ("19", tmp_path / "run-4")):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        assert choose_run_dir(Path("x.json"), run, fresh=True) == folder


def test_a_file_may_have_the_longest_name_and_is_on_disk_before_it(tmp_path, monkeypatch):
    synced: list[tuple[Path, bool]] = []
    monkeypatch.setattr(files, "sync", lambda place: synced.append((place, path.exists())))
    path = tmp_path / ("\u00e9" * 125 + ".json")
    write_text(path, "{}")
    assert [*tmp_path.iterdir()] == [path]
    (part, before), (folder, after) = synced
    assert part.suffix == ".json" and folder == tmp_path and (before, after) == (False, True)


@pytest.mark.parametrize(("code", "borne"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_a_folder_that_cannot_be_synced(code, borne, tmp_path, monkeypatch):
    def fsync(number: int) -> None:
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr("os.fsync", fsync)
    with nullcontext() if borne else pytest.raises(OSError, match="Input/output error"):
        write_text(tmp_path / "a.json", "{}")


def test_one_run_at_a_time(small_config, tmp_path):
    for name in (".lock", ".config.json.123.part.json"):
        (tmp_path / name).touch()
    with open_run_dir(tmp_path, small_config()):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        with pytest.raises(UserError, match="another process is training"):
            open_run_dir(tmp_path, small_config())
    open_run_dir(tmp_path, small_config()).close()


def test_a_requeued_job_waits_for_its_former_processes(small_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    former = open_run_dir(tmp_path, small_config())
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(open_run_dir, tmp_path, small_config())
        time.sleep(1.5)
        assert not following.done()
        former.close()
        held = following.result(timeout=10)
    assert capsys.readouterr().err.count("waiting up to 180 s") == 1
    monkeypatch.setattr("isofast.run.directory._WAIT_S", 1)
    with held, pytest.raises(UserError, match="another process is training"):
        open_run_dir(tmp_path, small_config())
