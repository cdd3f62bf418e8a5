"""Data roots of tars: same images and order as in folders, checked and read the same way."""

import gzip
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from isofast.cli import main
from isofast.data import ImageFolder, check, check_folder, open_dataset
from isofast.data import pack as module
from isofast.data.check import notes_on
from isofast.data.folder import read_files, read_sizes
from isofast.data.pack import pack
from isofast.data.preview import write_preview
from isofast.errors import RunError, UserError

from ..support.runs import ISOFAST, assert_same_run, call, train
from .conftest import checked, take, write_tar
from .test_check import BAD, PNG
from .test_folder import add_unlabeled
from .test_prepare import snapshot, without


def assert_same_images(ours: ImageFolder, theirs: ImageFolder) -> None:
    """Compare everything except location and modification time."""
    for name in ("classes", "paths", "fingerprint", "skipped", "ignored"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert np.array_equal(ours.labels, theirs.labels) and np.array_equal(ours.sizes, theirs.sizes)
    everything = range(len(ours))
    assert read_files(ours, everything) == read_files(theirs, everything)


def files_of(root: Path, top: str) -> dict[str, bytes]:
    """Return the files below root/top by name, in reverse order."""
    found = [path for path in (root / top).rglob("*") if path.is_file()]
    files = {path.relative_to(root / top).as_posix(): path for path in found}
    return {name: files[name].read_bytes() for name in sorted(files, reverse=True)}


@pytest.fixture
def packed(root: Path, tmp_path: Path) -> Path:
    """The images, some of them unlabelled, one in a folder of its own, packed into tars."""
    add_unlabeled(root, 5)
    (root / "train/class0/more").mkdir()
    (root / "train/class0/000.jpg").rename(root / "train/class0/more/000.jpg")
    pack(root, tmp_path / "packed", shard_mib=1)
    return tmp_path / "packed"


def test_tars_hold_the_images_of_the_folder(root, packed, tmp_path, capsys):
    for split in ("train", "val"):
        assert_same_images(checked(packed, split), checked(root, split))
        assert_same_images(checked(packed, split, check="headers"), checked(root, split))
    unchecked = open_dataset(packed, "train")
    assert np.array_equal(read_sizes(unchecked, range(56)), checked(root).sizes)
    with unchecked.open(0) as file:
        assert len(file.read(1) + file.read(10**6)) == unchecked.stamps[0, 0]
    sheets = []
    for where in (root, packed):
        assert main(["prepare", "imagefolder", "--root", str(where)]) == 0
        assert "3 classes, 56 train (5 without a label) and 15 val" in capsys.readouterr().out
        write_preview("cifar10", where, tmp_path / "views.png")
        sheets.append((tmp_path / "views.png").read_bytes())
    assert sheets[0] == sheets[1]
    # other programs unpack the original files
    for top in ("train", "val", "unlabeled"):
        (tmp_path / "out" / top).mkdir(parents=True)
        tar = str(packed / top / f"{top}-000000.tar")
        call(["tar", "-xf", tar, "-C", str(tmp_path / "out" / top)])
        assert files_of(tmp_path / "out", top) == files_of(root, top)


def test_shards_have_the_size_asked_for(digits, tmp_path):
    counts = pack(digits, tmp_path / "packed", shard_mib=1)
    assert (counts.name, counts.train, counts.val) == ("digits", 1442, 355)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "packed/train").glob("*.tar"))]
    # 1,024 bytes per image, in records of 10,240
    assert len(sizes) == 2 and 2**20 <= sizes[0] <= 2**20 + 2 * 10240
    assert_same_images(checked(tmp_path / "packed"), checked(digits))


