"""`isofast prepare pack`: write a data root's images as tars, byte for byte and in order."""

import io
import tarfile
from pathlib import Path

import numpy as np

from isofast.data.bar import Bar
from isofast.data.check import OnBad, hand_on
from isofast.data.files import sync
from isofast.data.folder import ImageFolder, open_dataset, read_files
from isofast.data.prepare import PreparedCounts, checked_splits, make_root, prepared_name
from isofast.errors import UserError


def pack(root: Path, output: Path, *, shard_mib: int, on_bad: OnBad = "stop") -> PreparedCounts:
    """Write the images of a data root to output/SPLIT/SPLIT-000000.tar, ...; also a data root.

    A second call only checks what is there.

    Args:
        root: the data root to pack; its images are checked first.
        output: the new root.
        shard_mib: size of a tar in MiB; the last image may exceed it.
        on_bad: "stop" refuses unreadable images, "skip" drops them.

    Raises:
        UserError: root cannot be used, or output cannot be written or holds something else.
        RunError: an image changes in the meantime.
    """
    if shard_mib < 1:
        raise UserError(f"--shard-mib {shard_mib} must be 1 or more")
    splits = checked_splits(root, on_bad)

    def build(partial: Path) -> None:
        for split in splits:
            _write(split, partial, shard_mib << 20)
        for split in splits:
            hand_on(split, open_dataset(partial, split.split))

    content = {
        "name": prepared_name(root) or "imagefolder",
        "shards": {"mib": shard_mib, "images": [split.fingerprint for split in splits]},
    }
    return make_root("pack", output, content, build, on_bad, option="--output")


def _write(dataset: ImageFolder, folder: Path, limit: int) -> None:
    tops_N = np.array([path.partition("/")[0] for path in dataset.paths])
    with Bar(desc=f"packing {dataset.split} images", total=len(dataset), unit="image") as bar:
        for top in np.unique(tops_N):
            (index_N,) = np.nonzero(tops_N == top)
            # where each would start in one long tar: a header, then the content in whole blocks
            blocks_N = 1 + -(-dataset.stamps[index_N, 0] // tarfile.BLOCKSIZE)
            number_N = (np.cumsum(blocks_N) - blocks_N) * tarfile.BLOCKSIZE // limit
            pieces = np.split(index_N, np.flatnonzero(np.diff(number_N)) + 1)
            (folder / top).mkdir()
            for number, piece in enumerate(pieces):
                path = folder / top / f"{top}-{number:06d}.tar"
                with tarfile.open(path, "w") as tar:
                    for index in piece.tolist():
                        (content,) = read_files(dataset, [index])
                        # no time or owner: the same images make the same tars
                        member = tarfile.TarInfo(dataset.paths[index].partition("/")[2])
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
                        bar.update()
                sync(path)
