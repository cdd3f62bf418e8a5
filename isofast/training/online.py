"""Online evaluation: linear-probe top-1, k-NN on features and raw pixels, label-free metrics.

Shapes: N images in the bank, M queries, V views, F features, K classes.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from isofast.config.schema import Config
from isofast.data import UNLABELLED, EvalLoader, ImageFolder, Recipe, draw_views
from isofast.data.bar import Bar
from isofast.distributed import World, cores_of_rank, gather_rows
from isofast.errors import UserError
from isofast.run.background import HostCopy
from isofast.run.labelfree import label_free
from isofast.run.loggers import Record
from isofast.run.metrics import Evaluation
from isofast.training.stall import StallWatch
from isofast.training.step import Online

Features = Callable[[Tensor], Tensor]
_QUERIES_AT_ONCE = 1024
# images, and views of each, for the metrics that compare views
_VIEWED_IMAGES, _VIEWS = 100, 10


class Evaluator:
    """Evaluation on the validation images, split across the ranks.

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
        watch: StallWatch,
        *,
        backend: str,
    ) -> None:
        self._config, self._watch = config, watch
        settings = config.evaluation
        self._knn = partial(
            knn_top1,
            classes=len(train.classes),
            k=settings.knn_k,
            temperature=settings.knn_temperature,
        )
        self._speak = world.is_main
        labelled = np.flatnonzero(train.labels != UNLABELLED)
        order = np.random.default_rng(config.seed).permutation(labelled)
        bank = np.sort(order[: config.evaluation.knn_images])
        if min(len(bank), len(val)) < world.size:
            raise UserError(
                f"evaluation splits its images across {world.size} processes, but there are only "
                f"{len(bank)} labelled training images for k-NN and {len(val)} validation images; "
                f"provide more, or --set evaluation.every_epochs=0"
            )

        self._bank = clean_loader(config, train, recipe, bank, world, backend)
        self._val = clean_loader(config, val, recipe, np.arange(len(val)), world, backend)
        self.images = len(bank) + len(val)
        self._views: Tensor | None = None
        if config.evaluation.metrics_images:
            # the same for every seed; at least one image per rank
            drawn = np.random.default_rng(0).permutation(len(val))
            sample = drawn[: max(config.evaluation.metrics_images, world.size)]
            gathered = [np.arange(len(val))[rank :: world.size] for rank in range(world.size)]
            self._sample = np.flatnonzero(np.isin(np.concatenate(gathered), sample))
            viewed = val.subset(sample[: max(_VIEWED_IMAGES, world.size)][world.rank :: world.size])
            self._views = _views(config, viewed, recipe, world, backend)

    @torch.no_grad()
    def __call__(self, online: Online) -> Evaluation:
        """Evaluate in eval mode, then return to training mode."""
        online.eval()
        bank_NF, bank_y_N = self._collect(self._bank, online.branch.features)
        val_MF, val_y_M = self._collect(self._val, online.branch.features)
        right = int((online.probe(val_MF).argmax(1) == val_y_M).sum())
        measured = self._label_free(online, val_MF)
        online.train()
        return Evaluation(
            right / len(val_y_M), self._knn(bank_NF, bank_y_N, val_MF, val_y_M), measured
        )

    @torch.no_grad()
    def pixels(self) -> float:
        """Return the k-NN accuracy of raw clean pixels, on the same images and settings."""
        flat = nn.Flatten()
        return self._knn(*self._collect(self._bank, flat), *self._collect(self._val, flat))

    def _label_free(self, online: Online, val_MF: Tensor) -> Callable[[], Record]:
        """Return a function that computes the metrics of the current features and embeddings."""
        if self._views is None:
            return dict
        branch = online.branch
        pieces = (
            x_BCHW.to(val_MF.device, torch.float32, memory_format=torch.channels_last)
            for x_BCHW in torch.split(self._views, self._config.evaluation.batch_size)
        )
        view_LF = gather_rows(torch.cat([branch.features(x_BCHW) for x_BCHW in pieces]))
        features = [val_MF[self._sample], view_LF]
        copies = [HostCopy(x) for h in features for x in (h, branch.projector(h))]

        def compute() -> Record:
            h_NF, z_ND, view_LF, view_LD = (copy.get() for copy in copies)
            of_h, of_z = (
                label_free(x, views.reshape(-1, _VIEWS, views.shape[1]))
                for x, views in ((h_NF, view_LF), (z_ND, view_LD))
            )
            return of_h | {f"{name}_z": value for name, value in of_z.items()}

        return compute

    def _collect(self, loader: EvalLoader, features: Features) -> tuple[Tensor, Tensor]:
        """Return features and labels of all of a loader's images, gathered from all ranks."""
        batches = Bar(loader, "evaluating", leave=False, disable=not self._speak, unit="batch")
        parts = [(features(x_BCHW), y_B) for x_BCHW, y_B in self._watch.over(batches)]
        return (
            gather_rows(torch.cat([h_BF for h_BF, _ in parts])),
            gather_rows(torch.cat([y_B for _, y_B in parts])),
        )


