"""Archives that nobody can unpack without asking back."""

import zipfile
from pathlib import Path

import pytest

from isofast.data.prepare import prepare
from isofast.errors import UserError


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "tiny.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("tiny-imagenet-200/wnids.txt", "n1\n")
    content = bytearray(archive.read_bytes())
    # the first of the flags says that a password is needed, in both headers of the file
    for header, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(header) + flags] |= 1
    archive.write_bytes(content)
    message = r"tiny\.zip is encrypted \('tiny-imagenet-200/wnids\.txt'\); use the official file"
    with pytest.raises(UserError, match=message):
        prepare("tinyimagenet", tmp_path / "root", archive)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.zip"]
