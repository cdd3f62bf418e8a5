"""A file that DALI refuses, though Pillow takes it, is found by the check, and named in a run."""

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from isofast.data import (
    EvalLoader,
    datasets,
    looks,
    make_train_loader,
    open_dataset,
    recipe_for,
    verify_images,
)
from isofast.data.dali import SingleDecoder
from isofast.errors import RunError, UserError

CPU = torch.device("cpu")
RNG = np.random.default_rng(1)


def encoded(kind: str) -> bytes:
    pixels = RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def jpeg_with_a_stray_byte() -> bytes:
    """Between two segments, where Pillow looks for the next marker and DALI expects it."""
    return encoded("JPEG").replace(b"\xff\xdb", b"\0\xff\xdb", 1)


def jpeg_with_a_damaged_marker() -> bytes:
    """Of the same size as the whole file: the first table of Huffman codes is lost."""
    return encoded("JPEG").replace(b"\xff\xc4", b"\0\xc4", 1)


def png_with_an_unknown_chunk() -> bytes:
    """One that is critical, so that who does not know it may not go on."""
    name = b"ABCD"
    end_of_header = 33
    whole = encoded("PNG")
    strange = struct.pack(">I", 0) + name + struct.pack(">I", zlib.crc32(name))
    return whole[:end_of_header] + strange + whole[end_of_header:]


REFUSED_FILES = [jpeg_with_a_stray_byte, jpeg_with_a_damaged_marker, png_with_an_unknown_chunk]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for label in "ab":
        (tmp_path / "train" / label).mkdir(parents=True)
        for k in range(32):
            (tmp_path / "train" / label / f"{k:02d}.png").write_bytes(encoded("PNG"))
    return tmp_path


@pytest.fixture
def culprit(root: Path) -> Path:
    """One of the files, refused by DALI."""
    path = root / "train" / "b" / "17.png"
    path.write_bytes(jpeg_with_a_stray_byte())
    return path


def without_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check as where DALI is not installed, as all checks were once made."""
    for module in (datasets, looks):
        monkeypatch.setattr(module, "has_dali", lambda: False)


@pytest.mark.parametrize("make", REFUSED_FILES)
def test_the_check_finds_it(
    root: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], bytes]
) -> None:
    path = root / "train" / "b" / "17.png"
    path.write_bytes(make())
    with Image.open(path) as image:
        image.load()
    with pytest.raises(UserError) as caught:
        verify_images(open_dataset(root, "train"), progress=False)
    assert f"1 of 64 train images cannot be read: {path} (DALI cannot decode it)" in str(
        caught.value
    )
    kept = verify_images(open_dataset(root, "train"), on_bad="skip", progress=False)
    assert kept.left_out == {"train/b/17.png": "DALI cannot decode it"} and len(kept) == 63
    # all of that is remembered
    monkeypatch.setattr(SingleDecoder, "decodes", None)
    again = verify_images(open_dataset(root, "train"), on_bad="skip", progress=False)
    assert again.left_out == kept.left_out


def test_what_passed_without_dali_is_checked_once_more(
    root: Path, culprit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as then:
        without_dali(then)
        assert len(verify_images(open_dataset(root, "train"), progress=False)) == 64
        then.setattr(datasets, "look_at", None)
        assert len(verify_images(open_dataset(root, "train"), progress=False)) == 64
    with pytest.raises(UserError, match=f"1 of 64 .*{culprit}"):
        verify_images(open_dataset(root, "train"), progress=False)
    culprit.write_bytes(encoded("PNG"))
    assert len(verify_images(open_dataset(root, "train"), progress=False)) == 64
    # a check with DALI is good enough where it is missing
    without_dali(monkeypatch)
    monkeypatch.setattr(datasets, "look_at", None)
    assert len(verify_images(open_dataset(root, "train"), progress=False)) == 64


def test_no_file_is_to_blame_where_dali_decodes_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(SingleDecoder, "decodes", lambda self, content: False)
        with pytest.raises(UserError, match=r"64 of 64 .*decodes nothing at all at the moment"):
            verify_images(open_dataset(root, "train"), progress=False)
    assert len(verify_images(open_dataset(root, "train"), on_bad="skip", progress=False)) == 64


@pytest.mark.parametrize("backend", ["dali", "resident"])
def test_the_culprit_is_named_and_can_be_left_out(
    root: Path, culprit: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """A GPU's decoder can refuse what the check, on the CPU, has let pass."""
    without_dali(monkeypatch)
    dataset = verify_images(open_dataset(root, "train"), progress=False)
    assert len(dataset) == 64

    def two_epochs() -> None:
        loader = make_train_loader(
            backend, dataset, recipe_for("cifar10"), batch_size=16, seed=0, device=CPU, threads=1
        )
        for _ in range(8):
            next(loader)
        loader.close()

    with pytest.raises(RunError, match=r"DALI cannot decode 1 of the \d+ images") as caught:
        two_epochs()
    message = str(caught.value)
    assert message.count(".png") == 1 and str(culprit) in message
    assert "data.on_bad_image=skip" in message and "--fresh" in message
    # that is of no use here
    assert "evaluation" not in message
    dataset = verify_images(open_dataset(root, "train"), on_bad="skip", progress=False)
    assert dataset.left_out == {"train/b/17.png": "DALI cannot decode it"}
    two_epochs()


def test_a_validation_image_need_not_end_the_run(
    root: Path, culprit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_dali(monkeypatch)
    (root / "train").rename(root / "val")
    dataset = verify_images(open_dataset(root, "val"), progress=False)
    loader = EvalLoader(
        dataset, recipe_for("cifar10"), range(64), batch_size=16, device=CPU, threads=1
    )
    with pytest.raises(RunError, match=r"bring these back undamaged.*evaluation\.every_epochs=0"):
        list(loader)


def test_where_no_file_is_to_blame_none_is_named(root: Path) -> None:
    """The window of a recipe for larger pictures lies outside of these."""
    dataset = verify_images(open_dataset(root, "train"), progress=False)
    wrong = replace(dataset, sizes=dataset.sizes * 4)
    loader = make_train_loader(
        "dali", wrong, recipe_for("cifar10"), batch_size=16, seed=0, device=CPU, threads=1
    )
    with pytest.raises(RunError, match="no single one of them is to blame"):
        for _ in range(4):
            next(loader)
    assert len(verify_images(dataset, on_bad="skip", progress=False)) == 64
