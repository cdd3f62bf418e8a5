"""Decoding and augmentation by DALI, on the CPU or the GPU: the only file that imports it.

DALI draws nothing here. The parameters of every image come from `isofast.data.draw` through an
external source, with the files' bytes; each is decoded once and made into both views in C++.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import Pipeline, fn, types
from nvidia.dali.plugin.pytorch import feed_ndarray
from torch.utils.dlpack import from_dlpack

from isofast.config import ViewConfig
from isofast.data.datasets import ImageFolder, read_files, remember_bad
from isofast.data.draw import Ints, ViewDraw, colour_matrices
from isofast.data.looks import REFUSED
from isofast.data.recipe import Recipe
from isofast.errors import RunError
from isofast_kernels.augment_reference import BLUR_REACH

Arrays = dict[str, npt.NDArray[Any]]
# DALI's graph nodes carry no types
Node = Any
Nodes = dict[str, Node]

# enough to make up for handing a task to a thread, few enough to share out a small batch
_FILES_A_TASK = 16
_SHOWN = 5

_CPU = torch.device("cpu")

CLEAN_ARGUMENTS = ("roi_start", "roi_end")

_DTYPES = {types.FLOAT: torch.float32, types.UINT8: torch.uint8}


class Stream:
    """A DALI pipeline that is fed batch by batch from Python.

    Args:
        dataset: where the images and labels are.
        source: gives the next batch's image numbers and arguments; StopIteration ends the stream
            until `restart`. It is called ahead of `pull`.
        graph: builds the outputs (HWC, float32 or uint8) from a decoded image and the named
            arguments.
        arguments: names of what the source gives beside the numbers.
        batch_size: the largest batch.
        device: where the images are made.
        threads: CPU threads.
        prefetch: batches made ahead.
        dtype: what float outputs are handed over in; integer ones stay as they are.
    """

    def __init__(
        self,
        dataset: ImageFolder,
        source: Callable[[], tuple[Ints, Arrays]],
        graph: Callable[[Node, Nodes], list[Node]],
        arguments: Sequence[str],
        *,
        batch_size: int,
        device: torch.device,
        threads: int,
        prefetch: int = 2,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._dataset = dataset
        self._source = source
        self._arguments = tuple(arguments)
        self._device = device
        self._dtype = dtype
        self._readers = ThreadPoolExecutor(threads, "isofast-read")
        self._fed: deque[Ints] = deque()
        self._started = False
        self._pipeline: Pipeline | None = _pipeline(batch_size, device, threads, prefetch)
        with self._pipeline:
            encoded, *values = fn.external_source(
                source=self._feed, num_outputs=1 + len(self._arguments), batch=True
            )
            image = _decoded(encoded, device)
            outputs = graph(image, dict(zip(self._arguments, values, strict=True)))
            self._pipeline.set_outputs(*outputs)
        self._pipeline.build()

    def pull(self) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Give the next batch: images (B, 3, H, W) channels_last, and labels (B,) int64.

        Raises:
            StopIteration: the source has ended.
            RunError: an image could not be read or decoded, or the stream is closed.
        """
        if self._pipeline is None:
            raise RunError("this data loader has been closed, or has failed; make a new one")
        cuda = self._device.type == "cuda"
        stream = torch.cuda.current_stream(self._device) if cuda else None
        self._started = True
        try:
            outputs = self._pipeline.run(stream)
        except RunError:
            self.close()
            raise
        except RuntimeError as error:
            fed = [int(index) for batch in self._fed for index in batch]
            # a DALI pipeline that has failed once is of no further use
            self.close()
            raise RunError(self._blame(fed, error)) from error
        images = [self._to_torch(output.as_tensor()).permute(0, 3, 1, 2) for output in outputs]
        labels = torch.from_numpy(self._dataset.labels[self._fed.popleft()])
        return images, labels.to(self._device)

    def restart(self) -> None:
        """Throw away what was made ahead; the source must raise StopIteration until this ends."""
        if self._pipeline is None or not self._started:
            return
        while True:
            try:
                self.pull()
            except StopIteration:
                break
        self._pipeline.reset()

    def close(self) -> None:
        """Free the pipeline's threads and memory."""
        self._pipeline = None
        self._readers.shutdown()
        self._fed.clear()

    def _feed(self) -> list[Any]:
        indices, values = self._source()
        pieces = [indices[k : k + _FILES_A_TASK] for k in range(0, len(indices), _FILES_A_TASK)]
        # One undecodable file makes DALI fail as a whole, or crashes the process with a worker
        # thread that goes on in freed memory. Files can change at any time, so DALI does not read
        # them: it gets bytes that are known to be those that were checked.
        files = self._readers.map(partial(read_files, self._dataset), pieces)
        encoded = [np.frombuffer(content, np.uint8) for piece in files for content in piece]
        self._fed.append(indices)
        return [encoded, *(np.ascontiguousarray(values[name]) for name in self._arguments)]

    def _blame(self, fed: list[int], error: RuntimeError) -> str:
        """Say which of the files that were fed DALI refuses, and have them remembered as bad."""
        fed = sorted(set(fed))
        decoder = SingleDecoder(self._device)
        refused = [k for k in fed if not decoder.decodes(read_files(self._dataset, [k])[0])]
        root = self._dataset.root
        # where not even one can be decoded, it is the device that fails
        if not refused or len(refused) == len(fed) > 1:
            return (
                f"DALI could not make a batch of images in {root}. It was given {len(fed)} that it "
                f"had not done with, and no single one of them is to blame: {error}"
            )
        remember_bad(self._dataset, dict.fromkeys(refused, REFUSED))
        shown = ", ".join(str(root / self._dataset.paths[index]) for index in refused[:_SHOWN])
        more = f", and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
        aside = ", or do without them: evaluation.every_epochs=0" * (self._dataset.split == "val")
        return (
            f"DALI cannot decode {len(refused)} of the {len(fed)} images that it was working on, "
            f"though they passed the check: {shown}{more}. A run without a checkpoint can begin "
            "without them: replace or delete what is named, or give data.on_bad_image=skip. One "
            "that has a checkpoint goes on with no other images than its own: bring these back "
            f"undamaged{aside}, or start over with --fresh"
        )

    def _to_torch(self, output: Any) -> torch.Tensor:
        if self._device.type == "cpu":
            made: torch.Tensor = from_dlpack(output)
        else:
            # DALI reuses freed GPU memory in the order of its own streams, not of torch's: copy
            made = torch.empty(output.shape(), dtype=_DTYPES[output.dtype], device=self._device)
            feed_ndarray(output, made, torch.cuda.current_stream(self._device))
        return made.to(self._dtype) if made.is_floating_point() else made


