"""Folders that may not be read or entered, tried without the privileges that root has."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# takes from root what lets it read everything; others have nothing to lose
UNPRIVILEGED = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]


@pytest.mark.skipif(os.getuid() == 0 and not shutil.which("setpriv"), reason="needs setpriv")
@pytest.mark.parametrize(
    ("forbidden", "mode", "named"),
    [
        ("root/train/class1", 0o000, "root/train/class1"),
        ("root/train", 0o400, "root/train"),
        ("root", 0o600, "root/"),
        (".", 0o600, "root"),
        ("out", 0o600, "out/views.png"),
    ],
)
def test_a_forbidden_folder_is_named(
    forbidden: str, mode: int, named: str, pictures: Path, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    (place / "out").mkdir(parents=True)
    shutil.copytree(pictures, place / "root")
    preview = place / "out/views.png" if forbidden == "out" else tmp_path / "views.png"
    command = [sys.executable, "-m", "isofast.cli", "prepare", "imagefolder"]
    command += ["--root", str(place / "root"), "--preview", str(preview)]
    (place / forbidden).chmod(mode)
    try:
        done = subprocess.run(
            [*(UNPRIVILEGED if os.getuid() == 0 else []), *command],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        (place / forbidden).chmod(0o700)
    assert done.returncode == 2, done.stderr
    assert "Permission denied" in done.stderr and "Traceback" not in done.stderr
    assert f"{place}/{named}" in done.stderr
