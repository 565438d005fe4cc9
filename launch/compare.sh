#!/usr/bin/env bash
# All methods side by side on CIFAR-10:   bash launch/compare.sh [--out=runs/compare] [--budget=60] [--seeds=3]
# A page of runs that exist:              bash launch/compare.sh --out=page --runs='runs/*'
# Makes the virtual environment on first use (see setup.sh). Goes on where it was stopped. Relative paths start in the
# current folder.
set -euo pipefail
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh

setup ""
cd "$here"
exec "$python" -P -m mim_jax.compare "$@"
