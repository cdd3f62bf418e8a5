"""Decoding and augmentation with DALI, on CPU or GPU; the only module that imports it.

DALI draws no random numbers: parameters from `isofast.data.draw` and the files' bytes enter through
an external source. Each file is decoded once, and both views are made from it in C++.
"""

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import Pipeline, fn, types
from nvidia.dali.plugin.pytorch import feed_ndarray

from isofast.config.schema import ViewConfig
from isofast.data.checked import undecodable
from isofast.data.draw import Chunk, Ints, ViewDraw, clean_windows, colour_matrices, draw
from isofast.data.folder import ImageFolder, read_files, read_sizes, some_of
from isofast.data.recipe import Recipe
from isofast.data.resident import for_dali
from isofast.errors import RunError

# image indices of a batch, and the arrays fed alongside the files
Fed = tuple[Ints, list[npt.NDArray[Any]]]
# DALI's graph nodes are untyped
Node = Any

# enough to outweigh a task's overhead, few enough to split a small batch among threads
_FILES_A_TASK = 16
_CPU = torch.device("cpu")


class DaliPipeline:
    """A DALI pipeline fed from Python, batch by batch.

    Args:
        graph: builds the outputs (HWC, float32) from a decoded image and the fed arrays.
        fed: number of arrays fed alongside the files.
        batch_size: largest batch.
        device: device of the images.
        prefetch: batches prepared ahead.
        dtype: dtype of the images.
    """

    def __init__(
        self,
        dataset: ImageFolder,
        graph: Callable[[Node, list[Node]], list[Node]],
        fed: int,
        *,
        batch_size: int,
        device: torch.device,
        threads: int,
        prefetch: int = 2,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._dataset, self._device, self._dtype = dataset, device, dtype
        self._readers = ThreadPoolExecutor(threads, "isofast-read")
        self._source: Iterator[Fed] = iter(())
        self._in_progress: deque[Ints] = deque()
        self._pipeline = _pipeline(batch_size, device, threads, prefetch)
        with self._pipeline:
            encoded, *arrays = fn.external_source(
                source=self._feed, num_outputs=1 + fed, batch=True
            )
            self._pipeline.set_outputs(*graph(_decoded(encoded, device), arrays))
        self._pipeline.build()

    def run(self, source: Iterable[Fed]) -> Iterator[tuple[Ints, torch.Tensor]]:
        """Yield each batch's image indices and its V outputs, concatenated.

        The outputs are (V * B, 3, H, W), contiguous as channels_last. ``source`` is read ahead.

        Raises:
            RunError: an image cannot be read or decoded.
        """
        # discard batches prefetched for an earlier source
        self._source = iter(())
        while self._pull() is not None:
            pass
        self._source = iter(source)
        yield from iter(self._pull, None)

    def close(self) -> None:
        """Free the pipeline's threads and memory."""
        self._pipeline = None
        self._readers.shutdown()

    def _pull(self) -> tuple[Ints, torch.Tensor] | None:
        """Return the next batch; None at the end of the source, after which another can start."""
        cuda = self._device.type == "cuda"
        stream = torch.cuda.current_stream(self._device) if cuda else None
        try:
            outputs = self._pipeline.run(stream)
        except StopIteration:
            self._pipeline.reset()
            return None
        except RuntimeError as error:
            # DALI pipelines do not recover from a failure
            self.close()
            # no file is to blame for running out of memory
            if isinstance(error, RunError) or "alloc" in str(error):
                raise
            raise self._blame(error) from error
        tensors = [output.as_tensor() for output in outputs]
        # copy: DALI reuses freed GPU memory in the order of its own streams, not torch's
        made = torch.empty((len(tensors), *tensors[0].shape()), device=self._device)
        for x_BHWC, tensor in zip(made, tensors, strict=True):
            feed_ndarray(tensor, x_BHWC, stream)
        images = made.flatten(0, 1).permute(0, 3, 1, 2).to(self._dtype)
        return self._in_progress.popleft(), images

    def _feed(self) -> list[Any]:
        indices, arrays = next(self._source)
        pieces = [indices[k : k + _FILES_A_TASK] for k in range(0, len(indices), _FILES_A_TASK)]
        # feed DALI the bytes that were checked: files can change, and an undecodable one fails
        # its whole batch or crashes the process
        files = self._readers.map(self._read, pieces)
        contents = [content for piece in files for content in piece]
        if bad := [int(k) for k, c in zip(indices, contents, strict=True) if _refused(c)]:
            raise self._undecodable(bad, len(indices))
        self._in_progress.append(indices)
        encoded = [np.frombuffer(content, np.uint8) for content in contents]
        return [encoded, *map(np.ascontiguousarray, arrays)]

    def _read(self, indices: Iterable[int]) -> list[bytes]:
        return [for_dali(content) for content in read_files(self._dataset, indices)]

    def _blame(self, error: RuntimeError) -> RunError:
        """Find the files in progress that DALI refuses."""
        fed = sorted({int(index) for batch in self._in_progress for index in batch})
        decoder = SingleDecoder(self._device)
        refused = [k for k in fed if not decoder.decodes(self._read([k])[0])]
        # if it decodes none of them, the device is at fault
        if not refused or len(refused) == len(fed) > 1:
            return RunError(
                f"DALI could not make a batch of images in {self._dataset.root}; no single one of "
                f"the {len(fed)} in progress is to blame: {error}"
            )
        return self._undecodable(refused, len(fed))

    def _undecodable(self, refused: list[int], fed: int) -> RunError:
        names = some_of([self._dataset.where(index) for index in refused])
        message = f"DALI cannot decode {len(refused)} of the {fed} images in progress: {names}"
        return undecodable(self._dataset, refused, message)


class DaliRenderer(DaliPipeline):
    """Makes both views of each batch; options are those of `DaliPipeline`."""

    def __init__(self, dataset: ImageFolder, recipe: Recipe, **options: Any) -> None:
        self._rows = (recipe.view1, recipe.view2)
        none = np.empty(0, np.int64)
        nothing = draw(recipe, 1, none.reshape(0, 2), none, seed=0, epoch=0)
        names = [[*_operands(row, nothing)] for row in self._rows]
        graph = partial(_two_views, recipe, names)
        super().__init__(dataset, graph, sum(map(len, names)), **options)

    def render(self, chunks: Iterator[Chunk]) -> Generator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield x_NCHW and y_B of each batch in ``chunks``, which are read ahead."""
        for index_B, x_NCHW in self.run(self._fed(chunks)):
            y_B = torch.from_numpy(self._dataset.labels[index_B])
            if self._device.type == "cuda":
                y_B = y_B.pin_memory().to(self._device, non_blocking=True)
            yield x_NCHW, y_B

    def describe(self) -> str:
        """Return one line on how batches are made."""
        where = "GPU" if self._device.type == "cuda" else "CPU"
        return f"images decoded and augmented by DALI on the {where}, batch by batch"

    def _fed(self, chunks: Iterator[Chunk]) -> Iterator[Fed]:
        for index_TB, *views in chunks:
            for t, index_B in enumerate(index_TB):
                batch = slice(t * len(index_B), (t + 1) * len(index_B))
                pairs = zip(self._rows, views, strict=True)
                fed = [_operands(row, view[batch]).values() for row, view in pairs]
                yield index_B, [*itertools.chain(*fed)]


class DaliCleanRenderer(DaliPipeline):
    """Makes clean images; options are those of `DaliPipeline`."""

    def __init__(self, dataset: ImageFolder, recipe: Recipe, **options: Any) -> None:
        self._recipe = recipe
        super().__init__(dataset, partial(_clean_view, recipe), 2, **options)

    def render(self, batches: Iterable[Ints]) -> Iterator[torch.Tensor]:
        """Yield (B, 3, crop, crop) float32, channels_last, for each batch of image indices."""
        for _, x_BCHW in self.run(map(self._windows, batches)):
            yield x_BCHW

    def _windows(self, index_B: Ints) -> Fed:
        return index_B, [*clean_windows(self._recipe, read_sizes(self._dataset, index_B))]


class SingleDecoder:
    """Tests files one at a time; not for use by several threads.

    Within a larger batch, a file that DALI refuses can crash the process.
    """

    def __init__(self, device: torch.device = _CPU) -> None:
        self._device = device
        self._pipeline: Pipeline | None = None

    def decodes(self, content: bytes) -> bool:
        """Whether DALI decodes a file's content."""
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
            # DALI pipelines do not recover from a failure
            self._pipeline = None
            return False
        return True


def _refused(content: bytes) -> bool:
    """Whether a file is empty, or a PNG without its end, which often crashes DALI."""
    return not content or (content.startswith(b"\x89PNG") and b"IEND" not in content)


def _decoded(encoded: Node, device: torch.device) -> Node:
    return fn.decoders.image(
        encoded,
        device="mixed" if device.type == "cuda" else "cpu",
        output_type=types.RGB,
        # ignore the orientation tag, as torchvision does: sizes are those of the file
        adjust_orientation=False,
        # upsample chroma as on the CPU; the GPU decoder's default differs
        jpeg_fancy_upsampling=True,
    )


def _pipeline(batch_size: int, device: torch.device, threads: int, prefetch: int) -> Pipeline:
    cuda = device.type == "cuda"
    index = torch.cuda.current_device() if cuda and device.index is None else device.index
    return Pipeline(
        batch_size=batch_size,
        num_threads=threads,
        device_id=index if cuda else None,
        prefetch_queue_depth=prefetch,
        # outputs stay valid while referenced, and a mean computed on the GPU can be an argument
        exec_dynamic=True,
    )


def _two_views(recipe: Recipe, names: list[list[str]], image: Node, fed: list[Node]) -> list[Node]:
    given = iter(fed)
    return [
        _view(recipe, row, image, {name: next(given) for name in of_row})
        for row, of_row in zip((recipe.view1, recipe.view2), names, strict=True)
    ]


def _clean_view(recipe: Recipe, image: Node, fed: list[Node]) -> list[Node]:
    return [_normalise(recipe, _resize(recipe, image, roi_start=fed[0], roi_end=fed[1]))]


def _operands(row: ViewConfig, view: ViewDraw) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays fed to the graph of a view."""
    fed: dict[str, npt.NDArray[Any]] = {
        "start": view.window_N4[:, :2],
        "shape": view.window_N4[:, 2:],
        "flip": view.flip_N.astype(np.int32),
    }
    if row.has_affine:
        fed["affine"] = view.affine_N23
    if row.has_colour:
        fed["colour"], fed["colour_of_mean"] = colour_matrices(view)
    if row.blur_p > 0:
        # DALI refuses 0; for this sigma all weights but the middle one are 0
        fed["sigma"] = np.where(view.blur_sigma_N > 0, view.blur_sigma_N, np.float32(1e-3))
    if row.solarize_p > 0:
        fed["solarize"] = view.solarize_N.astype(np.uint8)
    return fed


def _view(recipe: Recipe, row: ViewConfig, image: Node, args: dict[str, Node]) -> Node:
    # crop first: resizing a region would read pixels outside it
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
        # over three sigma to each side, as for resident views
        image = fn.gaussian_blur(image, sigma=args["sigma"])
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
