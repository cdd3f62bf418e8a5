"""Start runs for tests, always on the CPU with one thread, and compare them."""

import atexit
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from isofast import cli
from isofast.config.load import validate
from isofast.distributed import World
from isofast.run.checkpoint import newest_checkpoint
from isofast.run.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
ALONE = World(0, 1, 0, torch.device("cpu"))
ISOFAST = [sys.executable, "-m", "isofast.cli"]
# drops the capabilities that let root read everything; other users have none
UNPRIVILEGED = (
    ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.getuid() == 0 else []
)
Done = subprocess.CompletedProcess[str]
Process = subprocess.Popen[str]
Codes = list[int | None]
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
# fields that depend on a clock
TIMED = ("images_per_s", "data_wait")
# a fork server that has already imported everything
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(
    ["isofast.training.loop", "isofast.evaluation.report", "deepspeed"]
)


def environment(**more: str) -> dict[str, str]:
    """One thread and no GPU: bitwise reproducible however busy the machine is."""
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more


def free_port() -> int:
    """Return a local port that is currently free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command_of(config: Path, run_dir: Path, *options: str, ranks: int = 0) -> list[str]:
    """`python launch/train.py ...`, or through DeepSpeed's launcher with ``ranks`` processes."""
    program = [str(ROOT / "launch" / "train.py"), "--config", str(config)]
    if ranks:
        # the launcher's default port is fixed, so concurrent runs would collide
        port = f"--master_port={free_port()}"
        program = ["-m", "deepspeed.launcher.runner", f"--num_accelerators={ranks}", port, *program]
    return [sys.executable, *program, "--run-dir", str(run_dir), *options]


def opened(command: Sequence[str], **more: Any) -> Process:
    """Start a process on the CPU; its stderr is kept for ``communicate``."""
    kept: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **(kept | {"env": environment()} | more))


def started(
    config: Path,
    run_dir: Path,
    *options: str,
    ranks: int = 0,
    step: int = 1,
    start_new_session: bool = False,
    **env: str,
) -> Process:
    """Start a run in separate processes; return once it has recorded ``step``."""
    command = command_of(config, run_dir, *options, ranks=ranks)
    process = opened(command, env=environment(**env), start_new_session=start_new_session)
    wait_for_step(step, run_dir, process)
    return process


def wait_for_step(step: int, run_dir: Path, *processes: Process) -> None:
    """Wait until a run has recorded a step; fail if one of its processes ends before."""
    deadline = time.monotonic() + 200
    while True:
        records = read_metrics(run_dir / "metrics.jsonl")
        if records and records[-1]["step"] >= step:
            return
        for process in processes:
            assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def launched(ranks: int, names: Sequence[str] = TORCHRUN) -> list[dict[str, str]]:
    """Return each rank's environment, with rank, size and local rank under a launcher's names."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    given = [zip(names, map(str, (rank, ranks, rank)), strict=True) for rank in range(ranks)]
    return [environment(**address, **dict(variables)) for variables in given]


def forked(target: Callable[..., None], *args: Any, environments: list[dict[str, str]]) -> Codes:
    """Run ``target(*args)`` in one process per environment, concurrently; return the exit codes.

    Forking after the imports takes half a second each, instead of seven for a new program.
    """
    everything = [(env, os.getcwd(), target, args) for env in environments]
    processes = [_PROCESSES.Process(target=_call, args=arguments) for arguments in everything]
    # the preloaded imports choose a device too
    with mock.patch.dict(os.environ, environment()):
        for process in processes:
            process.start()
    for process in processes:
        process.join(timeout=400)
        process.kill()
    return [process.exitcode for process in processes]


def _call(
    env: dict[str, str], folder: str, target: Callable[..., None], args: tuple[Any, ...]
) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    try:
        target(*args)
    finally:
        # a multiprocessing child skips these
        atexit._run_exitfuncs()


def train(
    config: Path, run_dir: Path, *options: str, ranks: int = 1, code: int = 0, report: bool = False
) -> str:
    """Run launch/train.py to its end, expecting exit code ``code``; return its stderr.

    Without ``report`` the HTML report, which takes longer than the run, is not written.
    """
    arguments = ["--config", str(config), "--run-dir", str(run_dir), *options]
    environments = launched(ranks) if ranks > 1 else [environment()]
    with tempfile.NamedTemporaryFile("r") as file:
        codes = forked(_train, arguments, file.name, report, environments=environments)
        printed = file.read()
    assert codes == [code] * ranks, printed
    assert "Traceback" not in printed
    return printed


def _train(arguments: list[str], printed: str, report: bool) -> None:
    for name, number in ((os.devnull, 1), (printed, 2)):
        with open(name, "a") as file:
            os.dup2(file.fileno(), number)
    if not report:
        cli._write_own_report = lambda *args, **options: None
    program = str(ROOT / "launch" / "train.py")
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")


def call(command: list[str], *, code: int = 0, cwd: Path | None = None, **env: str) -> Done:
    """Run a command; it must exit with ``code`` and without a traceback."""
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=400, env=environment(**env)
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def fit_apart(settings: dict[str, Any], *run_dirs: Path, ranks: int = 1) -> None:
    """Call ``fit`` in separate processes, for one run dir after another."""
    environments = launched(ranks) if ranks > 1 else [environment()]
    assert forked(_fit, settings, *run_dirs, environments=environments) == [0] * ranks


def _fit(settings: dict[str, Any], *run_dirs: Path) -> None:
    from isofast.training.loop import fit

    for run_dir in run_dirs:
        random = torch.get_rng_state()
        fit(validate(settings), run_dir)
        assert os.environ.get("MASTER_PORT") != "0"
        assert torch.equal(torch.get_rng_state(), random)
        # like a notebook that goes on to evaluate
        torch.set_default_device("meta")
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)


def timeless(run_dir: Path) -> list[dict[str, Any]]:
    """Return a run's records without the fields that depend on a clock."""
    records = read_metrics(run_dir / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in TIMED} for record in records]


def assert_same_run(one: Path, other: Path) -> None:
    """Records, spectra and the last checkpoint are bitwise equal."""
    assert timeless(one) and timeless(one) == timeless(other)
    with np.load(one / "spectrum.npz") as a, np.load(other / "spectrum.npz") as b:
        assert a.files == b.files
        assert all(np.array_equal(a[name], b[name]) for name in a.files)
    found = [newest_checkpoint(folder / "checkpoints") for folder in (one, other)]
    assert found[0].step == found[1].step
    states = [checkpoint.load() for checkpoint in found]
    for state in states:
        del state["totals"]
    assert_equal_trees(*states)


def assert_equal_trees(a: Any, b: Any, where: str = "") -> None:
    """Nested containers hold bitwise equal tensors."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal_trees(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_equal_trees(*pair, f"{where}[{index}]")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, where
