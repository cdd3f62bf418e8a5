"""A file that DALI refuses, though it has passed the check, is named and can be left out."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from isofast.data import datasets, make_train_loader, open_dataset, recipe_for, verify_images
from isofast.errors import RunError

CPU = torch.device("cpu")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for label in "ab":
        (tmp_path / "train" / label).mkdir(parents=True)
        for k in range(32):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "train" / label / f"{k:02d}.png")
    return tmp_path


@pytest.mark.parametrize("backend", ["dali", "resident"])
def test_the_culprit_is_named_and_can_be_left_out(
    root: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """Without our own look at PNGs, one that is cut is a file that Pillow takes and DALI does not.

    No file is known that passes all of the check and is refused by DALI.
    """
    monkeypatch.setattr(datasets, "png_problem", lambda content: "")
    culprit = root / "train" / "b" / "17.png"
    culprit.write_bytes(culprit.read_bytes()[:-12])
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
    assert "data.on_bad_image=skip" in message
    dataset = verify_images(open_dataset(root, "train"), on_bad="skip", progress=False)
    assert dataset.left_out == {"train/b/17.png": "DALI cannot decode it"}
    two_epochs()


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
