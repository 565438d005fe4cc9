#!/usr/bin/env bash
# Trains on this machine:   bash launch/local.sh --config=dino:demo --workdir=runs/dino
# Makes the virtual environment on first use (see setup.sh for PYTHON and EXTRAS). The arguments are those of
# `python -m mim_jax.main`; relative paths start in the current folder.
set -euo pipefail
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh

setup ""
cd "$here"
exec "$python" -P -m mim_jax.main "$@" # -P: imports nothing from the current folder
