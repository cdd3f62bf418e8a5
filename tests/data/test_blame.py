"""Where DALI refuses every file it is given, it is the device that fails, and no file is bad."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from isofast.data import ImageFolder, dali, make_train_loader, recipe_for, verify_images
from isofast.errors import RunError


def test_a_decoder_that_fails_at_everything_makes_no_file_bad(
    train_set: ImageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = dali._decoded

    def broken(encoded: Any, device: torch.device) -> Any:
        """Without its first byte no file is a picture."""
        return decoded(encoded[1:], device)

    monkeypatch.setattr(dali, "_decoded", broken)
    loader = make_train_loader(
        "dali",
        train_set,
        recipe_for("cifar10"),
        batch_size=8,
        seed=0,
        device=torch.device("cpu"),
        threads=1,
    )
    with pytest.raises(RunError, match="no single one of them is to blame"):
        next(loader)
    memory = Path(train_set.root) / ".isofast-checked-train.json"
    assert json.loads(memory.read_text())["bad"] == {}
    assert len(verify_images(train_set, on_bad="skip", progress=False)) == len(train_set)
