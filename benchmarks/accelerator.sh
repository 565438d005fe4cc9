#!/usr/bin/env bash
# benchmarks/accelerator.py on a Linux machine (x86-64) that reaches no network and whose Python 3.12 has jax for its GPU:
#
#   bash benchmarks/accelerator.sh wheels   on a machine with a network: fetches into .wheels/ what that Python may lack (14 MB)
#   bash benchmarks/accelerator.sh          there, with .wheels/ in the checkout; the arguments are those of accelerator.py
#
# There it makes .venv-accelerator, which has all packages of its python3 (or of $PYTHON), and takes from .wheels/ what these do
# not have or have in another version than requirements.txt allows. Relative paths start in the current folder.
set -euo pipefail
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3} root=$PWD venv=$PWD/.venv-accelerator

if [[ ${1:-} == wheels ]]; then
  rm -rf .wheels
  platforms=()
  for name in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014; do platforms+=(--platform "${name}_x86_64"); done
  "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" \
    --constraint requirements.txt --dest .wheels absl-py array-record attrs clu cloudpickle dm-tree docstring-parser einops \
    etils flax googleapis-common-protos grain immutabledict importlib-resources ml-collections optax orbax-checkpoint \
    portpicker simple-parsing six tensorboardX tensorflow-datasets tensorflow-metadata termcolor toml tqdm wrapt
  "$python" -m pip wheel --quiet --no-deps --wheel-dir .wheels promise # has no wheel
  du -sh .wheels
  exit
fi

if [[ ! -x $venv/bin/python ]]; then
  "$python" -m venv --without-pip "$venv"
  # python3 may be of an environment itself, whose packages the new one would not see
  "$python" -c 'import site; print("".join(f"import site; site.addsitedir({p!r})\n" for p in site.getsitepackages()))' \
    >"$("$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')/outer.pth"
fi
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
"${pip[@]}" install --quiet --no-index --find-links=.wheels --requirement requirements.txt
cd "$here"
export PYTHONPATH=$root XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}
exec "$venv/bin/python" "$root/benchmarks/accelerator.py" "$@"
