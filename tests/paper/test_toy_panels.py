"""The toy simulations in processes of their own: what ends them, and that nothing is left."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from isofast.errors import RunError
from isofast.paper.toy import Toy
from isofast.paper.toy_panels import Panel, run_panels

pytestmark = pytest.mark.slow

# `quick` counts as the longest, so that it is the first to be done; three are left for two workers
QUICK = 'Panel("quick", Toy(loss="euclidean", outputs=2, steps=2000))'
LONG = 'Panel(name, Toy(loss="euclidean", inputs=600, outputs=600, steps=1999, lr=1e-6))'
PANELS = f"""
from isofast.paper.toy_panels import Panel, run_panels
from isofast.paper.toy import Toy
panels = [{QUICK}, *({LONG} for name in "abc")]
run_panels(panels, workers=2, done=lambda name: print(name, flush=True))
"""
needs_proc = pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc: not Linux")


def start(*arguments: str) -> "subprocess.Popen[str]":
    """Python in a session of its own, which hears SIGINT wherever the tests were started."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def workers_of(session: int) -> list[int]:
    """The processes of a session that were spawned to simulate, once they would hear SIGINT."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            of_session = folder.name.isdigit() and os.getsid(int(folder.name)) == session
            if of_session and b"spawn_main" in (folder / "cmdline").read_bytes():
                caught = re.search(r"^SigCgt:\s*(\w+)", (folder / "status").read_text(), re.M)
                if caught and int(caught[1], 16) & 1 << signal.SIGINT - 1:
                    found.append(int(folder.name))
        except OSError:
            continue
    return found


def wait_until(holds: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    while not holds():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def interrupt(process: "subprocess.Popen[str]") -> str:
    """Ctrl-C, as a terminal sends it to all processes; what was told before the end."""
    os.killpg(process.pid, signal.SIGINT)
    try:
        _, told = process.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        pytest.fail("still running 20 s after Ctrl-C")
    assert workers_of(process.pid) == []
    return told


@pytest.mark.slow
@needs_proc
def test_ctrl_c_ends_a_figure_while_its_workers_start(tmp_path: Path) -> None:
    figure = ("theory", "figure2", "--workers", "2", "--steps", "20000", "--output", str(tmp_path))
    process = start("-m", "isofast.cli", *figure)
    wait_until(lambda: len(workers_of(process.pid)) == 2, process)
    told = interrupt(process)
    assert process.returncode == 130 and "Traceback" not in told
    # nothing is kept
    assert told.endswith("interrupted; the same command starts over\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@needs_proc
def test_ctrl_c_ends_simulations_that_run_and_that_wait() -> None:
    process = start("-c", PANELS)
    assert process.stdout is not None and process.stdout.readline() == "quick\n"
    told = interrupt(process)
    # Python's own, of the parent alone
    assert told.count("Traceback") == 1 and told.endswith("KeyboardInterrupt\n")


def test_a_simulation_that_fails_ends_the_others() -> None:
    diverging = Panel("diverging", Toy(loss="euclidean", steps=2000, lr=9))
    long = [
        Panel(name, Toy(loss="euclidean", inputs=600, outputs=600, steps=1999, lr=1e-6))
        for name in "abc"
    ]
    others = {*multiprocessing.active_children()}
    began = time.monotonic()
    with pytest.raises(RunError, match="give a smaller --lr"):
        run_panels([diverging, *long], workers=2, done=lambda name: None)
    # the pool's own thread asks for their exit codes too, so that a join may come too late for one
    while {*multiprocessing.active_children()} - others:
        # any of the others takes longer by itself
        assert time.monotonic() - began < 60
        time.sleep(0.05)
