#!/usr/bin/env bash
# Trains on this machine:   bash launch/local.sh --config=configs/dino.py:demo --workdir=runs/dino
# Makes the virtual environment on first use (see setup.sh for PYTHON and EXTRAS). Every argument goes to
# `python -m mim_jax.main`, which runs in the root of the checkout: relative paths start there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh

setup ""
exec "$python" -m mim_jax.main "$@"
