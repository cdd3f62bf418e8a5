"""What an interrupted table leaves running: nothing, whatever its launcher does with signals."""

import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from .test_reproduce import command, start, wait_until

pytestmark = pytest.mark.slow

# A launcher that passes no signal on, and whose process takes no notice of SIGINT and SIGTERM.
DEAF = """
import os, pathlib, signal, subprocess, sys, time
if sys.argv[1] == "launcher":
    own_session = sys.argv[2] == "own-session"
    subprocess.Popen([sys.executable, __file__, "rank"], start_new_session=own_session).wait()
else:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    note = pathlib.Path(__file__).with_name("part")
    note.write_text(str(os.getpid()))
    note.rename(note.with_name("pid"))
    time.sleep(100)
"""


@pytest.mark.parametrize(
    ("number", "session"), [(signal.SIGINT, "own-session"), (signal.SIGTERM, "same-session")]
)
def test_an_interruption_leaves_nothing_running(
    number: signal.Signals, session: str, digits: Path, tmp_path: Path
) -> None:
    script, note = tmp_path / "launcher.py", tmp_path / "pid"
    script.write_text(DEAF)
    launcher = f"{sys.executable} {script} launcher {session}"
    process = start(command(digits, tmp_path, "--launcher", launcher))
    wait_until(note.exists, process)
    child = int(note.read_text())
    # the second and third, of one who does not want to wait, come to SIGTERM and SIGKILL at once
    for _ in range(3):
        process.send_signal(number)
        time.sleep(0.5)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in err
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie"


def test_what_is_interrupted_may_stop_by_itself(digits: Path, tmp_path: Path) -> None:
    script, note = tmp_path / "launcher.py", tmp_path / "pid"
    told = tmp_path / "told"
    script.write_text(
        "import pathlib, sys, time\n"
        "try:\n"
        f"    pathlib.Path({str(note)!r}).touch()\n"
        "    time.sleep(100)\n"
        "except KeyboardInterrupt:\n"
        "    time.sleep(1)\n"
        f"    pathlib.Path({str(told)!r}).touch()\n"
    )
    process = start(command(digits, tmp_path, "--launcher", f"{sys.executable} {script}"))
    wait_until(note.exists, process)
    # of a terminal that is closed
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 130 and told.exists()
