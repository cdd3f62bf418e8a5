"""Runs asked to stop: saved at that step, with the same exit code under any launcher."""

import fcntl
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from isofast.run.checkpoint import newest_checkpoint
from isofast.training.parallel import close_world, init_world, patient_group
from isofast.training.signals import ECHO_S, Signals, stopped

from ..support.runs import (
    ALONE,
    assert_same_run,
    command_of,
    forked,
    launched,
    opened,
    started,
    train,
    wait_for_step,
)


@pytest.fixture
def config(config_file: Callable[..., Path]) -> Path:
    return config_file(train={"max_steps": 30}, checkpoint={"every_steps": 1000})


@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_has_saved_and_ends_as_one_never_stopped(number, code, config, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(config, whole)
    process = started(config, stopped, step=3)
    process.send_signal(number)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"stopped by {number.name} after step" in printed and "Traceback" not in printed
    assert [path.name[:5] for path in (stopped / "checkpoints").iterdir()] == ["step_"]
    assert not (stopped / "summary.json").exists()
    assert "continuing from" in train(config, stopped)
    assert_same_run(whole, stopped)


@pytest.mark.long
def test_ctrl_c_in_a_terminal_saves_though_the_launcher_adds_a_sigterm(config_file, tmp_path):
    config = config_file(train={"epochs": 99}, checkpoint={"every_steps": 1000})
    process = started(config, tmp_path / "run", ranks=1, step=3, start_new_session=True)
    os.killpg(process.pid, signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    # whichever of the two comes first
    assert re.search(r"stopped by SIG(INT|TERM) after step \d+, which is saved", printed)
    assert newest_checkpoint(tmp_path / "run" / "checkpoints") is not None


@pytest.mark.long
@pytest.mark.parametrize(("ignored", "code"), [(False, 129), (True, 0)])
def test_a_terminal_that_closes(ignored, code, config, tmp_path):
    master, terminal = pty.openpty()

    def attach() -> None:
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        # as nohup does, under which pytest may run itself
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)

    process = opened(
        command_of(config, tmp_path / "run"),
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=attach,
    )
    os.close(terminal)
    wait_for_step(3, tmp_path / "run", process)
    os.close(master)
    assert process.wait(timeout=60) == code
    found = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert found is not None and (found.step == 30) == ignored


COMPILER = """
import os, signal, time
from isofast.methods import Method

class Compiles(Method):
    def loss(self, views):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
        raise ValueError("the compiler was ended by SIGTERM")
"""


@pytest.mark.slow
def test_a_signal_that_ends_a_compiler_too_is_no_failure(config_file, tmp_path, monkeypatch):
    """As when a scheduler sends it to all processes of a job in the first step."""
    (tmp_path / "of_mine.py").write_text(COMPILER)
    monkeypatch.chdir(tmp_path)
    config = config_file(method={"name": "of_mine:Compiles"})
    assert "stopped by SIGTERM after step 0, in a ValueError" in train(
        config, Path("run"), code=143
    )
    assert not Path("run", "summary.json").exists()


STOPS = """
import os, signal
from pathlib import Path
from isofast.methods import Method

class Stops(Method):
    def loss(self, views):
        Path("run", "checkpoints").touch()
        os.kill(os.getpid(), signal.SIGTERM)
        return (views.z1_BD - views.t2_BD).square().mean()
"""


@pytest.mark.slow
def test_a_stopped_run_that_cannot_save_says_so(config_file, tmp_path, monkeypatch):
    """A file in place of the folder of checkpoints."""
    (tmp_path / "stops.py").write_text(STOPS)
    monkeypatch.chdir(tmp_path)
    config = config_file(method={"name": "stops:Stops"}, checkpoint={"every_steps": 1000})
    printed = train(config, Path("run"), code=1)
    assert "could not write the checkpoint" in printed and "which is saved" not in printed


def test_a_run_gives_signals_back():
    """A notebook's event loop hears of Ctrl-C by the wake-up descriptor."""

    def handler(*_: object) -> None:
        pass

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    before = [signal.signal(number, handler) for number in numbers]
    _, writer = pipe = os.pipe()
    os.set_blocking(writer, False)
    wakeup = signal.set_wakeup_fd(writer)
    try:
        with ExitStack() as stack:
            signals = Signals(threading.Event())
            stack.push(signals.__exit__)
            signals.hold(None)
        assert {signal.getsignal(number) for number in numbers} == {handler}
    finally:
        left = signal.set_wakeup_fd(wakeup)
        for number, own in zip(numbers, before, strict=True):
            signal.signal(number, own)
        for end in pipe:
            os.close(end)
    assert left == writer


@pytest.mark.slow
def test_what_several_ranks_are_told_is_one_signal():
    assert forked(_poll_as_all_are_told, environments=launched(2)) == [0, 0]


def _poll_as_all_are_told() -> None:
    world = init_world()
    signals = Signals(threading.Event(), patient_group(world))
    assert [signals.poll(save=world.is_main), signals.poll()] == [(False, None), (True, None)]
    signals._received = signal.SIGHUP
    assert [signals.poll(), signals.poll()] == [(False, None), (True, signal.SIGHUP)]
    close_world()


@pytest.mark.long
def test_ranks_stop_after_the_same_step(config, tmp_path):
    """Only one of them gets the signal."""
    process = started(config, tmp_path / "run", ranks=2, step=3)
    ranks = psutil.Process(process.pid).children(recursive=True)
    (second,) = [rank for rank in ranks if "--local_rank=1" in rank.cmdline()]
    second.send_signal(signal.SIGTERM)
    _, printed = process.communicate(timeout=60)
    assert printed.count("stopped by SIGTERM after step") == 1 and "Traceback" not in printed
    assert "continuing from" in train(config, tmp_path / "run", ranks=2)


@pytest.mark.parametrize(
    ("array", "scontrol", "words"),
    [
        ("", '[ "$*" = "requeue 17" ]', "Slurm was asked to requeue the job"),
        ("17", '[ "$*" = "requeue 17_3" ]', "Slurm was asked to requeue the job"),
        ("", "exit 1", "Slurm will not requeue the job"),
        ("", None, "Slurm will not requeue the job"),
    ],
)
def test_what_becomes_of_a_slurm_job_is_told(array, scontrol, words, tmp_path, monkeypatch):
    if array:
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", array)
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    if scontrol is not None:
        (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{scontrol}\n")
        (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    ended = stopped(signal.SIGUSR1, 3, ALONE)
    assert ended.exit_code == 0 and words in str(ended)


# a step that never ends, like one that waits for a lost peer
STUCK = """
import threading, sys
from isofast.training.signals import Signals
Signals(threading.Event(), grace_s=float(sys.argv[1])).hold(None)
print("ready", flush=True)
threading.Event().wait()
"""
# a run that has saved, and closes its files
CLOSING = """
import threading, time
from contextlib import ExitStack
from isofast.training.signals import Signals
with ExitStack() as stack:
    signals = Signals(threading.Event())
    stack.push(signals)
    signals.hold(None)
    print("ready", flush=True)
    while signals.received is None:
        time.sleep(0.1)
    signals.done()
    time.sleep(8)
    print("closed")
"""
# a long evaluation, then a step
SLOW = """
import threading, time
from contextlib import ExitStack
from types import SimpleNamespace
from isofast.training.signals import Signals
watch = SimpleNamespace(batches=0)
with ExitStack() as stack:
    signals = Signals(threading.Event(), grace_s=1.0)
    stack.push(signals)
    signals.hold(watch)
    print("ready", flush=True)
    while watch.batches < 40:
        time.sleep(0.1)
        watch.batches += 1
    print(signals.poll())
"""


@pytest.mark.slow
@pytest.mark.parametrize(("grace_s", "signals"), [(0.5, 1), (60, 2)])
def test_a_run_that_cannot_stop_is_ended(grace_s, signals):
    process = opened([sys.executable, "-c", STUCK, str(grace_s)], stdout=subprocess.PIPE)
    process.stdout.readline()
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
        time.sleep(ECHO_S + 0.2)
    _, printed = process.communicate(timeout=20)
    assert process.returncode == 143
    assert ("the work was not saved" in printed) == (signals == 1)
    assert ("SIGTERM again: ended without saving" in printed) == (signals == 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "code"),
    [
        (signal.SIGUSR1, signal.SIGTERM, 0),
        (signal.SIGUSR1, signal.SIGINT, 130),
        (signal.SIGTERM, signal.SIGTERM, 143),
    ],
)
def test_slurms_sigterm_after_a_requeue_cuts_nothing_short(first, second, code):
    process = opened([sys.executable, "-c", CLOSING], stdout=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(first)
    time.sleep(ECHO_S + 0.5)
    process.send_signal(second)
    said, _ = process.communicate(timeout=20)
    assert process.returncode == code and ("closed" in said) == (code == 0)


@pytest.mark.slow
def test_a_long_evaluation_is_waited_for():
    process = opened([sys.executable, "-c", SLOW], stdout=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 0 and "SIGTERM" in said
