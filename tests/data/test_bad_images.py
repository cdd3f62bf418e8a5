"""Images that pass the check but fail in a run: named, remembered, left out with skip."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from isofast.data import check_folder, recipe_for
from isofast.errors import RunError

from .conftest import MakeLoader, checked, eval_loader, take, write_copies
from .test_check import BAD, PNG

RECIPE = recipe_for("cifar10")
Train = Callable[..., object]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_copies(tmp_path, "train", "ab", 32, PNG)
    return tmp_path


@pytest.fixture
def culprit(root: Path) -> Path:
    """A file that Pillow decodes and DALI refuses."""
    path = root / "train" / "b" / "17.png"
    path.write_bytes(BAD["a stray byte"][0])
    return path


@pytest.fixture
def two_epochs(make_loader: MakeLoader) -> Train:
    return lambda dataset, **options: take(
        make_loader(dataset, RECIPE, batch_size=16, **options), 8
    )


@pytest.mark.parametrize(
    ("backend", "check"), [("dali", "full"), ("dali", "headers"), ("resident", "headers")]
)
def test_the_culprit_is_named_and_can_be_skipped(root, culprit, two_epochs, backend, check):
    """As when a GPU's decoder refuses what has passed the check."""
    if backend == "resident":
        culprit.write_bytes(PNG[: len(PNG) // 2])
    how: Any = {"check": check, "decoder": "pillow"}
    dataset = checked(root, **how)
    assert len(dataset) == 64
    refusal = {"dali": r"DALI cannot decode 1 of the \d+ images", "resident": "Pillow cannot dec"}
    match = rf"{refusal[backend]}.*on_bad_image=skip.*--fresh"
    with pytest.raises(RunError, match=match) as caught:
        two_epochs(dataset, backend=backend)
    message = str(caught.value)
    assert message.count(".png") == 1 and str(culprit) in message
    # turning evaluation off would not help here
    assert "evaluation" not in message
    # remembered, though the check itself would let it pass again
    again = checked(root, on_bad="skip", **how)
    assert set(again.skipped) == {"train/b/17.png"}
    two_epochs(again, backend=backend)


def test_one_named_after_another_is_remembered_too(root, two_epochs):
    culprits = ["train/a/03.png", "train/b/05.png"]
    for name in culprits:
        (root / name).write_bytes(PNG[: len(PNG) // 2])
    dataset = checked(root, check="headers")
    for name in culprits:
        with pytest.raises(RunError, match=f"Pillow cannot decode .*{name}"):
            two_epochs(dataset, backend="resident")
        dataset = checked(root, check="headers", on_bad="skip")
    assert set(dataset.skipped) == set(culprits)


@pytest.mark.parametrize("kind", ["PNG cut by 12", "PNG cut by 60", "a TIFF of floats"])
def test_an_unchecked_file_is_named(root, two_epochs, kind):
    """By a PNG without its end DALI itself would kill the process in three out of four runs."""
    path = root / "train" / "b" / "17.png"
    path.write_bytes(BAD[kind][0])
    dataset = checked(root, check="headers")
    with pytest.raises(RunError, match=f"DALI cannot decode 1 of the 16 images.*{path}"):
        two_epochs(dataset)


@pytest.mark.parametrize("backend", ["dali", "resident"])
@pytest.mark.parametrize("content", [b"", b"no picture", None], ids=["empty", "text", "gone"])
def test_without_a_check_a_file_without_a_header_is_named(root, two_epochs, backend, content):
    dataset = checked(root, check="off")
    path = root / "train" / "b" / "17.png"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(RunError, match=rf"cannot read the size of {path}: .*data\.check=full"):
        two_epochs(dataset, backend=backend)


def test_a_validation_image_need_not_end_the_run(root, culprit):
    (root / "train").rename(root / "val")
    dataset = checked(root, "val", decoder="pillow")
    loader = eval_loader(dataset, RECIPE, range(64), batch_size=16)
    with pytest.raises(RunError, match=r"restore intact copies.*evaluation\.every_epochs=0"):
        list(loader)


def test_where_no_file_is_to_blame_none_is_named(root, two_epochs):
    """Crop windows drawn for four times the true sizes lie outside the images."""
    dataset = checked(root)
    with pytest.raises(RunError, match=r"no single one of the \d+ in progress is to blame"):
        two_epochs(replace(dataset, sizes=dataset.sizes * 4))
    assert len(check_folder(dataset, on_bad="skip")) == 64


def test_a_decoder_that_fails_at_everything_makes_no_file_bad(root, culprit, two_epochs):
    for path in (root / "train").glob("*/*.png"):
        path.write_bytes(culprit.read_bytes())
    dataset = checked(root, check="headers")
    with pytest.raises(RunError, match=r"no single one of the \d+ in progress is to blame"):
        two_epochs(dataset)
    memory = json.loads((root / ".isofast-checked-train.json").read_text())
    assert len(memory["problem"]) == 64 and not any(memory["problem"])
