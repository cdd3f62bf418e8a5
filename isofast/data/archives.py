"""Reading the official archives of data sets, trusting nothing that is written in them."""

import contextlib
import stat
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from isofast.errors import UserError

# many times what any TinyImageNet holds; a bomb declares more, or lies and is stopped in reading
_MAX_TOTAL_BYTES = 8 << 30
_MAX_FILE_BYTES = 16 << 20


def extract_tinyimagenet(archive: Path, folder: Path) -> None:
    """Write an archive of TinyImageNet's layout as folder/train/WNID/ and folder/val/WNID/.

    The layout: wnids.txt (the classes), train/WNID/images/*, val/images/*, val/val_annotations.txt
    (file, tab, WNID, ...), all in one top folder. Files keep their names and bytes.

    Args:
        archive: the zip.
        folder: an empty folder to write into.

    Raises:
        UserError: the file is missing, no zip, cut short, damaged, unsafe or of another layout.
    """
    try:
        with contextlib.ExitStack() as stack:
            with reading(archive):
                if not archive.is_file():
                    raise UserError(
                        f"there is no archive {archive}; give the zip's path as --archive FILE"
                    )
                # zipfile takes what cannot be read for no zip
                with archive.open("rb") as file:
                    file.read(1)
                opened = stack.enter_context(zipfile.ZipFile(archive))
            _extract(opened, archive, folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise UserError(
            f"{archive} is not a whole zip file ({error}); it was cut short or damaged. "
            "Download it again"
        ) from error


@contextlib.contextmanager
def reading(archive: Path) -> Iterator[None]:
    """Let what the system says when an archive is read be told apart from a full data root.

    Raises:
        UserError: the archive cannot be read, and why.
    """
    try:
        yield
    except OSError as error:
        # errors of decompression have no number
        if error.errno is None:
            raise
        raise UserError(
            f"cannot read the archive {archive}: {error.strerror or error}. Give a file that you "
            "may read, on a disk that works, as --archive FILE"
        ) from error


def _extract(opened: zipfile.ZipFile, archive: Path, folder: Path) -> None:
    members = {info.filename: info for info in _safe_members(opened, archive)}
    tops = [name.removesuffix("wnids.txt") for name in members if name.endswith("/wnids.txt")]
    if len(tops) != 1:
        raise UserError(
            f"{archive} is no TinyImageNet archive: it has {len(tops)} files FOLDER/wnids.txt, "
            "and needs one. The official file is tiny-imagenet-200.zip"
        )
    top = tops[0]
    classes = _text(opened, members, f"{top}wnids.txt", archive).split()
    for name in classes:
        # class names become folders
        if not name.isalnum():
            raise UserError(f"{archive} is unsafe: wnids.txt has the class name {name!r}")
    targets = dict(_targets(opened, members, top, classes, archive))
    for split in ("train", "val"):
        missing = set(classes) - {
            path.parts[1] for path in targets.values() if path.parts[0] == split
        }
        if missing:
            raise UserError(
                f"{archive} has no {split} images of {len(missing)} of its {len(classes)} classes: "
                f"{', '.join(sorted(missing)[:5])}. Download it again"
            )
    for path in {target.parent for target in targets.values()}:
        (folder / path).mkdir(parents=True)
    # disable=None: no bar where there is no terminal
    for name, target in tqdm(targets.items(), desc="unpacking", unit="image", disable=None):
        (folder / target).write_bytes(_content(opened, members[name], archive))


def _targets(
    opened: zipfile.ZipFile,
    members: dict[str, zipfile.ZipInfo],
    top: str,
    classes: list[str],
    archive: Path,
) -> Iterator[tuple[str, PurePosixPath]]:
    """Pair each image's name in the archive with its path in the data root."""
    known = set(classes)
    for name in members:
        parts = PurePosixPath(name.removeprefix(top)).parts
        if len(parts) == 4 and (parts[0], parts[2]) == ("train", "images") and parts[1] in known:
            yield name, PurePosixPath("train", parts[1], parts[3])
    annotated = set()
    annotations = _text(opened, members, f"{top}val/val_annotations.txt", archive)
    for line in annotations.splitlines():
        filename, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        name = f"{top}val/images/{filename}"
        if wnid not in known or name not in members or name in annotated:
            raise UserError(
                f"{archive}: val_annotations.txt says {line!r}, but the class or the image is not "
                "in the archive, or the image has a class already. Download it again"
            )
        annotated.add(name)
        yield name, PurePosixPath("val", wnid, filename)


def _safe_members(opened: zipfile.ZipFile, archive: Path) -> list[zipfile.ZipInfo]:
    members = [info for info in opened.infolist() if not info.is_dir()]
    for info in members:
        path = PurePosixPath(info.filename)
        if path.is_absolute() or ".." in path.parts or "\\" in info.filename:
            raise UserError(f"{archive} is unsafe: {info.filename!r} points outside of it")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise UserError(f"{archive} is unsafe: {info.filename!r} is a link")
        if info.flag_bits & 1:
            raise UserError(f"{archive} is encrypted ({info.filename!r}); use the official file")
    total = sum(info.file_size for info in members)
    if total > _MAX_TOTAL_BYTES:
        raise UserError(
            f"{archive} is unsafe: it unpacks to {total:,} bytes, more than {_MAX_TOTAL_BYTES:,}"
        )
    return members


def _content(opened: zipfile.ZipFile, info: zipfile.ZipInfo, archive: Path) -> bytes:
    with reading(archive), opened.open(info) as file:
        content = file.read(_MAX_FILE_BYTES + 1)
    if len(content) > _MAX_FILE_BYTES:
        raise UserError(
            f"{archive} is unsafe: {info.filename!r} unpacks to more than {_MAX_FILE_BYTES:,} bytes"
        )
    return content


def _text(
    opened: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], name: str, archive: Path
) -> str:
    if name not in members:
        raise UserError(f"{archive} is no whole TinyImageNet archive: it lacks {name}")
    return _content(opened, members[name], archive).decode("utf-8", "replace")
