"""`isofast profile`: where a step's time goes."""

import json
import re

import pytest

from isofast.run.directory import cpu_has_bf16
from isofast.training.profile import _advice

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
        *(["--set train.precision=bf16"] if cpu_has_bf16() else []),
    )
    assert [word for word in words if word not in done.stdout] == []
    rate = re.match(r"([\d,.]+) ms per step, ([\d,]+) images/s", done.stdout)
    ms, images_per_s = (float(number.replace(",", "")) for number in rate.groups())
    assert ms * images_per_s == pytest.approx(64_000, rel=0.1)
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


def test_advice_is_about_what_is_slow():
    assert _advice(True, False, "dali", 0.1) == []
    waits, fp32, uncompiled = _advice(False, True, "dali", 0.2)
    assert "20% of a step waits" in waits
    assert "train.precision=bf16" in fp32 and "train.compile=on" in uncompiled
