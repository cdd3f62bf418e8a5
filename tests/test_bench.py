"""The benchmarks refuse what they cannot time fairly, and leave earlier results alone."""

import importlib
from collections.abc import Iterator
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
