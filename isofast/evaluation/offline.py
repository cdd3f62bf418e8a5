"""Accuracy of a run's frozen features, compared with baselines.

Shapes: N training images, M validation images, F features.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from isofast.config.schema import Config
from isofast.data import (
    UNLABELLED,
    EvalLoader,
    ImageFolder,
    open_dataset,
    recipe_for,
    resolve_backend,
)
from isofast.data.images import Images, check_images
from isofast.distributed import World, limit_threads, usable_cores
from isofast.errors import UserError
from isofast.evaluation.encoders import newest_of, untrained
from isofast.evaluation.intervals import wilson
from isofast.methods.weights import load_weights, read_weights
from isofast.run.stored import read_config
from isofast.training.online import clean_loader, knn_top1

# train_NF, train_y_N, val_MF, val_y_M
Features = tuple[Tensor, Tensor, Tensor, Tensor]
# accuracies with their settings
Scores = Iterator[tuple[float, dict[str, Any]]]

_NEIGHBOURS, _TEMPERATURE = (20, 200), 0.07
GRID_C, _HELD_BACK = (0.001, 0.01, 0.1, 1.0, 10.0), 0.2
_LABELS, _DRAWS = (1, 5, 10), 5
_MOST_ITERATIONS = 500


@dataclass(frozen=True)
class Result:
    """One accuracy; fields that do not apply to the protocol are None."""

    baseline: str | None
    """Source of the features: "random", "pixels" or a file; None for the run."""
    protocol: str
    """knn, linear or few."""
    value: float
    """Top-1 as a fraction; for few, the mean over draws."""
    interval: tuple[float, float]
    """95 % interval from the number of validation images alone (Wilson), not the draw of labels."""
    n: int
    """Number of validation images."""
    k: int | None = None
    """Number of neighbours that vote."""
    C: float | None = None
    """scikit-learn's inverse regularisation strength."""
    labels_per_class: int | None = None
    std: float | None = None
    """Standard deviation over the draws of labelled images."""
    seeds: list[int] | None = None
    """Seeds of these draws."""


@dataclass(frozen=True)
class Report:
    """Results of ``evaluate`` and what they were measured on."""

    run: str
    checkpoint: str
    step: int
    root: str
    classes: int
    train_images: int
    val_images: int
    results: list[Result]
    notes: list[str]
    """What was left out and why."""

    def __str__(self) -> str:
        """Return a table at most 80 columns wide."""
        head = (
            f"step {self.step}, {self.train_images:,} training and {self.val_images:,} validation "
            f"images, {self.classes} classes"
        )
        title = f"  {'':<24}{'features of':<18}{'top-1':>7}   95 % interval   std"
        lines, before = [self.run, head, "", title], ""
        for one in self.results:
            protocol = {
                "knn": f"k-NN, k = {one.k}",
                "linear": "logistic regression",
                "few": f"few labels, {one.labels_per_class} a class",
            }[one.protocol]
            setting = protocol if protocol != before else ""
            name = one.baseline or "the run"
            name = name if len(name) < 18 else f"...{name[-14:]}"
            low, high = one.interval
            std = "" if one.std is None else f"  {one.std:.3f}"
            line = f"  {setting:<24}{name:<18}{one.value:>7.3f}  [{low:.3f}, {high:.3f}]{std}"
            lines.append(line)
            before = protocol
        return "\n".join([*lines, *self.notes])


