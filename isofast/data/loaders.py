"""The loaders that feed training and evaluation, on DALI.

Order and randomness are ours (`isofast.data.order`, `isofast.data.draw`); DALI executes.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch

from isofast.data import dali
from isofast.data.datasets import ImageFolder, verify_images
from isofast.data.draw import Ints, clean_windows, draw
from isofast.data.order import Batch, BatchOrder
from isofast.data.recipe import Recipe


class TrainLoader:
    """An endless iterator over augmented batches: `next(loader)` gives a `Batch`.

    Every batch is a function of (seed, global step), so a loader made with start_step=k goes on
    bit for bit where another one was after k batches, across ends of epochs too.

    Args:
        dataset: the training images; checked first where `verify_images` has not been called.
        recipe: the augmentation.
        batch_size: images of this rank a step.
        rank: this rank, from 0.
        world_size: number of ranks.
        seed: of the order and of the augmentation.
        device: where batches are made: DALI's GPU operators for a CUDA device.
        start_step: the global step of the first batch.
        threads: DALI's CPU threads.
        prefetch: batches made ahead.
        dtype: of the views; DALI works in levels of 8 bits and in float32 until they are cast.

    Attributes:
        steps_per_epoch, images_per_epoch, dropped_per_epoch: counted over all ranks.
        backend: "dali".

    Raises:
        UserError: unreadable images, or fewer than one global batch.
        RunError: from next(), when an image can no longer be read.
    """

    backend = "dali"

    def __init__(
        self,
        dataset: ImageFolder,
        recipe: Recipe,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int,
        device: torch.device,
        start_step: int = 0,
        threads: int,
        prefetch: int = 2,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        dataset, self._sizes = _with_sizes(dataset)
        self._recipe = recipe
        self._seed = seed
        self._on = f"DALI on the {'GPU' if device.type == 'cuda' else 'CPU'}"
        self._step = self._drawn = start_step
        self._order = BatchOrder(
            len(dataset), batch_size=batch_size, rank=rank, world_size=world_size, seed=seed
        )
        self.steps_per_epoch = self._order.steps_per_epoch
        self.images_per_epoch = self._order.images_per_epoch
        self.dropped_per_epoch = self._order.dropped_per_epoch
        self._identity: dict[str, int | str] = {
            "backend": self.backend,
            "seed": seed,
            "fingerprint": dataset.fingerprint,
            "batch_size": batch_size,
            "world_size": world_size,
        }
        self._stream = dali.Stream(
            dataset,
            self._draw_next,
            partial(dali.two_views, recipe),
            dali.view_arguments(recipe),
            batch_size=batch_size,
            device=device,
            threads=threads,
            prefetch=prefetch,
            dtype=dtype,
        )

    def __iter__(self) -> "TrainLoader":
        """Give itself: there is one stream, and it has no end."""
        return self

    def __next__(self) -> Batch:
        """Give the next batch; its tensors stay valid for as long as they are kept."""
        (x1, x2), y = self._stream.pull()
        self._step += 1
        return Batch(x1, x2, y)

    def state_dict(self) -> dict[str, int | str]:
        """Say where the stream is: "step" is the start_step that goes on from here."""
        return {"step": self._step, **self._identity}

    def describe(self) -> str:
        """Say in a line what makes the batches."""
        return f"images decoded and augmented by {self._on}, batch by batch"

    def close(self) -> None:
        """Free DALI's threads and memory; the loader is of no use afterwards."""
        self._stream.close()

    def _draw_next(self) -> tuple[Ints, dali.Arrays]:
        epoch, indices = self._order.batch(self._drawn)
        self._drawn += 1
        sizes, seed = self._sizes[indices], self._seed
        drawn = [draw(self._recipe, v, sizes, indices, seed=seed, epoch=epoch) for v in (1, 2)]
        return indices, dali.view_values(self._recipe, drawn)


class EvalLoader:
    """Clean images in a given order: `for x_BCHW, y_B in loader`, as often as wanted.

    The short side is resized to recipe.resize_short and the middle recipe.crop pixels are taken;
    the last batch may be short. Iterating again starts again, also after a `break`.

    Args:
        dataset: the images; checked first where `verify_images` has not been called.
        recipe: sizes and normalisation.
        indices: which images, in this order.
        batch_size: images a batch.
        device: where batches are made.
        threads: DALI's CPU threads.

    Raises:
        UserError: unreadable images.
        ValueError: no index, or one outside the data set.
        RunError: while iterating, when an image can no longer be read.
    """

    def __init__(
        self,
        dataset: ImageFolder,
        recipe: Recipe,
        indices: Sequence[int] | Ints,
        *,
        batch_size: int,
        device: torch.device,
        threads: int,
    ) -> None:
        dataset, self._sizes = _with_sizes(dataset)
        self._recipe = recipe
        self._indices = np.asarray(indices, dtype=np.int64)
        inside = (self._indices >= 0) & (self._indices < len(dataset))
        if not len(self._indices) or not inside.all():
            raise ValueError(
                f"indices need at least one number, each from 0 to {len(dataset) - 1}; "
                f"got {len(self._indices)} of them"
            )
        self._batch_size = batch_size
        self._todo: deque[Ints] = deque()

        self._stream = dali.Stream(
            dataset,
            self._next_windows,
            partial(dali.clean_view, recipe),
            dali.CLEAN_ARGUMENTS,
            batch_size=batch_size,
            device=device,
            threads=threads,
        )

    def __len__(self) -> int:
        """Give the number of batches, the short one included."""
        return -(-len(self._indices) // self._batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (x_BCHW float32 channels_last, y_B int64) from the first index on."""
        self._todo.clear()
        self._stream.restart()
        size = self._batch_size
        self._todo.extend(self._indices[k * size : (k + 1) * size] for k in range(len(self)))
        for _ in range(len(self)):
            (x,), y = self._stream.pull()
            yield x, y

    def close(self) -> None:
        """Free DALI's threads and memory; the loader is of no use afterwards."""
        self._stream.close()

    def _next_windows(self) -> tuple[Ints, dali.Arrays]:
        if not self._todo:
            raise StopIteration
        indices = self._todo.popleft()
        start_N2, end_N2 = clean_windows(self._recipe, self._sizes[indices])
        return indices, {"roi_start": start_N2, "roi_end": end_N2}


def _with_sizes(dataset: ImageFolder) -> tuple[ImageFolder, Ints]:
    if dataset.sizes is None:
        dataset = verify_images(dataset)
    assert dataset.sizes is not None
    return dataset, dataset.sizes
