"""`isofast embed` against features computed by hand with torchvision's transforms."""

import csv
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torchvision.models import resnet18
from torchvision.transforms.v2 import functional

import isofast
from isofast.cli import main
from isofast.data import EvalLoader, check_folder, open_dataset, recipe_for
from isofast.evaluation.embed import list_pictures

from ..support.encoders import write_run
from ..support.runs import ISOFAST, UNPRIVILEGED, call

IMAGES = {
    "b/one.jpg": (40, 60),
    "a-b/two.png": (16, 16),
    "a/three.PNG": (90, 33),
    "zebra.jpeg": (17, 16),
    "a/deep/er/four.webp": (32, 32),
    "a/five.tif": (32, 32),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of several sizes, formats and folder depths, and files that are not images."""
    root = tmp_path / "pictures"
    rng = np.random.default_rng(0)
    for name, (height, width) in IMAGES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 255, (5, 5, 3), dtype=np.uint8))
        large = small.resize((width, height), Image.Resampling.BICUBIC)
        # libtiff decodes it, not Pillow
        large.save(path, **({"compression": "tiff_lzw"} if name.endswith("tif") else {}))
    (root / "a" / "notes.txt").write_text("no picture")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "x.png").write_bytes(b"")
    return root


@pytest.fixture
def run_dir(tmp_path: Path, small: Callable[..., Any]) -> Path:
    """A run of an encoder for 16-pixel images."""
    write_run(tmp_path / "run", small(encoder={"width": 8}))
    return tmp_path / "run"


DIGITS = (16, 16, [0.305] * 3, [0.376] * 3)
IMAGENET = (256, 224, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def by_hand(path: Path, recipe: Any = DIGITS) -> torch.Tensor:
    """Return the clean view made with torchvision's transforms."""
    short, crop, mean, std = recipe
    with Image.open(path) as image:
        x = functional.pil_to_tensor(image.convert("RGB"))
    x = functional.resize(x, [short], functional.InterpolationMode.BICUBIC, antialias=True)
    x = functional.to_dtype(functional.center_crop(x, [crop]), torch.float32, scale=True)
    return functional.normalize(x, mean, std)[None]


def embed(source: Path, folder: Path, output: Path, *options: str) -> int:
    return main(["embed", str(source), "--images", str(folder), "--output", str(output), *options])


def test_tars_stand_for_their_pictures(run_dir, folder, tmp_path, capsys):
    tars = tmp_path / "tars"
    for top in ("a", "b"):
        (tars / top).mkdir(parents=True)
        with tarfile.open(tars / top / "0.tar", "w") as tar:
            tar.add(folder / top, arcname=".")
    for path in (folder / "a-b", folder / "zebra.jpeg"):
        (tars / path.name).symlink_to(path)
    # an unrelated file is named and left out
    (tars / "old").mkdir()
    (tars / "old" / "backup.tar").write_bytes(b"no tar")
    read = []
    for where in (folder, tars):
        assert embed(run_dir, where, tmp_path / "out.npz") == 0
        with np.load(tmp_path / "out.npz") as file:
            read.append((file["filenames"].tolist(), file["embeddings"]))
    assert read[0][0] == read[1][0] == sorted(IMAGES)
    assert np.array_equal(read[0][1], read[1][1])
    assert "old/*.tar: " in capsys.readouterr().err


def test_the_same_numbers_in_every_format(run_dir, folder, tmp_path):
    # a name that is not UTF-8
    (folder / "zebra.jpeg").rename(folder / "z\udce9.jpeg")
    names = sorted({*IMAGES, "z\udce9.jpeg"} - {"zebra.jpeg"})
    encoder = isofast.load_encoder(run_dir)
    with torch.no_grad():
        expected = torch.cat([encoder(by_hand(folder / name)) for name in names]).numpy()
    assert expected.std() > 0.05
    for suffix in (".npz", ".csv", ".pt"):
        assert embed(run_dir, folder, tmp_path / f"out{suffix}") == 0
    with np.load(tmp_path / "out.npz") as stored:
        assert set(stored.files) == {"embeddings", "filenames"}
        assert stored["filenames"].tolist() == names
        embeddings = stored["embeddings"]
    assert embeddings.dtype == np.float32 and embeddings.shape == (len(names), 64)
    np.testing.assert_allclose(embeddings, expected, rtol=1e-5, atol=1e-5)

    with (tmp_path / "out.csv").open(newline="", errors="surrogateescape") as file:
        header, *rows = csv.reader(file)
    assert header == ["filename", *(f"embedding_{k}" for k in range(64))]
    assert [row[0] for row in rows] == names
    assert np.array_equal(np.array([row[1:] for row in rows], np.float32), embeddings)

    stored_pt = torch.load(tmp_path / "out.pt", weights_only=True)
    assert stored_pt["filenames"] == names
    assert torch.equal(stored_pt["embeddings"], torch.from_numpy(embeddings))
    assert not list(tmp_path.glob(".*.part*"))


def test_they_are_those_of_the_evaluation(run_dir, digits, tmp_path):
    """More than one batch; the evaluation's resident loader makes the same pixels."""
    assert embed(run_dir, digits / "val", tmp_path / "out.npz") == 0
    images = check_folder(open_dataset(digits, "val"))
    options: Any = {"batch_size": 355, "device": torch.device("cpu"), "threads": 1}
    ((x_NCHW, _),) = EvalLoader("resident", images, recipe_for("digits"), range(355), **options)
    with torch.no_grad():
        expected = isofast.load_encoder(run_dir)(x_NCHW).numpy()
    with np.load(tmp_path / "out.npz") as stored:
        assert [f"val/{name}" for name in stored["filenames"]] == list(images.paths)
        np.testing.assert_allclose(stored["embeddings"], expected, rtol=1e-5, atol=1e-5)


def test_torchvision_timm_and_ours_agree(folder, tmp_path):
    """A resnet18 checkpoint that both libraries read, on ImageNet-sized images."""
    theirs = resnet18().eval()
    torch.save(theirs.state_dict(), tmp_path / "resnet18.pth")
    assert embed(tmp_path / "resnet18.pth", folder, tmp_path / "out.npz") == 0
    model = timm.create_model("resnet18", checkpoint_path=tmp_path / "resnet18.pth")
    model.reset_classifier(0)
    theirs.fc = nn.Identity()
    name = "b/one.jpg"
    x = by_hand(folder / name, IMAGENET)
    with np.load(tmp_path / "out.npz") as stored, torch.no_grad():
        ours = stored["embeddings"][stored["filenames"].tolist().index(name)]
        for net in (theirs, model.eval()):
            np.testing.assert_allclose(ours, net(x)[0].numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_unreadable_files_are_left_out_and_named(run_dir, folder, tmp_path, capsys, monkeypatch):
    # some now count as too large for Pillow, which must not matter
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    assert embed(run_dir, folder, tmp_path / "before.npz") == 0
    content = (folder / "b" / "one.jpg").read_bytes()
    (folder / "a" / "cut.jpg").write_bytes(content[: len(content) // 2])
    (folder / "a-b" / "empty.png").write_bytes(b"")
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    for dtype in (np.float32, np.int32):
        Image.fromarray(np.ones((9, 9), dtype)).save(folder / f"{dtype.__name__}.tif")
    capsys.readouterr()
    assert embed(run_dir, folder, tmp_path / "after.npz", "--json") == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["images"] == len(IMAGES) and report["features"] == 64
    wide = {"float32.tif", "int32.tif"}
    assert set(report["skipped"]) == {"a/cut.jpg", "a-b/empty.png", "gone.jpg", *wide}
    assert "a/cut.jpg: Truncated File Read" in printed.err
    assert "gone.jpg: a broken link" in printed.err and "5 unreadable file(s)" in printed.err
    with np.load(tmp_path / "before.npz") as one, np.load(tmp_path / "after.npz") as other:
        assert one["filenames"].tolist() == other["filenames"].tolist()
        np.testing.assert_allclose(one["embeddings"], other["embeddings"], rtol=1e-6)


def test_a_link_to_a_folder_that_it_lies_in_is_not_followed(folder, tmp_path):
    (folder / "a" / "up").symlink_to(tmp_path)
    # a link elsewhere is
    (folder / "again").symlink_to("a-b")
    # and two links into each other end
    (folder / "a-b" / "deep").symlink_to("../a/deep")
    (folder / "a" / "deep" / "back").symlink_to("../../a-b")
    found = [name for name in list_pictures(folder) if "/" in name]
    twice = ["a-b/deep/er/four.webp", "a/deep/back/two.png", "again/two.png"]
    again = ["again/deep/er/four.webp"]
    assert found == sorted([*twice, *again, *(name for name in IMAGES if "/" in name)])


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() == 0 and not shutil.which("setpriv"), reason="needs setpriv")
def test_a_folder_that_may_not_be_read_is_named(run_dir, folder, tmp_path):
    (folder / "a" / "deep").chmod(0o000)
    command = ["embed", str(run_dir), "--images", str(folder), "--output", str(tmp_path / "o.pt")]
    try:
        done = call([*UNPRIVILEGED, *ISOFAST, *command])
    finally:
        (folder / "a" / "deep").chmod(0o700)
    assert done.stdout.startswith("5 embeddings")
    assert "a/deep: [Errno 13] Permission denied" in done.stderr


def test_mistakes_exit_with_2_and_lose_nothing(run_dir, folder, tmp_path, refused, monkeypatch):
    bad, none, kept = tmp_path / "bad", tmp_path / "none", tmp_path / "kept.npz"
    bad.mkdir()
    none.mkdir()
    (bad / "x.jpg").write_bytes(b"no picture")
    kept.write_bytes(b"earlier")
    for source, images, output, words in (
        (run_dir, bad, kept, "none of the 1 images"),
        (run_dir, none, kept, "no images below"),
        (run_dir, tmp_path / "gone", kept, "is not a folder"),
        (tmp_path / "gone", folder, kept, "cannot read the weights"),
        (run_dir, folder, tmp_path / "out.json", "must be named .npz, .csv, .pt"),
        (run_dir, folder, tmp_path / "no" / "out.npz", "there is no folder"),
    ):
        refused(["embed", source, "--images", images, "--output", output], words)

    def fails(path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fails)
    assert embed(run_dir, folder, kept) == 1
    assert kept.read_bytes() == b"earlier"
    assert not list(tmp_path.glob(".*.part*"))
