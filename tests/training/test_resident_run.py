"""A run whose images stay on the device goes on after a break, with no other backend."""

from collections.abc import Callable
from pathlib import Path

import pytest

from .test_train import assert_same_run, command_of, run

pytestmark = pytest.mark.slow


def test_a_run_on_resident_images_continues_bit_for_bit(
    config_file: Callable[..., Path], tmp_path: Path
) -> None:
    config = config_file(
        data={"dataset": "cifar10", "crop": 16, "backend": "resident"},
        train={"max_steps": 6},
        checkpoint={"every_steps": 3},
    )
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    done = run(command_of(config, whole))
    assert done.returncode == 0, done.stderr
    assert "images resident on the device (0.00 GB of 8 x 8 pixels)" in done.stderr
    for steps in (3, 6):
        done = run(command_of(config, parted, "--set", f"train.max_steps={steps}"))
        assert done.returncode == 0, done.stderr
    assert_same_run(whole, parted)

    more = ("--set", "train.max_steps=7", "--set", "data.backend=dali")
    done = run(command_of(config, parted, *more))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "made by the resident backend" in done.stderr
    assert "--set data.backend=resident" in done.stderr