def clean_loader(
    config: Config,
    images: ImageFolder,
    recipe: Recipe,
    indices: npt.NDArray[np.int64],
    world: World,
    backend: str,
) -> EvalLoader:
    """Return a loader over this rank's share of ``images[indices]``."""
    return EvalLoader(
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
    """Return the k-NN top-1 accuracy: neighbours by cosine similarity, votes weighted.

    A neighbour's vote has weight exp(similarity / temperature), as in instance discrimination
    (Wu et al., CVPR 2018).

    Args:
        bank_NF: features to search, float.
        bank_y_N: their labels, int64 in [0, classes).
        query_MF: features to classify.
        query_y_M: their labels.
        classes: number of classes.
        k: number of neighbours that vote; the whole bank if it is smaller.
        temperature: temperature of the vote weights.
    """
    bank_NF = functional.normalize(bank_NF, dim=1)
    right = torch.zeros((), dtype=torch.int64, device=query_MF.device)
    for start in range(0, len(query_MF), _QUERIES_AT_ONCE):
        query_QF = query_MF[start : start + _QUERIES_AT_ONCE]
        query_y_Q = query_y_M[start : start + _QUERIES_AT_ONCE]
        similarity_QN = functional.normalize(query_QF, dim=1) @ bank_NF.T
        nearest_Qk, index_Qk = similarity_QN.topk(min(k, len(bank_NF)), dim=1)
        votes_QK = torch.zeros(len(query_QF), classes, device=query_QF.device)
        # relative to the nearest neighbour: the same winner, and no overflow
        weights_Qk = ((nearest_Qk - nearest_Qk[:, :1]) / temperature).exp()
        votes_QK.scatter_add_(1, bank_y_N[index_Qk], weights_Qk)
        right += (votes_QK.argmax(1) == query_y_Q).sum()
    return float(right) / len(query_MF)


def _views(
    config: Config, images: ImageFolder, recipe: Recipe, world: World, backend: str
) -> Tensor:
    """Return ``_VIEWS`` draws of view 1 of each image: (images * V, C, H, W) on the CPU."""
    threads = config.data.threads or cores_of_rank(world)
    twice = replace(recipe, view2=recipe.view1)
    try:
        pairs = draw_views(
            backend, images, twice, _VIEWS // 2, device=world.device, threads=threads
        )
        # float16's rounding error is a fraction of a gray level
        x_NVCHW = torch.stack([x.cpu().half() for pair in pairs for x in pair], dim=1)
    except UserError as error:
        raise UserError(
            f"augmented validation images: {error}. To skip the metrics that need them, "
            f"--set evaluation.metrics_images=0"
        ) from None
    return x_NVCHW.flatten(0, 1)
