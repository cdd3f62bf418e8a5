"""Decoding and augmentation by DALI, on the CPU or the GPU: the only file that imports it.

DALI draws nothing here. The parameters of every image come from `isofast.data.draw` through an
external source, with the files' bytes; each is decoded once and made into both views in C++.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import Pipeline, fn, types
from nvidia.dali.plugin.pytorch import feed_ndarray
from torch.utils.dlpack import from_dlpack

from isofast.config.schema import ViewConfig
from isofast.data.batches import Batch, Chunk
from isofast.data.check import read_sizes
from isofast.data.draw import Ints, ViewDraw, clean_windows, colour_matrices
from isofast.data.folder import ImageFolder, UndecodableError, read_files
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

_DTYPES = {types.FLOAT: torch.float32, types.UINT8: torch.uint8}


class DaliPipeline:
    """A DALI pipeline that is fed batch by batch from Python.

    Args:
        dataset: where the images are.
        graph: builds the outputs (HWC, float32 or uint8) from a decoded image and the named
            arguments.
        arguments: names of what is fed beside the files.
        batch_size: the largest batch.
        device: where the images are made.
        threads: CPU threads.
        prefetch: batches made ahead.
        dtype: what float outputs are handed over in; integer ones stay as they are.
    """

    def __init__(
        self,
        dataset: ImageFolder,
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
        self._arguments = tuple(arguments)
        self._device = device
        self._dtype = dtype
        self._readers = ThreadPoolExecutor(threads, "isofast-read")
        self._source: Iterator[tuple[Ints, Arrays]] = iter(())
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

    def run(self, source: Iterable[tuple[Ints, Arrays]]) -> Iterator[list[torch.Tensor]]:
        """Yield the images (B, 3, H, W), channels_last, of each of the source's batches.

        Args:
            source: image numbers (B,) and arguments; read ahead.

        Raises:
            RunError: an image cannot be read, or the pipeline is closed.
            UndecodableError: DALI refuses images.
        """
        self._drain()
        self._source = iter(source)
        while (images := self._pull()) is not None:
            yield images

    def close(self) -> None:
        """Free the pipeline's threads and memory."""
        self._pipeline = None
        self._readers.shutdown()
        self._fed.clear()

    def _drain(self) -> None:
        """Throw away what was made ahead of an earlier source."""
        self._source = iter(())
        if self._pipeline is not None and self._started:
            while self._pull() is not None:
                pass

    def _pull(self) -> list[torch.Tensor] | None:
        """The next batch, or None at the source's end, after which another can begin."""
        if self._pipeline is None:
            raise RunError("this data loader has been closed, or has failed; make a new one")
        cuda = self._device.type == "cuda"
        stream = torch.cuda.current_stream(self._device) if cuda else None
        self._started = True
        try:
            outputs = self._pipeline.run(stream)
        except StopIteration:
            self._pipeline.reset()
            return None
        except RunError:
            self.close()
            raise
        except RuntimeError as error:
            fed = sorted({int(index) for batch in self._fed for index in batch})
            # a DALI pipeline that has failed once is of no further use
            self.close()
            raise self._blame(fed, error) from error
        self._fed.popleft()
        return [self._to_torch(output.as_tensor()).permute(0, 3, 1, 2) for output in outputs]

    def _feed(self) -> list[Any]:
        indices, values = next(self._source)
        pieces = [indices[k : k + _FILES_A_TASK] for k in range(0, len(indices), _FILES_A_TASK)]
        # One undecodable file makes DALI fail as a whole, or crashes the process with a worker
        # thread that goes on in freed memory. Files can change at any time, so DALI does not read
        # them: it gets bytes that are known to be those that were checked.
        files = self._readers.map(partial(read_files, self._dataset), pieces)
        encoded = [np.frombuffer(content, np.uint8) for piece in files for content in piece]
        self._fed.append(indices)
        return [encoded, *(np.ascontiguousarray(values[name]) for name in self._arguments)]

    def _blame(self, fed: list[int], error: RuntimeError) -> RunError:
        """Find which of the files that were fed DALI refuses."""
        decoder = SingleDecoder(self._device)
        refused = [k for k in fed if not decoder.decodes(read_files(self._dataset, [k])[0])]
        root = self._dataset.root
        # where not even one can be decoded, it is the device that fails
        if not refused or len(refused) == len(fed) > 1:
            return RunError(
                f"DALI could not make a batch of images in {root}. It was given {len(fed)} that it "
                f"had not done with, and no single one of them is to blame: {error}"
            )
        shown = ", ".join(str(root / self._dataset.paths[index]) for index in refused[:_SHOWN])
        more = f", and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
        return UndecodableError(
            f"DALI cannot decode {len(refused)} of the {len(fed)} images that it was working on: "
            f"{shown}{more}",
            refused,
        )

    def _to_torch(self, output: Any) -> torch.Tensor:
        if self._device.type == "cpu":
            made: torch.Tensor = from_dlpack(output)
        else:
            # DALI reuses freed GPU memory in the order of its own streams, not of torch's: copy
            made = torch.empty(output.shape(), dtype=_DTYPES[output.dtype], device=self._device)
            feed_ndarray(output, made, torch.cuda.current_stream(self._device))
        return made.to(self._dtype) if made.is_floating_point() else made


