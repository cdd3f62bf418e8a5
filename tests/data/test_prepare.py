"""`prepare`: what it writes, that it writes all or nothing, and what it refuses."""

import io
import shutil
import stat
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from isofast.data import archives, open_dataset, verify_images
from isofast.data import prepare as module
from isofast.data.prepare import prepare
from isofast.errors import UserError
from isofast.presets import VIEWS_OF_DATASET

TOP = "tiny-imagenet-200"
Members = dict[str, bytes]


def jpeg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 255 - value)).save(buffer, format="JPEG")
    return buffer.getvalue()


def official_members() -> Members:
    """Two classes, three train and two val images each, in the official layout."""
    members: Members = {
        f"{TOP}/wnids.txt": b"n001\nn002\n",
        f"{TOP}/words.txt": b"n001\tgoose\nn002\tchair\n",
        f"{TOP}/test/images/test_0.JPEG": jpeg(1),
    }
    lines = []
    for c, wnid in enumerate(("n001", "n002")):
        members[f"{TOP}/train/{wnid}/{wnid}_boxes.txt"] = b"boxes"
        for k in range(3):
            members[f"{TOP}/train/{wnid}/images/{wnid}_{k}.JPEG"] = jpeg(10 * c + k)
        for k in range(2):
            # validation images of both classes lie mixed in one folder
            members[f"{TOP}/val/images/val_{2 * k + c}.JPEG"] = jpeg(100 + 10 * c + k)
            lines.append(f"val_{2 * k + c}.JPEG\t{wnid}\t0\t0\t7\t7")
    members[f"{TOP}/val/val_annotations.txt"] = "\n".join(lines).encode()
    return members


def write_zip(path: Path, members: Members) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


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
    archive = write_zip(tmp_path / "tiny.zip", official_members())
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


def test_tinyimagenet_layout(tmp_path: Path) -> None:
    members = official_members()
    prepare("tinyimagenet", tmp_path / "root", write_zip(tmp_path / "tiny.zip", members))
    written = {k: v for k, v in snapshot(tmp_path / "root").items() if k.endswith(".JPEG")}
    expected = {
        f"train/{w}/{w}_{k}.JPEG": members[f"{TOP}/train/{w}/images/{w}_{k}.JPEG"]
        for w in ("n001", "n002")
        for k in range(3)
    }
    expected |= {
        f"val/{w}/val_{k}.JPEG": members[f"{TOP}/val/images/val_{k}.JPEG"]
        for w, k in (("n001", 0), ("n001", 2), ("n002", 1), ("n002", 3))
    }
    assert written == expected


def test_real_tinyimagenet(tiny_root: Path) -> None:
    for split, count in (("train", 500), ("val", 50)):
        dataset = verify_images(open_dataset(tiny_root, split), progress=False)
        assert len(dataset.classes) == 20
        assert set(Counter(dataset.labels).values()) == {count}
        assert (dataset.sizes == 64).all()


