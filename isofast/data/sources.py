"""Where the official archives are, and by which checksums they and what is in them are known.

Addresses and checksums are torchvision's, where it has the data set.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torchvision import datasets as official


@dataclass(frozen=True)
class Source:
    """One official archive.

    Attributes:
        title: what people call the data set.
        url: where it is downloaded from. filename: of the archive.
        md5: of the archive.
        folder: the archive's only folder.
        train, val: the files of both splits in their official order, with their md5.
        classes_file: holds the names of the classes.
        others: further files that are needed, with their md5.
    """

    title: str
    url: str
    filename: str
    md5: str
    folder: str = ""
    train: Mapping[str, str] = field(default_factory=dict)
    val: Mapping[str, str] = field(default_factory=dict)
    classes_file: str = ""
    others: Mapping[str, str] = field(default_factory=dict)

    @property
    def checksums(self) -> dict[str, str]:
        """The md5 of every file whose checksum is published, by its name."""
        return {**self.train, **self.val, **self.others}


def source_of(name: str) -> Source:
    """Give the official archive of cifar10, cifar100, stl10 or tinyimagenet."""
    if name == "tinyimagenet":
        # torchvision has neither; the checksum is the one that is widely published
        return Source(
            title="TinyImageNet",
            url="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
            filename="tiny-imagenet-200.zip",
            md5="90528d7ca1a48142e341f4ef8d21d0de",
        )
    if name == "stl10":
        stl = official.STL10
        return Source(
            title="STL-10",
            url=stl.url,
            filename=stl.filename,
            md5=stl.tgz_md5,
            folder=stl.base_folder,
            train=dict(stl.train_list),
            val=dict(stl.test_list),
            classes_file=stl.class_names_file,
        )
    cifar = {"cifar10": official.CIFAR10, "cifar100": official.CIFAR100}[name]
    return Source(
        title={"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}[name],
        url=cifar.url,
        filename=cifar.filename,
        md5=cifar.tgz_md5,
        folder=cifar.base_folder,
        train=dict(cifar.train_list),
        val=dict(cifar.test_list),
        classes_file=cifar.meta["filename"],
        others={cifar.meta["filename"]: cifar.meta["md5"]},
    )