def evaluate(
    run_dir: Path,
    protocols: Sequence[str],
    baselines: Sequence[str] = (),
    *,
    train_images: int = 50_000,
    root: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Evaluate the encoder of a run's newest checkpoint on clean images, in fp32.

    knn: a vote of the 20 and 200 nearest by cosine similarity, temperature 0.07. linear: logistic
    regression on standardised features; C is the best of ``GRID_C`` on a held-out stratified fifth
    of the training images, and the final fit uses all of them. few: the same with C = 1 on 1, 5 and
    10 labels per class, drawn five times; all training images standardise, without their labels.

    Args:
        run_dir: a finished or stopped run.
        protocols: any of knn, linear, few.
        baselines: "random" (the run's network before training), "pixels", or weight files for the
            run's encoder (.safetensors).
        train_images: maximum number of training images, drawn at random.
        root: folder of the images, if they are no longer in the run's data.root.
        say: called with progress messages.

    Raises:
        UserError: the run has no checkpoint, its images have no labels, one class, no validation
            split or too few of a class, or a baseline does not exist or fit.
        RunError: an image can no longer be read.
    """
    config = read_config(run_dir)
    checkpoint = newest_of(run_dir)
    # load all encoders first, so that a bad baseline fails before any work
    encoders: dict[str | None, nn.Module] = {
        None: _encoder(config, str(checkpoint.path / "encoder.safetensors"))
    }
    encoders |= {name: _encoder(config, name) for name in baselines}
    train, val = _images(config, root or config.data.root)
    classes = len(train.classes)
    labelled = np.random.default_rng(0).permutation(np.flatnonzero(train.labels != UNLABELLED))
    drawn = np.sort(labelled[:train_images])
    counts = np.bincount(train.labels[drawn], minlength=classes)
    _require_enough(counts, protocols)
    limit_threads(usable_cores())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = config.data
    recipe = recipe_for(data.dataset, crop=data.crop, augmentation=data.augmentation)
    backend = resolve_backend(data.backend, train, recipe, device, data.resident_limit_gb)
    loaders = [
        clean_loader(config, images, recipe, indices, World(0, 1, 0, device), backend)
        for images, indices in ((train, drawn), (val, np.arange(len(val))))
    ]
    results: list[Result] = []
    for name, encoder in encoders.items():
        say(f"features of {name or run_dir}")
        encoder.to(device)
        features = (*_collect(encoder, loaders[0]), *_collect(encoder, loaders[1]))
        encoder.cpu()
        for protocol in protocols:
            say(f"{protocol} of {name or run_dir}")
            # a fit may stop at the maximum number of iterations
            with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
                scores = [*_PROTOCOLS[protocol](features, classes)]
            results += [
                Result(name, protocol, top1, wilson(top1, len(val)), len(val), **settings)
                for top1, settings in scores
            ]
    # group by setting, with the run before its baselines
    order = [*_PROTOCOLS]
    results.sort(key=lambda r: (order.index(r.protocol), r.k or r.labels_per_class or 0))
    return Report(
        run=str(run_dir),
        checkpoint=str(checkpoint.path),
        step=checkpoint.step,
        root=str(train.root),
        classes=classes,
        train_images=len(drawn),
        val_images=len(val),
        results=results,
        notes=[
            f"no {count} labels per class: a class has only {counts.min()} training image(s)"
            for count in _LABELS
            if "few" in protocols and count > counts.min()
        ],
    )


def _knn(features: Features, classes: int) -> Scores:
    for k in sorted({min(k, len(features[0])) for k in _NEIGHBOURS}):
        yield knn_top1(*features, classes=classes, k=k, temperature=_TEMPERATURE), {"k": k}


def _linear(features: Features, classes: int) -> Scores:
    train_NF, train_y_N, val_MF, val_y_M = (x.cpu().numpy() for x in features)
    split = StratifiedShuffleSplit(1, test_size=_HELD_BACK, random_state=0)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=_MOST_ITERATIONS))
    search = GridSearchCV(pipeline, {"logisticregression__C": GRID_C}, cv=split)
    search.fit(train_NF, train_y_N)
    best = search.best_params_["logisticregression__C"]
    yield float(search.score(val_MF, val_y_M)), {"C": best}


def _few(features: Features, classes: int) -> Scores:
    train_NF, train_y_N, val_MF, val_y_M = (x.cpu().numpy() for x in features)
    scaler = StandardScaler().fit(train_NF)
    train_NF, val_MF = scaler.transform(train_NF), scaler.transform(val_MF)
    seeds = list(range(_DRAWS))
    orders = [np.random.default_rng(seed).permutation(len(train_NF)) for seed in seeds]
    least = np.bincount(train_y_N, minlength=classes).min()
    for count in (count for count in _LABELS if count <= least):
        scores = []
        for order in orders:
            of_classes = [order[train_y_N[order] == label][:count] for label in range(classes)]
            chosen = np.concatenate(of_classes)
            model = LogisticRegression(max_iter=_MOST_ITERATIONS)
            model.fit(train_NF[chosen], train_y_N[chosen])
            scores.append(model.score(val_MF, val_y_M))
        std = float(np.std(scores, ddof=1))
        settings = {"labels_per_class": count, "C": 1.0, "std": std, "seeds": seeds}
        yield float(np.mean(scores)), settings


_PROTOCOLS = {"knn": _knn, "linear": _linear, "few": _few}
PROTOCOLS = tuple(_PROTOCOLS)


def _images(config: Config, root: Path) -> tuple[ImageFolder, ImageFolder]:
    """Return both splits, checked as a run checks them."""
    train = open_dataset(root, "train")
    if len(train.classes) < 2:
        raise UserError(
            f"the training images in {root} have {'one class' if train.classes else 'no labels'}, "
            f"but k-NN, logistic regression and few labels need classes: sort some images into "
            f"train/CLASS/ and val/CLASS/, with two classes or more. Without labels there are C's "
            f"eigenvalues and effective rank (`isofast figures 3 RUN`)"
        )
    if not (root / "val").is_dir():
        raise UserError(
            f"{root} has no folder val: accuracy is measured on images that were not trained on. "
            f"Put some into {root}/val/CLASS/, or use another image folder with --root"
        )
    checked = check_images(config, Images(train, open_dataset(root, "val")))
    assert checked.val is not None
    return checked.train, checked.val


def _require_enough(counts: npt.NDArray[np.int64], protocols: Sequence[str]) -> None:
    """Require enough training images per class to hold out a stratified fraction of them."""
    total, held_back = counts.sum(), math.ceil(_HELD_BACK * counts.sum())
    if "linear" in protocols and (counts.min() < 2 or held_back < len(counts)):
        raise UserError(
            f"logistic regression holds out a fifth of the training images to choose C, at least "
            f"one of each class, but there are {total:,} images of {len(counts)} classes, the "
            f"smallest with {counts.min()}; use more (--train-images), or --protocol knn"
        )
    if counts.min() < 1:
        raise UserError(
            f"some of the {len(counts)} classes have none of the {total:,} training images; use "
            f"more with --train-images"
        )


@torch.no_grad()
def _collect(encoder: nn.Module, loader: EvalLoader) -> tuple[Tensor, Tensor]:
    parts = [(encoder(x_BCHW).float(), y_B) for x_BCHW, y_B in loader]
    return torch.cat([h_BF for h_BF, _ in parts]), torch.cat([y_B for _, y_B in parts])


def _encoder(config: Config, name: str) -> nn.Module:
    """Return a baseline, or the run's encoder with a file's weights."""
    if name == "pixels":
        return nn.Flatten()
    encoder = untrained(config)
    if name != "random":
        if not Path(name).is_file():
            raise UserError(
                f"--baselines: there is no file {name}; allowed are random, pixels and weight "
                "files (.safetensors)"
            )
        load_weights(encoder, read_weights(Path(name)))
    return encoder.eval()
