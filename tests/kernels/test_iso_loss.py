"""The loss as a module: what it computes, when C is updated, one process against two."""

import pytest
import torch
from torch import nn

from isofast_kernels import IsoLoss, reference

from ..support.runs import assert_equal_trees, forked, launched
from . import iso_loss_ranks

DIM, BATCH = 6, 8


def embeddings(seed=0, batch=BATCH):
    torch.manual_seed(seed)
    return [torch.randn(batch, DIM, requires_grad=True) for _ in range(2)]


@pytest.mark.parametrize("isotropic", [True, False], ids=["iso", "plain"])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_it_is_the_reference_in_float64(metric, isotropic):
    kind = {"metric": metric, "isotropic": isotropic}
    criterion = IsoLoss(DIM, alpha=0.7, eps=0.1, decay=0.5, **kind)
    z1, z2 = embeddings()
    t1, t2 = (z.detach() for z in embeddings(1))
    for _ in range(2):
        z1.grad = z2.grad = None
        loss = criterion(z1, z2, t1, t2)
        loss.backward()
    a, b = (z.detach().double().requires_grad_() for z in (z1, z2))
    corr = 0.75 * reference.second_moment_reference([a.detach(), b.detach()])
    torch.testing.assert_close(criterion.corr_DD.double(), corr, rtol=1e-5, atol=1e-6)
    normalize = "spectral" if metric == "cosine" else "none"
    w = reference.matrix_power_reference(corr, 0.7, eps=0.1, normalize=normalize)
    expected = 2 * sum(
        reference.losses_reference(z, t.double(), w, **kind).mean() for z, t in ((a, t2), (b, t1))
    )
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)
    for ours, theirs in ((z1, a), (z2, b)):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-6)


def test_c_moves_in_training_only_and_is_saved():
    criterion = IsoLoss(DIM)
    z1, z2 = embeddings()
    criterion(z1, z2)
    before = criterion.corr_DD.clone()
    torch.testing.assert_close(before, 0.002 * reference.second_moment_reference([z1, z2]).detach())
    assert torch.equal(before, before.T)
    criterion.eval()(z1, z2)
    assert torch.equal(criterion.corr_DD, before)
    other = IsoLoss(DIM)
    other.load_state_dict(criterion.state_dict())
    assert torch.equal(other.corr_DD, before)


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"metric": "l2"}, "'l2'"), ({"alpha": -1.0}, "alpha"), ({"dim": 5}, "5")],
)
def test_settings_that_do_not_fit_are_refused(settings, word):
    criterion = IsoLoss(**({"dim": DIM} | settings))
    with pytest.raises(ValueError, match=word):
        criterion(*embeddings())


def test_one_target_alone_is_refused():
    z1, z2 = embeddings()
    for targets in ({"t1_BD": z1}, {"t2_BD": z2}):
        with pytest.raises(ValueError, match="both targets"):
            IsoLoss(DIM)(z1, z2, **targets)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast_changes_the_network_alone(compiled):
    """bf16 embeddings, fp32 inside: bitwise equal under autocast and outside, also as one graph."""
    z1, z2 = (z.detach().bfloat16().requires_grad_() for z in embeddings())
    criteria = IsoLoss(DIM, decay=0.5), IsoLoss(DIM, decay=0.5)
    call = criteria[1]
    if compiled:
        call = torch.compile(criteria[1], fullgraph=True, backend="aot_eager")
    for _ in range(2):
        outside = criteria[0](z1, z2)
        with torch.autocast("cpu", torch.bfloat16):
            inside = call(z1, z2)
    assert inside.dtype == criteria[1].corr_DD.dtype == torch.float32
    assert torch.equal(outside, inside)
    assert torch.equal(criteria[0].corr_DD, criteria[1].corr_DD)
    grads = [torch.autograd.grad(loss, (z1, z2)) for loss in (outside, inside)]
    assert grads[0][0].dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_model_of_bf16_keeps_c_in_fp32():
    """As Lightning's bf16-true and DeepSpeed's bf16 convert a whole module."""
    model = nn.ModuleDict({"encoder": nn.Linear(5, DIM), "criterion": IsoLoss(DIM, decay=0.5)})
    x = torch.randn(2, BATCH, 5)
    model["criterion"](*model["encoder"](x).unbind())
    before = model["criterion"].corr_DD.clone()
    model.bfloat16()
    assert torch.equal(model["criterion"].corr_DD, before)
    model["criterion"](*model["encoder"](x.bfloat16()).unbind()).backward()
    assert model["encoder"].weight.grad.dtype == torch.bfloat16
    assert model.double()["criterion"].corr_DD.dtype == torch.float64
    assert model.half()["criterion"].corr_DD.dtype == torch.float64
    assert model.to("meta")["criterion"].corr_DD.device.type == "meta"


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float32, torch.float64])
def test_a_criterion_made_under_another_default_dtype(default):
    """As Lightning's bf16-true builds modules in configure_model."""
    torch.set_default_dtype(default)
    try:
        criterion, encoder = IsoLoss(DIM), nn.Linear(5, DIM)
    finally:
        torch.set_default_dtype(torch.float32)
    x = torch.randn(2, BATCH, 5, dtype=default)
    criterion(*encoder(x).unbind()).backward()
    wide = torch.float64 if default == torch.float64 else torch.float32
    assert criterion.corr_DD.dtype == wide and encoder.weight.grad.dtype == default


