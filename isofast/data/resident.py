"""Images that stay on the device: decoded once, both views of a batch made in one launch.

Order and randomness are those of the DALI loader (`isofast.data.order`, `isofast.data.draw`); what
is done to pixels is defined by `isofast_kernels.augment_reference`. It differs from DALI's in that
colour jitter takes its operations in the drawn order, one after the other, as torchvision does.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from isofast.config import ViewConfig
from isofast.data import dali
from isofast.data.backend import CHANNELS, resident_gb
from isofast.data.datasets import ImageFolder
from isofast.data.draw import Ints, ViewDraw, draw
from isofast.data.order import Batch, BatchOrder
from isofast.data.recipe import Recipe
from isofast.errors import RunError, UserError
from isofast_kernels import augment_views
from isofast_kernels.augment_reference import COLUMNS

_DECODED_AT_ONCE = 256
# numpy's calls cost little on so many, and their words still fit a cache
_DRAWN_AT_ONCE = 2048


class _Chunk(NamedTuple):
    """What T following batches are made of: (T, B), (T, V, B, P) and (T, B)."""

    index_TB: torch.Tensor
    parameters_TVBP: torch.Tensor
    label_TB: torch.Tensor

    def to(self, device: torch.device) -> "_Chunk":
        if device.type == "cpu":
            return self
        # torch keeps pinned memory from reuse until the copy has been made
        return _Chunk(*(x.pin_memory().to(device, non_blocking=True) for x in self))


class ResidentLoader:
    """An endless iterator over augmented batches of images that lie decoded on the device.

    It keeps what `TrainLoader` promises: every batch is a function of (seed, global step), so
    start_step=k goes on bit for bit where another loader was after k batches. Every rank holds the
    whole set. Files that change or vanish after the start do not matter any more.

    A thread draws the parameters of some batches ahead; making a batch is one launch on the
    current stream, and nothing waits for the device.

    Args:
        dataset: the training images, as `verify_images` has given them, all of one size.
        recipe: the augmentation, without affine maps.
        batch_size: images of this rank a step.
        rank: this rank, from 0; the first shows a bar while images are decoded.
        world_size: number of ranks.
        seed: of the order and of the augmentation.
        device: where the images lie. A CPU runs the reference of the kernel, which is slow.
        start_step: the global step of the first batch.
        threads: DALI's CPU threads while decoding.
        dtype: of the views.

    Attributes:
        steps_per_epoch, images_per_epoch, dropped_per_epoch: counted over all ranks.
        backend: "resident".

    Raises:
        UserError: fewer images than one global batch, or too little memory on the device.
        RunError: an image can no longer be read.
    """

    backend = "resident"

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
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if dataset.sizes is None:
            raise ValueError("ResidentLoader needs a data set that verify_images has given")
        self._recipe, self._seed, self._device, self._dtype = recipe, seed, device, dtype
        self._sizes, self._labels = dataset.sizes, dataset.labels
        self._blur = any(view.blur_p > 0 for view in (recipe.view1, recipe.view2))
        self._step = start_step
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
        self._chunk_steps = max(1, _DRAWN_AT_ONCE // batch_size)
        self._images: torch.Tensor | None = decode_all(
            dataset, device, threads=threads, progress=rank == 0
        )
        self._drawer = ThreadPoolExecutor(1, "isofast-draw")
        self._chunk: Iterator[tuple[torch.Tensor, ...]] = iter(())
        self._drawn_to = start_step
        self._next_chunk: Future[_Chunk] = self._draw_ahead()

    def __iter__(self) -> "ResidentLoader":
        """Give itself: there is one stream, and it has no end."""
        return self

    def __next__(self) -> Batch:
        """Give the next batch; its tensors stay valid for as long as they are kept."""
        if self._images is None:
            raise RunError("this data loader has been closed; make a new one")
        following = next(self._chunk, None)
        if following is None:
            chunk = self._next_chunk.result().to(self._device)
            self._next_chunk = self._draw_ahead()
            self._chunk = zip(*chunk, strict=True)
            following = next(self._chunk)
        index_B, parameters_VBP, y_B = following
        x1_BCHW, x2_BCHW = augment_views(
            self._images,
            index_B,
            parameters_VBP,
            side=self._recipe.crop,
            mean=self._recipe.mean,
            std=self._recipe.std,
            blur=self._blur,
            dtype=self._dtype,
        )
        self._step += 1
        return Batch(x1_BCHW, x2_BCHW, y_B)

    def state_dict(self) -> dict[str, int | str]:
        """Say where the stream is: "step" is the start_step that goes on from here."""
        return {"step": self._step, **self._identity}

    def describe(self) -> str:
        """Say in a line what makes the batches."""
        if self._images is None:
            return "closed"
        count, height, width, _ = self._images.shape
        size = resident_gb(count, height, width)
        return f"images resident on the device ({size:.2f} GB of {height} x {width} pixels)"

    def close(self) -> None:
        """Free the images; the loader is of no use afterwards."""
        self._drawer.shutdown(cancel_futures=True)
        self._images = None

    def _draw_ahead(self) -> Future[_Chunk]:
        first = self._drawn_to
        # an epoch's end ends a chunk: one call draws for one epoch
        left = self.steps_per_epoch - first % self.steps_per_epoch
        self._drawn_to += min(self._chunk_steps, left)
        return self._drawer.submit(self._draw, range(first, self._drawn_to))

    def _draw(self, steps: range) -> _Chunk:
        batches = [self._order.batch(step) for step in steps]
        epoch = batches[0][0]
        indices = np.concatenate([indices for _, indices in batches])
        drawn = [
            draw(self._recipe, v, self._sizes[indices], indices, seed=self._seed, epoch=epoch)
            for v in (1, 2)
        ]
        rows_VTBP = parameter_rows(self._recipe, drawn).reshape(
            len(drawn), len(steps), -1, len(COLUMNS)
        )
        return _Chunk(
            torch.from_numpy(indices).view(len(steps), -1),
            torch.from_numpy(np.ascontiguousarray(rows_VTBP.swapaxes(0, 1))),
            torch.from_numpy(self._labels[indices]).view(len(steps), -1),
        )


def parameter_rows(recipe: Recipe, drawn: Sequence[ViewDraw]) -> npt.NDArray[np.float32]:
    """Write the parameters of both views as the kernel's rows, (V, N, P) float32."""
    rows = (recipe.view1, recipe.view2)
    return np.stack([_rows(row, view) for row, view in zip(rows, drawn, strict=True)])


