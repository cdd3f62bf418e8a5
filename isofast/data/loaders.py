"""The loaders of training and evaluation, and which renderer makes their images."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from isofast.data.batches import Batch, BatchOrder, Chunk
from isofast.data.check import has_dali, read_sizes, remember_bad
from isofast.data.draw import Ints, draw
from isofast.data.folder import ImageFolder, UndecodableError
from isofast.data.recipe import Recipe
from isofast.data.resident import ResidentCleanRenderer, ResidentRenderer, resident_gb
from isofast.errors import RunError, UserError
from isofast_kernels.augment_reference import BLUR_REACH

BACKENDS = ("auto", "dali", "resident")
# numpy's calls cost little on so many, and their words still fit a cache
_DRAWN_AT_ONCE = 2048


class Renderer(Protocol):
    """Makes views of images from parameters that were drawn: by DALI, or resident."""

    backend: str

    def render(self, chunks: Iterator[Chunk]) -> Iterator[Batch]:
        """Yield the batches of the chunks, one by one; chunks are read ahead."""
        ...

    def describe(self) -> str:
        """A line on what makes the batches."""
        ...

    def close(self) -> None:
        """Free threads and memory."""
        ...


class TrainLoader:
    """An infinite iterator over augmented batches: `next(loader)` gives a `Batch`.

    Every batch is a function of (seed, global step), so a loader made with start_step=k continues
    bit for bit where another one was after k batches, across ends of epochs too.

    Args:
        dataset: the training images.
        recipe: the augmentation.
        renderer: makes the views.
        batch_size: images of this rank a step.
        rank: this rank, from 0.
        world_size: number of ranks.
        seed: of the order and of the augmentation.
        start_step: the global step of the first batch.

    Attributes:
        steps_per_epoch, images_per_epoch, dropped_per_epoch: counted over all ranks.
        backend: "dali" or "resident".

    Raises:
        UserError: fewer images than one global batch.
        RunError: from next(), when an image can no longer be read.
    """

    def __init__(
        self,
        dataset: ImageFolder,
        recipe: Recipe,
        renderer: Renderer,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int,
        start_step: int = 0,
    ) -> None:
        self._dataset, self._recipe, self._renderer = dataset, recipe, renderer
        self._seed = seed
        self._step = start_step
        self._order = BatchOrder(
            len(dataset), batch_size=batch_size, rank=rank, world_size=world_size, seed=seed
        )
        # where sizes are still to be read, a batch at a time
        drawn = _DRAWN_AT_ONCE if dataset.sizes is not None else 1
        self._chunk_steps = max(1, drawn // batch_size)
        self.steps_per_epoch = self._order.steps_per_epoch
        self.images_per_epoch = self._order.images_per_epoch
        self.dropped_per_epoch = self._order.dropped_per_epoch
        self.backend = renderer.backend
        self._batches = renderer.render(self._chunks(start_step))

    def __iter__(self) -> "TrainLoader":
        """Return self; the loader is infinite."""
        return self

    def __next__(self) -> Batch:
        """The next batch; its tensors stay valid for as long as they are kept."""
        with _bad_images_remembered(self._dataset):
            batch = next(self._batches, None)
        if batch is None:
            raise RunError("this data loader has been closed, or has failed; make a new one")
        self._step += 1
        return batch

    def state_dict(self) -> dict[str, int | str]:
        """Where the stream is: "step" is the start_step that continues from here."""
        return {"step": self._step, "backend": self.backend}

    def describe(self) -> str:
        """A line on what makes the batches."""
        return self._renderer.describe()

    def close(self) -> None:
        """Free threads and memory; the loader is of no use afterwards."""
        self._renderer.close()

    def _chunks(self, step: int) -> Iterator[Chunk]:
        while True:
            # an epoch's end ends a chunk: one call draws for one epoch
            left = self.steps_per_epoch - step % self.steps_per_epoch
            batches = [self._order.batch(step + k) for k in range(min(self._chunk_steps, left))]
            step += len(batches)
            epoch = batches[0][0]
            index_TB = np.stack([index_B for _, index_B in batches])
            index_N = index_TB.reshape(-1)
            sizes_N2 = read_sizes(self._dataset, index_N)
            view1, view2 = (
                draw(self._recipe, v, sizes_N2, index_N, seed=self._seed, epoch=epoch)
                for v in (1, 2)
            )
            yield Chunk(index_TB, self._dataset.labels[index_TB], view1, view2)


class EvalLoader:
    """Clean images in a given order: `for x_BCHW, y_B in loader`, as often as wanted.

    The short side is resized to recipe.resize_short and the middle recipe.crop pixels are taken;
    the last batch may be short. Iterating again starts again, also after a `break`.

    Args:
        dataset: the images.
        renderer: a `DaliCleanRenderer` or `ResidentCleanRenderer` of the data set.
        indices: which images, in this order.
        batch_size: images a batch.

    Raises:
        RunError: while iterating, when an image can no longer be read.
    """

    def __init__(
        self, dataset: ImageFolder, renderer: Any, indices: Ints, *, batch_size: int
    ) -> None:
        self._dataset, self._renderer = dataset, renderer
        self._batches = [indices[k : k + batch_size] for k in range(0, len(indices), batch_size)]

    def __len__(self) -> int:
        """Number of batches, the short one included."""
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (x_BCHW float32 channels_last, y_B int64) from the first index on."""
        images = self._renderer.render(self._batches)
        for index_B in self._batches:
            with _bad_images_remembered(self._dataset):
                x_BCHW = next(images)
            yield x_BCHW, torch.from_numpy(self._dataset.labels[index_B]).to(x_BCHW.device)

    def close(self) -> None:
        """Free threads and memory; the loader is of no use afterwards."""
        self._renderer.close()


