#!/bin/bash
# A private Docker engine for tests and demos, with eight pretended GPUs and no network: a TEST DOUBLE of a GPU host.
#
#   engine.sh up DIR [OPTION...] starts it (nothing to do where it runs) and prints DOCKER_HOST=...; options are dockerd's
#   engine.sh kill DIR [SIGNAL]  ends dockerd alone, KILL as in a crash or TERM as in a restart; `up` starts it again
#   engine.sh down DIR           stops it and everything in it; images stay in DIR for the next time
#   engine.sh run DIR CMD...     runs CMD against the engine that DOCKER_HOST (or the default socket) reaches, else against
#                                the private one in DIR, which is stopped again on every path
#
# It lives in PID, mount and network namespaces of its own, so that no other engine notices it and one signal ends all of
# it. Missing packages are installed (root on Debian or Ubuntu; in a CI runner only with INSTALL_ENGINE=1).
set -euo pipefail

HERE=$(dirname "$(readlink -f "$0")")
PACKAGES="docker.io containerd runc iptables tini busybox-static curl ca-certificates"

fail() { echo "error: $*" >&2; exit 1; }

usage() { sed -n 's/^#   //p' "$0" >&2; exit 2; }

enter() {   # enter DIR: absolute, made, ours
  mkdir -p "$1" 2>/dev/null || fail "cannot make the engine's directory $1"
  DIR=$(readlink -f "$1")
  SOCKET=$DIR/docker.sock
  # A unix socket's path has at most 107 bytes.
  [ ${#SOCKET} -le 107 ] || SOCKET=/tmp/warm-cache-engine-$(printf %s "$DIR" | sha256sum | cut -c1-12).sock
  HOST=unix://$SOCKET
}

# The first process of the engine's namespaces. dockerd is its child, so that containers outlive dockerd, as on a host; and
# when dockerd has ended the rest ends too, unless $0/down says that it is to be started again once that file is gone.
KEEPER='ip link set lo up
  trap "end=1; kill -TERM \$daemon 2>/dev/null" TERM
  while :; do
    rm -f "$0/docker.pid"
    dockerd "$@" $(cat "$0/options") & daemon=$!
    while kill -0 $daemon 2>/dev/null; do wait $daemon; done
    [ -e "$0/down" ] || exit
    while [ -z "$end" ] && [ -e "$0/down" ]; do sleep 0.02; done
    [ -z "$end" ] || exit
  done'

pings() { curl -sf -m 5 --unix-socket "$SOCKET" http://engine/_ping >/dev/null 2>&1; }

guardian() {   # prints the pid of the engine's namespace, if it is alive and really this engine's (pids are used again)
  local pid
  pid=$(cat "$DIR/guardian.pid" 2>/dev/null) || return 1
  [ -n "$pid" ] && tr '\0' '\n' <"/proc/$pid/cmdline" 2>/dev/null | grep -qxF -- "$DIR/data" || return 1
  echo "$pid"
}

allowed() {   # ends with one sentence where this machine does not allow an engine of our own
  [ -z "${CI:-}" ] || [ "${INSTALL_ENGINE:-}" = 1 ] || fail "no Docker engine answers, and this is a CI runner: set DOCKER_HOST, or INSTALL_ENGINE=1 to start a private one"
  [ "$(id -u)" = 0 ] || fail "no Docker engine answers, and starting a private one needs root: set DOCKER_HOST, or run as root"
  command -v unshare >/dev/null || fail "no Docker engine answers, and a private one needs unshare (package util-linux)"
  unshare --pid --net --mount --fork true 2>/dev/null || fail "no Docker engine answers, and a private one needs namespaces that this machine refuses (unshare fails)"
}

install_packages() {
  local missing=() tool
  for tool in dockerd docker containerd runc curl; do command -v $tool >/dev/null || missing+=("$tool"); done
  [ ${#missing[@]} -gt 0 ] || return 0
  command -v apt-get >/dev/null && grep -qE '^ID(_LIKE)?=.*(debian|ubuntu)' /etc/os-release ||
    fail "no Docker engine answers, and ${missing[*]} cannot be installed here (Debian or Ubuntu only): install Docker and set DOCKER_HOST"
  echo "installing ${missing[*]} (apt)" >&2
  # No service may start: the engine is ours, and private.
  local policy=/usr/sbin/policy-rc.d
  if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod 755 $policy
    trap "rm -f $policy" EXIT
  fi
  apt-get update -qq >&2 || fail "apt-get update failed"
  # shellcheck disable=SC2086
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $PACKAGES >/dev/null || fail "apt-get install failed: $PACKAGES"
}

up() {   # up DIR [OPTION...]
  local runtime=() pid
  enter "$1"
  shift
  if guardian >/dev/null && pings; then return; fi
  if pid=$(guardian) && [ -e "$DIR/down" ]; then
    echo "$*" >"$DIR/options"
    rm "$DIR/down"
    await "$pid"
    return
  fi
  allowed
  install_packages
  # Without CAP_SYS_RESOURCE (bit 24) no container may get the limits that a warm-up asks for: then a wrapper lowers them.
  if (($((16#$(sed -n 's/^CapEff:\s*//p' /proc/self/status))) >> 24 & 1)); then :; else
    runtime=(--add-runtime "limited=$HERE/runc-limited" --default-runtime limited)
  fi
  halt
  mkdir -p "$DIR/data" "$DIR/exec"
  rm -f "$DIR/down" "$SOCKET"
  echo "$*" >"$DIR/options"
  PATH=$HERE/hook:$PATH setsid nohup unshare --pid --net --mount --fork --kill-child=SIGKILL --mount-proc -- \
    sh -c "$KEEPER" "$DIR" \
    --data-root "$DIR/data" --exec-root "$DIR/exec" --pidfile "$DIR/docker.pid" -H "$HOST" \
    --bridge=none --iptables=false --ip6tables=false "${runtime[@]}" >>"$DIR/log" 2>&1 </dev/null &
  pid=$!
  echo "$pid" >"$DIR/guardian.pid"
  await "$pid"
}

await() {   # await PID: until the engine answers, as long as its guardian lives
  local pid=$1 tries
  for ((tries = 0; tries < 600; tries++)); do
    if pings; then return; fi
    kill -0 "$pid" 2>/dev/null || break
    sleep 0.05
  done
  tail -n 5 "$DIR/log" >&2
  halt
  fail "the private engine does not start; its log is $DIR/log"
}

strike() {   # strike DIR SIGNAL
  local signal=$2 keeper pid child
  enter "$1"
  pid=$(guardian) || fail "no engine runs in $DIR"
  keeper=$(cat "/proc/$pid/task/$pid/children")
  keeper=${keeper% }
  touch "$DIR/down"
  for child in $(cat "/proc/$keeper/task/$keeper/children"); do
    [ "$(cat "/proc/$child/comm" 2>/dev/null)" = dockerd ] || continue
    kill -"$signal" "$child"
    while kill -0 "$child" 2>/dev/null; do sleep 0.02; done
  done
}

halt() {   # ends the engine, in order if it can: what it has written must be there the next time
  local pid child tries
  if pid=$(guardian); then
    child=$(cat "/proc/$pid/task/$pid/children" 2>/dev/null || :)
    if [ -n "$child" ]; then
      # shellcheck disable=SC2086
      kill -TERM $child 2>/dev/null || :
      for ((tries = 0; tries < 300; tries++)); do kill -0 "$pid" 2>/dev/null || break; sleep 0.05; done
    fi
    kill -KILL "$pid" 2>/dev/null || :
    for ((tries = 0; tries < 100; tries++)); do kill -0 "$pid" 2>/dev/null || break; sleep 0.05; done
  fi
  rm -rf "$DIR/guardian.pid" "$DIR/docker.pid" "$SOCKET" "$DIR/exec" 2>/dev/null || :
}

answers() {   # is there an engine without us?
  if command -v docker >/dev/null; then
    # macOS has no timeout.
    $(command -v timeout >/dev/null && echo timeout 15) docker version >/dev/null 2>&1
  elif [ -n "${DOCKER_HOST:-}" ]; then
    fail "DOCKER_HOST is $DOCKER_HOST, and the docker command is missing: install the Docker CLI"
  else
    return 1
  fi
}

run() {
  local dir=$1 status=0 child
  shift
  if answers; then
    # Whoever comes next goes by DOCKER_HOST alone.
    DOCKER_HOST=${DOCKER_HOST:-$(docker context inspect -f '{{.Endpoints.docker.Host}}' 2>/dev/null || echo unix:///var/run/docker.sock)}
    export DOCKER_HOST
    exec "$@"
  fi
  [ -z "${DOCKER_HOST:-}" ] || fail "no engine answers at DOCKER_HOST=$DOCKER_HOST; start it, or unset DOCKER_HOST"
  enter "$dir"
  exec 8>"$DIR/use.lock"
  flock -n 8 || { echo "the private engine in $DIR is in use; waiting" >&2; flock 8; }
  trap halt EXIT
  up "$DIR" 8>&-
  # Not in the foreground: a shell waits for its foreground child before it heeds a signal. Ctrl-C reaches the child from
  # the terminal (which the shell would have it ignore); SIGTERM is passed on.
  # Its input is ours, for a shell: a job in the background would get none.
  DOCKER_HOST=$HOST env --default-signal=INT "$@" 8>&- <&0 &
  child=$!
  trap : INT
  trap 'kill -TERM $child 2>/dev/null || :' TERM
  while wait "$child" || status=$?; kill -0 "$child" 2>/dev/null; do :; done
  status=0
  wait "$child" || status=$?
  exit $status
}

[ $# -ge 2 ] || usage
case $1 in
  up) shift; up "$@"; echo "DOCKER_HOST=$HOST" ;;
  kill) strike "$2" "${3:-KILL}" ;;
  down) enter "$2"; halt ;;
  run) [ $# -ge 3 ] || usage; shift; run "$@" ;;
  *) usage ;;
esac