def _decoded(encoded: Node, device: torch.device) -> Node:
    return fn.decoders.image(
        encoded,
        device="mixed" if device.type == "cuda" else "cpu",
        output_type=types.RGB,
        # the orientation tag is ignored, as torchvision does: sizes are those of the file
        adjust_orientation=False,
    )


def _pipeline(batch_size: int, device: torch.device, threads: int, prefetch: int) -> Pipeline:
    cuda = device.type == "cuda"
    index = torch.cuda.current_device() if cuda and device.index is None else device.index
    return Pipeline(
        batch_size=batch_size,
        num_threads=threads,
        device_id=index if cuda else None,
        prefetch_queue_depth=prefetch,
        # outputs stay valid while referred to, and a mean found on the GPU can be an argument
        exec_dynamic=True,
    )


class SingleDecoder:
    """Tells of one file at a time whether DALI decodes it; for one thread.

    Never in batches: a file that is refused within one can crash the process.

    Args:
        device: where files are decoded.
    """

    def __init__(self, device: torch.device = _CPU) -> None:
        self._device = device
        self._pipeline: Pipeline | None = None

    def decodes(self, content: bytes) -> bool:
        """Say whether DALI makes an image of what a file holds."""
        try:
            if self._pipeline is None:
                self._pipeline = _pipeline(1, self._device, threads=1, prefetch=1)
                with self._pipeline:
                    encoded = fn.external_source(name="file", batch=True)
                    self._pipeline.set_outputs(_decoded(encoded, self._device))
                self._pipeline.build()
            self._pipeline.feed_input("file", [np.frombuffer(content, np.uint8)])
            self._pipeline.run()
        except RuntimeError:
            # of no further use
            self._pipeline = None
            return False
        return True


def view_arguments(recipe: Recipe) -> list[str]:
    """Name what the graph of both views needs; only operations that the recipe has take part."""
    return [f"{name}{v}" for v, row in _views(recipe) for name in _operands(row)]


