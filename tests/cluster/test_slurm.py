"""launch/slurm.sh with stubs in place of Slurm's commands."""

import json
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from ..support.runs import ROOT, assert_same_run, call, environment, opened, train, wait_for_step

pytestmark = pytest.mark.long

# starts a step's tasks, forwards SIGUSR1 to them, and exits with the code of the first failure
SRUN = """#!/bin/bash
[ "$1" = --kill-on-bad-exit=1 ] && shift || exit 9
tasks=()
trap 'kill -USR1 "${tasks[@]}"' USR1
for rank in 0 1; do
  SLURM_STEP_NUM_TASKS=2 SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & tasks+=($!)
done
for task in "${tasks[@]}"; do
  while kill -0 "$task" 2> /dev/null; do wait "$task"; code=$?; done
  [ "$code" = 0 ] || { kill "${tasks[@]}"; exit "$code"; }
done
"""
SCONTROL = """#!/bin/sh
case "$1 $2" in
  "show hostnames") echo 127.0.0.1 ;;
  "show job") [ "$3" = 5_7 ] && echo "Restarts=0 PreemptTime=$PREEMPTED" ;;
  requeue*) echo "$2" >> requeued ;;
esac
"""


def install(folder: Path, srun: str) -> dict[str, str]:
    """Put the stubs into ``folder``, and return a job's environment."""
    for name, script in (("srun", srun), ("scontrol", SCONTROL)):
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    return environment(
        PATH=f"{folder}:{os.environ['PATH']}",
        SLURM_SUBMIT_DIR=str(folder),
        SLURM_JOB_ID=str(os.getpid()),
        SLURM_JOB_NODELIST="node1",
        SLURM_ARRAY_JOB_ID="5",
        SLURM_ARRAY_TASK_ID="7",
    )


@pytest.mark.parametrize(
    ("code", "preempted", "requeued"),
    [(143, "2026-11-28T16:41:08", True), (143, "None", False), (2, "2026-11-28T16:41:08", False)],
)
def test_a_job_that_is_preempted_is_requeued(code, preempted, requeued, tmp_path):
    env = install(tmp_path, f"#!/bin/sh\nexit {code}") | {"PREEMPTED": preempted}
    call(["bash", str(ROOT / "launch" / "slurm.sh")], code=code, **env)
    assert (tmp_path / "requeued").exists() == requeued
    assert not requeued or (tmp_path / "requeued").read_text() == "5_7\n"


def test_a_job_that_reaches_its_time_limit_is_requeued_and_goes_on(config_file, tmp_path):
    config = config_file(
        train={"max_steps": 20},
        evaluation={"every_epochs": 1, "knn_images": 99},
        checkpoint={"every_steps": 1000},
    )
    whole, job = tmp_path / "whole", tmp_path / "job-7"
    assert "2 process(es), BatchNorm statistics synchronised" in train(config, whole, ranks=2)
    assert json.loads((whole / "environment.json").read_text())["batch_norm"] == "synchronised"
    env = install(tmp_path, SRUN)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    script = str(ROOT / "launch" / "slurm.sh")
    command = ["bash", script, "--config", str(config), "--run-dir", str(tmp_path / "job-%a")]

    process = opened(command, env=env)
    wait_for_step(1, job, process)
    # as Slurm does two minutes before the time limit: signal the steps, not the batch script
    (srun,) = psutil.Process(process.pid).children()
    srun.send_signal(signal.SIGUSR1)
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 0 and "Slurm was asked" in printed, printed
    assert (tmp_path / "requeued").read_text() == "5_7\n"

    process = opened(command, env=env)
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 0 and "continuing from" in printed, printed
    assert_same_run(whole, job)
