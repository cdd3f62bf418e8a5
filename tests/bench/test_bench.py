"""The benchmarks refuse what they cannot time fairly, and keep earlier results."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from ..conftest import ROOT, load_script


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """bench/harness.py, found as its scripts find it."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    yield importlib.import_module("harness")


@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize("name", ["kernels", "data"])
def test_the_interpreter_is_not_timed(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_script(ROOT / "bench" / f"{name}.py")
    monkeypatch.setattr(script, "INTERPRET", True)
    with pytest.raises(SystemExit, match="2"):
        script.main([])
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_without_git_the_commit_is_unknown(
    harness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert harness.environment()["commit"] == "unknown"


def test_only_green_tests_pass(harness: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "test_both.py"
    file.write_text("def test_good():\n    pass\n\ndef test_bad():\n    assert False\n")
    assert harness.tests_pass([str(file), "-k", "good"])
    # alone, a missing file would have pytest load every conftest.py of the repository
    missing = [str(file), "-k", "good", str(tmp_path / "test_missing.py")]
    for paths in ([str(file)], [str(file), "-k", "absent"], missing):
        assert not harness.tests_pass(paths)


def test_only_questions_with_green_tests_are_timed_and_no_result_is_overwritten(
    harness: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "test_both.py"
    file.write_text("def test_good():\n    pass\n\ndef test_bad():\n    assert False\n")
    called = set()

    def question(name: str) -> object:
        contender = harness.Contender("who", lambda: called.add(name))
        tests = [str(file), "-k", name]
        return harness.Question(name, tests, lambda: ([contender], harness.Work(bytes=100)))

    both, results = [question("good"), question("bad")], tmp_path / "results"
    assert harness.run("some", both[1:], 2, results) == 1
    assert not results.exists()
    assert harness.run("some", both, 2, results) == 1
    assert called == {"good"}
    assert capsys.readouterr().out.count(f"bad: {harness.NOT_TIMED}") == 2
    kept = {path.name: path.read_bytes() for path in results.iterdir()}
    assert set(kept) == {"some-001.csv", "some-001.png"}
    assert b"# commit: " in kept["some-001.csv"] and b"\ngood,who,2," in kept["some-001.csv"]

    assert harness.run("some", both[:1], 2, results) == 0
    now = {path.name: path.read_bytes() for path in results.iterdir()}
    assert set(now) - set(kept) == {"some-002.csv", "some-002.png"}
    assert all(now[name] == content for name, content in kept.items())
