"""Damaged PNGs are found by the check, wherever the damage is; DALI would stop a run at them."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from isofast.data import open_dataset, verify_images
from isofast.data.png import png_problem
from isofast.errors import UserError

SIDE = 40


def chunk(name: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
    )


def png(rows: int, *, colour: int = 2, depth: int = 8) -> bytes:
    """A PNG whose header says SIDE x SIDE, with so many rows of a colour type's pixels."""
    bits = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour] * depth
    raw = (b"\0" + bytes((SIDE * bits + 7) // 8)) * rows
    header = struct.pack(">IIBBBBB", SIDE, SIDE, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + (chunk(b"PLTE", bytes(768)) if colour == 3 else b"")
        + chunk(b"IDAT", zlib.compress(raw))
        + chunk(b"IEND", b"")
    )


def whole() -> bytes:
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def flipped() -> bytes:
    """One bit of the checksum of the picture data is another."""
    content = bytearray(whole())
    content[-13] ^= 1
    return bytes(content)


DAMAGED = {f"cut by {n}": (whole()[:-n], "cut short") for n in (1, 4, 12, 20)} | {
    "wrong checksum": (flipped(), "checksum of IDAT is wrong"),
    "too few rows": (png(SIDE - 7), r"cut short: 3,993 of 4,840 bytes"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_png_is_named(tmp_path: Path, name: str) -> None:
    content, reason = DAMAGED[name]
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    for k in range(3):
        (folder / f"{k}.png").write_bytes(whole())
    (folder / "1.png").write_bytes(content)
    with pytest.raises(UserError, match=rf"1 of 3 train images.*a/1\.png \(.*{reason}"):
        verify_images(open_dataset(tmp_path, "train"), progress=False)
    kept = verify_images(open_dataset(tmp_path, "train"), on_bad="skip", progress=False)
    assert kept.paths == ("train/a/0.png", "train/a/2.png")


@pytest.mark.parametrize("colour, depth", [(0, 1), (0, 16), (2, 8), (3, 4), (4, 8), (6, 16)])
def test_every_kind_of_png_passes_at_its_full_length_only(colour: int, depth: int) -> None:
    assert png_problem(png(SIDE, colour=colour, depth=depth)) == ""
    assert "cut short" in png_problem(png(SIDE - 1, colour=colour, depth=depth))
    # libpng warns of rows too many and of bytes after the end, and reads the picture
    assert png_problem(png(SIDE + 9, colour=colour, depth=depth) + b"more") == ""


def test_interlaced_pngs(tmp_path: Path) -> None:
    """The seven passes of 40 x 40 are 25 + 25 + 50 + 100 + 200 + 400 + 800 pixels, in 75 rows."""
    data = bytes(1600 * 3 + 5 + 5 + 5 + 10 + 10 + 20 + 20)
    for content, problem in ((data, ""), (data[:-1], "4,874 of 4,875"), (data[:999], "999 of")):
        header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 1)
        text = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
        text += chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")
        found = png_problem(text)
        assert problem in found and bool(problem) == bool(found)
        if not problem:
            Image.open(io.BytesIO(text)).load()


def test_interlaced_pngs_without_some_of_the_passes() -> None:
    """Columns x rows of the seven passes; one without columns or rows has no byte at all."""
    passes = {
        (4, 4): [(1, 1), (1, 1), (2, 1), (2, 2), (4, 2)],
        (13, 11): [(2, 2), (2, 2), (4, 1), (3, 3), (7, 3), (6, 6), (13, 5)],
        (1, 1): [(1, 1)],
    }
    for (width, height), sizes in passes.items():
        data = bytes(sum(down * (1 + 3 * across) for across, down in sizes))
        for content, whole_one in ((data, True), (data[:-1], False)):
            header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 1)
            text = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
            text += chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")
            assert (png_problem(text) == "") is whole_one, (width, height)
            if whole_one:
                Image.open(io.BytesIO(text)).load()


def test_what_passed_an_earlier_check_is_read_again(tmp_path: Path) -> None:
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    (folder / "0.png").write_bytes(whole()[:-12])
    status = (folder / "0.png").stat()
    known = {"train/a/0.png": [status.st_size, status.st_mtime_ns, SIDE, SIDE]}
    (tmp_path / ".isofast-checked-train.json").write_text(json.dumps({"files": known}))
    with pytest.raises(UserError, match="cut short"):
        verify_images(open_dataset(tmp_path, "train"), progress=False)