def test_a_criterion_built_on_the_meta_device_starts_at_zero():
    """As FSDP2 users build a model: sharded without memory, then materialised and initialised."""
    with torch.device("meta"):
        model = nn.ModuleDict({"encoder": nn.Linear(5, DIM), "criterion": IsoLoss(DIM)})
    model.to_empty(device="cpu")["criterion"].corr_DD.fill_(torch.nan)
    for module in (model["encoder"], model["criterion"]):
        module.reset_parameters()
    x = torch.randn(2, BATCH, 5)
    fresh = IsoLoss(DIM)
    assert torch.equal(*(c(*model["encoder"](x).unbind()) for c in (model["criterion"], fresh)))
    assert torch.equal(model["criterion"].corr_DD, fresh.corr_DD)


def test_a_run_resumed_through_state_dict_has_the_losses_of_the_uncut_one(tmp_path):
    def parts():
        encoder, criterion = nn.Linear(5, DIM), IsoLoss(DIM, decay=0.9)
        return encoder, criterion, torch.optim.SGD(encoder.parameters(), lr=0.1, momentum=0.9)

    def losses(encoder, criterion, optimizer, x):
        for views in x:
            loss = criterion(*encoder(views).unbind())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()

    torch.manual_seed(0)
    x = torch.randn(8, 2, BATCH, 5)
    first = parts()
    before = [*losses(*first, x[:4])]
    torch.save([part.state_dict() for part in first], tmp_path / "run.pt")
    uncut = [*losses(*first, x[4:])]
    second = parts()
    for part, state in zip(second, torch.load(tmp_path / "run.pt"), strict=True):
        part.load_state_dict(state)
    assert [*losses(*second, x[4:])] == uncut
    assert len({*before, *uncut}) == 8
    # a checkpoint without C would give other losses
    second[0].load_state_dict(torch.load(tmp_path / "run.pt")[0])
    second[1].corr_DD.zero_()
    assert next(losses(*second, x[4:])) != uncut[0]


def test_with_gradient_accumulation_c_moves_at_each_call():
    calls, decay = 4, 0.9
    torch.manual_seed(0)
    encoder, x = nn.Linear(5, DIM).double(), torch.randn(calls, 2, BATCH, 5).double()
    criterion = IsoLoss(DIM, decay=decay ** (1 / calls)).double()
    start = torch.eye(DIM).double()
    criterion.corr_DD.copy_(start)
    for views in x:
        (criterion(*encoder(views).unbind()) / calls).backward()
    with torch.no_grad():
        z = encoder(x)
    moments = torch.einsum("kvbi,kvbj->kij", z, z) / (2 * BATCH)
    weights = decay ** (torch.arange(calls).flip(0) / calls) * (1 - decay ** (1 / calls))
    expected = decay * start + torch.einsum("k,kij->ij", weights.double(), moments)
    torch.testing.assert_close(criterion.corr_DD, expected)

    # each call's loss uses C as of that call
    grad, corr = 0, start
    for views, moment in zip(x, moments, strict=True):
        corr = decay ** (1 / calls) * corr + (1 - decay ** (1 / calls)) * moment
        values, u = torch.linalg.eigh(corr)
        w = u @ (values / values.max()).sqrt().diag() @ u.T
        z1, z2 = encoder(views).unbind()
        pairs = ((z1, z2.detach()), (z2, z1.detach()))
        options = {"metric": "cosine", "isotropic": True}
        losses = [reference.losses_reference(z, t, w, **options).mean() for z, t in pairs]
        (alone,) = torch.autograd.grad(2 * sum(losses) / calls, encoder.weight)
        grad = grad + alone
    torch.testing.assert_close(encoder.weight.grad, grad)


def test_c_is_symmetric_in_whatever_order_ranks_are_added(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: x.add_(torch.rand_like(x)))
    criterion = IsoLoss(DIM, gather_distributed=True)
    criterion(*embeddings())
    assert torch.equal(criterion.corr_DD, criterion.corr_DD.T)


@pytest.mark.slow
def test_two_ranks_are_one_process_on_the_whole_batch(tmp_path):
    """DDP in a loop and around the loss, with lightly's heads and teacher, FSDP2, torch.compile."""
    ranks = forked(iso_loss_ranks.main, str(tmp_path), environments=launched(2))
    assert ranks == [0, 0]
    expected = iso_loss_ranks.everything()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert not torch.equal(first["local"].pop("C"), second["local"].pop("C"))
    assert_equal_trees(first, second)
    # without gathering, each rank trains with its own C
    assert (first["local"]["losses"] - expected.pop("local")["losses"]).abs().max() > 1e-3
    for case, results in expected.items():
        for name, tensor in results.items():
            torch.testing.assert_close(
                first[case][name], tensor, rtol=1e-10, atol=1e-12, msg=f"{case}: {name}"
            )
