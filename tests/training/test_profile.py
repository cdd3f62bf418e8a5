"""`isofast profile`: where the time of a step goes."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from isofast.cli import main

from ..support.runs import call


@pytest.mark.slow
def test_a_profile_says_where_the_time_goes(
    config_file: Callable[..., Path], tmp_path: Path
) -> None:
    config = config_file(method={"ema": True}, train={"precision": "fp32"})
    output = tmp_path / "profile"
    command = [sys.executable, "-m", "isofast.cli", "profile", "--config", str(config)]
    done = call([*command, "--steps", "2", "--output", str(output)])
    words = (
        "images/s",
        *("target", "forward", "correlation", "loss", "probe", "backward", "optimizer"),
        "target's move",
        "aten::convolution_backward",
        "--set train.precision=bf16",
    )
    assert [word for word in words if word not in done.stdout] == []
    assert not done.stderr
    events = json.loads((output / "trace.json").read_text())["traceEvents"]
    assert {"forward", "backward"} <= {event.get("name") for event in events}
    assert [path.name for path in output.iterdir()] == ["trace.json"]


def test_several_processes_are_not_profiled(
    config_file: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["profile", "--config", str(config_file())]) == 2
    assert "one process" in capsys.readouterr().err


def test_a_folder_that_cannot_be_is_refused_before_the_steps(
    config_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "file"
    output.touch()
    command = ["profile", "--config", str(config_file()), "--output"]
    for path in (output, output / "below"):
        assert main([*command, str(path)]) == 2
        assert f"cannot write to {path}" in capsys.readouterr().err
