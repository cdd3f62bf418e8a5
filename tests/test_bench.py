"""The benchmarks refuse what they cannot time fairly, and leave earlier results alone."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from .conftest import ROOT, load_script


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
