"""Loaders for training and evaluation, and the choice of their backend."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from isofast.data.check import has_dali
from isofast.data.draw import Chunk, Ints, draw, epoch_order
from isofast.data.folder import ImageFolder, read_sizes
from isofast.data.recipe import Recipe
from isofast.data.resident import (
    ResidentRenderer,
    clean_image,
    decode_images,
    normalised,
    resident_gb,
)
from isofast.errors import RunError, UserError
from isofast_kernels.augment_reference import BLUR_REACH

if TYPE_CHECKING:
    from isofast.data.dali import DaliRenderer

_GET_DALI = "install it with `pip install nvidia-dali-cuda130` (nvidia-dali-cuda120 for CUDA 12)"
# enough to amortise numpy's cost per call, while the words still fit in cache
_DRAWN_AT_ONCE = 2048


class Batch(NamedTuple):
    """Two augmented views of B images, on the device.

    x_NCHW: the first views, then the second views (N = 2B): normalised, contiguous as
        channels_last, in the loader's dtype.
    y_B: int64 labels.
    """

    x_NCHW: torch.Tensor
    y_B: torch.Tensor

    @property
    def x1_BCHW(self) -> torch.Tensor:
        """The first views."""
        return self.x_NCHW.chunk(2)[0]

    @property
    def x2_BCHW(self) -> torch.Tensor:
        """The second views."""
        return self.x_NCHW.chunk(2)[1]


class TrainLoader:
    """An infinite iterator over augmented `Batch`es.

    Every batch is a function of (seed, global step): a loader with start_step=k continues bit for
    bit where another one stopped after k batches. Global batch k of an epoch is the k-th chunk of
    the epoch's permutation, split over the ranks. Images that do not fill a last global batch are
    dropped, different ones each epoch.

    Args:
        backend: "auto", "dali" or "resident", as for `resolve_backend`.
        dataset: the training images, from `check_folder`.
        recipe: the augmentation.
        batch_size: images per step on this rank.
        rank, world_size: this rank, from 0, and the number of ranks.
        start_step: global step of the first batch, from 0.
        device: where batches are made.
        resident_limit_gb: memory limit for decoded images, in 10^9 bytes.
        prefetch: batches that DALI prepares ahead.
        dtype: dtype of the views.

    Attributes:
        steps_per_epoch, dropped_per_epoch: global steps, and images dropped over all ranks.
        backend: "dali" or "resident".

    Raises:
        UserError: the backend is not installed or cannot handle the data set and recipe, or there
            are fewer images than one global batch.
        RunError: an image can no longer be read.
    """

    def __init__(
        self,
        backend: str,
        dataset: ImageFolder,
        recipe: Recipe,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int,
        start_step: int = 0,
        device: torch.device,
        threads: int,
        resident_limit_gb: float = 8.0,
        prefetch: int = 2,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        global_batch = batch_size * world_size
        if len(dataset) < global_batch:
            raise UserError(
                f"the training set has {len(dataset)} images, fewer than one global batch of "
                f"{global_batch}; lower train.batch_size or add images"
            )
        self._dataset, self._recipe, self._seed = dataset, recipe, seed
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self.steps_per_epoch, self.dropped_per_epoch = divmod(len(dataset), global_batch)
        self.backend = resolve_backend(backend, dataset, recipe, device, resident_limit_gb)
        options: dict[str, Any] = {"device": device, "threads": threads, "dtype": dtype}
        self._renderer: ResidentRenderer | DaliRenderer
        if self.backend == "resident":
            self._renderer = ResidentRenderer(dataset, recipe, progress=rank == 0, **options)
        else:
            options |= {"batch_size": batch_size, "prefetch": prefetch}
            self._renderer = _dali().DaliRenderer(dataset, recipe, **options)
        self._batches = self._renderer.render(self._chunks(start_step))

    def __iter__(self) -> "TrainLoader":
        """Return self; the loader is infinite."""
        return self

    def __next__(self) -> Batch:
        """Return the next batch; its tensors stay valid as long as they are referenced.

        Raises:
            RunError: an image can no longer be read, or the loader is closed.
        """
        made = next(self._batches, None)
        if made is None:
            raise RunError("this data loader has been closed, or has failed; make a new one")
        return Batch(*made)

    def describe(self) -> str:
        """Return one line on how batches are made."""
        return self._renderer.describe()

    def close(self) -> None:
        """Free threads and memory; the loader cannot be used afterwards."""
        self._batches.close()
        self._renderer.close()

    def _chunks(self, step: int) -> Iterator[Chunk]:
        # the sizes of unchecked images are read one batch at a time
        drawn = _DRAWN_AT_ONCE if self._dataset.sizes is not None else 1
        steps = max(1, drawn // self._batch_size)
        epoch, first = divmod(step, self.steps_per_epoch)
        while True:
            order = epoch_order(len(self._dataset), seed=self._seed, epoch=epoch)
            used = order[: len(order) - self.dropped_per_epoch]
            index_KB = used.reshape(-1, self._world_size, self._batch_size)[:, self._rank]
            for k in range(first, self.steps_per_epoch, steps):
                index_TB = index_KB[k : k + steps]
                index_N = index_TB.reshape(-1)
                sizes_N2 = read_sizes(self._dataset, index_N)
                view1, view2 = (
                    draw(self._recipe, v, sizes_N2, index_N, seed=self._seed, epoch=epoch)
                    for v in (1, 2)
                )
                yield index_TB, view1, view2
            epoch, first = epoch + 1, 0


class EvalLoader:
    """Clean images in a given order: `for x_BCHW, y_B in loader`.

    The short side is resized to recipe.resize_short, then the centre is cropped to recipe.crop. The
    last batch may be short. Iterating again starts over, even after a `break`.

    Args:
        backend: "dali" or "resident"; DALI replaces resident if clean images exceed the limit.
        dataset: the images, from `check_folder`.
        recipe: sizes and normalisation.
        indices: the images to load, in order; at least one.
        device: where batches are made.
        resident_limit_gb: as for `TrainLoader`.
        progress: show a bar on stderr while images are decoded.

    Raises:
        UserError: DALI is needed but not installed.
        RunError: an image can no longer be read.
    """

    def __init__(
        self,
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
    ) -> None:
        index_N = np.asarray(indices, dtype=np.int64)
        fits = resident_gb(len(index_N), recipe.crop, recipe.crop) <= resident_limit_gb
        self._dataset = dataset
        self._batches = [index_N[k : k + batch_size] for k in range(0, len(index_N), batch_size)]
        self._images: Callable[[], Iterator[torch.Tensor]]
        if backend == "resident" and fits:
            clean = partial(clean_image, recipe)
            images_NHW3 = decode_images(
                dataset, index_N, device, threads=threads, progress=progress, transform=clean
            )
            pieces = torch.split(images_NHW3.permute(0, 3, 1, 2), batch_size)
            self._images = lambda: (normalised(recipe, piece) for piece in pieces)
        else:
            renderer = _dali().DaliCleanRenderer(
                dataset, recipe, batch_size=batch_size, device=device, threads=threads
            )
            self._images = lambda: renderer.render(self._batches)

    def __len__(self) -> int:
        """Number of batches, including the short one."""
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (x_BCHW float32 channels_last, y_B int64) from the first index on.

        Raises:
            RunError: an image can no longer be read.
        """
        for index_B, x_BCHW in zip(self._batches, self._images(), strict=True):
            yield x_BCHW, torch.from_numpy(self._dataset.labels[index_B]).to(x_BCHW.device)


