"""Benchmarks refuse what they cannot time fairly, keep earlier results and pair their ratios."""

import importlib
import sys
from types import ModuleType

import pytest

from ..support.runs import ROOT, call


@pytest.fixture(autouse=True)
def _beside_the_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))


@pytest.fixture
def harness() -> ModuleType:
    """bench/harness.py, imported as the scripts import it."""
    return importlib.import_module("harness")


@pytest.mark.parametrize("name", ["kernels", "data"])
def test_the_interpreter_is_not_timed(name, monkeypatch, capsys):
    script = importlib.import_module(name)
    monkeypatch.setattr(script, "INTERPRET", True)
    with pytest.raises(SystemExit, match="2"):
        script.main([])
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_without_git_the_commit_is_unknown(harness, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert harness.environment()["commit"] == "unknown"


@pytest.mark.slow
def test_only_questions_with_green_tests_are_timed_and_no_result_is_overwritten(
    harness, tmp_path, capsys
):
    file = tmp_path / "test_both.py"
    file.write_text("def test_good():\n    pass\n\ndef test_bad():\n    assert False\n")
    called = set()

    def question(name: str, *tests: str) -> object:
        contender = harness.Contender("who", lambda: called.add(name))
        selected = [str(file), "-k", name, *tests]
        return harness.Question(name, selected, lambda: ([contender], harness.Work(bytes=100)))

    good, bad, results = question("good"), question("bad"), tmp_path / "results"
    # on its own, a missing file would make pytest load every conftest.py in the repository
    red = [bad, question("absent"), question("good", str(tmp_path / "test_missing.py"))]
    assert harness.run("some", red, 2, results) == 1
    assert not results.exists() and not called
    assert harness.run("some", [good, bad], 2, results) == 1
    assert called == {"good"}
    assert capsys.readouterr().out.count(f"bad: {harness.NOT_TIMED}") == 2
    kept = {path.name: path.read_bytes() for path in results.iterdir()}
    assert set(kept) == {"some-001.csv", "some-001.png"}
    assert b"# commit: " in kept["some-001.csv"] and b"\ngood,who,2," in kept["some-001.csv"]

    # the next record is numbered last even where older ones were deleted
    (results / "some-001.csv").rename(results / "some-004.csv")
    assert harness.run("some", [good], 2, results) == 0
    now = {path.name: path.read_bytes() for path in results.iterdir()}
    assert set(now) == {"some-001.png", "some-004.csv", "some-005.csv", "some-005.png"}
    assert now["some-004.csv"] == kept["some-001.csv"]
    assert now["some-001.png"] == kept["some-001.png"]


def test_the_notes_have_the_paired_ratio():
    """When rounds slow down together, the ratio of medians is not the median of ratios."""
    bench = importlib.import_module("data")
    first, second = (
        bench.Contender(name, lambda: None, note, times_ms)
        for name, note, times_ms in (
            ("first", "", [10.0, 30.0, 60.0, 70.0, 80.0]),
            ("second", "decoded before", [5.0, 10.0, 15.0, 14.0, 80.0]),
        )
    )
    bench.add_speeds([first, second], 64)
    assert first.note == "1,067 images/s"
    ratio = "x3.00 [1.40, 4.60] of first (paired)"
    assert second.note == f"4,571 images/s; {ratio}; decoded before"


@pytest.mark.slow
def test_an_absent_peer_is_named_and_left_out(tmp_path):
    absent = "import sys; sys.modules['lightly'] = None; import peers; sys.exit(peers.main())"
    sizes = ["--batch", "8", "--width", "4", "--workers", "1", "--rounds", "2", "--steps", "1"]
    program = [sys.executable, "-c", absent, "--only", "fp32", *sizes]
    printed = call(program, PYTHONPATH=str(ROOT / "bench"), BENCH_RESULTS=str(tmp_path)).stdout
    assert "lightly is not installed" in printed and "  isofast, fp32 " in printed
    assert "lightly, fp32" not in printed
    assert "lightly" not in (tmp_path / "peers-001.csv").read_text()
    program = [sys.executable, "-c", absent, "--only", "lightly"]
    printed = call(program, code=1, PYTHONPATH=str(ROOT / "bench")).stdout
    assert "lightly is not installed" in printed
