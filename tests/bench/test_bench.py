"""The benchmarks refuse what they cannot time fairly, and leave earlier results alone."""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ..conftest import ROOT, load_script


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """bench/harness.py, found as its scripts find it."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    yield importlib.import_module("harness")


@pytest.fixture
def script(harness: ModuleType, request: pytest.FixtureRequest) -> ModuleType:
    """The script of bench/ that the test is parametrized with."""
    return load_script(ROOT / "bench" / f"{request.param}.py")


@pytest.fixture
def nothing_is_timed(harness: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("timed, or about to be")

    for name in ("tests_pass", "compare", "write"):
        monkeypatch.setattr(harness, name, refuse)


@pytest.mark.usefixtures("nothing_is_timed")
@pytest.mark.parametrize("script", ["kernels", "data"], indirect=True)
def test_the_interpreter_is_not_timed(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "INTERPRET", True)
    with pytest.raises(SystemExit) as stopped:
        script.main([])
    assert stopped.value.code == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err


@pytest.mark.usefixtures("nothing_is_timed")
@pytest.mark.parametrize(
    ("script", "option", "value", "least"),
    [
        ("kernels", "--batch", "0", "1"),
        ("kernels", "--batch", "-3", "1"),
        ("kernels", "--features", "0", "1"),
        ("kernels", "--rounds", "1", "2"),
        ("kernels", "--rounds", "many", "2"),
        ("passes", "--width", "0", "4"),
        ("passes", "--rounds", "1", "2"),
        ("data", "--batch", "0", "1"),
        ("data", "--workers", "0", "1"),
        ("data", "--rounds", "1", "2"),
    ],
    indirect=["script"],
)
def test_sizes_that_cannot_be_timed_are_refused(
    script: ModuleType, option: str, value: str, least: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        script.main([f"{option}={value}"])
    assert stopped.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert all(part in message for part in (option, repr(value), f"at least {least}"))


def test_without_git_the_commit_is_unknown(
    harness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert harness.environment()["commit"] == "unknown"


def test_only_green_tests_pass(harness: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "test_both.py").write_text(
        "def test_good():\n    pass\n\ndef test_bad():\n    assert False\n"
    )
    file = str(tmp_path / "test_both.py")
    assert harness.tests_pass([file, "-k", "good"])
    # named alone, it would have pytest load every conftest.py of the repository
    missing = [file, "-k", "good", str(tmp_path / "test_missing.py")]
    for paths in ([file], [file, "-k", "absent"], missing):
        assert not harness.tests_pass(paths)


def test_a_result_is_never_written_over_an_earlier_one(
    harness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    # measuring them takes seconds
    monkeypatch.setattr(harness, "limits", lambda: (1e6, 1e6))

    def write(median_ms: float) -> dict[str, bytes]:
        timing = harness.Timing("what", "who", 3, median_ms, 1.0, 9.0, bytes=100, floor_ms=0.5)
        return {path.name: path.read_bytes() for path in harness.write("some", [timing])}

    first, second = write(2.0), write(4.0)
    assert set(first) == {"some-001.csv", "some-001.png"}
    assert set(second) == {"some-002.csv", "some-002.png"}
    kept = {path.name: path.read_bytes() for path in (tmp_path / "results").iterdir()}
    assert kept == first | second
    assert (
        b"# commit: " in first["some-001.csv"]
        and b"what,who,3,2,1,9,100,0.5" in first["some-001.csv"]
    )


@pytest.mark.parametrize("script", ["kernels"], indirect=True)
@pytest.mark.parametrize(
    "green", [set(), {"first"}, {"first", "second"}], ids=["none", "one", "both"]
)
def test_an_operation_whose_tests_are_red_is_not_timed(
    green: set[str],
    script: ModuleType,
    harness: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked, called = [], set()

    def contenders_of(name: str) -> Callable[..., Any]:
        contender = script.Contender(name, lambda: called.add(name))
        return lambda problem: ([contender], problem.work(problem.w))

    def tests_pass(paths: list[str]) -> bool:
        asked.append(paths[0])
        return paths[0] in green

    names = ("first", "second")
    monkeypatch.setattr(script, "QUESTIONS", {name: (name, contenders_of(name)) for name in names})
    monkeypatch.setattr(script, "TESTS", {name: [name] for name in names})
    monkeypatch.setattr(harness, "tests_pass", tests_pass)
    monkeypatch.setattr(harness, "limits", lambda: (1e6, 1e6))
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    code = script.main(["--batch", "4", "--features", "4", "--rounds", "2"])
    assert asked == list(names)
    assert called == green
    assert capsys.readouterr().out.count(script.NOT_TIMED) == 2 - len(green)
    assert code == (0 if green == set(names) else 1)
    written = [path.name for path in tmp_path.glob("results/*.csv")]
    assert written == (["kernels-001.csv"] if green else [])