def draw_views(
    backend: str,
    dataset: ImageFolder,
    recipe: Recipe,
    draws: int,
    *,
    device: torch.device,
    threads: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield both views (x1_NCHW, x2_NCHW) of all images in order, ``draws`` times, all different.

    Other arguments and errors are those of `TrainLoader`.
    """
    # labelled by index, because every epoch has a different order
    numbered = replace(dataset, labels=np.arange(len(dataset)))
    options: dict[str, Any] = {"batch_size": len(dataset), "device": device, "threads": threads}
    with contextlib.closing(TrainLoader(backend, numbered, recipe, seed=0, **options)) as loader:
        for batch in itertools.islice(loader, draws):
            place_N = batch.y_B.argsort()
            yield batch.x1_BCHW[place_N], batch.x2_BCHW[place_N]


def resolve_backend(
    asked: str, dataset: ImageFolder, recipe: Recipe, device: torch.device, limit_gb: float
) -> str:
    """Choose between decoding batch by batch with DALI, and images resident on the device.

    "auto" is resident on a GPU if the data set and recipe allow it, and without DALI; else DALI,
    because on a CPU resident runs its kernel's slow reference. Images of unknown size
    (data.check=off) use DALI.

    Args:
        asked: "auto", "dali" or "resident", as data.backend.
        limit_gb: data.resident_limit_gb.

    Returns:
        "dali" or "resident".

    Raises:
        UserError: resident is requested or the only choice, but cannot be used.
    """
    better = has_dali() and (device.type != "cuda" or dataset.sizes is None)
    if asked == "dali" or (asked == "auto" and better):
        return "dali"
    reason = _why_not_resident(dataset, recipe, limit_gb)
    if reason is None:
        return "resident"
    if asked == "resident":
        raise UserError(f"data.backend 'resident' cannot be used: {reason}, or use 'dali'")
    if not has_dali():
        raise UserError(
            f"without NVIDIA DALI images must stay on the device: {reason}, or {_GET_DALI}"
        )
    return "dali"


def _why_not_resident(dataset: ImageFolder, recipe: Recipe, limit_gb: float) -> str | None:
    """Return why images cannot stay on the device, and what to do; None if they can."""
    views = (recipe.view1, recipe.view2)
    if any(view.has_affine for view in views):
        return (
            f"the {recipe.name!r} recipe rotates, shifts, scales or shears images, which is not "
            "supported; use a recipe that does not"
        )
    widest = max(view.blur_sigma[1] if view.blur_p > 0 else 0.0 for view in views)
    if math.ceil(BLUR_REACH * widest) >= recipe.crop:
        return (
            f"a blur of sigma {widest:g} reaches beyond a view of {recipe.crop} pixels; raise "
            "data.crop"
        )
    kinds = np.unique(read_sizes(dataset, range(len(dataset))), axis=0)
    if len(kinds) > 1:
        low, high = kinds[0], kinds[-1]
        return (
            f"images must have one size, but the {len(dataset):,} {dataset.split} images have "
            f"{len(kinds)} sizes, from {low[0]} x {low[1]} to {high[0]} x {high[1]} pixels; resize "
            "the files to one size"
        )
    needed = resident_gb(len(dataset), int(kinds[0, 0]), int(kinds[0, 1]))
    if needed > limit_gb:
        return (
            f"the {len(dataset):,} decoded images take {needed:.3g} GB, but "
            f"data.resident_limit_gb is {limit_gb:g}; raise it if the device has room"
        )
    return None


def _dali() -> Any:
    """Return DALI's renderers, imported on first use."""
    if not has_dali():
        raise UserError(
            "NVIDIA DALI is not installed, but is needed for data.backend=dali and for images "
            f"that do not fit on the device (Linux only): {_GET_DALI}"
        )
    from isofast.data import dali

    return dali
