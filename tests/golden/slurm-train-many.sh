#!/bin/bash
# vlmrob train on 4 machines of 8 GPUs
# Made by vlmrob slurm. Submit it with sbatch; read it before.
#SBATCH --job-name=vlmrob-train
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --output=vlmrob-train-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# Five minutes before the time is over this script is told, and the command saves what it has.
#SBATCH --signal=B:TERM@300

set -u
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=4

srun torchrun --nnodes=4 --nproc-per-node=8 --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$head:29500" "$(command -v vlmrob)" train mmt-ard &
step=$!

told=0
trap 'told=1; kill -TERM "$step"' TERM
# A trapped signal ends "wait" before the step has ended.
code=0
while true; do
  wait "$step" && code=0 || code=$?
  kill -0 "$step" 2>/dev/null || break
done

# 75: stopped, and the same command goes on. A launcher that was told to stop ends with a code of its own.
if [ "$code" -eq 75 ] || { [ "$told" -eq 1 ] && [ "$code" -ne 0 ]; }; then
  if [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ]; then
    scontrol requeue "$SLURM_JOB_ID"
  else
    echo "not queued again after 3 restarts; submit it again by hand" >&2
  fi
fi
exit "$code"
