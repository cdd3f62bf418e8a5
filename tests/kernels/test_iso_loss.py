"""The loss as a module: what it computes, when C moves, one process against two."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from isofast_kernels import IsoLoss, reference

ROOT = Path(__file__).resolve().parents[2]
DIM, BATCH = 6, 8


def embeddings(seed=0, batch=BATCH):
    torch.manual_seed(seed)
    return [torch.randn(batch, DIM, requires_grad=True) for _ in range(2)]


@pytest.mark.parametrize("isotropic", [True, False], ids=["iso", "plain"])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_it_is_the_reference_in_float64(metric, isotropic):
    criterion = IsoLoss(DIM, alpha=0.5, decay=0.5, metric=metric, isotropic=isotropic)
    z1, z2 = embeddings()
    t1, t2 = (z.detach() for z in embeddings(1))
    for _ in range(2):
        z1.grad = z2.grad = None
        loss = criterion(z1, z2, t1, t2)
        loss.backward()
    a, b, c, d = (x.detach().double() for x in (z1, z2, t1, t2))
    moment = (a.T @ a + b.T @ b) / (2 * BATCH)
    corr = 0.75 * moment
    torch.testing.assert_close(criterion.corr_DD.double(), corr, rtol=1e-5, atol=1e-6)
    values, u = torch.linalg.eigh(corr)
    values = values / values.max() if metric == "cosine" else values
    w = u @ values.clamp(min=0).sqrt().diag() @ u.T
    a.requires_grad_(), b.requires_grad_()
    kind = {"metric": metric, "isotropic": isotropic}
    expected = 2 * (
        reference.losses_reference(a, d, w, **kind).mean()
        + reference.losses_reference(b, c, w, **kind).mean()
    )
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)
    for ours, theirs in ((z1, a), (z2, b)):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-6)


def test_without_targets_the_views_are_each_others():
    z1, z2 = embeddings()
    one, two = IsoLoss(DIM), IsoLoss(DIM)
    assert torch.equal(one(z1, z2), two(z1, z2, z1, z2))
    one(z1, z2).backward()
    assert z1.grad is not None and z2.grad is not None


def test_c_moves_in_training_only_and_is_saved():
    criterion = IsoLoss(DIM)
    z1, z2 = embeddings()
    criterion(z1, z2)
    before = criterion.corr_DD.clone()
    assert before.abs().sum() > 0 and torch.equal(before, before.T)
    criterion.eval()(z1, z2)
    assert torch.equal(criterion.corr_DD, before)
    other = IsoLoss(DIM)
    other.load_state_dict(criterion.state_dict())
    assert torch.equal(other.corr_DD, before)


def test_a_network_of_ones_own_fills_its_dimensions():
    torch.manual_seed(0)
    encoder, criterion = nn.Linear(16, DIM, bias=False), IsoLoss(DIM, decay=0.9)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.3)
    ranks = []
    for _ in range(300):
        x = torch.randn(64, 16) * torch.linspace(0.2, 2, 16)
        loss = criterion(*(encoder(x + 0.3 * torch.randn_like(x)) for _ in range(2)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values = torch.linalg.eigvalsh(criterion.corr_DD)
        ranks.append(float(values.sum() ** 2 / values.square().sum()))
    assert ranks[0] < 5 and ranks[-1] > 5.8


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"metric": "l2"}, "'l2'"), ({"alpha": -1.0}, "alpha"), ({"dim": 5}, "5")],
)
def test_settings_that_do_not_fit_are_refused(settings, word):
    criterion = IsoLoss(**({"dim": DIM} | settings))
    with pytest.raises(ValueError, match=word):
        criterion(*embeddings())


RANK = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from isofast_kernels import IsoLoss
folder, gather, rank = sys.argv[1], sys.argv[2] == "True", int(sys.argv[3])
dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
torch.manual_seed(0)
encoder, x = torch.nn.Linear(5, 6).double(), torch.randn(3, 2, 8, 5).double()
criterion = IsoLoss(6, decay=0.5, gather_distributed=gather)
ddp = DDP(encoder)
for step in range(3):
    share = x[step][:, 4 * rank : 4 * rank + 4]
    encoder.zero_grad()
    criterion(*(z.float() for z in ddp(share.flatten(0, 1)).view(2, 4, 6))).backward()
torch.save([criterion.corr_DD, encoder.weight.grad], f"{folder}/{rank}.pt")
# who leaves early takes the other's connections along
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("gather", [True, False])
def test_two_ranks_are_one_process_on_the_whole_batch(tmp_path, gather):
    torch.manual_seed(0)
    encoder, x = nn.Linear(5, 6).double(), torch.randn(3, 2, 8, 5).double()
    criterion = IsoLoss(6, decay=0.5)
    for step in range(3):
        encoder.zero_grad()
        criterion(*(encoder(view).float() for view in x[step])).backward()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path), str(gather), str(rank)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in (0, 1)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    (corr, grad), (other_corr, other_grad) = (torch.load(tmp_path / f"{k}.pt") for k in (0, 1))
    assert torch.equal(grad, other_grad)
    assert torch.equal(corr, other_corr) == gather
    if gather:
        torch.testing.assert_close(corr, criterion.corr_DD, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad, encoder.weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_wheel_needs_torch_and_triton_alone(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet"]
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    source = tmp_path / "kernels"
    # a copy: a build leaves folders beside what it builds
    skipped = shutil.ignore_patterns("*.egg-info", "build", "__pycache__")
    shutil.copytree(ROOT / "kernels", source, ignore=skipped)
    subprocess.run([*pip, "wheel", *options, str(source)], check=True)
    (wheel,) = tmp_path.glob("isofast_kernels-*.whl")
    target = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
        (metadata,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    needs = sorted(line.split()[1] for line in lines if line.startswith("Requires-Dist"))
    assert [need.partition(">")[0] for need in needs] == ["torch", "triton"]
    code = (
        "import sys; absent = ('isofast', 'deepspeed', 'pydantic', 'torchvision', 'nvidia.dali');"
        "sys.modules.update(dict.fromkeys(absent));"
        "import torch, isofast_kernels as k; assert k.__file__.startswith(sys.argv[1]), k.__file__;"
        "z = torch.randn(2, 8, 4, requires_grad=True);"
        "k.IsoLoss(4)(*z).backward(); assert z.grad.isfinite().all()"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(target)],
        check=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(target)},
    )
