#!/usr/bin/env bash
# The checks: lint, types, tests.   bash launch/test.sh                        all but the slow tests
#                                   bash launch/test.sh tests/test_optim.py    arguments go to pytest
#                                   bash launch/test.sh -m slow                the slow tests
#                                   bash launch/test.sh -m peers               beside timm, transformers and others, in .venv-peers
#                                   PYTHON=python3.13 bash launch/test.sh      on another Python (see setup.sh)
# Paths start in the current folder or in the root of the checkout.
set -euo pipefail
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh

case " $* " in
  *" -m peers "*) setup dev,peers peers ;; # gigabytes: nothing else needs these libraries
  *) setup dev ;;
esac
"$python" -m ruff check --quiet
"$python" -m mypy
args=()
for arg in "$@"; do
  if [[ $arg != /* && -e $here/${arg%%::*} ]]; then arg=$here/$arg; fi
  args+=("$arg")
done
exec "$python" -m pytest -n 2 --dist loadfile ${args[@]+"${args[@]}"}
