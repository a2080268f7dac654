#!/bin/bash
# shell.sh [BASH ARGUMENT...]: a shell to try the program in, on what `make demo` warmed. The engine is that of DOCKER_HOST.
# Without a checkout's virtual environment and cache there is nothing to try: `make shell` makes the first.
set -euo pipefail

ROOT=$(dirname "$(dirname "$(dirname "$(readlink -f "$0")")")")
export PATH=$ROOT/.venv/bin:$PATH
export WARM_CACHE_PROFILE=stand-in WARM_CACHE_IMAGE=${WARM_CACHE_IMAGE:-warm-cache-stand-in:real}
export WARM_CACHE_CACHE=${WARM_CACHE_CACHE:-$ROOT/.demo/cache}

[ -d "$WARM_CACHE_CACHE" ] || { echo "error: there is no $WARM_CACHE_CACHE yet; first: make demo" >&2; exit 1; }
if [ $# -gt 0 ]; then exec bash "$@"; fi
cat <<'TEXT'
The engine is up, and warm-cache works with the demo's image and cache until you leave this shell (exit). Try:

  warm-cache status              what the cache holds
  warm-cache explain             why each task is warm, factor by factor
  warm-cache env                 what docker run needs, so that a job hits the cache
  warm-cache warm --force --dry-run     the plan of a run
  warm-cache help                everything else

TEXT
# bash reads the user's own start-up file, and what it says of the prompt and of PATH comes before ours.
exec bash --rcfile <(printf '%s\n' '[ ! -f ~/.bashrc ] || . ~/.bashrc' "PATH=$(printf %q "$PATH")" 'PS1="(warm-cache demo) \w\$ "') -i
