"""`prepare` that was stopped, is given again, or cannot read or write: what it leaves and says."""

from pathlib import Path

import pytest

from isofast.cli import main
from isofast.data import prepare as module
from isofast.data.prepare import prepare
from isofast.errors import UserError


def test_leftovers_of_a_command_that_was_killed_at_its_end_are_removed(tmp_path: Path) -> None:
    root = tmp_path / "root"
    prepare("digits", root)
    (root / ".partial").mkdir()
    (root / ".download").mkdir()
    (root / ".download" / "archive.zip").write_bytes(b"x")
    assert prepare("digits", root).already_there
    assert not (root / ".partial").exists() and not (root / ".download").exists()


def test_folders_made_for_nothing_are_removed_with_their_parents(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    archive = tmp_path / "text.zip"
    archive.write_bytes(b"not found")
    with pytest.raises(UserError, match="not a whole zip"):
        prepare("tinyimagenet", tmp_path / "mine" / "x" / "y" / "z", archive)
    assert list((tmp_path / "mine").iterdir()) == []


def test_what_file_managers_leave_changes_nothing(tmp_path: Path) -> None:
    root = tmp_path / "root"
    prepare("digits", root)
    for folder in (root / "train", root / "train" / "3"):
        (folder / ".DS_Store").write_bytes(b"x")
    (root / "val" / ".thumbnails").mkdir()
    assert prepare("digits", root).already_there


@pytest.mark.parametrize("name", ["tinyimagenet", "cifar10"])
def test_an_archive_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    """A file of the kernel's, which nobody can read from its start, not even root."""
    with pytest.raises(UserError) as caught:
        prepare(name, tmp_path / "root", "/proc/self/mem")
    message = str(caught.value)
    assert message.startswith("cannot read the archive /proc/self/mem: ")
    assert "free space" not in message
    assert list(tmp_path.iterdir()) == []


def test_only_a_full_disk_asks_for_space(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"Not a directory: .*file.* mend that or give") as caught:
        prepare("digits", tmp_path / "file" / "root")
    assert "free space" not in str(caught.value)


def test_ctrl_c_says_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(folder: Path) -> None:
        (folder / "train").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_write_digits", stop)
    assert main(["prepare", "digits", "--root", str(tmp_path / "root")]) == 130
    assert "starts over, but for what was downloaded, a build" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_move_that_was_stopped_is_finished_under_its_own_name_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    rename = Path.rename

    def stop_at_val(self: Path, target: Path) -> Path:
        if self.name == "val":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stop_at_val)
        with pytest.raises(KeyboardInterrupt):
            prepare("digits", root)
    before = sorted(root.rglob("*"))
    with pytest.raises(UserError) as caught:
        prepare("stl10", root)
    assert str(caught.value) == (
        f"{root} holds digits, half moved into place; finish that with `isofast prepare digits "
        f"--root {root}`, or give another --root for stl10"
    )
    assert sorted(root.rglob("*")) == before
    assert str(prepare("digits", root)).startswith("digits ready: 10 classes, 1,442 train")


@pytest.mark.parametrize("name", ["train/notes.txt", "train/3/notes", "train/3/x.png"])
def test_what_was_put_into_a_prepared_root_is_to_be_removed(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    prepare("digits", root)
    if name.endswith(".txt"):
        (root / name).write_text("x")
    elif name.endswith(".png"):
        (root / name).symlink_to(root / "nowhere")
    else:
        (root / name).mkdir()
    with pytest.raises(UserError) as caught:
        prepare("digits", root)
    assert str(caught.value) == (
        f"{root} holds what `isofast prepare` has not put there: {root / name}. Remove it, then "
        "give the same command again"
    )


def test_a_renamed_image_is_a_change(tmp_path: Path) -> None:
    """Also where the order stays, and so the contents one after the other."""
    root = tmp_path / "root"
    prepare("digits", root)
    folder = root / "train" / "3"
    last = max(folder.iterdir())
    last.rename(last.with_name("999.png"))
    assert max(folder.iterdir()).name == "999.png"
    with pytest.raises(UserError, match=r"has changed since .* 1 class folder\(s\), train/3\."):
        prepare("digits", root)
