"""The images of each batch and the parameters drawn for them, the same for every renderer."""

from typing import NamedTuple

import numpy as np
import torch

from isofast.data.draw import Ints, ViewDraw, epoch_order
from isofast.errors import UserError


class Batch(NamedTuple):
    """Two augmented views of the same images, on the device.

    x1_BCHW, x2_BCHW: normalised, channels_last in memory, in the loader's dtype.
    y_B: int64 labels.
    """

    x1_BCHW: torch.Tensor
    x2_BCHW: torch.Tensor
    y_B: torch.Tensor


class Chunk(NamedTuple):
    """T consecutive batches of B images, and the parameters of both views of N = T * B images."""

    index_TB: Ints
    label_TB: Ints
    view1: ViewDraw
    view2: ViewDraw


class BatchOrder:
    """The images of each batch as a function of (seed, step), without state.

    Global batch k of an epoch is the k-th piece of the epoch's permutation, shared out over the
    ranks. Images that do not fill a last global batch are dropped, other ones each epoch, so each
    image is seen at most once an epoch.

    Args:
        images: size of the data set.
        batch_size: images of a rank a step.
        rank: this rank, from 0.
        world_size: number of ranks.
        seed: the run's seed.

    Raises:
        UserError: the data set does not fill one global batch.
    """

    def __init__(
        self, images: int, *, batch_size: int, rank: int = 0, world_size: int = 1, seed: int
    ) -> None:
        self.global_batch = batch_size * world_size
        if images < self.global_batch:
            raise UserError(
                f"the training set has {images} images, fewer than one global batch of "
                f"{self.global_batch}; lower train.batch_size or add images"
            )
        self.images = images
        self.steps_per_epoch = images // self.global_batch
        self.images_per_epoch = self.steps_per_epoch * self.global_batch
        self.dropped_per_epoch = images - self.images_per_epoch
        self._share = slice(rank * batch_size, (rank + 1) * batch_size)
        self._seed = seed
        self._cached: tuple[int, Ints] = (-1, np.empty(0, dtype=np.int64))

    def batch(self, step: int) -> tuple[int, Ints]:
        """Return (epoch, indices_B int64) of this rank at a global step, from 0."""
        epoch, k = divmod(step, self.steps_per_epoch)
        if self._cached[0] != epoch:
            self._cached = (epoch, epoch_order(self.images, seed=self._seed, epoch=epoch))
        piece = self._cached[1][k * self.global_batch : (k + 1) * self.global_batch]
        return epoch, piece[self._share]
