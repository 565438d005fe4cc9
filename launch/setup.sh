# shellcheck shell=bash
# Sourced by the other scripts, from the root of the checkout. `setup EXTRAS` installs mim_jax with these extras of
# pyproject.toml into a virtual environment, unless it is up to date, and sets $python to its interpreter.
#
#   PYTHON=python3.13 bash launch/...   this interpreter, in an environment of its own (.venv-3.13); else .venv
#   EXTRAS=cuda13 bash launch/...       more extras, separated by commas: cuda12, cuda13, tpu, gcs,
#                                       s3, plan-tpu, plan-gpu, curate, onnx
#
# Installs with uv if it is on the PATH, else with venv and pip.

fail() {
  printf '%s\n' "" "$@" >&2
  exit 1
}

not_installed() {
  fail "The installation failed: see above." \
    "If it is the network, check the connection and the proxy or index settings of pip or uv. Then run this again."
}

have_uv() { command -v uv >/dev/null; }

suits() { # INTERPRETER: it is run, because pyenv has a shim for every version, active or not
  local check='import sys; assert (3, 11) <= sys.version_info < (3, 14)'
  have_uv || check+='; import ensurepip' # on Debian a separate package
  "$1" -c "$check" >/dev/null 2>&1
}

find_python() {
  local candidates=(python3.13 python3.12 python3.11 python3) candidate
  if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    if suits "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  if have_uv && [[ -z ${PYTHON:-} ]]; then
    echo 3.13 # uv downloads it
    return
  fi
  fail "mim_jax needs Python 3.11, 3.12 or 3.13 with its venv module; none found${PYTHON:+ as PYTHON=$PYTHON}." \
    "Install one (Debian, Ubuntu: apt install python3 python3-venv), or name one: PYTHON=/path/to/python3 bash $0"
}

make_venv() { # VENV INTERPRETER
  rm -rf "$1"
  if have_uv; then uv venv --quiet --seed --python "$2" "$1"; else "$2" -m venv "$1"; fi
}

install() { # INTERPRETER TARGET
  local pip=("$1" -m pip install --disable-pip-version-check)
  if have_uv; then pip=(uv pip install --python "$1"); fi
  "${pip[@]}" --quiet --editable "$2"
}

setup() { # EXTRAS [NAME of an environment of its own]
  local extras=${1:-}${EXTRAS:+,$EXTRAS} venv=.venv${2:+-$2} stamp base
  extras=${extras#,}
  if [[ -n ${PYTHON:-} ]]; then
    base=$(find_python)
    venv+=-$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  fi
  python=$PWD/$venv/bin/python
  stamp=$venv/installed-$extras # a copy of the requirements, written when they are installed
  wanted() { pwd && cat requirements.txt pyproject.toml; }
  ready() { [[ -x $python && ! -e $venv.installing ]] && wanted | cmp -s - "$stamp"; }

  if ready; then return; fi
  (
    flock 9 2>/dev/null || true # a second script waits for the first, if the system has flock
    if ready; then exit; fi
    if [[ -x $python && ! -e $venv.installing ]]; then
      echo "New requirements: installing into $venv." >&2
    else # there is none, or its installation was interrupted
      base=$(find_python)
      echo "First use: installing into $venv with $base (a minute or a few)." >&2
      touch "$venv.installing"
      make_venv "$venv" "$base" || not_installed
    fi
    touch "$venv.installing"
    install "$python" ".${extras:+[$extras]}" || not_installed
    wanted >"$stamp"
    rm "$venv.installing"
  ) 9>"$venv.lock"
}