@pytest.mark.long
@pytest.mark.parametrize(("backend", "other"), [("dali", "resident"), ("resident", "dali")])
def test_runs_on_folder_and_tars_are_bitwise_equal(config_file, digits, tmp_path, backend, other):
    """Also when a run starts on one and continues on the other."""
    pack(digits, tmp_path / "packed", shard_mib=1)
    config = config_file(
        data={"dataset": "cifar10", "crop": 16, "backend": backend},
        train={"max_steps": 26},
        evaluation={"every_epochs": 1, "at_start": True, "knn_images": 200},
        checkpoint={"every_steps": 10},
    )
    tars = ["--set", f"data.root={tmp_path / 'packed'}"]
    printed = train(config, tmp_path / "folder")
    resident = "images resident on the device (0.00 GB of 8 x 8 pixels)"
    assert (resident in printed) == (backend == "resident")
    train(config, tmp_path / "tars", *tars)
    assert_same_run(tmp_path / "folder", tmp_path / "tars")
    # stop after an epoch, where there is an evaluation anyway
    train(config, tmp_path / "moved", "--set", "train.max_steps=22")
    printed = train(config, tmp_path / "moved", *tars)
    assert "continuing from" in printed
    assert_same_run(tmp_path / "folder", tmp_path / "moved")
    more = ("--set", "train.max_steps=27", "--set", f"data.backend={other}")
    printed = train(config, tmp_path / "moved", *more, code=2)
    assert f"started with the {backend} backend" in printed
    assert f"--set data.backend={backend}" in printed


LONG = f"{'deep' * 30}/{'x' * 120}.jpg"


@pytest.mark.parametrize("writer", ["GNU_FORMAT", "PAX_FORMAT", "tar", "two of each"])
def test_tars_of_others_are_read(root, tmp_path, writer):
    """With long names, non-UTF-8 names, hidden files, and images that are not used."""
    add_unlabeled(root, 3)
    for name in (LONG, "class0/é.png", "class0/.hidden.png", "class1/a.webp", "top.png"):
        (root / "train" / name).parent.mkdir(exist_ok=True)
        (root / "train" / name).write_bytes(PNG)
    shutil.copytree(root / "train" / LONG.split("/")[0], root / "val" / LONG.split("/")[0])
    (root / "unlabeled" / os.fsdecode(b"\xff.png")).write_bytes(PNG)
    for top in ("train", "val", "unlabeled"):
        to, files = tmp_path / "tars" / top, files_of(root, top)
        to.mkdir(parents=True)
        if writer == "tar":
            subprocess.run(["tar", "cf", to / "1.tar", "-C", root / top, "."], check=True)
        elif writer == "two of each":
            for k in (0, 1):
                write_tar(to / f"{k}.tar", dict([*files.items()][k::2]))
        else:
            write_tar(to / "any.tar", files, format=getattr(tarfile, writer))
    for split in ("train", "val"):
        assert_same_images(checked(tmp_path / "tars", split), checked(root, split))
    (note,) = notes_on([open_dataset(tmp_path / "tars", "train")])
    assert "train/top.png" in note


def test_samples_of_webdataset_have_their_class_from_cls(tmp_path):
    files = {}
    for k in range(6):
        sample = {"cls": f"{k % 2 * 9}\n".encode(), "jpg": PNG, "json": b"{}"}
        files |= {f"{k:03d}.{end}": content for end, content in sample.items()}
    for split in ("train", "val"):
        write_tar(tmp_path / split / "a.tar", files)
    dataset = checked(tmp_path)
    assert dataset.classes == ("0", "9") and dataset.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.paths[1] == "train/0/002.jpg" and len(checked(tmp_path, "val")) == 6
    # a sample's folder becomes part of its name; labels that cannot be folder names are refused
    files = {"a/1.jpg": PNG, "b/1.jpg": PNG, "a/1.cls": b"3", "b/1.cls": b"3"}
    write_tar(tmp_path / "train" / "a.tar", files)
    write_tar(tmp_path / "val" / "a.tar", files)
    assert checked(tmp_path).paths == ("train/3/a_1.jpg", "train/3/b_1.jpg")
    write_tar(tmp_path / "train" / "a.tar", {"1.jpg": PNG, "1.cls": b"../x"})
    with pytest.raises(UserError, match=r"a\.tar: the class of 1\.jpg is '\.\./x'"):
        open_dataset(tmp_path, "train")
    # without .cls files and without folders there are no classes
    write_tar(tmp_path / "train" / "a.tar", {"1.jpg": PNG, "2.jpg": PNG})
    with pytest.raises(UserError, match=r"train has tars, but no images with a class: .*unlabeled"):
        open_dataset(tmp_path, "train")
    (tmp_path / "train").rename(tmp_path / "unlabeled")
    assert checked(tmp_path).paths == ("unlabeled/1.jpg", "unlabeled/2.jpg")
    write_tar(tmp_path / "unlabeled" / "a.tar", {"1.jpg": PNG, "1.cls": b"3"})
    assert checked(tmp_path).paths == ("unlabeled/1.jpg",)


