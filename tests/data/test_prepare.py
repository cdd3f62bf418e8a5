"""`prepare`: what it writes, that it writes all or nothing, and what it refuses."""

import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from isofast.cli import main
from isofast.config.presets import VIEWS_OF_DATASET
from isofast.data import open_dataset
from isofast.data import prepare as module
from isofast.data.prepare import PreparedCounts, prepare
from isofast.errors import UserError

from .test_official import tiny_files, write_archive

Pair = tuple[Future[PreparedCounts], Future[PreparedCounts]]
# seconds that nothing here comes near, unless it hangs
LONG = 30


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_digits(tmp_path: Path) -> None:
    counts = prepare("digits", tmp_path / "digits")
    assert (counts.classes, counts.train, counts.val, counts.already_there) == (
        10,
        1442,
        355,
        False,
    )
    train, val = (open_dataset(tmp_path / "digits", split) for split in ("train", "val"))
    assert train.classes == val.classes == tuple("0123456789")
    assert Counter(load_digits().target) == Counter(train.labels) + Counter(val.labels)
    # stratified: a fifth of every class
    for label in range(10):
        share = (val.labels == label).sum() / ((train.labels == label).sum() + 35)
        assert 0.17 < share < 0.22
    with Image.open(tmp_path / "digits" / "train" / "0" / "000.png") as image:
        first_zero = load_digits().images[0]
        assert image.mode == "L"
        assert np.array_equal(np.asarray(image), np.rint(first_zero * 255 / 16))
    prepare("digits", tmp_path / "again")
    assert open_dataset(tmp_path / "again", "train").fingerprint == train.fingerprint
    images = {k: v for k, v in snapshot(tmp_path / "digits").items() if k.endswith(".png")}
    assert images == {k: v for k, v in snapshot(tmp_path / "again").items() if k.endswith(".png")}
    # no image is in both splits
    content = Counter(images.values())
    assert max(content.values()) == 1


def test_a_second_call_checks_and_changes_nothing(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "tiny.zip", tiny_files())
    first = prepare("tinyimagenet", tmp_path / "root", archive)
    before = snapshot(tmp_path / "root")
    # the archive is not needed any more
    second = prepare("tinyimagenet", tmp_path / "root")
    assert (first.already_there, second.already_there) == (False, True)
    assert (second.classes, second.train, second.val) == (2, 6, 4)
    assert "already there" in str(second) and "2 classes, 6 train and 4 val" in str(second)
    assert snapshot(tmp_path / "root") == before
    with pytest.raises(UserError, match="holds tinyimagenet, not digits"):
        prepare("digits", tmp_path / "root")
    (tmp_path / "root" / "train" / "n002" / "n002_1.JPEG").write_bytes(b"changed")
    with pytest.raises(UserError, match=r"has changed.*train/n002.*prepare it again"):
        prepare("tinyimagenet", tmp_path / "root")
    shutil.rmtree(tmp_path / "root" / "val")
    with pytest.raises(UserError, match="no longer whole"):
        prepare("tinyimagenet", tmp_path / "root")


def test_an_interrupted_build_starts_over_and_an_interrupted_move_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    # killed while building: the partial folder stays, without its manifest
    (root / ".partial" / "train" / "n009").mkdir(parents=True)
    (root / ".partial" / "train" / "n009" / "x.JPEG").write_bytes(b"half")
    archive = write_archive(tmp_path / "tiny.zip", tiny_files())
    rename = Path.rename

    def stop_at_val(self: Path, target: Path) -> Path:
        if self.name == "val":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stop_at_val)
    with pytest.raises(KeyboardInterrupt):
        prepare("tinyimagenet", root, archive)
    monkeypatch.undo()
    assert (root / "train").exists() and not (root / "val").exists()
    counts = prepare("tinyimagenet", root)
    assert (counts.classes, counts.train, counts.val) == (2, 6, 4)
    assert not (root / ".partial").exists()
    assert prepare("tinyimagenet", root).already_there


