"""Two `prepare` on one root at a time: the second waits, says so, and then does what is left."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from isofast.data import prepare as module
from isofast.data.prepare import PreparedCounts, prepare
from isofast.errors import UserError

Pair = tuple[Future[PreparedCounts], Future[PreparedCounts]]
# seconds that nothing here comes near, unless it hangs
LONG = 30


@pytest.fixture
def start_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Pair]]:
    """Start a command that fails or not, and one that is there while the first still builds."""
    threads = ThreadPoolExecutor(2)
    going_on = threading.Event()
    write = module._write_digits
    said: list[str] = []

    def start(root: Path, *, fails: bool) -> Pair:
        building = threading.Event()

        def build(folder: Path) -> None:
            # only the first build is held up
            if not building.is_set():
                building.set()
                assert going_on.wait(LONG)
                if fails:
                    raise UserError("spoiled")
            write(folder)

        monkeypatch.setattr(module, "_write_digits", build)
        first = threads.submit(prepare, "digits", root)
        assert building.wait(LONG)
        second = threads.submit(prepare, "digits", root)
        ends = time.monotonic() + LONG
        while "waiting" not in "".join(said) and not second.done() and time.monotonic() < ends:
            said.append(capsys.readouterr().err)
            time.sleep(0.01)
        assert "".join(said) == f"another isofast prepare works on {root}; waiting for it to end\n"
        assert not second.done()
        going_on.set()
        return first, second

    yield start
    going_on.set()
    threads.shutdown()


def test_the_second_finds_what_the_first_has_made(
    tmp_path: Path, start_two: Callable[..., Pair]
) -> None:
    first, second = start_two(tmp_path / "root", fails=False)
    assert not first.result(LONG).already_there
    assert second.result(LONG).already_there


def test_the_second_does_what_the_first_has_failed_at(
    tmp_path: Path, start_two: Callable[..., Pair]
) -> None:
    """The first removes the root that it made, with its parents, and the second waits for that."""
    root = tmp_path / "new" / "root"
    first, second = start_two(root, fails=True)
    with pytest.raises(UserError, match="spoiled"):
        first.result(LONG)
    assert not second.result(LONG).already_there
    assert prepare("digits", root).already_there


def test_a_root_that_another_failed_to_fill_is_removed_by_the_last(
    tmp_path: Path, start_two: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise UserError("counted wrong")

    monkeypatch.setattr(module, "write_manifest", fail)
    first, second = start_two(tmp_path / "new" / "root", fails=True)
    for command, message in ((first, "spoiled"), (second, "counted wrong")):
        with pytest.raises(UserError, match=message):
            command.result(LONG)
    assert list(tmp_path.iterdir()) == []
