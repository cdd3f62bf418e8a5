"""Clean evaluation: top-1 of the online probe, k-NN of the features, k-NN of raw pixels.

Shapes: N images of the bank, M queries, F features, K classes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from isofast.config.schema import Config
from isofast.data import UNLABELLED, EvalLoader, ImageFolder, Recipe, make_eval_loader
from isofast.distributed import World, cores_of_rank, gather_rows
from isofast.errors import UserError
from isofast.run.metrics import Evaluation
from isofast.training.step import Online

Features = Callable[[Tensor], Tensor]
_QUERIES_AT_ONCE = 1024


class Evaluator:
    """Evaluates on the validation images, the work shared out over the ranks.

    The k-NN bank is ``evaluation.knn_images`` labelled training images, drawn once from the seed.

    Raises:
        UserError: there are fewer images than processes.
    """

    def __init__(
        self,
        config: Config,
        train: ImageFolder,
        val: ImageFolder,
        recipe: Recipe,
        world: World,
        *,
        backend: str,
    ) -> None:
        self._config = config
        self._classes = len(train.classes)
        self._speak = world.is_main
        labelled = np.flatnonzero(train.labels != UNLABELLED)
        order = np.random.default_rng(config.seed).permutation(labelled)
        bank = np.sort(order[: config.evaluation.knn_images])
        if min(len(bank), len(val)) < world.size:
            raise UserError(
                f"evaluation shares its images out over {world.size} processes, and there are "
                f"{len(bank)} labelled training images for k-NN and {len(val)} validation images; "
                f"give more, or --set evaluation.every_epochs=0"
            )

        def loader(images: ImageFolder, indices: np.ndarray) -> EvalLoader:
            return make_eval_loader(
                backend,
                images,
                recipe,
                indices[world.rank :: world.size],
                batch_size=config.evaluation.batch_size,
                device=world.device,
                threads=config.data.threads or cores_of_rank(world),
                resident_limit_gb=config.data.resident_limit_gb,
                progress=world.is_main,
            )

        self._bank = loader(train, bank)
        self._val = loader(val, np.arange(len(val)))
        self.images = len(bank) + len(val)

    @torch.no_grad()
    def __call__(self, online: Online) -> Evaluation:
        """Evaluates in eval mode and leaves the module in the mode that it had."""
        with eval_mode(online):
            bank_NF, bank_y_N = self._collect(self._bank, online.branch.features)
            val_MF, val_y_M = self._collect(self._val, online.branch.features)
            right = int((online.probe(val_MF).argmax(1) == val_y_M).sum())
        return Evaluation(
            val_top1=right / len(val_y_M),
            knn_top1=self._knn(bank_NF, bank_y_N, val_MF, val_y_M),
        )

    @torch.no_grad()
    def pixels(self) -> float:
        """The k-NN of the clean pixels themselves, the same images and settings."""

        def flat(x_BCHW: Tensor) -> Tensor:
            return x_BCHW.flatten(1)

        return self._knn(*self._collect(self._bank, flat), *self._collect(self._val, flat))

    def _collect(self, loader: EvalLoader, features: Features) -> tuple[Tensor, Tensor]:
        """Features and labels of all of a loader's images, gathered from all ranks."""
        # disable=None hides the bar where there is no terminal
        silent = None if self._speak else True
        batches = tqdm(loader, "evaluating", leave=False, disable=silent, unit="batch")
        parts = [(features(x_BCHW), y_B) for x_BCHW, y_B in batches]
        return (
            gather_rows(torch.cat([h_BF for h_BF, _ in parts])),
            gather_rows(torch.cat([y_B for _, y_B in parts])),
        )

    def _knn(self, bank_NF: Tensor, bank_y_N: Tensor, val_MF: Tensor, val_y_M: Tensor) -> float:
        settings = self._config.evaluation
        return knn_top1(
            bank_NF,
            bank_y_N,
            val_MF,
            val_y_M,
            classes=self._classes,
            k=settings.knn_k,
            temperature=settings.knn_temperature,
        )


def knn_top1(
    bank_NF: Tensor,
    bank_y_N: Tensor,
    query_MF: Tensor,
    query_y_M: Tensor,
    *,
    classes: int,
    k: int = 200,
    temperature: float = 0.07,
) -> float:
    """Share of queries whose class wins a vote of the ``k`` nearest by cosine similarity.

    A neighbour's vote weighs exp(similarity / temperature), as in instance discrimination
    (Wu et al., CVPR 2018).

    Args:
        bank_NF: features to search, float.
        bank_y_N: their labels, int64 in [0, classes).
        query_MF: features to classify.
        query_y_M: their labels.
        classes: how many there are.
        k: neighbours that vote; all of the bank where it is smaller.
        temperature: of the weights.
    """
    bank_NF = functional.normalize(bank_NF, dim=1)
    right = torch.zeros((), dtype=torch.int64, device=query_MF.device)
    for start in range(0, len(query_MF), _QUERIES_AT_ONCE):
        query_QF = query_MF[start : start + _QUERIES_AT_ONCE]
        query_y_Q = query_y_M[start : start + _QUERIES_AT_ONCE]
        similarity_QN = functional.normalize(query_QF, dim=1) @ bank_NF.T
        nearest_Qk, index_Qk = similarity_QN.topk(min(k, len(bank_NF)), dim=1)
        votes_QK = torch.zeros(len(query_QF), classes, device=query_QF.device)
        # relative to the nearest, which changes no vote and cannot overflow
        weights_Qk = ((nearest_Qk - nearest_Qk[:, :1]) / temperature).exp()
        votes_QK.scatter_add_(1, bank_y_N[index_Qk], weights_Qk)
        right += (votes_QK.argmax(1) == query_y_Q).sum()
    return float(right) / len(query_MF)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """``module`` in eval mode; afterwards as it was."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
