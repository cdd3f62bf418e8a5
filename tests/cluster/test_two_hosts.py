"""Two hosts on one machine: network namespaces joined by a virtual cable, two ranks in each."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from isofast.run.metrics import read_metrics

from ..support.runs import (
    ROOT,
    Process,
    assert_same_run,
    environment,
    opened,
    started,
    timeless,
    train,
    wait_for_step,
)

pytestmark = pytest.mark.long

ADDRESSES = ("10.231.7.1", "10.231.7.2")
# the heartbeat's timeout, plus a margin
ENDS_WITHIN_S = 60


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def start(hosts: list[str], config: Path, run_dir: Path, by: str) -> list[Process]:
    """Start a launcher on each host, as one does by hand without ssh."""
    hostfile = config.with_name("hostfile")
    hostfile.write_text("".join(f"{address} slots=2\n" for address in ADDRESSES))
    launcher = {
        "deepspeed": f"deepspeed.launcher.runner --hostfile {hostfile} --no_ssh "
        f"--node_rank NODE --master_addr {ADDRESSES[0]} --log_level error",
        "torchrun": "torch.distributed.run --nnodes 2 --nproc-per-node 2 --node-rank NODE "
        f"--master-addr {ADDRESSES[0]}",
    }[by]
    program = [str(ROOT / "launch" / "train.py"), "--config", str(config)]
    command = [sys.executable, "-m", *launcher.split(), *program, "--run-dir", str(run_dir)]
    return [
        opened(
            ["ip", "netns", "exec", host, *(x.replace("NODE", str(node)) for x in command)],
            env=environment(),
        )
        for node, host in enumerate(hosts)
    ]


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """The names of two namespaces; each end of the cable is a device called ``cable``."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    names = [f"isofast-{os.getpid()}-{side}" for side in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr!r}")
    try:
        cable = ("link", "add", "cable", "netns", names[0], "type", "veth")
        ip(*cable, "peer", "cable", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for device in ("cable", "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name)


@pytest.fixture
def config(config_file: Callable[..., Path]) -> Path:
    return config_file(
        train={"max_steps": 30, "epochs": 6, "precision": "fp32"}, checkpoint={"every_steps": 5}
    )


def end_of(processes: list[Process], within_s: float) -> list[str]:
    """Return each process's stderr once it has ended; kill those that outlast the deadline."""
    deadline = time.monotonic() + within_s
    try:
        return [p.communicate(timeout=max(0.1, deadline - time.monotonic()))[1] for p in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()


def test_two_hosts_train_as_one_and_outlive_a_cut_cable(hosts, config, tmp_path):
    single, whole = tmp_path / "one-process", tmp_path / "one-host"
    train(config, whole, ranks=4)
    train(config, single)
    # same global batch and statistics, summed in another order; the gap grows with the steps
    losses = [[r["loss"] for r in timeless(run) if r["loss"]][:5] for run in (whole, single)]
    np.testing.assert_allclose(*losses, rtol=1e-3)

    for launcher in ("deepspeed", "torchrun"):
        cut = tmp_path / launcher
        processes = start(hosts, config, cut, launcher)
        wait_for_step(8, cut, *processes)
        ip("-n", hosts[0], "link", "set", "cable", "down")
        began = time.monotonic()
        printed = end_of(processes, ENDS_WITHIN_S)
        assert time.monotonic() - began < ENDS_WITHIN_S
        assert all(process.returncode != 0 for process in processes)
        for text in printed:
            assert text.count("\nerror") == 1 and "rerun the same command" in text, text
            # torchrun prints a traceback of its own code
            assert 'launch/train.py", line' not in text, text

        ip("-n", hosts[0], "link", "set", "cable", "up")
        # resumes on one host; the losses on two hosts are bitwise those on one
        assert "continuing from" in train(config, cut, ranks=4)
        assert_same_run(whole, cut)


def test_a_rank_that_hangs_ends_the_run(config, tmp_path):
    """Rank 0, which hosts the ranks' store, or another; two runs side by side."""
    hung, processes = [], []
    try:
        for rank in (0, 1):
            processes.append(started(config, tmp_path / str(rank), ranks=4, step=3))
            children = psutil.Process(processes[rank].pid).children(recursive=True)
            hung += [child for child in children if f"--local_rank={rank}" in child.cmdline()]
            hung[rank].send_signal(signal.SIGSTOP)
        printed = end_of(processes, 2 * ENDS_WITHIN_S)
    finally:
        for child in hung:
            if child.is_running():
                child.kill()
    names = ("rank 0, its launcher or its machine", "rank 1")
    for process, text, named in zip(processes, printed, names, strict=True):
        assert process.returncode != 0
        assert text.count("\nerror") == 1 and "Traceback" not in text, text
        assert f"{named} has not answered for 30 s" in text, text
    assert read_metrics(tmp_path / "1" / "metrics.jsonl")
