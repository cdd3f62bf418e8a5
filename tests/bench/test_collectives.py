"""A step's collectives by kind, within their budget, and ranks timed side by side."""

import csv
import re
import sys

import pytest
from torch import nn

from isofast.config.schema import EncoderConfig, ProjectorConfig
from isofast.methods.networks import make_encoder, make_projector

from ..support.runs import ROOT, call

# more calls per step make it slower on a cluster
BUDGET = {
    "BatchNorm, forward": 21,
    "BatchNorm, backward": 21,
    "BatchNorm, target": 21,
    "C's moment": 1,
    "gradients": 1,
    "stop and save": 1,
}


@pytest.mark.long
def test_a_step_keeps_to_its_collectives(tmp_path):
    small = ["--presets", "cifar10 with EMA", "--width", "4", "--ranks", "1", "2", "64"]
    program = [sys.executable, str(ROOT / "bench" / "collectives.py"), *small, "--gloo", "2"]
    printed = call(program, BENCH_RESULTS=str(tmp_path)).stdout
    with (tmp_path / "collectives-001.csv").open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    for ranks in ("2", "64"):
        published = [row for row in rows if row["ranks"] == ranks and row["name"] != "gloo, here"]
        assert {row["kind"]: int(row["calls"]) for row in published} == BUDGET
    assert not any(row["ranks"] == "1" for row in rows)

    encoder = make_encoder(EncoderConfig(stem="cifar", width=4))
    net = nn.Sequential(encoder, make_projector(32, ProjectorConfig()), nn.Linear(32, 10))
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    of_norms = sum(2 * 2 * 4 * norm.num_features for norm in norms)
    expected = dict.fromkeys(("forward", "backward", "target"), of_norms)
    expected = {f"BatchNorm, {name}": size for name, size in expected.items()}
    expected |= {"C's moment": 4 * 256**2, "stop and save": 8}
    expected["gradients"] = sum(p.nbytes for p in net.parameters())
    assert {row["kind"]: int(row["bytes"]) for row in rows} == expected

    long = [row for row in rows if row["kind"] == "gradients"]
    assert all(float(row["ring_bytes"]) > expected["gradients"] * 0.99 for row in long)
    assert "| 2 | gloo, here |" in printed


@pytest.mark.long
def test_ranks_are_timed_side_by_side(tmp_path):
    small = ["--ranks", "1", "2", "--batch", "8", "--width", "4", "--rounds", "2", "--steps", "1"]
    program = [sys.executable, str(ROOT / "bench" / "ranks.py"), *small]
    printed = call(program, BENCH_RESULTS=str(tmp_path)).stdout
    assert re.search(r"1 rank .*ms.* 0% \[0%, 0%\] in collectives, [\d,]+ MB a rank", printed)
    (two,) = re.findall(r"2 ranks .*ms.* (\d+)% .*in collectives, [\d,]+ MB a rank", printed)
    assert int(two) > 0
    assert (tmp_path / "ranks-001.csv").exists()
