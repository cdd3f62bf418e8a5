"""The check before a run: what each decoder refuses, what is skipped, what is remembered."""

import io
import json
import os
import signal
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from isofast.data import check_folder, open_dataset, recipe_for
from isofast.data.check import notes_on
from isofast.data.dali import SingleDecoder
from isofast.data.folder import read_files, read_sizes
from isofast.data.images import Images, check_images, list_images
from isofast.errors import UserError

from .conftest import checked, eval_loader, levels_of, take, write_copies

DECODERS = ("dali", "pillow")
BOTH = pytest.mark.parametrize("decoder", DECODERS)
SIDE = 40
RNG = np.random.default_rng(1)


def encoded(kind: str, mode: str = "RGB", **options: object) -> bytes:
    """Return an encoded image of noise."""
    file = io.BytesIO()
    pixels = RNG.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


PNG, JPEG = encoded("PNG"), encoded("JPEG")


def chunk(name: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + checksum


# the header says SIDE rows, and each chunk is whole
ROWS = zlib.compress((b"\0" + bytes(3 * SIDE)) * (SIDE - 7))
SHORT_PNG = PNG[:33] + chunk(b"IDAT", ROWS) + chunk(b"IEND", b"")


def flipped(content: bytes, place: int) -> bytes:
    """Return ``content`` with one bit flipped."""
    changed = bytearray(content)
    changed[place] ^= 1
    return bytes(changed)


# content, the decoders that refuse it, whether the header check refuses it too
BAD = {
    "empty": (b"", DECODERS, True),
    "text": (b"this is no picture", DECODERS, True),
    "GIF": (encoded("GIF"), DECODERS, True),
    "JPEG 2000": (encoded("JPEG2000"), DECODERS, True),
    # its decoder needs the whole file to begin with
    "half a WebP": (encoded("WEBP")[:999], DECODERS, True),
    "half a BMP": (encoded("BMP")[:999], DECODERS, False),
    "half a TIFF": (encoded("TIFF")[:999], DECODERS, False),
    "a TIFF of floats": (encoded("TIFF", "F"), DECODERS, False),
    "half a JPEG": (JPEG[: len(JPEG) // 2], DECODERS, False),
    "JPEG cut by 60": (JPEG[:-60], DECODERS, False),
    **{f"PNG cut by {n}": (PNG[:-n], DECODERS, False) for n in (12, 20, 60)},
    # all pixels are there, and Pillow does not read beyond them
    **{f"PNG cut by {n}": (PNG[:-n], ("dali",), False) for n in (1, 4)},
    "a checksum of pixels": (flipped(PNG, -13), DECODERS, False),
    # Pillow reads the rows that exist and leaves the rest black
    "a PNG short of rows": (SHORT_PNG, ("dali",), False),
    "a stray byte": (JPEG.replace(b"\xff\xdb", b"\0\xff\xdb", 1), ("dali",), False),
    "a damaged marker": (JPEG.replace(b"\xff\xc4", b"\0\xc4", 1), ("dali",), False),
    "an unknown critical chunk": (PNG[:33] + chunk(b"ABCD", b"") + PNG[33:], ("dali",), False),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes with three training and two validation images each."""
    write_copies(tmp_path, "train", "ab", 3, PNG)
    write_copies(tmp_path, "val", "ab", 2, PNG)
    return tmp_path


def keep_stamp(path: Path, content: bytes) -> None:
    """Overwrite a file without changing its size and modification time."""
    before = path.stat()
    assert len(content) == before.st_size
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@BOTH
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_named_and_can_be_skipped(root, kind, decoder):
    content, refused_by, by_headers = BAD[kind]
    path = root / "train" / "a" / "01.png"
    path.write_bytes(content)
    assert len(checked(root, check="off")) == 6
    if by_headers:
        with pytest.raises(UserError, match=r"1 of 6 train images"):
            checked(root, check="headers")
    else:
        assert len(checked(root, check="headers")) == 6
    if decoder not in refused_by:
        assert len(checked(root, decoder=decoder)) == 6
        return
    with pytest.raises(UserError, match=r"Replace or delete.*data\.on_bad_image=skip") as caught:
        checked(root, decoder=decoder)
    assert f"1 of 6 train images cannot be read: {path} (" in str(caught.value)
    kept = checked(root, on_bad="skip", decoder=decoder)
    assert set(kept.skipped) == {"train/a/01.png"} and len(kept) == len(kept.labels) == 5
    assert len(kept.sizes) == len(kept.stamps) == 5
    (note,) = notes_on([kept])
    assert note.startswith("1 of 6 train images cannot be read: train/a/01.png (")
    # the training set is the same as if the file did not exist
    path.unlink()
    assert checked(root, decoder=decoder).fingerprint == kept.fingerprint


def test_no_file_is_to_blame_where_dali_decodes_nothing(root, monkeypatch):
    # fills the cache, which the failing check then empties
    checked(root, decoder="pillow")
    with monkeypatch.context() as broken:
        broken.setattr(SingleDecoder, "decodes", lambda self, content: False)
        with pytest.raises(UserError, match=r"6 of 6 .*currently decodes no image at all"):
            checked(root, decoder="dali")
    assert len(checked(root, on_bad="skip", decoder="dali")) == 6


def test_who_stops_a_check_does_not_wait_for_its_end(tmp_path):
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    Image.fromarray(RNG.integers(0, 256, (1000, 1000, 3), dtype=np.uint8)).save(folder / "00.png")
    for k in range(1, 2000):
        (folder / f"{k:02d}.png").hardlink_to(folder / "00.png")

    def stop(*_: object) -> None:
        # blocked while processes are forked
        signal.raise_signal(signal.SIGINT)

    handler = signal.signal(signal.SIGALRM, stop)
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            checked(tmp_path, decoder="pillow")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.signal(signal.SIGINT, interrupt)
    assert time.monotonic() - start < 5


def test_all_bad_files_that_stop_a_run_are_named(root):
    for k in range(7):
        (root / "train" / "b" / f"bad{k}.png").write_text("no picture")
    with pytest.raises(UserError, match=r"7 of 13.*bad0.*cannot identify.*bad6.*Replace"):
        checked(root)
    (note,) = notes_on([checked(root, on_bad="skip")])
    assert "bad4.png" in note and "and 2 more" in note


def test_a_class_without_readable_images_is_an_error(root):
    for path in (root / "train" / "b").iterdir():
        path.write_text("no picture")
    with pytest.raises(UserError, match=r"3 of 6 train images.*no image of the class b"):
        checked(root, on_bad="skip")


@BOTH
def test_what_was_checked_is_not_read_again(root, decoder):
    first = checked(root, decoder=decoder)
    good, bad = root / "train" / "a" / "00.png", root / "train" / "b" / "00.png"
    # damage that changes neither size nor time goes unnoticed
    keep_stamp(good, bytes(len(PNG)))
    again = checked(root, decoder=decoder)
    assert np.array_equal(first.sizes, again.sizes) and np.array_equal(first.stamps, again.stamps)
    # a new modification time: read again, and cached as bad
    os.utime(good, ns=(1, 1))
    assert set(checked(root, on_bad="skip", decoder=decoder).skipped) == {"train/a/00.png"}
    keep_stamp(good, PNG)
    assert set(checked(root, on_bad="skip", decoder=decoder).skipped) == {"train/a/00.png"}
    # a file that stopped the check may have been repaired, so it is read again
    assert len(checked(root, decoder=decoder)) == 6
    # nor does a new size alone go unnoticed
    stamp = bad.stat().st_mtime_ns
    Image.new("RGB", (9, 7)).save(bad)
    os.utime(bad, ns=(stamp, stamp))
    changed = checked(root, decoder=decoder)
    assert changed.sizes[changed.paths.index("train/b/00.png")].tolist() == [7, 9]


def test_one_decoder_does_not_answer_for_the_other(root):
    path = root / "train" / "a" / "01.png"
    path.write_bytes(SHORT_PNG)
    assert len(checked(root, decoder="pillow")) == 6
    with pytest.raises(UserError, match=r"01\.png \(DALI cannot decode it"):
        checked(root, decoder="dali")
    path.write_bytes(PNG)
    checked(root, decoder="dali")
    # the cached results of either decoder will do for a header check
    keep_stamp(path, bytes(len(PNG)))
    assert len(checked(root, check="headers")) == 6
    # which leaves the full check's cache unchanged
    assert len(checked(root, decoder="dali")) == 6
    with pytest.raises(UserError, match=r"1\.png"):
        checked(root, decoder="pillow")


def test_a_resident_run_is_checked_by_pillow(root, small_config):
    (root / "train" / "a" / "01.png").write_bytes(SHORT_PNG)

    def check(backend: str) -> Images:
        config = small_config(data={"root": str(root), "backend": backend})
        return check_images(config, list_images(config))

    assert len(check("resident").train) == 6
    with pytest.raises(UserError, match=r"01\.png \(DALI cannot decode it"):
        check("dali")


def test_a_file_is_known_as_it_was_when_checked(root):
    listed = open_dataset(root, "train")
    Image.new("RGB", (9, 7)).save(root / "train" / "b" / "00.png")
    assert len(read_files(check_folder(listed), range(6))) == 6


@pytest.mark.parametrize("memory", ["{", '{"format": 4}', '{"format": 6, "files": ["a"]}'])
def test_a_damaged_memory_is_written_anew(root, memory):
    path = root / ".isofast-checked-train.json"
    path.write_text(memory)
    assert len(checked(root, decoder="dali")) == 6
    assert len(json.loads(path.read_text())["files"]) == 6
    assert not list(root.glob(".*.part*"))


def test_a_root_that_cannot_be_written_is_checked_all_the_same(root):
    # a folder in place of the cache file, which stops even root
    (root / ".isofast-checked-train.json").mkdir()
    assert len(checked(root)) == 6


def test_a_file_that_cannot_be_read_now_is_tried_again(root):
    """A /proc file that cannot be read from its start, not even by root."""
    (root / "train" / "a" / "closed.png").symlink_to("/proc/self/mem")
    with pytest.raises(UserError, match=r"closed\.png \(Input/output error\)"):
        checked(root)
    assert set(checked(root, on_bad="skip").skipped) == {"train/a/closed.png"}
    files = json.loads((root / ".isofast-checked-train.json").read_text())["files"]
    assert len(files) == 6 and "train/a/closed.png" not in files


def test_broken_links_are_named_and_links_to_no_files_ignored(root, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (root / "train" / "a" / "z.png").symlink_to(tmp_path / "pipe")
    (root / "train" / "b" / "folder.jpg").symlink_to(tmp_path)
    # opening a pipe would block forever
    assert len(open_dataset(root, "train")) == 6
    (root / "train" / "a" / "gone.png").symlink_to(tmp_path / "unmounted.png")
    with pytest.raises(UserError, match=r"1 of 7 .*gone\.png \(No such file"):
        checked(root)


@BOTH
def test_unusual_images_are_read_as_pillow_reads_them(tmp_path, decoder):
    folder = tmp_path / "val" / "a"
    folder.mkdir(parents=True)
    coarse = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC)
    for name in ("CMYK.jpg", "L.jpg", "P.png", "RGBA.png", "LA.png", "1.png"):
        image.convert(name[:-4]).save(folder / name)
    image.save(folder / "progressive.jpg", progressive=True)
    image.save(folder / "png_named.jpg", format="PNG")
    image.save(folder / "camera.jpg", format="MPO", save_all=True, append_images=[image])
    turned = Image.Exif()
    turned[0x0112] = 6
    image.save(folder / "turned.jpg", exif=turned)
    levels = np.asarray(image.convert("L"))
    Image.fromarray(levels.astype(np.uint16) * 257).save(folder / "sixteen.png")

    dataset = checked(tmp_path, "val", decoder=decoder)
    recipe = recipe_for("cifar10")
    backend = {"dali": "dali", "pillow": "resident"}[decoder]
    ((x, _),) = eval_loader(dataset, recipe, range(len(dataset)), batch_size=16, backend=backend)
    for pixels, path in zip(np.rint(levels_of(x, recipe)), dataset.paths, strict=True):
        with Image.open(tmp_path / path) as stored:
            # Pillow clips 16-bit levels instead of scaling them
            theirs = stored.convert("RGB") if "sixteen" not in path else image.convert("L")
            theirs = np.asarray(theirs.convert("RGB"), np.float32)
        assert np.abs(pixels - theirs).max() <= 1, path


@pytest.mark.parametrize("size", [(1, 1), (4000, 10), (10, 4000)], ids=str)
def test_images_of_odd_sizes_are_trained_and_evaluated_on(tmp_path, make_loader, size):
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.new("RGB", size, (200, 100, 50)).save(tmp_path / split / "a" / "x.png")
    recipe = recipe_for("imagefolder", crop=32)
    train, val = (open_dataset(tmp_path, split) for split in ("train", "val"))
    assert read_sizes(train, [0]).tolist() == [[size[1], size[0]]]
    for batch in take(make_loader(train, recipe, batch_size=1), 4):
        assert batch.x1_BCHW.shape == (1, 3, 32, 32) and batch.x2_BCHW.isfinite().all()
    for backend in ("dali", "resident"):
        ((x, _),) = eval_loader(val, recipe, [0], backend=backend)
        assert np.abs(levels_of(x, recipe) - [200, 100, 50]).max() < 1
