"""Stages on a GPU, tried without one: real processes, a failure, a limit, a second call."""

import json
import sys
from pathlib import Path

import pytest

from ..support.runs import ROOT, call

sys.path.append(str(ROOT / "bench"))
import gpu_day


def test_a_stage_that_fails_or_takes_too_long_does_not_end_the_day(tmp_path: Path) -> None:
    script = tmp_path / "stage.py"
    script.write_text(
        "import pathlib, sys, time\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "print('said', path.name)\n"
        "if path.name == 'slow': time.sleep(60)\n"
        "tries = int(path.read_text()) if path.exists() else 0\n"
        "path.write_text(str(tries + 1))\n"
        "sys.exit(path.name == 'mends' and tries == 0)\n"
    )
    stages = [
        gpu_day.Stage(name, minutes, "", f"{script} {{output}}/{name}", needs)
        for name, minutes, needs in (
            ("good", 28, ()),
            ("mends", 28, ()),
            ("slow", 1, ()),
            ("lacks", 28, ("no_such_package",)),
        )
    ] + [gpu_day.Stage("gpu", 28, "never")]
    out = tmp_path / "out"
    day = ["--output", str(out), "--dry-run", "--minutes"]
    # a limit of three seconds for the slow one
    assert gpu_day.main([*day, "1.4"], stages) == 1
    done = json.loads((out / "stages.json").read_text())
    outcomes = [row["outcome"] for row in done.values()]
    assert outcomes[:3] == ["passed", "failed", "out of time"]
    assert outcomes[3:] == ["left out: no no_such_package", "left out: needs a GPU"]
    assert "said good" in (out / "1-good.log").read_text()
    assert gpu_day.main([*day, "1.4", "--stage", "2", "4"], stages) == 1
    assert gpu_day.main([*day, "1.4", "--stage", "1"], stages) == 1
    assert ((out / "good").read_text(), (out / "mends").read_text()) == ("2", "2")
    assert gpu_day.main([*day, "1.4"], stages[:2]) == 1
    assert (out / "good").read_text() == "2"
    assert "| mends | passed |" in (out / "summary.md").read_text()


@pytest.mark.slow
def test_a_dry_run_goes_through_the_stages(tmp_path: Path) -> None:
    """But for the step, which test_bench runs."""
    command = [sys.executable, "bench/gpu_day.py", "--output", str(tmp_path), "--dry-run"]
    call([*command, "--stage", "1", "2", "5", "10", "11"], cwd=ROOT)
    done = json.loads((tmp_path / "stages.json").read_text())
    passed = [name for name, row in done.items() if row["outcome"] == "passed"]
    assert passed == ["tests", "kernels", "run", "run-on"]
    page = (tmp_path / "summary.md").read_text()
    assert "## kernels-" in page and '"steps": 4' in page
