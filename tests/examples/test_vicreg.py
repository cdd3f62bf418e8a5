"""A custom method: its mathematics, and a run from outside the repository."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from isofast.config.schema import ProjectorConfig
from isofast.methods import Views
from isofast.run.metrics import read_metrics

from ..support.runs import call, command_of

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))
from vicreg import VICReg  # noqa: E402


def test_each_term_is_the_papers():
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, 32, 6, dtype=torch.float64)
    covs = [(z - z.mean(0)).T @ (z - z.mean(0)) / 31 for z in (z1, z2)]
    expected = {
        "invariance": (z1 - z2).square().mean(),
        "variance": sum((1 - (c.diagonal() + 1e-4).sqrt()).clamp(min=0).mean() for c in covs) / 2,
        "covariance": sum((c - c.diagonal().diag()).square().sum() for c in covs) / 6,
    }
    for key, term in expected.items():
        weights = dict.fromkeys(expected, 0.0) | {key: 1.0}
        config = VICReg.Config(name="vicreg:VICReg", **weights)
        loss = VICReg(config, ProjectorConfig(output=6)).loss(Views(z1, z2, z1, z2))
        assert loss.item() == pytest.approx(term.item(), rel=1e-5)


@pytest.mark.long
def test_it_trains_resumes_and_is_evaluated(tmp_path, small):
    shutil.copy(HERE / "vicreg.py", tmp_path / "my_file.py")
    tree = small(evaluation={"every_epochs": 1})
    del tree["optimizer"]
    (tmp_path / "config.json").write_text(json.dumps(tree))

    def train(*overrides: str, code: int = 0) -> str:
        command = command_of(Path("config.json"), Path("run"))
        command += [word for override in overrides for word in ("--set", override)]
        return call(command, cwd=tmp_path, code=code).stderr

    mine = ("method.name=my_file:VICReg", "method.covariance=2")
    wrong = train(*mine, "method.covarianse=1", "method.variance=-1", code=2)
    assert "method.covarianse: unknown key. Did you mean method.covariance?" in wrong
    assert "method.variance: got -1; input should be greater than or equal to 0" in wrong
    train(*mine, "train.max_steps=2")
    assert "continuing from" in train(*mine, "train.max_steps=4")
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["method"]["covariance"] == 2 and stored["method"]["ema"] is False
    # SimSiam's preset
    assert (stored["optimizer"]["name"], stored["optimizer"]["lr"]) == ("sgd", 0.1)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    for record in steps:
        assert record["alignment"] is None and record["variance_loss"] > 0
        assert record["effective_rank"] >= 1
    assert records[-1]["knn_top1"] > 0
