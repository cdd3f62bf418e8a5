"""Downloads, from a real server on this machine: verified, not repeated, or nothing at all."""

import hashlib
import http.server
import io
import socket
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, STL10

from isofast.cli import main
from isofast.data import official
from isofast.data.prepare import prepare
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
NAME = "tiny-imagenet-200.zip"


class Server(http.server.ThreadingHTTPServer):
    """Serves one file; ``sent`` is how much of it goes out before the connection is cut."""

    content = OFFICIAL
    sent = len(OFFICIAL)
    requests = 0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests += 1
        if "missing" in self.path:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        self.wfile.write(self.server.content[: self.server.sent])

    def log_message(self, *_: object) -> None:
        pass


def point_to(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Where the official archive is said to be, and what it is."""
    md5 = hashlib.md5(OFFICIAL, usedforsecurity=False).hexdigest()
    monkeypatch.setattr(official, "_TINYIMAGENET", (url, NAME, md5))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server() as running:
        point_to(monkeypatch, f"http://127.0.0.1:{running.server_port}/{NAME}")
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_a_data_set_is_downloaded_and_made(tmp_path: Path, server: Server) -> None:
    root = tmp_path / "root"
    counts = prepare("tinyimagenet", root)
    assert (counts.classes, counts.train, counts.val) == (2, 2, 2)
    hidden = {".isofast-prepared.json", ".isofast-checked-train.json", ".isofast-checked-val.json"}
    assert {path.name for path in root.iterdir()} == {"train", "val"} | hidden
    before = server.requests
    assert prepare("tinyimagenet", root).already_there
    assert server.requests == before > 0


@pytest.mark.parametrize("sent", [0, len(OFFICIAL) // 2])
def test_a_cut_download_leaves_nothing(tmp_path: Path, server: Server, sent: int) -> None:
    server.sent = sent
    with pytest.raises(UserError, match=r"cannot download http://127\.0\.0\.1.*--archive FILE"):
        prepare("tinyimagenet", tmp_path / "root")
    assert list(tmp_path.iterdir()) == []
    server.sent = len(OFFICIAL)
    assert prepare("tinyimagenet", tmp_path / "root").train == 2


def test_a_wrong_checksum_leaves_nothing(tmp_path: Path, server: Server) -> None:
    server.content = OFFICIAL[:-1] + b"?"
    with pytest.raises(UserError, match=r"cannot download .*corrupted.*--archive FILE"):
        prepare("tinyimagenet", tmp_path / "root")
    assert list(tmp_path.iterdir()) == []


def test_an_archive_beside_the_data_is_used_and_kept(tmp_path: Path, server: Server) -> None:
    (tmp_path / NAME).write_bytes(OFFICIAL)
    assert prepare("tinyimagenet", tmp_path).train == 2
    assert server.requests == 0 and (tmp_path / NAME).exists()


def test_half_an_archive_of_a_killed_download_is_replaced(tmp_path: Path, server: Server) -> None:
    (tmp_path / ".download").mkdir()
    (tmp_path / ".download" / NAME).write_bytes(OFFICIAL[:100])
    assert prepare("tinyimagenet", tmp_path).train == 2


def test_hosts_that_do_not_answer(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{silent.getsockname()[1]}/x.zip"
        point_to(monkeypatch, closed)
        with pytest.raises(UserError, match=f"cannot download {closed}: .*refused"):
            prepare("tinyimagenet", tmp_path / "root")
        silent.listen()
        monkeypatch.setattr(official, "_SILENCE_S", 0.2)
        with pytest.raises(UserError, match=f"cannot download {closed}: .*timed out"):
            prepare("tinyimagenet", tmp_path / "root")
    point_to(monkeypatch, f"http://127.0.0.1:{server.server_port}/missing.zip")
    with pytest.raises(UserError, match=r"cannot download .*missing.*404"):
        prepare("tinyimagenet", tmp_path / "root")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("cifar10", CIFAR10.url),
        ("cifar100", CIFAR100.url),
        ("stl10", STL10.url),
        ("tinyimagenet", "http://cs231n.stanford.edu/tiny-imagenet-200.zip"),
    ],
)
def test_the_command_names_the_address_and_the_way_out(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    url: str,
) -> None:
    def unreachable(*_: object) -> object:
        raise socket.gaierror(-2, "Name or service not known")

    # also where this machine could reach it
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    assert main(["prepare", name, "--root", str(tmp_path / "root")]) == 2
    message = capsys.readouterr().err
    assert f"cannot download {url}" in message
    assert "--archive FILE" in message and "Traceback" not in message
    assert list(tmp_path.iterdir()) == []
