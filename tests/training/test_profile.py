"""`isofast profile`: where a step's time goes."""

import json

import pytest

from ..support.runs import ISOFAST, call


@pytest.mark.slow
def test_a_profile_says_where_the_time_goes(config_file, tmp_path):
    config = config_file(method={"ema": True}, train={"precision": "fp32"})
    output = tmp_path / "profile"
    command = [*ISOFAST, "profile", "--config", str(config)]
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


def test_what_cannot_be_is_refused_before_the_steps(config_file, tmp_path, monkeypatch, refused):
    command, output = ["profile", "--config", config_file()], tmp_path / "file"
    output.touch()
    for path in (output, output / "below"):
        refused([*command, "--output", path], f"cannot write to {path}")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(command, "one process")
