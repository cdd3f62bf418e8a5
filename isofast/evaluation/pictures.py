"""A sample of images as an encoder sees it: neighbours, a map, and numbers with baselines.

Shapes: N images, F features.
"""

import base64
import io
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.colors import TABLEAU_COLORS
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional

from isofast.config.schema import Config
from isofast.data import ImageFolder, Recipe, open_dataset
from isofast.distributed import limit_threads, usable_cores
from isofast.errors import UserError
from isofast.evaluation.embed import Pixels, decoded, features
from isofast.evaluation.encoders import read_encoder, untrained
from isofast.methods.weights import initialise
from isofast.run.checkpoint import encoder_file
from isofast.run.labelfree import rankme, uniformity
from isofast.training.online import knn_top1

RAW_PIXELS = "raw pixels"
# per split
_MOST_IMAGES = 1000
_QUERIES, _NEIGHBOURS = 8, 6
_THUMB, _TILE, _COLUMNS, _ROWS = 56, 30, 30, 20
# largest side for which raw pixels serve as features
_MOST_PIXELS = 64
CLASS_COLORS = [str(color) for color in TABLEAU_COLORS.values()]


class Thumb(NamedTuple):
    """A picture in a row of neighbours."""

    uri: str
    alt: str
    caption: str
    """Its class; "" without a label."""
    agrees: bool | None = None
    """Whether its class is the query's; None if either has no label."""


@dataclass(frozen=True)
class Measured:
    """Metrics of one set of features on the sample."""

    name: str
    knn_top1: float | None
    """None without labelled validation images."""
    rankme: float
    uniformity: float


@dataclass(frozen=True)
class Pictures:
    """Results of `look`."""

    sample: str
    """Description of the images."""
    queries: int
    rows: list[list[Thumb]]
    """One row per query: the query, then its neighbours, nearest first."""
    map_uri: str
    map_alt: str
    map_classes: list[tuple[str, str]]
    """Names and frame colours; empty without labels or with more than ten classes."""
    measured: list[Measured]
    """The run, the network it began with, and raw pixels if the images are small."""


class _Sample(NamedTuple):
    pixels_NHW3: Pixels
    labels_N: npt.NDArray[np.int64]
    paths: list[str]


def look(run_dir: Path, config: Config, root: Path) -> Pictures:
    """Run a run's encoder on validation images, or on training images if there are none.

    Raises:
        UserError: the images or the checkpoint are gone, or the features are not finite.
    """
    encoder, _, recipe = read_encoder(run_dir)
    train = open_dataset(root, "train")
    has_val = bool(train.classes) and (root / "val").is_dir()
    bank = _sample(train, recipe)
    query = _sample(open_dataset(root, "val"), recipe) if has_val else bank
    labelled = torch.from_numpy(bank.labels_N) >= 0
    limit_threads(usable_cores())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start, kind = untrained(config), "untrained network"
    if config.encoder.init is not None:
        # they may be gone
        with suppress(UserError, OSError):
            initialise(start, encoder_file(Path(config.encoder.init)))
            kind = "initial weights"
    named: dict[str, nn.Module] = {"this run": encoder, kind: start}
    if recipe.crop <= _MOST_PIXELS:
        named[RAW_PIXELS] = nn.Flatten()
    measured, seen = [], []
    for name, module in named.items():
        module.eval().to(device).to(memory_format=torch.channels_last)
        query_NF = features(module, recipe, query.pixels_NHW3, device)
        bank_NF = features(module, recipe, bank.pixels_NHW3, device) if has_val else query_NF
        top1 = None
        if has_val and labelled.any():
            # the same share of the bank votes as in an evaluation, which may search more images
            searched = min(config.evaluation.knn_images, int((train.labels >= 0).sum()))
            share = min(1.0, int(labelled.sum()) / searched)
            top1 = knn_top1(
                bank_NF[labelled],
                torch.from_numpy(bank.labels_N)[labelled],
                query_NF,
                torch.from_numpy(query.labels_N),
                classes=len(train.classes),
                k=max(1, round(share * config.evaluation.knn_k)),
                temperature=config.evaluation.knn_temperature,
            )
        measured.append(Measured(name, top1, rankme(query_NF), uniformity(query_NF)))
        seen.append((query_NF, bank_NF))
    query_NF, bank_NF = seen[0]
    if not query_NF.isfinite().all():
        raise UserError("the encoder's features are NaN or infinite")
    sample = f"{len(query.paths):,} {'validation' if has_val else 'training'} images"
    colored = 0 < len(train.classes) <= len(CLASS_COLORS)
    uri, shares = _map(query_NF, query, colored)
    return Pictures(
        sample=sample + (f", and {len(bank.paths):,} training images to search" if has_val else ""),
        queries=len(query.paths),
        rows=_neighbours(query_NF, bank_NF, query, bank, train.classes),
        map_uri=uri,
        map_alt=f"Map by the first two principal components ({shares} of the variance) of {sample}",
        map_classes=[*zip(train.classes, CLASS_COLORS, strict=False)] if colored else [],
        measured=measured,
    )


