"""The images of a run: listed, checked, and the same on every rank."""

from typing import NamedTuple

from isofast.config.schema import Config
from isofast.data import (
    UNLABELLED,
    ImageFolder,
    check_folder,
    ignored_note,
    open_dataset,
    skipped_note,
)
from isofast.data.check import default_decoder
from isofast.data.prepare import prepared_name
from isofast.distributed import World, gather_objects
from isofast.errors import RankError, UserError


class Images(NamedTuple):
    """What a run trains on, and what it evaluates on, if it does."""

    train: ImageFolder
    val: ImageFolder | None

    def notes(self) -> list[str]:
        """What there is to say about files that are skipped, or ignored."""
        notes = (
            note(images)
            for note in (skipped_note, ignored_note)
            for images in self
            if images is not None
        )
        return [note for note in notes if note]


def list_images(config: Config) -> Images:
    """Lists the images that ``config`` asks for; none is opened.

    Raises:
        UserError: the data root is not one.
    """
    root = config.data.root
    evaluates = config.evaluation.every_epochs > 0
    return Images(open_dataset(root, "train"), open_dataset(root, "val") if evaluates else None)


def check_images(config: Config, images: Images) -> Images:
    """Checks every image that was not checked before, as ``data.check`` says.

    Raises:
        UserError: images that cannot be read, unless ``data.on_bad_image`` leaves them out.
    """
    data = config.data

    def check(part: ImageFolder) -> ImageFolder:
        decoder = "pillow" if data.backend == "resident" else default_decoder()
        return check_folder(part, check=data.check, decoder=decoder, on_bad=data.on_bad_image)

    return Images(check(images.train), None if images.val is None else check(images.val))


def agree_on_images(config: Config, world: World, images: Images) -> Images:
    """Checks the images on the ranks after the first, and that all ranks have the same ones.

    Called by every rank; the first has been through ``check_images``, and the others mostly read
    what it has found.

    Raises:
        RankError: images that this rank alone cannot read, or others than on the first rank.
    """
    problem = ""
    if not world.is_main:
        try:
            images = check_images(config, images)
        except UserError as error:
            problem = str(error)
    fingerprints = [None if part is None else part.fingerprint for part in images]
    if gather_objects((problem, fingerprints)) != [("", fingerprints)] * world.size:
        raise RankError(
            problem
            or f"the processes do not find the same images under {config.data.root}: give all of "
            "them the same files, and let them read all of these"
        )
    return images


def data_set_notes(config: Config) -> list[str]:
    """What there is to say of a root that holds another data set than ``data.dataset``."""
    root, name = config.data.root, config.data.dataset
    prepared = prepared_name(root)
    if prepared in (None, name) or name == "imagefolder":
        return []
    return [
        f"note: {root} holds {prepared}, and data.dataset is {name}: augmentation and network are "
        f"those of {name}"
    ]


def describe_images(train: ImageFolder) -> str:
    """Says in a few words what is trained on: "1,442 images of 10 classes"."""
    unlabelled = int((train.labels == UNLABELLED).sum())
    if not train.classes:
        return f"{len(train):,} images without labels"
    aside = f" ({unlabelled:,} without a label)" if unlabelled else ""
    return f"{len(train):,} images{aside} of {len(train.classes)} classes"