def make_train_loader(
    backend: str,
    dataset: ImageFolder,
    recipe: Recipe,
    *,
    batch_size: int,
    rank: int = 0,
    device: torch.device,
    threads: int,
    resident_limit_gb: float = 8.0,
    prefetch: int = 2,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> TrainLoader:
    """Make the infinite loader of augmented batches.

    Args:
        backend: "auto", "dali" or "resident"; `resolve_backend` says what auto takes.
        dataset: the training images, as `check_folder` gives them.
        recipe: the augmentation.
        batch_size: images of this rank a step.
        rank: this rank, from 0; the first shows a bar while images are decoded.
        device: where batches are made.
        threads: CPU threads.
        resident_limit_gb: the most that decoded images may take, in 10^9 bytes.
        prefetch: batches that DALI makes ahead.
        dtype: of the views.
        options: seed, world_size and start_step, as for `TrainLoader`.

    Raises:
        UserError: the backend is unknown, not installed or cannot be used with this set and
            recipe, and what `TrainLoader` raises.
    """
    backend = resolve_backend(backend, dataset, recipe, device, resident_limit_gb)
    common: dict[str, Any] = {"device": device, "threads": threads, "dtype": dtype}
    with _bad_images_remembered(dataset):
        renderer: Renderer = (
            ResidentRenderer(dataset, recipe, progress=rank == 0, **common)
            if backend == "resident"
            else _dali().DaliRenderer(
                dataset, recipe, batch_size=batch_size, prefetch=prefetch, **common
            )
        )
    return TrainLoader(dataset, recipe, renderer, batch_size=batch_size, rank=rank, **options)


def make_eval_loader(
    backend: str,
    dataset: ImageFolder,
    recipe: Recipe,
    indices: Sequence[int] | Ints,
    *,
    batch_size: int,
    device: torch.device,
    threads: int,
    resident_limit_gb: float = 8.0,
    progress: bool = True,
) -> EvalLoader:
    """Make the loader of clean images.

    Args:
        backend: "dali" or "resident"; resident gives way to DALI where the clean images take more
            than the limit.
        dataset: the images, as `check_folder` gives them.
        recipe: sizes and normalisation.
        indices: which images, in this order.
        batch_size: images a batch.
        device: where batches are made.
        threads: CPU threads.
        resident_limit_gb: as for `make_train_loader`.
        progress: show a bar on stderr while images are decoded.

    Raises:
        UserError: DALI is needed and not installed.
        ValueError: no index, or one outside the data set.
    """
    index_N = np.asarray(indices, dtype=np.int64)
    if not len(index_N) or index_N.min() < 0 or index_N.max() >= len(dataset):
        raise ValueError(
            f"indices need at least one number, each from 0 to {len(dataset) - 1}; "
            f"got {len(index_N)} of them"
        )
    fits = resident_gb(len(index_N), recipe.crop, recipe.crop) <= resident_limit_gb
    common: dict[str, Any] = {"device": device, "threads": threads}
    with _bad_images_remembered(dataset):
        renderer = (
            ResidentCleanRenderer(dataset, recipe, index_N, progress=progress, **common)
            if backend == "resident" and fits
            else _dali().DaliCleanRenderer(dataset, recipe, batch_size=batch_size, **common)
        )
    return EvalLoader(dataset, renderer, index_N, batch_size=batch_size)


def resolve_backend(
    asked: str, dataset: ImageFolder, recipe: Recipe, device: torch.device, limit_gb: float
) -> str:
    """Decide between DALI a batch and images that stay on the device.

    "auto" takes resident on a GPU where set and recipe allow it, and where DALI is not installed;
    else dali: on a CPU the resident backend runs the reference of its kernel, which is there to be
    right rather than fast. Images whose sizes are unknown (data.check=off) go to DALI.

    Args:
        asked: data.backend.
        dataset: the training images.
        recipe: the augmentation.
        device: where batches are made.
        limit_gb: data.resident_limit_gb.

    Returns:
        "dali" or "resident".

    Raises:
        UserError: no such backend, or resident is the only one or was asked for, and cannot be.
    """
    if asked not in BACKENDS:
        allowed = ", ".join(BACKENDS[:-1])
        raise UserError(f"data.backend is {asked!r}; allowed are {allowed} and {BACKENDS[-1]}")
    if asked == "dali":
        return "dali"
    if asked == "auto" and has_dali() and (device.type != "cuda" or dataset.sizes is None):
        return "dali"
    reason = why_not_resident(dataset, recipe, limit_gb)
    if reason is None:
        return "resident"
    if asked == "resident":
        raise UserError(f"data.backend 'resident' cannot be used: {reason}, or use 'dali'")
    if not has_dali():
        raise UserError(
            f"without NVIDIA DALI images are kept on the device, and {reason}, or {_GET}"
        )
    return "dali"


def why_not_resident(dataset: ImageFolder, recipe: Recipe, limit_gb: float) -> str | None:
    """Why a set cannot stay on the device, and what would help; None where it can."""
    views = (recipe.view1, recipe.view2)
    if any(view.has_affine for view in views):
        return (
            f"the {recipe.name!r} recipe rotates, moves, scales or shears images, which it does "
            f"not do; take a recipe without"
        )
    widest = max(view.blur_sigma[1] if view.blur_p > 0 else 0.0 for view in views)
    if math.ceil(BLUR_REACH * widest) >= recipe.crop:
        return (
            f"a blur of sigma {widest:g} reaches beyond a view of {recipe.crop} pixels; raise "
            f"data.crop"
        )
    sizes_N2 = read_sizes(dataset, range(len(dataset)))
    kinds = np.unique(sizes_N2, axis=0)
    if len(kinds) > 1:
        low, high = kinds[0], kinds[-1]
        return (
            f"it takes images of one size, and the {len(dataset):,} training images have "
            f"{len(kinds)} sizes, from {low[0]} x {low[1]} to {high[0]} x {high[1]} pixels; bring "
            f"them to one size on the disk"
        )
    needed = resident_gb(len(dataset), int(kinds[0, 0]), int(kinds[0, 1]))
    if needed > limit_gb:
        return (
            f"the {len(dataset):,} decoded images take {needed:.3g} GB and "
            f"data.resident_limit_gb is {limit_gb:g}; raise it if the device has the room"
        )
    return None


_GET = "install it with `pip install nvidia-dali-cuda130` (nvidia-dali-cuda120 for CUDA 12)"


def _dali() -> Any:
    """DALI's renderers, imported on first use."""
    if not has_dali():
        raise UserError(
            "NVIDIA DALI is not installed; data.backend=dali needs it, and so do images that do "
            f"not fit the device (Linux only): {_GET}"
        )
    from isofast.data import dali

    return dali


@contextlib.contextmanager
def _bad_images_remembered(dataset: ImageFolder) -> Iterator[None]:
    try:
        yield
    except UndecodableError as error:
        remember_bad(dataset, error.indices, "it could not be decoded in training")
        # only what was checked is remembered
        way_out = "data.on_bad_image=skip" if dataset.stamps is not None else "data.check=full"
        aside = ", or do without them: evaluation.every_epochs=0" * (dataset.split == "val")
        raise RunError(
            f"{error}. A run without a checkpoint can begin without them: replace or delete what "
            f"is named, or give {way_out}. One that has a checkpoint goes on with no other images "
            f"than its own: bring these back undamaged{aside}, or start over with --fresh"
        ) from error
