"""Downloads from a real local server: verified, not repeated, all or nothing."""

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torchvision.datasets import CIFAR10, CIFAR100, STL10

from isofast.data import official
from isofast.data.prepare import prepare
from isofast.errors import UserError

from .test_official import md5, tiny_files, write_archive

NAME = "tiny-imagenet-200.zip"


class Server(http.server.ThreadingHTTPServer):
    """Serves ``content``, but cuts the connection after ``sent`` bytes of it."""

    requests = 0

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.sent = content, len(content)


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests += 1
        if self.server.content is None:
            self.send_error(404)
            return
        if self.server.content == "silence":
            time.sleep(3)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        self.wfile.write(self.server.content[: self.server.sent])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    content = write_archive(tmp_path / NAME, tiny_files()).read_bytes()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(content) as running:
        url = f"http://127.0.0.1:{running.server_port}/{NAME}"
        monkeypatch.setattr(official, "_TINYIMAGENET", (url, NAME, md5(content)))
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_a_data_set_is_downloaded_and_made(tmp_path, server):
    root = tmp_path / "root"
    # left behind by a killed command
    (root / ".download").mkdir(parents=True)
    (root / ".download" / NAME).write_bytes(server.content[:100])
    counts = prepare("tinyimagenet", root)
    assert (counts.classes, counts.train, counts.val) == (2, 6, 4)
    hidden = {".isofast-prepared.json", ".isofast-checked-train.json", ".isofast-checked-val.json"}
    assert {path.name for path in root.iterdir()} == {"train", "val"} | hidden
    before = server.requests
    assert prepare("tinyimagenet", root).already_there
    assert server.requests == before > 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"sent": 0}, ""),
        ({"sent": 1000}, ""),
        ({"content": b"something else", "sent": 14}, "corrupted"),
        ({"content": None}, "404"),
        ({"content": "silence"}, "timed out"),
    ],
    ids=str,
)
def test_a_failed_download_leaves_nothing(tmp_path, server, monkeypatch, change, match):
    monkeypatch.setattr(official, "_SILENCE_S", 1.0)
    whole, root = vars(server).copy(), tmp_path / "root"
    vars(server).update(change)
    address = r"cannot download http://127\.0\.0\.1"
    with pytest.raises(UserError, match=rf"{address}.*{match}.*--archive FILE"):
        prepare("tinyimagenet", root)
    assert not any(root.iterdir()) and socket.getdefaulttimeout() is None
    server.content, server.sent = whole["content"], whole["sent"]
    assert prepare("tinyimagenet", root).train == 6


def test_an_archive_beside_the_data_is_used_and_kept(tmp_path, server):
    assert prepare("tinyimagenet", tmp_path).train == 6
    assert server.requests == 0 and (tmp_path / NAME).exists()


URLS = {"cifar10": CIFAR10.url, "cifar100": CIFAR100.url, "stl10": STL10.url}
URLS["tinyimagenet"] = f"http://cs231n.stanford.edu/{NAME}"


@pytest.mark.parametrize("name", URLS)
def test_the_command_names_the_address_and_the_way_out(tmp_path, monkeypatch, refused, name):
    def unreachable(*_: object) -> object:
        raise socket.gaierror(-2, "Name or service not known")

    # even if this machine is online
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    words = f"cannot download {URLS[name]}", "--archive FILE"
    refused(["prepare", name, "--root", tmp_path / "root"], *words)
    assert not any((tmp_path / "root").iterdir())
