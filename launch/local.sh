#!/usr/bin/env bash
# Trains on this machine:   bash launch/local.sh --config=dino:demo --workdir=runs/dino
# Makes the virtual environment on first use (see setup.sh for PYTHON and EXTRAS). Every argument goes to
# `python -m mim_jax.main`, which runs in the folder that you stand in: relative paths start there.
set -euo pipefail
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh

setup ""
cd "$here"
exec "$python" -P -m mim_jax.main "$@" # -P: no Python file of this folder is imported
