#!/usr/bin/env bash
#SBATCH --job-name=mim_jax --nodes=1 --gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=8
#SBATCH --time=24:00:00 --signal=B:USR1@180 --requeue --open-mode=append
# Trains on a Slurm cluster, one process for each GPU. From the root of the checkout, in a folder that all nodes see:
#   sbatch launch/slurm.sh --config=dino:vits16 --workdir=runs/vits16 --config.data.dir=$HOME/tensorflow_datasets
#   sbatch --nodes=4 --partition=NAME launch/slurm.sh ...    options of sbatch come first and win over those above
# Three minutes before its time is up, the run saves and the job is queued again. After any other end, submit it again.
# Makes the virtual environment on first use (EXTRAS: see setup.sh). Where nodes have no network, do so on the login node:
#   EXTRAS=cuda13 bash launch/local.sh --help
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?is not set: this is a script for sbatch}" # sbatch runs a copy of this file, somewhere else
if [[ ! -f launch/setup.sh ]]; then
  echo "Submit it from the root of the checkout, as launch/slurm.sh; this is $PWD." >&2
  exit 1
fi
source launch/setup.sh

again() {
  scancel --signal=TERM "$SLURM_JOB_ID" # to all processes of the run; this script is not meant
  wait "$run"
  scontrol requeue "$SLURM_JOB_ID"
  exit
}

export EXTRAS=${EXTRAS:-cuda13}
setup ""
# jax gives each process the GPU of its number on the node. srun runs in the background: only then are traps heard.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" "$python" -P -m mim_jax.main "$@" &
run=$!
trap again USR1
trap 'wait "$run"' TERM
wait "$run"