def view_values(recipe: Recipe, drawn: Sequence[ViewDraw]) -> Arrays:
    """Give the arguments of both views as arrays, under the names of `view_arguments`."""
    values: Arrays = {}
    for (v, row), view in zip(_views(recipe), drawn, strict=True):
        everything = _operand_values(view)
        values |= {f"{name}{v}": everything[name] for name in _operands(row)}
    return values


def two_views(recipe: Recipe, image: Node, arguments: Nodes) -> list[Node]:
    """Build both views of a decoded image: HWC float32, normalised."""
    return [
        _view(recipe, row, image, {name: arguments[f"{name}{v}"] for name in _operands(row)})
        for v, row in _views(recipe)
    ]


def clean_view(recipe: Recipe, image: Node, arguments: Nodes) -> list[Node]:
    """Build the clean view of a decoded image: the middle of it, HWC float32, normalised."""
    return [_normalise(recipe, _resize(recipe, image, **arguments))]


def _views(recipe: Recipe) -> tuple[tuple[int, ViewConfig], ...]:
    return (1, recipe.view1), (2, recipe.view2)


def _operands(row: ViewConfig) -> list[str]:
    present = {
        "start": True,
        "shape": True,
        "affine": row.has_affine,
        "colour": row.has_colour,
        "colour_of_mean": row.has_colour,
        "blur_sigma": row.blur_p > 0,
        "blur_window": row.blur_p > 0,
        "solarize": row.solarize_p > 0,
        "flip": True,
    }
    return [name for name, wanted in present.items() if wanted]


def _operand_values(view: ViewDraw) -> Arrays:
    colour_N33, colour_of_mean_N33 = colour_matrices(view)
    blurred = view.blur_sigma_N > 0
    # a window of one pixel leaves the image as it is, whatever the sigma
    window_N = np.where(blurred, 2 * np.ceil(BLUR_REACH * view.blur_sigma_N) + 1, 1)
    return {
        "start": view.window_N4[:, :2],
        "shape": view.window_N4[:, 2:],
        "affine": view.affine_N23,
        "colour": colour_N33,
        "colour_of_mean": colour_of_mean_N33,
        "blur_sigma": np.where(blurred, view.blur_sigma_N, 1).astype(np.float32),
        "blur_window": window_N.astype(np.int32),
        "solarize": view.solarize_N.astype(np.uint8),
        "flip": view.flip_N.astype(np.int32),
    }


def _view(recipe: Recipe, row: ViewConfig, image: Node, args: Nodes) -> Node:
    # cut first: a resize of a region would look at pixels outside it
    image = fn.slice(image, start=args["start"], shape=args["shape"], axes=[0, 1])
    image = _resize(recipe, image)
    if row.has_affine:
        image = fn.warp_affine(image, matrix=args["affine"], fill_value=0)
    if row.has_colour:
        mean = fn.reductions.mean(image, axes=[0, 1], keep_dims=True)
        shift = fn.reshape(fn.coord_transform(mean, M=args["colour_of_mean"]), shape=[3])
        if image.device == "gpu":
            shift = shift.cpu()
        image = fn.coord_transform(image, M=args["colour"], T=shift, dtype=types.UINT8)
    if row.blur_p > 0:
        image = fn.gaussian_blur(image, sigma=args["blur_sigma"], window_size=args["blur_window"])
    if row.solarize_p > 0:
        chosen = args["solarize"].gpu() if image.device == "gpu" else args["solarize"]
        # x ^ 255 is 255 - x
        image = image ^ (
            (image >= row.solarize_threshold) * chosen * types.Constant(255, types.UINT8)
        )
    return _normalise(recipe, image, mirror=args["flip"])


def _resize(recipe: Recipe, image: Node, **region: Node) -> Node:
    return fn.resize(
        image,
        size=[recipe.crop, recipe.crop],
        interp_type=types.INTERP_CUBIC,
        antialias=True,
        **region,
    )


def _normalise(recipe: Recipe, image: Node, **mirror: Node) -> Node:
    return fn.crop_mirror_normalize(
        image,
        mean=[255 * value for value in recipe.mean],
        std=[255 * value for value in recipe.std],
        dtype=types.FLOAT,
        output_layout="HWC",
        **mirror,
    )
