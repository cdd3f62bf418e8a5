"""Real machine faults: what a run reports, and what it leaves behind."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from types import SimpleNamespace

import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from isofast.distributed import World
from isofast.errors import RunError
from isofast.run.checkpoint import newest_checkpoint
from isofast.run.metrics import read_metrics
from isofast.training import heartbeat
from isofast.training.faults import in_words

from ..support.runs import assert_same_run, call, fit_apart, started, train

pytestmark = pytest.mark.slow


def one_message(printed: str, *words: str) -> None:
    assert "Traceback" not in printed, printed
    (message,) = [text for text in printed.split("\n") if text.startswith("error")]
    assert all(word in message for word in (*words, "rerun the same command")), message


NCCL = (
    "NCCL error in: x.cpp:77, unhandled system error (run with NCCL_DEBUG=INFO for details)\n"
    "ncclSystemError: System call (e.g. socket, malloc) or external library call failed.\n"
    "Last error:\nError while creating shared memory segment /dev/shm/nccl-x (size 33030528)"
)
LOST = "NCCL error in: x, remote process exited or there was a network error. Last error:"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.distributed.DistBackendError(NCCL), "NCCL failed: Error while creating shared memo"),
        (torch.distributed.DistBackendError(LOST), "another process of the run is gone"),
        (torch.distributed.DistBackendError("NCCL error in: x"), "NCCL failed: NCCL error in: x"),
        (RuntimeError("Gloo connectFullMesh failed with timed out"), "GLOO_SOCKET_IFNAME="),
        *(
            (kind(text), "the GPU is out of memory")
            for kind, text in (
                (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2 GiB"),
                (torch.AcceleratorError, "CUDA error: out of memory"),
                (RuntimeError, "Triton Error [CUDA]: out of memory"),
                (
                    RuntimeError,
                    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`",
                ),
                (MemoryError, "Can't allocate 1024 bytes on device 0."),
            )
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "this machine is out of"),
        (RuntimeError("cc1plus: out of memory allocating 65536 bytes"), "this machine is out of"),
    ],
)
def test_a_library_s_error_is_told_in_words(error, words, small_config):
    with pytest.raises(RunError, match=words), in_words(small_config()):
        raise error
    with pytest.raises(RuntimeError, match="a bug"), in_words(small_config()):
        raise RuntimeError("a bug")


@pytest.mark.parametrize(
    ("number", "rank"), [(signal.SIGKILL, 1), (signal.SIGSEGV, 0)], ids=["SIGKILL", "SIGSEGV"]
)
def test_a_rank_that_dies(number, rank, config_file, tmp_path):
    """Killed by the kernel for its memory use, or by a crash in an image-decoding thread."""
    config = config_file(train={"max_steps": 30})
    process = started(config, tmp_path / "run", ranks=2)
    tree = psutil.Process(process.pid).children(recursive=True)
    (victim,) = [child for child in tree if f"--local_rank={rank}" in child.cmdline()]
    victim.send_signal(number)
    survivor = "" if rank else " on rank 1"
    _, printed = process.communicate(timeout=30)
    assert process.returncode not in (0, None)
    one_message(printed, f"error{survivor}: another process of the run is gone")


SLOW_LOGGER = """
import threading

class Slow:
    def __init__(self, run_dir, config, step):
        self.log = self.flush = print

    def close(self):
        with open({path!r}, "w") as file:
            file.write(" ".join(thread.name for thread in threading.enumerate()))