def test_a_folder_beside_tars_is_what_counts(root):
    """As when ImageNet is unpacked, leaving an archive next to each class folder or above them."""
    before = open_dataset(root, "train").fingerprint
    write_tar(root / "train" / "class0.tar", {"class0/new.png": PNG})
    assert open_dataset(root, "train").fingerprint == before


WHOLE = "is not a complete, uncompressed tar file: .* again"
# (a tar's content, the offset of its second header) -> the damaged content
DAMAGE: dict[str, Callable[[bytes, int], bytes]] = {
    "cut within an image": lambda tar, _: tar[: len(tar) // 2 + 7],
    "cut behind an image": lambda tar, second: tar[:second],
    "a damaged header": lambda tar, second: overwritten(tar, second),
    "a damaged first header": lambda tar, _: overwritten(tar, 0),
    "zeros from an image on": lambda tar, second: tar[:second].ljust(len(tar), b"\0"),
    "two tars in one": lambda tar, _: 2 * tar,
    "compressed": lambda tar, _: gzip.compress(tar),
    "empty": lambda *_: b"",
}


def overwritten(content: bytes, place: int) -> bytes:
    return content[:place] + b"\xff" * 512 + content[place + 512 :]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_tar_is_refused_by_name(packed, damage):
    path = packed / "train" / "train-000000.tar"
    with tarfile.open(path) as tar:
        second = tar.getmembers()[1].offset
    path.write_bytes(DAMAGE[damage](path.read_bytes(), second))
    with pytest.raises(UserError, match=f"{path} {WHOLE}"):
        open_dataset(packed, "train")


def test_links_and_pictures_that_two_tars_hold_are_refused(packed):
    path = packed / "train" / "train-000000.tar"
    shutil.copy(path, path.with_name("z.tar"))
    with pytest.raises(UserError, match=rf"{path} and .*z\.tar both contain class"):
        open_dataset(packed, "train")
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo("class0/link.png")
        member.type, member.linkname = tarfile.LNKTYPE, "class0/000.jpg"
        tar.addfile(member)
    with pytest.raises(UserError, match=rf"{path}: class0/link\.png is a link.*--hard-dereference"):
        open_dataset(packed, "train")


@pytest.mark.parametrize("check", ["full", "off"])
def test_a_tar_that_changes_during_a_run_ends_it(packed, make_loader, check):
    loader = make_loader(checked(packed, check=check))
    next(loader)
    os.utime(packed / "train" / "train-000000.tar", ns=(1, 1))
    with pytest.raises(RunError, match=r"train-000000\.tar.*has changed") as caught:
        take(loader, 20)
    assert "class" in str(caught.value)
    # the next start takes the tar as it is now
    assert len(checked(packed)) == 56


def test_another_tar_is_indexed_and_checked_anew(root, packed):
    before = checked(packed)
    files = files_of(root, "train")
    files["class1/001.png"] = BAD["text"][0]
    write_tar(packed / "train" / "train-000000.tar", files)
    with pytest.raises(UserError, match=r"1 of 56 .*train-000000\.tar: class1/001\.png \(cannot"):
        checked(packed)
    kept = checked(packed, on_bad="skip")
    assert set(kept.skipped) == {"train/class1/001.png"} and kept.fingerprint != before.fingerprint
    (root / "train" / "class1" / "001.png").write_bytes(BAD["text"][0])
    assert_same_images(kept, checked(root, on_bad="skip"))


def test_headers_are_read_once(packed):
    first = open_dataset(packed, "train")
    tar, index = packed / "train" / "train-000000.tar", packed / "train" / ".isofast-index.npz"
    stamp = tar.stat().st_mtime_ns
    tar.write_bytes(overwritten(tar.read_bytes(), 0))
    os.utime(tar, ns=(stamp, stamp))
    assert_same_images(checked(packed), check_folder(first))
    for spoil in (lambda: index.write_bytes(index.read_bytes()[:-100]), index.unlink):
        spoil()
        with pytest.raises(UserError, match=WHOLE):
            open_dataset(packed, "train")
    # an index that cannot be written is rebuilt at every start
    shutil.copy(packed / "val" / "val-000000.tar", tar)
    index.mkdir()
    assert len(open_dataset(packed, "train")) == 15 + 5


def test_an_interrupted_pack_leaves_nothing_and_a_second_one_changes_nothing(
    digits, tmp_path, monkeypatch
):
    output = tmp_path / "packed"

    def stop(path: Path) -> None:
        if path.name == "train-000001.tar":
            raise KeyboardInterrupt

    with monkeypatch.context() as stopping:
        stopping.setattr(module, "sync", stop)
        with pytest.raises(KeyboardInterrupt):
            pack(digits, output, shard_mib=1)
    assert not any(output.iterdir())
    # leftovers of a killed one, which the next one removes
    write_tar(output / ".partial" / "train" / "train-000007.tar", {})
    for split in ("train", "val"):
        checked(digits, split)
    with monkeypatch.context() as checking:
        # images already checked are not checked again
        checking.setattr(check, "_judge", lambda *_: 1 / 0)
        first = pack(digits, output, shard_mib=1)
    before = snapshot(output)
    second = pack(digits, output, shard_mib=1)
    assert (first.already_there, second.already_there) == (False, True)
    assert snapshot(output) == before and not any(".partial" in name for name in before)
    # the same images make the same tars
    pack(output, tmp_path / "again", shard_mib=1)
    again = snapshot(tmp_path / "again")
    assert without(again, "isofast") == without(before, "isofast")
    assert json.loads(again[".isofast-prepared.json"])["name"] == "digits"
    assert main(["prepare", "digits", "--root", str(output)]) == 0
    tar = output / "val" / "val-000000.tar"
    tar.write_bytes(overwritten(tar.read_bytes(), 600))
    with pytest.raises(UserError, match=r"changed since .* 1 place\(s\), val/val-000000\.tar"):
        pack(digits, output, shard_mib=1)


@pytest.mark.slow
def test_more_tars_than_open_files(tmp_path):
    for k in range(150):
        write_tar(tmp_path / "train" / f"{k}.tar", {f"{name}/{k}.png": PNG for name in "ab"})
    command = [*ISOFAST, "prepare", "imagefolder", "--root", str(tmp_path)]
    done = call(["bash", "-c", 'ulimit -n 100 && "$@"', "bash", *command])
    assert "300 train" in done.stdout


def test_pack_overwrites_nothing(digits, root, tmp_path, refused):
    pack(digits, tmp_path / "packed", shard_mib=1)
    for source, output, size, match in (
        (root, root, 256, "already holds train and val, not made by `isofast prepare pack`"),
        (digits, digits, 256, "holds digits, not these images as shards; give another --output"),
        (root, tmp_path / "packed", 1, "holds shards of other images or another --shard-mib"),
        (digits, tmp_path / "packed", 2, "holds shards of other images or another --shard-mib"),
        (digits, tmp_path / "new", 0, "--shard-mib 0 must be 1 or more"),
        (digits, root / "val" / "class0" / "000.jpg", 1, "cannot prepare pack .*File exists"),
    ):
        before = snapshot(tmp_path)
        with pytest.raises(UserError, match=match):
            pack(source, output, shard_mib=size)
        # except for the check's cache
        after = snapshot(tmp_path)
        assert without(after, "isofast-checked") == without(before, "isofast-checked")
    for words in (["pack"], ["digits", "--output", "x"], ["pack", "--output=x", "--archive=y"]):
        refused(["prepare", *words, "--root", digits], "takes --root and --output")


def test_pack_stops_at_unreadable_images_or_leaves_them_out(root, tmp_path):
    (root / "val" / "class1" / "001.png").write_bytes(BAD["half a JPEG"][0])
    with pytest.raises(UserError, match="1 of 15 val images cannot be read"):
        pack(root, tmp_path / "packed", shard_mib=256)
    assert not (tmp_path / "packed").exists()
    counts = pack(root, tmp_path / "packed", shard_mib=256, on_bad="skip")
    assert counts.val == 14
    assert checked(tmp_path / "packed", "val").fingerprint == (
        checked(root, "val", on_bad="skip").fingerprint
    )
