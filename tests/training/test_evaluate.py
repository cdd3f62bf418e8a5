"""k-NN against a plain loop, evaluation in eval mode."""

import math

import pytest
import torch
from torch import nn

from isofast.training.online import eval_mode, knn_top1


def _vote(q: torch.Tensor, bank: torch.Tensor, bank_y: list[int], k: int, t: float) -> int:
    """The class of one query by k-NN, a neighbour at a time."""
    similarities = [float(q @ b / (q.norm() * b.norm())) for b in bank.double()]
    votes = [0.0] * 5
    for similarity, label in sorted(zip(similarities, bank_y, strict=True), reverse=True)[:k]:
        votes[label] += math.exp(similarity / t)
    return votes.index(max(votes))


@pytest.mark.parametrize("k", [1, 7, 200], ids=lambda k: f"k{k}")
def test_knn_is_a_weighted_vote(k: int) -> None:
    torch.manual_seed(0)
    bank, bank_y = torch.randn(60, 8), torch.randint(5, (60,))
    query, query_y = torch.randn(40, 8), torch.randint(5, (40,))
    answers = [_vote(q, bank, bank_y.tolist(), k, 0.5) for q in query.double()]
    expected = sum(a == y for a, y in zip(answers, query_y.tolist(), strict=True)) / 40
    got = knn_top1(bank, bank_y, query, query_y, classes=5, k=k, temperature=0.5)
    assert got == pytest.approx(expected)


def test_knn_votes_do_not_overflow_at_low_temperatures() -> None:
    bank, bank_y = torch.tensor([[1.0, 0.0], [0.9, 0.436]]), torch.tensor([1, 0])
    query = torch.tensor([[1.0, 0.0]])
    for temperature in (0.02, 0.01, 0.001):
        got = knn_top1(bank, bank_y, query, torch.tensor([1]), classes=2, temperature=temperature)
        assert got == 1.0


def test_knn_in_pieces_counts_every_query() -> None:
    bank = torch.eye(4)
    query_y = torch.arange(2500) % 4
    assert knn_top1(bank, torch.arange(4), bank[query_y], query_y, classes=4, k=1) == 1.0
    assert knn_top1(bank, torch.arange(4), bank[query_y], (query_y + 1) % 4, classes=4, k=1) == 0.0


def test_eval_mode_gives_back_the_mode_it_found() -> None:
    module = nn.BatchNorm1d(3)
    with pytest.raises(RuntimeError), eval_mode(module):
        assert not module.training
        raise RuntimeError
    assert module.training
    module.eval()
    with eval_mode(module):
        pass
    assert not module.training
