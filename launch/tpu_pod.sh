#!/usr/bin/env bash
# Trains on all hosts of a Cloud TPU VM, from nothing: copies the code there, installs it, starts it, shows what is printed.
#   bash launch/tpu_pod.sh NAME ZONE --config=dino:vits16 --workdir=gs://BUCKET/run --config.data.dir=gs://BUCKET/tfds
#   bash launch/tpu_pod.sh NAME ZONE         shows it again (Ctrl-C ends only the showing)
#   bash launch/tpu_pod.sh NAME ZONE stop    the run saves and ends
# The first command again goes on with the run, also on new hosts. Needs gcloud, logged in. EXTRAS: as in setup.sh.
# shellcheck disable=SC2016 # what is in single quotes is expanded on the hosts
set -euo pipefail
if (($# < 2)) || [[ $1 == -* || $2 == -* ]]; then
  sed -n '2,6s/^# //p' "$0" >&2
  exit 1
fi
name=$1 zone=$2; shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/.."

on() { # HOST COMMAND
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker="$1" --command="$2"
}

if [[ ${1:-} == stop ]]; then
  on all 'flock --nonblock mim_jax.lock true || kill "$(cat mim_jax.pid)"'
elif (($#)); then
  temporary=$(mktemp -d); trap 'rm -r "$temporary"' EXIT
  tar -cz --exclude=__pycache__ LICENSE README.md configs launch mim_jax pyproject.toml requirements.txt \
    >"$temporary/mim_jax.tgz"
  gcloud compute tpus tpu-vm scp "$temporary/mim_jax.tgz" "$name:" --zone="$zone" --worker=all
  run="env EXTRAS=${EXTRAS:-tpu,gcs} bash mim_jax/launch/local.sh"
  on all 'set -e; export PATH=$HOME/.local/bin:$PATH
    flock --nonblock mim_jax.lock true || { echo "A run is in progress here: stop it first." >&2; exit 1; }
    mkdir -p mim_jax; rm -rf mim_jax/mim_jax mim_jax/configs; tar -xzf mim_jax.tgz -C mim_jax
    command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh # which brings a suitable Python, too
    '"$run --help >/dev/null"
  # The lock is held as long as the run lives.
  on all "exec 8>mim_jax.lock; flock --nonblock 8 || exit 1; exec >>mim_jax.log 2>&1 </dev/null
    nohup $run $(printf '%q ' "$@") & echo \$! >mim_jax.pid"
fi
on 0 'test -e mim_jax.pid || { echo "No run was started here." >&2; exit 1; }
  tail -n 20 --pid="$(cat mim_jax.pid)" -f mim_jax.log; [[ $(tail -n 1 mim_jax.log) != error:* ]]' ||
  { on all 'tail -n 1 mim_jax.log' >&2; exit 1; } # the reason may be on another host
