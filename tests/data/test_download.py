"""Downloads, from a real server on this machine: verified, not repeated, or nothing at all."""

import hashlib
import http.client
import http.server
import io
import socket
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from isofast.cli import main
from isofast.data import download, sources
from isofast.data.download import fetch
from isofast.data.prepare import prepare
from isofast.data.sources import Source
from isofast.errors import UserError


def tiny_archive() -> bytes:
    """Two classes, one image of each in both splits, in TinyImageNet's layout."""
    image, packed = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (64, 64), (200, 30, 60)).save(image, format="JPEG")
    with zipfile.ZipFile(packed, "w") as archive:
        top = "tiny-imagenet-200"
        archive.writestr(f"{top}/wnids.txt", "n1\nn2\n")
        annotations = "a.JPEG\tn1\t0\nb.JPEG\tn2\t0\n"
        archive.writestr(f"{top}/val/val_annotations.txt", annotations)
        for name in ("val/images/a", "val/images/b", "train/n1/images/c", "train/n2/images/d"):
            archive.writestr(f"{top}/{name}.JPEG", image.getvalue())
    return packed.getvalue()


OFFICIAL = tiny_archive()


class Server(http.server.ThreadingHTTPServer):
    """Serves one file; ``sent`` is how much of it goes out before the connection is cut."""

    content = OFFICIAL
    sent = len(OFFICIAL)
    ranges = True
    requests = 0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str | None] = []

    @property
    def source(self) -> Source:
        name = "tiny-imagenet-200.zip"
        md5 = hashlib.md5(OFFICIAL, usedforsecurity=False).hexdigest()
        return Source("TinyImageNet", f"http://127.0.0.1:{self.server_port}/{name}", name, md5)


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests += 1
        if "missing" in self.path:
            self.send_error(404)
            return
        self.server.asked.append(self.headers["Range"])
        content = self.server.content
        first = 0
        if self.server.ranges and self.headers["Range"]:
            first = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if first >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        self.wfile.write(content[first : first + self.server.sent])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_a_data_set_is_downloaded_and_made(tmp_path: Path, server: Server) -> None:
    counts = prepare("tinyimagenet", tmp_path / "root", source=server.source)
    assert (counts.classes, counts.train, counts.val) == (2, 2, 2)
    names = {path.name for path in (tmp_path / "root").iterdir()}
    assert names == {
        "train",
        "val",
        ".isofast-prepared.json",
        ".isofast-checked-train.json",
        ".isofast-checked-val.json",
    }
    before = server.requests
    assert prepare("tinyimagenet", tmp_path / "root", source=server.source).already_there
    assert server.requests == before > 0


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_a_cut_download_goes_on(tmp_path: Path, server: Server, ranges: bool) -> None:
    root, half = tmp_path / "root", len(server.content) // 2
    server.sent, server.ranges = half, ranges
    with pytest.raises(UserError, match=rf"127\.0\.0\.1.* cut after {half:,} of .*--archive FILE"):
        prepare("tinyimagenet", root, source=server.source)
    (part,) = (root / ".download").iterdir()
    assert part.read_bytes() == server.content[:half] and list(root.iterdir()) == [part.parent]
    server.sent = len(server.content)
    assert prepare("tinyimagenet", root, source=server.source).train == 2
    assert server.asked == [None, f"bytes={half}-"]
    assert not part.parent.exists()


def test_a_whole_part_is_not_downloaded_again(tmp_path: Path, server: Server) -> None:
    part = tmp_path / f"{server.source.filename}.part"
    part.write_bytes(server.content)
    assert fetch(server.source, tmp_path).read_bytes() == server.content
    assert server.asked == [f"bytes={len(server.content)}-"] and not part.exists()


@pytest.mark.parametrize("have", ["another file", "more than there is"])
def test_a_part_of_something_else_is_given_up(tmp_path: Path, server: Server, have: str) -> None:
    part = tmp_path / "folder" / f"{server.source.filename}.part"
    part.parent.mkdir()
    if have == "another file":
        part.write_bytes(b"?" * 100)
        with pytest.raises(UserError, match="not TinyImageNet's official archive"):
            fetch(server.source, part.parent)
        assert not part.parent.exists()
    else:
        part.write_bytes(server.content + b"?")
    assert fetch(server.source, part.parent).read_bytes() == server.content
    assert [path.name for path in part.parent.iterdir()] == [server.source.filename]


