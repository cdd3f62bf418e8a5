"""bench/gpu_day.py: the outcomes of stages of real programs, and a dry run on a CPU."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from ..support.runs import ROOT, call


@pytest.fixture
def day(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("gpu_day")


def test_a_day_goes_on_after_failures_and_is_taken_up_again(day, tmp_path, monkeypatch):
    """The stage that hangs ignores SIGTERM and has a child process."""
    monkeypatch.setattr(day, "GRACE_S", 0.5)
    done, mended = tmp_path / "done", tmp_path / "mended"
    hang = f"test -f '{mended}' && exit; trap '' TERM; sleep 60 & echo $!; wait; wait"

    def shell(name: str, script: str, *more: str, minutes: float = 1) -> object:
        commands = [["sh", "-c", text] for text in (f"echo {name} >> '{done}'; {script}", *more)]
        return day.Stage(name, minutes, commands)

    stages = [
        shell("good", "echo fine"),
        shell(
            "fails", f"echo the reason; test -f '{mended}' || exit 3", f"echo second >> '{done}'"
        ),
        shell("hangs", hang, minutes=0.02),
        day.Stage("module", 1, [["true"]], ("torch", "no_such_module")),
        day.Stage("program", 1, [["no-such-program"]]),
        day.Stage("gpu", 1, [["true"]], gpu=True),
        shell("last", ""),
    ]
    first = day.run_stages(stages, tmp_path)
    found = {name: (outcome["status"], outcome["exit_code"]) for name, outcome in first.items()}
    assert found == {
        "good": ("passed", 0),
        "fails": ("failed", 3),
        "hangs": ("timed out", None),
        **dict.fromkeys(("module", "program", "gpu"), ("skipped", None)),
        "last": ("passed", 0),
    }
    assert json.loads((tmp_path / "stages.json").read_text()) == first
    whys = [first[name]["why"] for name in ("fails", "module", "program", "gpu")]
    reasons = ["the reason", "no_such_module: No module named", "needs no-such-", "needs a GPU"]
    assert all(why.startswith(reason) for why, reason in zip(whys, reasons, strict=True))
    assert 1.2 < first["hangs"]["seconds"] < 20
    child = int((tmp_path / "03-hangs.log").read_text().split()[-1])
    status = Path(f"/proc/{child}/stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"
    assert done.read_text().split() == ["good", "fails", "hangs", "last"]

    mended.touch()
    second = day.run_stages(stages, tmp_path)
    assert [second[name]["status"] for name in ("fails", "hangs")] == ["passed", "passed"]
    assert second["good"] == first["good"]
    assert done.read_text().split()[4:] == ["fails", "second", "hangs"]
    # selected by number, or with changed commands
    day.run_stages(stages, tmp_path, only=[7])
    day.run_stages([shell("good", "echo other"), *stages[1:]], tmp_path)
    assert done.read_text().split()[7:] == ["last", "good"]


@pytest.mark.long
def test_a_dry_run_of_everything(tmp_path):
    output = tmp_path / "day"
    # limits for a busy machine
    options = ["--dry-run", "--output", str(output), "--minutes", "240"]
    command = [sys.executable, "bench/gpu_day.py", *options]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    outcomes = json.loads((output / "stages.json").read_text())
    skipped = {name for name, outcome in outcomes.items() if outcome["status"] == "skipped"}
    assert skipped == {"kernel-tests", "tests", "memcheck", "racecheck", "initcheck"}
    assert {outcomes[name]["status"] for name in outcomes.keys() - skipped} == {"passed"}
    assert "continuing from" in (output / "11-run.log").read_text()
    page = (output / "summary.md").read_text()
    for text in ("kernels-001.csv", "step-001.csv", "peers-001.csv", "data-001.csv", "| run-ema |"):
        assert text in page
    assert "passed" not in call(command, cwd=ROOT).stdout
    again = json.loads((output / "stages.json").read_text())
    assert all(again[name] == outcomes[name] for name in outcomes.keys() - skipped)