class DaliRenderer:
    """Makes both views of batches by DALI, from the files.

    Args:
        dataset: the training images.
        recipe: the augmentation.
        batch_size: images of this rank a step.
        device: where batches are made: DALI's GPU operators for a CUDA device.
        threads: DALI's CPU threads.
        prefetch: batches made ahead.
        dtype: of the views; DALI works in levels of 8 bits and in float32 until they are cast.
    """

    backend = "dali"

    def __init__(
        self,
        dataset: ImageFolder,
        recipe: Recipe,
        *,
        batch_size: int,
        device: torch.device,
        threads: int,
        prefetch: int = 2,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._recipe, self._device = recipe, device
        self._labels: deque[Ints] = deque()
        self._pipeline = DaliPipeline(
            dataset,
            partial(two_views, recipe),
            view_arguments(recipe),
            batch_size=batch_size,
            device=device,
            threads=threads,
            prefetch=prefetch,
            dtype=dtype,
        )

    def render(self, chunks: Iterator[Chunk]) -> Iterator[Batch]:
        """Yield the batches of the chunks, one by one."""
        for x1_BCHW, x2_BCHW in self._pipeline.run(self._arguments(chunks)):
            y_B = torch.from_numpy(self._labels.popleft()).to(self._device)
            yield Batch(x1_BCHW, x2_BCHW, y_B)

    def describe(self) -> str:
        """A line on what makes the batches."""
        where = "GPU" if self._device.type == "cuda" else "CPU"
        return f"images decoded and augmented by DALI on the {where}, batch by batch"

    def close(self) -> None:
        """Free DALI's threads and memory."""
        self._pipeline.close()

    def _arguments(self, chunks: Iterator[Chunk]) -> Iterator[tuple[Ints, Arrays]]:
        for chunk in chunks:
            size = chunk.index_TB.shape[1]
            for t, (index_B, label_B) in enumerate(zip(*chunk[:2], strict=True)):
                batch = slice(t * size, (t + 1) * size)
                self._labels.append(label_B)
                views = [chunk.view1[batch], chunk.view2[batch]]
                yield index_B, view_values(self._recipe, views)


class DaliCleanRenderer:
    """Makes clean images by DALI, from the files: see `isofast.data.loaders.EvalLoader`."""

    def __init__(
        self,
        dataset: ImageFolder,
        recipe: Recipe,
        *,
        batch_size: int,
        device: torch.device,
        threads: int,
    ) -> None:
        self._dataset, self._recipe = dataset, recipe
        self._pipeline = DaliPipeline(
            dataset,
            partial(clean_view, recipe),
            ("roi_start", "roi_end"),
            batch_size=batch_size,
            device=device,
            threads=threads,
        )

    def render(self, batches: Iterable[Ints]) -> Iterator[torch.Tensor]:
        """Yield (B, 3, crop, crop) float32, channels_last, for each batch of image numbers."""
        for (x_BCHW,) in self._pipeline.run(map(self._windows, batches)):
            yield x_BCHW

    def close(self) -> None:
        """Free DALI's threads and memory."""
        self._pipeline.close()

    def _windows(self, index_B: Ints) -> tuple[Ints, Arrays]:
        sizes_B2 = read_sizes(self._dataset, index_B)
        start_B2, end_B2 = clean_windows(self._recipe, sizes_B2)
        return index_B, {"roi_start": start_B2, "roi_end": end_B2}


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
    """Decodes one file at a time, to see whether DALI can; for one thread.

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
