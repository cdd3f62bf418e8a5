"""Checkpoints: all or nothing, and the newest intact one is used."""

import resource
import signal
from pathlib import Path
from pickle import UnpicklingError

import pytest
import torch
from torch import nn

from isofast.errors import RunError, UserError
from isofast.run.checkpoint import newest_checkpoint, save_checkpoint


def _save(folder: Path, step: int, keep: int = 3) -> Path:
    state = {"value": torch.full((1000,), float(step))}
    return save_checkpoint(folder, step, state, nn.Linear(2, 2).state_dict(), keep)


def test_the_newest_is_found_and_old_ones_go(tmp_path, monkeypatch):
    # as some network file systems refuse it
    monkeypatch.delattr("os.chmod")
    assert newest_checkpoint(tmp_path / "none") is None
    for step in (9, 10, 100):
        _save(tmp_path, step, keep=2)
    found = newest_checkpoint(tmp_path)
    assert found.step == 100
    assert torch.equal(found.load()["value"], torch.full((1000,), 100.0))
    # all files have the same permissions
    assert len({file.stat().st_mode for file in found.path.iterdir()}) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000010", "step_00000100"]


def test_a_checkpoint_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced: list[tuple[str, bool]] = []

    def note(path: Path) -> None:
        synced.append((path.name, (tmp_path / "step_00000001").exists()))

    monkeypatch.setattr("isofast.run.checkpoint.sync", note)
    _save(tmp_path, 1)
    files = ("state.pt", "encoder.safetensors", "manifest.json")
    assert synced == [*((name, False) for name in files), (tmp_path.name, True)]


def test_a_checkpoint_runs_no_code_of_others(tmp_path):
    save_checkpoint(tmp_path, 1, {"value": print}, nn.Linear(2, 2).state_dict(), 1)
    with pytest.raises(UnpicklingError):
        newest_checkpoint(tmp_path).load()


def test_the_best_is_kept_however_old(tmp_path):
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 5), (6, 5)):
        save_checkpoint(tmp_path, step, {}, nn.Linear(2, 2).state_dict(), 1, best_step=best)
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["5", "6"]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("state.pt", lambda content: content[:-10]),
        ("state.pt", lambda content: content[:100] + bytes([content[100] ^ 1]) + content[101:]),
        ("state.pt", None),
        ("encoder.safetensors", lambda content: content[:-10]),
        ("manifest.json", lambda content: content[:20]),
        ("manifest.json", lambda content: b"{}"),
        ("manifest.json", lambda content: b"[]"),
        ("manifest.json", None),
    ],
)
def test_a_damaged_one_is_passed_over_and_named(tmp_path, name, damage):
    _save(tmp_path, 1)
    file = _save(tmp_path, 2) / name
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage(file.read_bytes()))
    said: list[str] = []
    assert newest_checkpoint(tmp_path, said.append).step == 1
    assert len(said) == 1 and "step_00000002 is damaged" in said[0]


def test_continuing_from_an_older_one_keeps_and_replaces(tmp_path, capsys):
    for step in (2, 4, 6):
        _save(tmp_path, step)
    (tmp_path / "step_00000006" / "state.pt").write_bytes(b"damaged")
    assert newest_checkpoint(tmp_path).step == 4
    assert "step_00000006 is damaged" in capsys.readouterr().err
    assert _save(tmp_path, 5, keep=1).exists()
    assert newest_checkpoint(tmp_path).step == 5
    _save(tmp_path, 6, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000006"]
    assert torch.equal(newest_checkpoint(tmp_path).load()["value"], torch.full((1000,), 6.0))


def test_none_whole_is_an_error_and_not_a_new_beginning(tmp_path):
    for step in (1, 2):
        (_save(tmp_path, step) / "state.pt").unlink()
    with pytest.raises(UserError, match=r"none of the 2 checkpoint.*--fresh"):
        newest_checkpoint(tmp_path)


def test_an_unfinished_folder_is_no_checkpoint(tmp_path):
    _save(tmp_path, 1)
    (tmp_path / ".step_00000002.part").mkdir()
    (tmp_path / ".step_00000002.part" / "state.pt").write_bytes(b"half")
    (tmp_path / "step_notes").mkdir()
    assert newest_checkpoint(tmp_path).step == 1
    # it does not block saving the same step, and the next save removes it
    assert _save(tmp_path, 2).exists()
    (tmp_path / ".step_00000003.part").mkdir()
    _save(tmp_path, 4)
    assert not [*tmp_path.glob(".*")]


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path):
    _save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        with pytest.raises(RunError, match="Earlier checkpoints, if any, are intact"):
            _save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
