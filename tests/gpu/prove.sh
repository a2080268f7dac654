#!/bin/bash
# Proves on the GPU of this machine that kernels prebuilt without it are the ones it asks for, and load on it.
#
#   prove.sh DIR [--rehearse GPU] [--quick]
#
# DIR: made by carry.sh. PYTHON: the Python that has torch (default: python3). Prints one table, and writes the record that
# `[prebuild] enabled = "proven"` looks for to DIR/proof.json: copy it to /etc/warm-cache/proofs/ of the hosts with that GPU.
# --rehearse simulates the GPU; such a record proves nothing. At most 8 minutes, or PROVE_SECONDS.
set -euo pipefail

DIR=$(readlink -f "${1:?usage: prove.sh DIR [--rehearse GPU] [--quick]}")
shift
PYTHON=${PYTHON:-python3}
SITE=$DIR/site
if [ -d "$DIR/wheels" ] && [ ! -d "$SITE" ]; then
  mkdir "$SITE.new"
  for wheel in "$DIR"/wheels/*.whl; do "$PYTHON" -m zipfile -e "$wheel" "$SITE.new"; done
  mv "$SITE.new" "$SITE"
fi
export PYTHONPATH=$DIR${PYTHONPATH:+:$PYTHONPATH}
[ ! -d "$SITE" ] || export PYTHONPATH=$PYTHONPATH:$SITE
exec timeout --kill-after=10 "${PROVE_SECONDS:-480}" "$PYTHON" "$(dirname "$(readlink -f "$0")")/prove.py" "$DIR" "$@"
