#!/usr/bin/env bash
# The checks: lint, types, tests.   bash launch/test.sh                        all but the slow tests
#                                   bash launch/test.sh tests/test_optim.py    arguments go to pytest; paths start at the root
#                                   bash launch/test.sh -m slow                the slow tests
#                                   PYTHON=python3.13 bash launch/test.sh      on another Python (see setup.sh)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh

setup dev
"$python" -m ruff check --quiet
"$python" -m mypy
exec "$python" -m pytest -n 2 --dist loadfile "$@"
