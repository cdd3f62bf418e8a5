"""Write embeddings of a folder of images to a file."""

import csv
import io
import os
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import nn

from isofast.data import Recipe
from isofast.data.bar import Bar
from isofast.data.files import check_output, write_atomically
from isofast.data.folder import walk
from isofast.data.parallel import in_processes
from isofast.data.resident import clean_image, normalised, rgb
from isofast.data.shards import PICTURES, open_member, read_index
from isofast.distributed import usable_cores
from isofast.errors import UserError
from isofast.evaluation.encoders import read_encoder, torch_bytes

Pixels = npt.NDArray[np.uint8]
Features = npt.NDArray[np.float32]
_Batch = tuple[list[Features], dict[str, str]]

_SUFFIXES = (".npz", ".csv", ".pt")
_BATCH = 128
# pixels per batch on a CPU, where each core takes its own batches
_PIXELS = 1 << 19


@dataclass(frozen=True)
class Embedded:
    """Summary of what `embed` wrote."""

    output: str
    encoder: str
    images: int
    features: int
    skipped: dict[str, str]
    """Unreadable files and the reason for each."""
    images_per_s: float


def embed(source: Path, folder: Path, output: Path) -> Embedded:
    """Write the features of all images below ``folder``, ordered by relative path.

    Images are resized and cropped as in evaluation, and the network runs in fp32.

    Args:
        source: a run or a file, as for `load_encoder`.
        folder: searched recursively, except for hidden files and folders.
        output: .npz, or .pt for `torch.load`, with ``embeddings`` (N, F) float32 and ``filenames``
            (N,) relative to ``folder``; or .csv with the file name and one column per feature.

    Raises:
        UserError: there is no encoder or no readable image, or ``output`` cannot be written.
        RunError: a decoding process was killed.
    """
    if output.suffix not in _SUFFIXES:
        raise UserError(f"--output {output} must be named {', '.join(_SUFFIXES)}")
    check_output(output)
    module, config, recipe = read_encoder(source)
    pictures = list_pictures(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module.to(device).to(memory_format=torch.channels_last)
    began = time.perf_counter()
    skipped: dict[str, str] = {}
    parts: list[Features] = []
    with (
        Bar(total=len(pictures), desc="embedding", unit="image") as bar,
        closing(_embedded(module, recipe, pictures, device)) as batches,
    ):
        for h_NF, problems in batches:
            parts += h_NF
            skipped |= problems
            bar.update(sum(map(len, h_NF)) + len(problems))
    if not parts:
        name, problem = next(iter(skipped.items()))
        raise UserError(
            f"none of the {len(pictures)} images below {folder} can be read: {name} ({problem})"
        )
    kept = [name for name in pictures if name not in skipped]
    rate = len(kept) / (time.perf_counter() - began)
    embeddings_NF = np.concatenate(parts)
    write_atomically(output, lambda part: _write(part, embeddings_NF, kept))
    return Embedded(
        output=str(output),
        encoder=config.name,
        images=len(kept),
        features=embeddings_NF.shape[1],
        skipped=skipped,
        images_per_s=round(rate, 1),
    )


def _embedded(
    module: nn.Module,
    recipe: Recipe,
    pictures: Mapping[str, Callable[[], BinaryIO]],
    device: torch.device,
) -> Generator[_Batch]:
    """Yield each batch's features, if any, and the problems of its unreadable images."""
    names = [*pictures]
    cuda = device.type == "cuda"
    size = _BATCH if cuda else max(1, min(_BATCH, _PIXELS // recipe.crop**2))
    batches = [names[k : k + size] for k in range(0, len(names), size)]

    def embedded(batch: list[str], images: Iterable[Pixels | str]) -> _Batch:
        found = dict(zip(batch, images, strict=True))
        good = [image for image in found.values() if not isinstance(image, str)]
        h_NF = [features(module, recipe, np.stack(good), device).numpy()] if good else []
        return h_NF, {name: image for name, image in found.items() if isinstance(image, str)}

    if cuda:
        with closing(decoded(pictures, recipe)) as images:
            for batch in batches:
                yield embedded(batch, islice(images, size))
    else:
        # one core handles a whole batch: decoding processes and the network's threads would wait
        # for each other
        decode = _decoder(pictures, recipe)
        yield from in_processes(
            lambda b: embedded(b, map(decode, b)), batches, usable_cores(), piece=1
        )


@torch.no_grad()
def features(
    module: nn.Module, recipe: Recipe, pixels_NHW3: Pixels, device: torch.device
) -> torch.Tensor:
    """Return the features h_NF of clean images, float32 on the CPU; ``device`` is the module's."""
    batches = torch.split(torch.from_numpy(pixels_NHW3).permute(0, 3, 1, 2), _BATCH)
    parts = [module(normalised(recipe, x_B3HW.to(device))) for x_B3HW in batches]
    return torch.cat([h_BF.float().cpu() for h_BF in parts])


def list_pictures(folder: Path) -> dict[str, Callable[[], BinaryIO]]:
    """Return a function that opens each image below ``folder``, by relative path with "/", sorted.

    Tars indexed by `isofast.data.shards` stand for their images.

    Raises:
        UserError: ``folder`` is not a folder or contains no image.
    """
    if not folder.is_dir():
        raise UserError(f"--images {folder} is not a folder")
    found: dict[str, Callable[[], BinaryIO]] = {}
    closed: list[OSError] = []
    for place, names in walk(folder, closed.append):
        here: dict[str, Callable[[], BinaryIO]] = {
            name: partial(io.FileIO, os.path.join(place, name)) for name in names
        }
        try:
            if (index := read_index(place)) is not None:
                for name, (tar, *part) in zip(index.names, index.places_N3.tolist(), strict=True):
                    here[name] = partial(open_member, index.tars[tar], *part)
        except (UserError, OSError) as error:
            # reported with the unreadable files
            here["*.tar"] = partial(_fail, error)
        below = Path(place).relative_to(folder)
        found |= {(below / name).as_posix(): opens for name, opens in here.items()}
    # folders that cannot be listed are reported with the unreadable files
    found |= {
        Path(error.filename).relative_to(folder).as_posix(): partial(_fail, error)
        for error in closed
    }
    if not found:
        raise UserError(
            f"there are no images below {folder}; images are named *{', *'.join(PICTURES)}"
        )
    return dict(sorted(found.items()))


def _fail(error: Exception) -> BinaryIO:
    raise error


def decoded(
    pictures: Mapping[str, Callable[[], BinaryIO]], recipe: Recipe
) -> Generator[Pixels | str]:
    """Yield a clean image (crop, crop, 3) for each picture, or the reason why it is unreadable.

    Raises:
        RunError: a decoding process was killed.
    """
    return in_processes(_decoder(pictures, recipe), [*pictures], usable_cores())


def _decoder(
    pictures: Mapping[str, Callable[[], BinaryIO]], recipe: Recipe
) -> Callable[[str], Pixels | str]:
    def decode(name: str) -> Pixels | str:
        try:
            # libtiff would read a tar's descriptor from its start
            with pictures[name]() as file, Image.open(io.BytesIO(file.read())) as image:
                return clean_image(recipe, rgb(image))
        except UnidentifiedImageError:
            return "cannot identify it as an image"
        except FileNotFoundError:
            return "a broken link"
        # Pillow raises nearly anything for damaged files
        except Exception as error:
            return str(error) or type(error).__name__

    return decode


def _write(path: Path, h_NF: npt.NDArray[np.float32], names: list[str]) -> None:
    if path.suffix == ".npz":
        np.savez(path, embeddings=h_NF, filenames=np.array(names))
    elif path.suffix == ".pt":
        path.write_bytes(torch_bytes({"embeddings": torch.from_numpy(h_NF), "filenames": names}))
    else:
        with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as table:
            rows = csv.writer(table)
            rows.writerow(["filename", *(f"embedding_{k}" for k in range(h_NF.shape[1]))])
            # nine digits round-trip float32
            rows.writerows(
                [name, *(f"{value:.9g}" for value in row)]
                for name, row in zip(names, h_NF, strict=True)
            )