SPOILED = {
    "no wnids.txt": (lambda m: m.pop(f"{TOP}/wnids.txt"), "needs one"),
    "no annotations": (
        lambda m: m.pop(f"{TOP}/val/val_annotations.txt"),
        "lacks .*val_annotations",
    ),
    "annotated image missing": (lambda m: m.pop(f"{TOP}/val/images/val_0.JPEG"), r"'val_0\.JPEG"),
    "class without images": (
        lambda m: [m.pop(f"{TOP}/train/n002/images/n002_{k}.JPEG") for k in range(3)],
        "no train images of 1 of its 2 classes: n002",
    ),
    "class without val images": (
        lambda m: m.update({f"{TOP}/val/val_annotations.txt": b"val_0.JPEG\tn001\t0\t0\t7\t7"}),
        "no val images of 1 of its 2 classes: n002",
    ),
    "annotated twice": (
        lambda m: m.update(
            {f"{TOP}/val/val_annotations.txt": b"val_0.JPEG\tn001\t0\nval_0.JPEG\tn002\t0"}
        ),
        "has a class already",
    ),
    "unknown class": (
        lambda m: m.update({f"{TOP}/val/val_annotations.txt": b"val_0.JPEG\tn999\t0"}),
        "n999",
    ),
    "annotation that escapes": (
        lambda m: m.update({f"{TOP}/val/val_annotations.txt": b"../../x.JPEG\tn001\t0"}),
        "not in the archive",
    ),
    "wnids that escape": (
        lambda m: m.update({f"{TOP}/wnids.txt": b"..\nn001"}),
        r"unsafe: wnids.txt has the class name '\.\.'",
    ),
    "name that escapes": (lambda m: m.update({"../evil.txt": b"x"}), "points outside"),
    "absolute name": (lambda m: m.update({"/tmp/evil.txt": b"x"}), "points outside"),
    "image that is none": (
        lambda m: m.update({f"{TOP}/train/n001/images/n001_1.JPEG": b"text"}),
        r"1 of 6 train images cannot be read.*n001_1\.JPEG",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_archives_leave_nothing(tmp_path: Path, name: str) -> None:
    spoil, message = SPOILED[name]
    members = official_members()
    spoil(members)
    archive = write_zip(tmp_path / "tiny.zip", members)
    with pytest.raises(UserError, match=message):
        prepare("tinyimagenet", tmp_path / "root", archive)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.zip"]
    assert not Path("/tmp/evil.txt").exists()
    # and the good archive then works in the same place
    prepare("tinyimagenet", tmp_path / "root", write_zip(archive, official_members()))


def test_a_spoiled_image_can_be_left_out(tmp_path: Path) -> None:
    members = official_members()
    members[f"{TOP}/train/n001/images/n001_1.JPEG"] = b"text"
    archive = write_zip(tmp_path / "tiny.zip", members)
    # what was unpacked is gone when the message is read, so that it names the place to be
    named = r"^1 of 6 train images cannot be read: train/n001/n001_1\.JPEG \(.*archive is spoiled"
    with pytest.raises(UserError, match=f"{named}: get it again, or .*--on-bad-image skip$"):
        prepare("tinyimagenet", tmp_path / "root", archive)
    counts = prepare("tinyimagenet", tmp_path / "root", archive, on_bad="skip")
    assert (counts.classes, counts.train, counts.val) == (2, 5, 4)
    assert "\n1 of 6 train images cannot be read: train/n001/n001_1.JPEG (" in str(counts)
    # said again, and known to the check before a run
    again = prepare("tinyimagenet", tmp_path / "root", on_bad="skip")
    assert again.left_out == counts.left_out and again.train == 5
    dataset = verify_images(open_dataset(tmp_path / "root", "train"), on_bad="skip")
    assert list(dataset.left_out) == ["train/n001/n001_1.JPEG"]
    write_zip(archive, members | {name: b"text" for name in members if "/n001/images/" in name})
    with pytest.raises(UserError, match=r": train/n001/.*the class n001: the archive is spoiled"):
        prepare("tinyimagenet", tmp_path / "other", archive, on_bad="skip")


def test_archives_that_are_no_whole_zip_leave_nothing(tmp_path: Path) -> None:
    whole = write_zip(tmp_path / "whole.zip", official_members()).read_bytes()
    flipped = bytearray(whole)
    # inside the packed bytes of an image, so only its checksum tells
    place = whole.index(b"n002_2.JPEG") + 200
    flipped[place : place + 8] = bytes(8)
    for name, content in (
        ("cut.zip", whole[: len(whole) * 2 // 3]),
        ("text.zip", b"not found"),
        ("empty.zip", b""),
        ("flipped.zip", bytes(flipped)),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} is not a whole zip file.*Download it again"):
            prepare("tinyimagenet", tmp_path / "root", tmp_path / name)
        assert not (tmp_path / "root").exists()
    with pytest.raises(UserError, match=r"there is no archive .*nowhere.zip"):
        prepare("tinyimagenet", tmp_path / "root", tmp_path / "nowhere.zip")


def test_links_are_refused(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "tiny.zip", official_members())
    link = zipfile.ZipInfo(f"{TOP}/train/n001/images/n001_9.JPEG")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(archive, "a") as opened:
        opened.writestr(link, "/etc/passwd")
    with pytest.raises(UserError, match=r"n001_9.JPEG' is a link"):
        prepare("tinyimagenet", tmp_path / "root", archive)


def test_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = official_members()
    members[f"{TOP}/train/n001/images/n001_9.JPEG"] = bytes(100_000)
    archive = write_zip(tmp_path / "tiny.zip", members)
    monkeypatch.setattr(archives, "_MAX_FILE_BYTES", 50_000)
    with pytest.raises(UserError, match=r"n001_9.JPEG' unpacks to more than 50,000 bytes"):
        prepare("tinyimagenet", tmp_path / "root", archive)
    monkeypatch.setattr(archives, "_MAX_TOTAL_BYTES", 90_000)
    with pytest.raises(UserError, match="more than 90,000"):
        prepare("tinyimagenet", tmp_path / "root", archive)
    assert not (tmp_path / "root").exists()


def test_an_interrupted_build_starts_over_and_an_interrupted_move_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    # killed while building: the partial folder stays, without its manifest
    (root / ".partial" / "train" / "n009").mkdir(parents=True)
    (root / ".partial" / "train" / "n009" / "x.JPEG").write_bytes(b"half")
    archive = write_zip(tmp_path / "tiny.zip", official_members())
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


def test_a_full_disk_is_a_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    write = Path.write_bytes

    def fill_up(self: Path, data: bytes) -> int:
        if self.suffix == ".JPEG" and len(written) == 4:
            raise OSError(28, "No space left on device")
        written.append(self)
        return write(self, data)

    archive = write_zip(tmp_path / "tiny.zip", official_members())
    monkeypatch.setattr(Path, "write_bytes", fill_up)
    with pytest.raises(UserError, match=r"No space left on device.*free space"):
        prepare("tinyimagenet", tmp_path / "root", archive)
    assert len(written) == 4
    assert not (tmp_path / "root").exists()


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