def _rows(row: ViewConfig, view: ViewDraw) -> npt.NDArray[np.float32]:
    columns: dict[str, npt.NDArray[np.generic]] = {
        **dict(zip(("top", "left", "height", "width"), view.window_N4.T, strict=True)),
        **dict(zip(("first", "second", "third", "fourth"), view.order_N4.T, strict=True)),
        "brightness": view.brightness_N,
        "contrast": view.contrast_N,
        "saturation": view.saturation_N,
        "hue": view.hue_N,
        "gray": view.gray_N,
        "blur_sigma": view.blur_sigma_N,
        "solarize_from": np.where(view.solarize_N, row.solarize_threshold, 256),
        "flip": view.flip_N,
    }
    return np.stack([columns[name] for name in COLUMNS], axis=1).astype(np.float32)


def decode_all(
    dataset: ImageFolder, device: torch.device, *, threads: int, progress: bool = True
) -> torch.Tensor:
    """Decode every image of a set once, by DALI.

    Args:
        dataset: images of one size, as `verify_images` has given them.
        device: where they are decoded and stay.
        threads: DALI's CPU threads.
        progress: show a bar on stderr.

    Returns:
        images_NHW3: uint8, RGB, in the data set's order.

    Raises:
        UserError: they do not fit the device's memory.
        RunError: a file is not the one that was checked.
    """
    assert dataset.sizes is not None
    height, width = (int(side) for side in dataset.sizes[0])
    shape = (len(dataset), height, width, CHANNELS)
    try:
        images_NHW3 = torch.empty(shape, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        # torch has an error of its own for a GPU's memory, none for a CPU's
        raise UserError(
            f"{resident_gb(*shape[:3]):.2f} GB for the {len(dataset):,} decoded images cannot be "
            f"had on {device}; use --set data.backend=dali"
        ) from error
    pieces = iter(_pieces(len(dataset)))
    stream = dali.Stream(
        dataset,
        lambda: (next(pieces), {}),
        lambda image, arguments: [image],
        (),
        batch_size=_DECODED_AT_ONCE,
        device=device,
        threads=threads,
    )
    bar = tqdm(
        desc="decoding train images",
        total=len(dataset),
        unit="image",
        # None: no bar where there is no terminal
        disable=None if progress else True,
    )
    done = 0
    with bar:
        while done < len(dataset):
            (x_BCHW,), _ = stream.pull()
            images_NHW3[done : done + len(x_BCHW)] = x_BCHW.permute(0, 2, 3, 1)
            done += len(x_BCHW)
            bar.update(len(x_BCHW))
    stream.close()
    return images_NHW3


def _pieces(images: int) -> list[Ints]:
    return np.split(np.arange(images), range(_DECODED_AT_ONCE, images, _DECODED_AT_ONCE))