"""


def test_a_rank_that_closes_its_logger_slowly_is_not_lost(small, tmp_path, monkeypatch):
    """Ranks stop watching each other before they close their files."""
    running = tmp_path / "running"
    (tmp_path / "slow_logger.py").write_text(SLOW_LOGGER.format(path=str(running)))
    monkeypatch.syspath_prepend(tmp_path)
    loggers = {"loggers": ["slow_logger:Slow"]}
    fit_apart(small(train={"max_steps": 1}, logging=loggers), tmp_path / "run", ranks=2)
    assert "MainThread" in running.read_text() and "_beat" not in running.read_text()


def test_a_silent_rank_is_noticed_and_one_that_answers_is_not(monkeypatch, capsys):
    """Two ranks in one process, whose store is a counter."""
    beats: Counter[str] = Counter()
    ended: list[int] = []

    def add(key: str, value: int) -> int:
        beats[key] += value
        return beats[key]

    monkeypatch.setattr(heartbeat, "TCPStore", lambda *_, **__: SimpleNamespace(add=add))
    environ = {"MASTER_ADDR": "", "MASTER_PORT": "0"}
    monkeypatch.setattr(heartbeat, "os", SimpleNamespace(environ=environ, _exit=ended.append))
    for name, seconds in (("INTERVAL_S", 0.1), ("LIMIT_S", 3.0), ("TURN_S", 0.5)):
        monkeypatch.setattr(heartbeat, name, seconds)
    first, second = (
        heartbeat.Heartbeat(World(rank, 2, rank, torch.device("cpu")), threading.Event())
        for rank in (0, 1)
    )
    with second:
        with first:
            time.sleep(4.5)
            first._end()
        assert ended == []
        deadline = time.monotonic() + 20
        while not ended and time.monotonic() < deadline:
            time.sleep(0.1)
    assert set(ended) == {1}
    assert "error on rank 1: rank 0 has not answered for 3 s" in capsys.readouterr().err


def test_a_group_without_a_store_is_not_watched():
    before = threading.active_count()
    with heartbeat.Heartbeat(World(0, 2, 0, torch.device("cpu")), threading.Event()):
        assert threading.active_count() == before


def test_a_loader_that_hangs(config_file, own_digits, tmp_path):
    """Opening a named pipe blocks forever, as does reading from a file system that is gone."""
    config = config_file(
        data={"root": str(own_digits), "stall_seconds": 3.0},
        train={"epochs": 50, "max_steps": 1000},
    )
    process = started(config, tmp_path / "run")
    image = next((own_digits / "train" / "4").iterdir())
    os.mkfifo(own_digits / "pipe.png")
    (own_digits / "pipe.png").rename(image)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 1
    one_message(printed, "no batch of images for 3 s (data.stall_seconds)", str(own_digits))
    assert newest_checkpoint(tmp_path / "run" / "checkpoints") is not None


# leaves as little memory as `ulimit -v` or a batch system might
LIMITED = """
import resource, sys, psutil, nvidia.dali, isofast.training.loop
from isofast import cli
used = psutil.Process().memory_info().vms
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
sys.exit(cli.main(["train", *sys.argv[1:]]))
"""


def test_a_machine_without_memory(config_file, tmp_path):
    config = config_file(projector={"hidden": 100_000}, train={"batch_size": 1400})
    arguments = ["--config", str(config), "--run-dir", str(tmp_path / "run")]
    printed = call([sys.executable, "-c", LIMITED, *arguments], code=1).stderr
    one_message(printed, "this machine is out of memory", "data.prefetch (now 2)")
    # there are no records for a report to show
    assert "report" not in printed


def test_a_disk_that_fills_up(config_file, small_disk):
    config = config_file(train={"max_steps": 30})
    run_dir = small_disk / "run"
    printed = train(config, run_dir, code=1)
    assert printed.count("warning: could not write the checkpoint") == 3
    one_message(printed.replace("repeat the command to continue", "rerun the same command"))
    assert newest_checkpoint(run_dir / "checkpoints") is not None
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    assert "continuing from" in train(config, run_dir)


def test_a_full_disk_is_borne_until_there_is_room(config_file, small_disk):
    """Not one byte is left for records while the run goes on; none is missing in the end."""
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    checkpoint = {"every_steps": 2, "max_failures": 1000}
    config = config_file(train={"max_steps": 200, "epochs": 10}, checkpoint=checkpoint)
    run_dir, filler = small_disk / "run", small_disk / "filler"
    process = started(config, run_dir)
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    lines = iter(process.stderr.readline, "")
    assert any("warning: could not write the records up to step" in line for line in lines)
    filler.unlink()
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    steps = [record["step"] for record in read_metrics(run_dir / "metrics.jsonl")]
    assert steps == list(range(1, 201))
    assert json.loads((run_dir / "summary.json").read_text())["completed"]


# preloaded, shifts the wall clock by the seconds in a file, which may change at any time; other
# clocks are unaffected, as when somebody sets the date
SHIFTED = """
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static volatile long *shift;

__attribute__((constructor)) static void start(void) {
    shift = mmap(0, sizeof *shift, PROT_READ, MAP_SHARED, open(getenv("SHIFT"), O_RDONLY), 0);
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    long failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && shift && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += *shift;
    return failed;
}
"""


@pytest.mark.long
def test_a_clock_that_jumps(config_file, tmp_path):
    """The wall clock of two ranks and their launcher jumps forward and back during training."""
    if not shutil.which("gcc"):
        pytest.skip("needs gcc")
    source, library, shift = (tmp_path / name for name in ("shifted.c", "shifted.so", "shift"))
    source.write_text(SHIFTED)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    shift.write_bytes(bytes(8))
    env = {"LD_PRELOAD": str(library), "SHIFT": str(shift)}
    config = config_file(train={"max_steps": 24, "epochs": 2}, logging={"loggers": ["tensorboard"]})
    whole, jumped = tmp_path / "whole", tmp_path / "jumped"
    train(config, whole, ranks=2)
    process = started(config, jumped, ranks=2, **env)
    for days in (365, -365):
        with shift.open("r+b") as file:
            file.write(struct.pack("q", days * 86_400))
        records = (jumped / "metrics.jsonl").read_text()
        while process.poll() is None and (jumped / "metrics.jsonl").read_text() == records:
            time.sleep(0.02)
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert_same_run(whole, jumped)
    events = EventAccumulator(str(jumped / "tensorboard")).Reload()
    times = [event.wall_time for event in events.Scalars("loss")]
    assert (max(times) - min(times)) / 86_400 == pytest.approx(730, abs=0.1)


@pytest.mark.long
@pytest.mark.parametrize("days", [-365, 365])
def test_files_of_another_time(days, config_file, tmp_path):
    """The run's files are dated a year ago or a year ahead, all with the same time."""
    config = config_file(train={"max_steps": 12})
    whole, jumped = tmp_path / "whole", tmp_path / "jumped"
    train(config, whole)
    train(config, jumped, "--set", "train.max_steps=6")
    then = time.time() + 86_400 * days
    for path in jumped.rglob("*"):
        os.utime(path, (then, then))
    assert "step_00000006" in train(config, jumped)
    assert_same_run(whole, jumped)