def _sample(images: ImageFolder, recipe: Recipe) -> _Sample:
    """Draw a sample of images, without unreadable ones."""
    drawn = np.sort(np.random.default_rng(0).permutation(len(images))[:_MOST_IMAGES])
    every = decoded({images.paths[k]: partial(images.open, k) for k in drawn}, recipe)
    pairs = zip(drawn, every, strict=True)
    found = {index: one for index, one in pairs if not isinstance(one, str)}
    if len(found) < 2:
        raise UserError(f"fewer than two of the {images.split} images in {images.root} can be read")
    paths = [images.paths[k] for k in found]
    return _Sample(np.stack([*found.values()]), images.labels[[*found]], paths)


def _neighbours(
    query_NF: Tensor, bank_NF: Tensor, query: _Sample, bank: _Sample, classes: tuple[str, ...]
) -> list[list[Thumb]]:
    """Return rows of queries, spread over the sample, and their neighbours by cosine similarity."""
    count, same = min(_QUERIES, len(query.paths)), query is bank
    places = np.arange(count) * len(query.paths) // count + len(query.paths) // (2 * count)
    similarity_QN = functional.normalize(query_NF[places]) @ functional.normalize(bank_NF).T
    if same:
        # no image is its own neighbour
        similarity_QN[torch.arange(count), torch.from_numpy(places)] = -torch.inf
    nearest = similarity_QN.topk(min(_NEIGHBOURS, len(bank.paths) - same))
    # the last is for the label -1, unlabelled
    names = (*classes, "")
    rows = []
    for place, *near in zip(places, nearest.values.tolist(), nearest.indices.tolist(), strict=True):
        own = query.labels_N[place]
        row = [Thumb(_thumb(query.pixels_NHW3[place]), query.paths[place], names[own])]
        for value, index in zip(*near, strict=True):
            label = bank.labels_N[index]
            agrees = None if min(own, label) < 0 else bool(own == label)
            alt = f"{bank.paths[index]}, similarity {value:.2f}"
            row.append(Thumb(_thumb(bank.pixels_NHW3[index]), alt, names[label], agrees))
        rows.append(row)
    return rows


def _map(h_NF: Tensor, sample: _Sample, colored: bool) -> tuple[str, str]:
    """Return thumbnails placed by the first two PCs, without overlap, and the PCs' shares."""
    centred_NF = h_NF.numpy().astype(np.float64) - h_NF.numpy().mean(0)
    u_NK, s_K, _ = np.linalg.svd(centred_NF, full_matrices=False)
    shares = np.square(s_K[:2]) / max(np.square(s_K).sum(), np.finfo(float).tiny)
    place_N2 = u_NK[:, :2] * s_K[:2]
    # an outlier would squeeze all others together
    low_2, high_2 = np.percentile(place_N2, (1, 99), axis=0)
    span_2 = np.maximum(high_2 - low_2, np.finfo(float).tiny)
    share_N2 = (place_N2.clip(low_2, high_2) - low_2) / span_2
    cell_N2 = (share_N2 * (_COLUMNS - 1, _ROWS - 1)).round().astype(int)
    sheet = Image.new("RGBA", (_COLUMNS * _TILE, _ROWS * _TILE))
    pen = ImageDraw.Draw(sheet)
    _, firsts = np.unique(cell_N2, axis=0, return_index=True)
    for index in firsts:
        x, y = int(cell_N2[index, 0]) * _TILE, int(_ROWS - 1 - cell_N2[index, 1]) * _TILE
        if colored and (label := sample.labels_N[index]) >= 0:
            pen.rectangle((x, y, x + _TILE - 1, y + _TILE - 1), fill=CLASS_COLORS[label])
        size = (_TILE - 6, _TILE - 6)
        sheet.paste(Image.fromarray(sample.pixels_NHW3[index]).resize(size), (x + 3, y + 3))
    return _uri(sheet), " and ".join(f"{share:.0%}" for share in shares)


def _thumb(pixels_HW3: Pixels) -> str:
    return _uri(Image.fromarray(pixels_HW3).resize((_THUMB, _THUMB)))


def _uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
