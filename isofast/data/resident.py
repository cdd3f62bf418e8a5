"""Images resident on the device: decoded once; one kernel launch makes both views of a batch.

`isofast_kernels.augment_reference` defines the pixels. Unlike with DALI, colour jitter applies its
operations one by one in the drawn order, as torchvision does. Images are decoded with Pillow,
because torchvision.io crashes the process on a PNG with a wrong checksum (torchvision 0.29).
"""

import io
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from isofast.data.bar import Bar
from isofast.data.checked import undecodable
from isofast.data.draw import Chunk, Ints, ViewDraw
from isofast.data.folder import ImageFolder, read_files
from isofast.data.parallel import in_processes, in_threads
from isofast.data.recipe import Recipe
from isofast.errors import UserError
from isofast_kernels import augment_views
from isofast_kernels.augment_reference import COLUMNS

CHANNELS = 3
_COPIED_AT_ONCE = 64
# bytes; above, copying images between processes costs more than sharing the GIL
_LARGE = 1 << 17
# longer than this many times its width
_STRIP = 16


class ResidentRenderer:
    """Makes both views of each batch from decoded images on the device.

    A thread prepares one chunk ahead; a batch is one kernel launch on the current stream, without a
    host sync. A CPU runs the kernel's slow reference. All images must have one size, and the recipe
    no affine transforms.
    """

    def __init__(
        self,
        dataset: ImageFolder,
        recipe: Recipe,
        *,
        device: torch.device,
        threads: int,
        dtype: torch.dtype = torch.float32,
        progress: bool,
    ) -> None:
        self._labels = dataset.labels
        self._recipe, self._device, self._dtype = recipe, device, dtype
        self._blur = any(view.blur_p > 0 for view in (recipe.view1, recipe.view2))
        self._images = decode_images(
            dataset, np.arange(len(dataset)), device, threads=threads, progress=progress
        )
        self._ahead = ThreadPoolExecutor(1, "isofast-draw")

    def render(self, chunks: Iterator[Chunk]) -> Generator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield x_NCHW and y_B of each batch in the endless ``chunks``."""
        following = self._ahead.submit(self._next, chunks)
        while True:
            tensors = following.result()
            following = self._ahead.submit(self._next, chunks)
            if self._device.type == "cuda":
                # torch does not reuse pinned memory before the copy is done
                tensors = [x.pin_memory().to(self._device, non_blocking=True) for x in tensors]
            for index_B, parameters_VBP, y_B in zip(*tensors, strict=True):
                x_VBCHW = augment_views(
                    self._images,
                    index_B,
                    parameters_VBP,
                    side=self._recipe.crop,
                    mean=self._recipe.mean,
                    std=self._recipe.std,
                    blur=self._blur,
                    dtype=self._dtype,
                )
                yield x_VBCHW.flatten(0, 1), y_B

    def describe(self) -> str:
        """Return one line on how batches are made."""
        count, height, width, _ = self._images.shape
        size = resident_gb(count, height, width)
        return f"images resident on the device ({size:.2f} GB of {height} x {width} pixels)"

    def close(self) -> None:
        """Free the images."""
        self._ahead.shutdown(cancel_futures=True)
        self._images = torch.empty(0)

    def _next(self, chunks: Iterator[Chunk]) -> list[torch.Tensor]:
        """Return indices (T, B), parameters (T, V, B, P) and labels (T, B) of the next chunk."""
        index_TB, *views = next(chunks)
        rows_VNP = parameter_rows(self._recipe, views)
        rows_TVBP = rows_VNP.reshape(2, *index_TB.shape, len(COLUMNS)).swapaxes(0, 1)
        arrays = (index_TB, np.ascontiguousarray(rows_TVBP), self._labels[index_TB])
        return [torch.from_numpy(array) for array in arrays]


def clean_image(recipe: Recipe, image_HW3: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return the clean view of an image, (crop, crop, 3), not normalised."""
    height, width = image_HW3.shape[:2]
    # only the middle of a strip: one that is a pixel high would be enlarged to gigabytes
    top, left = (max(0, (side - _STRIP * min(height, width)) // 2) for side in (height, width))
    image_HW3 = image_HW3[top : height - top, left : width - left]
    image_3HW = torch.from_numpy(image_HW3).permute(2, 0, 1)
    bicubic = functional.InterpolationMode.BICUBIC
    resized = functional.resize(image_3HW, [recipe.resize_short], bicubic, antialias=True)
    cropped_3HW: torch.Tensor = functional.center_crop(resized, [recipe.crop])
    return cropped_3HW.permute(1, 2, 0).numpy()


def normalised(recipe: Recipe, images_B3HW: torch.Tensor) -> torch.Tensor:
    """Return uint8 images as network input, (B, 3, H, W) float32, channels_last."""
    x_BCHW = functional.to_dtype(images_B3HW, torch.float32, scale=True)
    x_BCHW = functional.normalize(x_BCHW, list(recipe.mean), list(recipe.std), inplace=True)
    made: torch.Tensor = x_BCHW.contiguous(memory_format=torch.channels_last)
    return made


def resident_gb(images: int, height: int, width: int) -> float:
    """Return the size of decoded images in 10^9 bytes."""
    return images * height * width * CHANNELS / 1e9


def parameter_rows(recipe: Recipe, drawn: Sequence[ViewDraw]) -> npt.NDArray[np.float32]:
    """Return the parameters of both views as the kernel's rows, (V, N, P) float32."""
    rows = []
    for row, view in zip((recipe.view1, recipe.view2), drawn, strict=True):
        solarize_from_N = np.where(view.solarize_N, row.solarize_threshold, 256)
        # in the order of COLUMNS
        columns = (
            view.window_N4,
            *(view.brightness_N, view.contrast_N, view.saturation_N, view.hue_N),
            view.order_N4,
            *(view.gray_N, view.blur_sigma_N, solarize_from_N, view.flip_N),
        )
        rows.append(np.column_stack(columns))
    return np.stack(rows).astype(np.float32)


def decode_images(
    dataset: ImageFolder,
    indices: Ints,
    device: torch.device,
    *,
    threads: int,
    progress: bool,
    transform: Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.uint8]] | None = None,
) -> torch.Tensor:
    """Decode images once, with Pillow.

    Args:
        device: device of the result.
        threads: number of decoding threads, or processes for small images.
        progress: show a bar on stderr.
        transform: applied to each (H, W, 3) image; all results must have one size.

    Returns:
        images_NHW3: uint8, RGB, in the order of ``indices``.

    Raises:
        UserError: they do not fit in the device's memory.
        RunError: a file has changed since it was checked, Pillow refuses it, or a decoding process
            was killed.
    """

    def decode(index: int) -> npt.NDArray[np.uint8] | str:
        (content,) = read_files(dataset, [index])
        try:
            with Image.open(io.BytesIO(content)) as image:
                image_HW3 = rgb(image)
        except Exception as error:
            return f"Pillow cannot decode {dataset.where(index)} ({error})"
        return image_HW3 if transform is None else transform(image_HW3)

    def good(index: int, image: npt.NDArray[np.uint8] | str) -> npt.NDArray[np.uint8]:
        if isinstance(image, str):
            raise undecodable(dataset, [index], image)
        return image

    index_N = indices.tolist()
    first = good(index_N[0], decode(index_N[0]))
    shape = (len(index_N), *first.shape)
    try:
        images_NHW3 = torch.empty(shape, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        # torch raises OutOfMemoryError for GPUs only
        raise UserError(
            f"cannot allocate {resident_gb(*shape[:3]):.2f} GB for {len(indices):,} decoded images "
            f"on {device}; use --set data.backend=dali"
        ) from error
    spread = in_threads if first.nbytes > _LARGE else in_processes
    with (
        closing(spread(decode, index_N, threads)) as decoded,
        Bar(
            desc=f"decoding {dataset.split} images",
            total=len(indices),
            unit="image",
            disable=not progress,
        ) as bar,
    ):
        images = map(good, index_N, decoded)
        for start in range(0, len(index_N), _COPIED_AT_ONCE):
            piece = [*islice(images, _COPIED_AT_ONCE)]
            images_NHW3[start : start + len(piece)] = torch.from_numpy(np.stack(piece))
            bar.update(len(piece))
    return images_NHW3


def rgb(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Return an image's RGB pixels, (H, W, 3) uint8, on white where it is transparent.

    Raises:
        ValueError: the pixels are 32-bit or floating-point numbers.
    """
    if image.mode in ("I", "F"):
        raise ValueError("32-bit or float pixels have no standard range; save as 8 or 16 bits")
    # Pillow clips 16-bit gray instead of scaling it
    if image.mode.startswith("I"):
        gray = np.rint(np.asarray(image) / 257).astype(np.uint8)
        return np.repeat(gray[:, :, None], CHANNELS, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def for_dali(content: bytes) -> bytes:
    """Return a file's content as DALI takes it: a JPEG or an opaque PNG as it is, others as BMP.

    Nothing is returned for a file of another format that Pillow refuses.
    """
    if content.startswith(b"\xff\xd8"):
        return content
    is_png = content.startswith(b"\x89PNG")
    if is_png:
        head = content[: content.find(b"IDAT")]
        # neither gray or RGB with alpha, nor transparent colours
        if head[25:26] not in (b"\4", b"\6") and b"tRNS" not in head:
            return content
    file = io.BytesIO()
    try:
        with Image.open(io.BytesIO(content)) as image:
            # the cheapest to encode and decode
            Image.fromarray(rgb(image)).save(file, "BMP")
    except Exception:
        return content if is_png else b""
    return file.getvalue()
