#!/usr/bin/env bash
# One process per GPU, started by srun: sbatch launch/slurm.sh --config launch/tinyimagenet.json
# Two minutes before the time limit the job saves and requeues itself; after that, or a preemption,
# it continues from the newest intact checkpoint. The signal before the limit ends a job that has
# not begun to train, so the limit must leave time to check the images.
#SBATCH --job-name=isofast
#SBATCH --nodes=1
#SBATCH --gpus-per-node=4
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
# a process that fails ends them all instead of leaving the others waiting
# %a is the array task, as in sbatch's own file names
srun --kill-on-bad-exit=1 .venv/bin/python launch/train.py "${@//%a/${SLURM_ARRAY_TASK_ID-%a}}" || {
  code=$?
  job=${SLURM_ARRAY_JOB_ID+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
  job=${job:-$SLURM_JOB_ID}
  # Slurm itself requeues only preempted jobs that outlast the grace period
  if [ $code = 143 ] && scontrol show job "$job" | grep 'PreemptTime=[0-9]' > /dev/null; then
    scontrol requeue "$job"
  fi
  exit $code
}
