#!/bin/bash
# The whole experiment on several nodes under SLURM. Submit it from the repository's root:
#
#   sbatch --nodes=2 experiments/cluster/slurm.sh EXP=celeba SCALE=sd14 DATA=/data/celeba \
#     BACKBONE=/models/stable-diffusion-v1-4
#
# `make train` runs once, here in the batch script; each stage that trains or samples is started by
# srun, one process a GPU, and Lightning finds its rank in SLURM's variables. If the time limit
# comes first, Lightning saves a checkpoint on SIGUSR1 and asks to be queued again; the same command
# then goes on from it. A stage that has no checkpoint goes on from the files it has written.
#SBATCH --job-name=invdiff
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=SIGUSR1@180
set -euo pipefail

export HF_HUB_OFFLINE=1
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"

exec make train "$@" \
  DEVICES="${SLURM_NTASKS_PER_NODE}" \
  NUM_NODES="${SLURM_JOB_NUM_NODES}" \
  LAUNCHER="srun --kill-on-bad-exit=1"