def test_an_answer_without_a_byte_leaves_nothing(tmp_path: Path, server: Server) -> None:
    server.sent = 0
    with pytest.raises(UserError, match=r"cut after 0 of .* Nothing came; try again later"):
        prepare("tinyimagenet", tmp_path / "root", source=server.source)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_no_part(tmp_path: Path, server: Server) -> None:
    part = tmp_path / "folder" / f"{server.source.filename}.part"
    part.parent.mkdir()
    part.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        fetch(server.source, part.parent)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("begun", [False, True], ids=["no answer", "in the middle"])
def test_an_error_of_the_network_without_a_class_of_its_own_keeps_the_part(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    read, half = http.client.HTTPResponse.read, len(server.content) // 2
    part = tmp_path / f"{server.source.filename}.part"
    reads: list[int] = []

    def fail(*_: object) -> bytes:
        raise OSError(113, "No route to host")

    def read_once(self: http.client.HTTPResponse, _: int) -> bytes:
        reads.append(half)
        return read(self, half) if len(reads) == 1 else fail()

    if begun:
        monkeypatch.setattr(http.client.HTTPResponse, "read", read_once)
    else:
        part.write_bytes(server.content[:half])
        monkeypatch.setattr(http.client.HTTPConnection, "getresponse", fail)
    message = rf"cannot download .*No route to host\. {half:,} bytes are kept in .*goes on from"
    with pytest.raises(UserError, match=message):
        fetch(server.source, tmp_path)
    monkeypatch.undo()
    assert fetch(server.source, tmp_path).read_bytes() == server.content


def test_a_wrong_checksum_leaves_nothing(tmp_path: Path, server: Server) -> None:
    server.content = server.content[:-1] + b"?"
    md5 = hashlib.md5(server.content, usedforsecurity=False).hexdigest()
    with pytest.raises(UserError, match=f"not TinyImageNet's official archive.*md5 {md5}"):
        prepare("tinyimagenet", tmp_path / "root", source=server.source)
    assert list(tmp_path.iterdir()) == []


def test_a_verified_archive_is_not_downloaded_again(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("isofast.data.prepare.extract_tinyimagenet", full)
        with pytest.raises(UserError, match=r"No space left.*downloaded is kept in .*\.download"):
            prepare("tinyimagenet", root, source=server.source)
    kept = root / ".download" / server.source.filename
    assert kept.read_bytes() == server.content
    assert [path.name for path in root.iterdir()] == [".download"]
    before = server.requests
    assert prepare("tinyimagenet", root, source=server.source).train == 2
    assert server.requests == before
    assert not kept.exists()
    # one that the user has put into the root is used, and stays the user's
    other = tmp_path / "other"
    other.mkdir()
    (other / server.source.filename).write_bytes(server.content)
    assert prepare("tinyimagenet", other, source=server.source).train == 2
    assert server.requests == before
    assert (other / server.source.filename).exists()


def test_half_an_archive_of_a_killed_download_is_replaced(tmp_path: Path, server: Server) -> None:
    folder = tmp_path / ".download"
    folder.mkdir()
    (folder / server.source.filename).write_bytes(server.content[:100])
    assert fetch(server.source, folder).read_bytes() == server.content


def test_a_line_and_no_bar_in_log_files(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare("tinyimagenet", tmp_path / "root", source=server.source)
    assert capsys.readouterr() == ("", f"downloading {server.source.url}\n")


def test_hosts_that_do_not_answer(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{silent.getsockname()[1]}/x.zip"
        refused = replace(server.source, url=closed)
        with pytest.raises(UserError, match=f"cannot download {closed}: .*refused"):
            fetch(refused, tmp_path / "folder")
        silent.listen()
        monkeypatch.setattr(download, "_SILENCE_S", 0.2)
        with pytest.raises(UserError, match=f"cannot download {closed}: .*timed out"):
            fetch(refused, tmp_path / "folder")
    missing = replace(server.source, url=server.source.url.replace("tiny", "missing"))
    with pytest.raises(UserError, match=r"cannot download .*missing.*404.*--archive FILE"):
        fetch(missing, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "tinyimagenet"])
def test_the_command_names_the_address_and_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    def unreachable(*_: object) -> object:
        raise socket.gaierror(-2, "Name or service not known")

    # also where this machine could reach it
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    assert main(["prepare", name, "--root", str(tmp_path / "root")]) == 2
    message = capsys.readouterr().err
    assert f"cannot download {sources.source_of(name).url}" in message
    assert "--archive FILE" in message and "Traceback" not in message
    assert list(tmp_path.iterdir()) == []
