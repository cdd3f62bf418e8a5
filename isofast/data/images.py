"""List and check the images of a run, the same on every rank."""

from functools import partial
from typing import Any, NamedTuple

from isofast.config.schema import Config
from isofast.data import UNLABELLED, ImageFolder, Recipe, check_folder, open_dataset
from isofast.data.check import default_decoder, note_on_size, notes_on
from isofast.data.prepare import prepared_name
from isofast.distributed import World, gather_objects
from isofast.errors import RankError, UserError


class Images(NamedTuple):
    """The training images, and the validation images if the run evaluates."""

    train: ImageFolder
    val: ImageFolder | None

    def notes(self, recipe: Recipe) -> list[str]:
        """Return notes on skipped and ignored files, and on the images' size."""
        splits = [images for images in self if images is not None]
        return notes_on(splits) + note_on_size(self.train, recipe)


def list_images(config: Config) -> Images:
    """List the images that ``config`` asks for, without opening any.

    Raises:
        UserError: see `open_dataset`.
    """
    root = config.data.root
    evaluates = config.evaluation.every_epochs > 0
    return Images(open_dataset(root, "train"), open_dataset(root, "val") if evaluates else None)


def check_images(config: Config, images: Images) -> Images:
    """Check every new or changed image according to ``data.check``.

    Raises:
        UserError: unreadable images, unless ``data.on_bad_image`` skips them.
    """
    data = config.data
    decoder = "pillow" if data.backend == "resident" else default_decoder()
    check = partial(check_folder, check=data.check, decoder=decoder, on_bad=data.on_bad_image)
    return Images(check(images.train), None if images.val is None else check(images.val))


def agree_on_images(config: Config, world: World, images: Images, group: Any = None) -> Images:
    """Check the images on rank 0, then on the other ranks, and compare.

    Args:
        config: the run's configuration.
        world: the ranks.
        images: those listed on this rank.
        group: all ranks, with a timeout that outlasts a check of hours.

    Raises:
        UserError: rank 0 cannot read its images.
        RankError: this rank cannot read its images, or they are not rank 0's.
    """
    if world.size == 1:
        return check_images(config, images)
    problem = ""
    # first on rank 0, whose results the others find in the data root
    if world.is_main:
        images, problem = _checked(config, images)
    if problem_of_first := gather_objects(problem, group)[0]:
        raise UserError(problem_of_first)
    if not world.is_main:
        images, problem = _checked(config, images)
    fingerprints = [None if split is None else split.fingerprint for split in images]
    found = gather_objects((problem, fingerprints), group)
    if found != [("", fingerprints)] * world.size:
        others = (f"rank {rank}: {said}" for rank, (said, _) in enumerate(found) if said)
        raise RankError(
            problem
            or next(others, "")
            or f"the processes do not see the same images under {config.data.root}; give all of "
            "them read access to the same files"
        )
    return images


def _checked(config: Config, images: Images) -> tuple[Images, str]:
    """Return the images, checked, or what is wrong with them."""
    try:
        return check_images(config, images), ""
    except UserError as error:
        return images, str(error)


def data_set_notes(config: Config) -> list[str]:
    """Return a note if a root holds a prepared data set other than ``data.dataset``."""
    root, name = config.data.root, config.data.dataset
    prepared = prepared_name(root)
    if prepared in (None, name) or name == "imagefolder":
        return []
    return [
        f"note: {root} holds {prepared}, but data.dataset is {name}: augmentation and network are "
        f"those of {name}"
    ]


def describe_images(train: ImageFolder) -> str:
    """Describe a training set: "1,442 images of 10 classes"."""
    if not train.classes:
        return f"{len(train):,} images without labels"
    unlabelled = int((train.labels == UNLABELLED).sum())
    aside = f" ({unlabelled:,} without a label)" if unlabelled else ""
    return f"{len(train):,} images{aside} of {len(train.classes)} classes"