@pytest.mark.slow
def test_a_really_full_disk_is_a_users_error(tmp_path: Path) -> None:
    """1 MB, in which the digits do not fit, in a mount namespace that ends with the command."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f"mount -t tmpfs -o size=1m small {disk} || exit 77; "
    script += f"{sys.executable} -m isofast.cli prepare digits --root {disk}/digits; code=$?; "
    script += f"ls -A {disk}; exit $code"
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare, which is not installed")
    probe = subprocess.run(["unshare", "-m", "true"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"may not make a mount namespace here: {probe.stderr.strip()}")
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip(f"may not mount a small disk here: {done.stderr.strip()}")
    assert done.returncode == 2, done.stderr
    assert "No space left on device" in done.stderr and "Nothing half-written" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_other_peoples_folders_are_left_alone(tmp_path: Path, pictures: Path) -> None:
    shutil.copytree(pictures, tmp_path / "mine")
    before = snapshot(tmp_path / "mine")
    with pytest.raises(
        UserError, match=r"already holds train and val.*isofast prepare imagefolder"
    ):
        prepare("digits", tmp_path / "mine")
    assert snapshot(tmp_path / "mine") == before
    counts = prepare("imagefolder", tmp_path / "mine")
    assert (counts.classes, counts.train, counts.val) == (3, 51, 15)
    (tmp_path / "mine" / "val" / "class0" / "000.jpg").write_text("no picture")
    with pytest.raises(UserError, match="1 of 15 val images cannot be read"):
        prepare("imagefolder", tmp_path / "mine")


def test_unknown_names_and_unwanted_archives_are_refused(tmp_path: Path) -> None:
    names = "digits, cifar10, cifar100, stl10, tinyimagenet, imagefolder"
    with pytest.raises(UserError, match=f"no data set 'mnist'.*{names}"):
        prepare("mnist", tmp_path)
    for name in ("digits", "imagefolder"):
        with pytest.raises(UserError, match=f"{name} is made without an archive"):
            prepare(name, tmp_path, tmp_path / "x.zip")
    assert tuple(VIEWS_OF_DATASET) == module.NAMES


def test_folders_made_for_nothing_are_removed_with_their_parents(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    archive = tmp_path / "text.zip"
    archive.write_bytes(b"not found")
    with pytest.raises(UserError, match="not a whole tar or zip"):
        prepare("tinyimagenet", tmp_path / "mine" / "x" / "y" / "z", archive)
    assert list((tmp_path / "mine").iterdir()) == []


def test_what_file_managers_leave_changes_nothing(tmp_path: Path) -> None:
    root = tmp_path / "root"
    prepare("digits", root)
    for folder in (root / "train", root / "train" / "3"):
        (folder / ".DS_Store").write_bytes(b"x")
    (root / "val" / ".thumbnails").mkdir()
    assert prepare("digits", root).already_there


def test_leftovers_of_a_command_that_was_killed_at_its_end_are_removed(tmp_path: Path) -> None:
    root = tmp_path / "root"
    prepare("digits", root)
    (root / ".partial").mkdir()
    (root / ".download").mkdir()
    (root / ".download" / "archive.zip").write_bytes(b"x")
    assert prepare("digits", root).already_there
    assert not (root / ".partial").exists() and not (root / ".download").exists()


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
    assert "starts over, but for a whole download" in capsys.readouterr().err
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
def test_what_was_put_into_a_prepared_root_is_a_change(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    prepare("digits", root)
    if name.endswith(".txt"):
        (root / name).write_text("x")
    elif name.endswith(".png"):
        (root / name).symlink_to(root / "nowhere")
    else:
        (root / name).mkdir()
    place = "train/3" if "/3/" in name else name
    with pytest.raises(UserError, match=rf"has changed .*{place}\. Undo that, or delete"):
        prepare("digits", root)


def test_a_renamed_image_is_a_change(tmp_path: Path) -> None:
    """Also where the order stays, and so the contents one after the other."""
    root = tmp_path / "root"
    prepare("digits", root)
    folder = root / "train" / "3"
    last = max(folder.iterdir())
    last.rename(last.with_name("999.png"))
    assert max(folder.iterdir()).name == "999.png"
    with pytest.raises(UserError, match=r"has changed since .* 1 place\(s\), train/3\."):
        prepare("digits", root)


@pytest.fixture
def start_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Pair]]:
    """Start a command that fails or not, and one that is there while the first still builds."""
    threads = ThreadPoolExecutor(2)
    going_on = threading.Event()
    write = module._write_digits
    said: list[str] = []

    def start(root: Path, *, fails: bool) -> Pair:
        building = threading.Event()

        def build(folder: Path) -> None:
            # only the first build is held up
            if not building.is_set():
                building.set()
                assert going_on.wait(LONG)
                if fails:
                    raise UserError("spoiled")
            write(folder)

        monkeypatch.setattr(module, "_write_digits", build)
        first = threads.submit(prepare, "digits", root)
        assert building.wait(LONG)
        second = threads.submit(prepare, "digits", root)
        ends = time.monotonic() + LONG
        while "waiting" not in "".join(said) and not second.done() and time.monotonic() < ends:
            said.append(capsys.readouterr().err)
            time.sleep(0.01)
        assert "".join(said) == f"another isofast prepare works on {root}; waiting for it to end\n"
        assert not second.done()
        going_on.set()
        return first, second

    yield start
    going_on.set()
    threads.shutdown()


def test_the_second_finds_what_the_first_has_made(
    tmp_path: Path, start_two: Callable[..., Pair]
) -> None:
    first, second = start_two(tmp_path / "root", fails=False)
    assert not first.result(LONG).already_there
    assert second.result(LONG).already_there


def test_the_second_does_what_the_first_has_failed_at(
    tmp_path: Path, start_two: Callable[..., Pair]
) -> None:
    """The first removes the root that it made, with its parents, and the second waits for that."""
    root = tmp_path / "new" / "root"
    first, second = start_two(root, fails=True)
    with pytest.raises(UserError, match="spoiled"):
        first.result(LONG)
    assert not second.result(LONG).already_there
    assert prepare("digits", root).already_there
