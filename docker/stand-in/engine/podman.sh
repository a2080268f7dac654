#!/bin/bash
# A private Podman that serves its Docker-compatible API, for tests of what is different there: no GPUs, no network.
#
#   podman.sh up DIR             starts it (nothing to do where it runs) and prints DOCKER_HOST=...
#   podman.sh down DIR           stops it and everything in it; images stay in DIR for the next time
#   podman.sh run DIR CMD...     runs CMD with DOCKER_HOST set to it, and stops it again on every path
#
# It lives in PID, mount and network namespaces of its own, with storage of its own, so that no other Podman notices it and
# one signal ends all of it. Podman is installed where it is missing (root on Debian or Ubuntu; in a CI runner only with
# INSTALL_ENGINE=1).
set -euo pipefail

HERE=$(dirname "$(readlink -f "$0")")
PACKAGES="podman catatonit runc conmon curl"

fail() { echo "error: $*" >&2; exit 1; }

usage() { sed -n 's/^#   //p' "$0" >&2; exit 2; }

enter() {   # enter DIR: absolute, made, ours
  mkdir -p "$1" 2>/dev/null || fail "cannot make Podman's directory $1"
  DIR=$(readlink -f "$1")
  SOCKET=$DIR/podman.sock RUN=$DIR/run
  # A unix socket's path has at most 107 bytes, and Podman takes at most 50 for its run root.
  local short
  short=/tmp/warm-cache-podman-$(printf %s "$DIR" | sha256sum | cut -c1-12)
  [ ${#SOCKET} -le 107 ] || SOCKET=$short.sock
  [ ${#RUN} -le 50 ] || RUN=$short.run
  HOST=unix://$SOCKET
}

pings() { curl -sf -m 5 --unix-socket "$SOCKET" http://engine/_ping >/dev/null 2>&1; }

guardian() {   # prints the pid of its namespaces, if it is alive and really this one's (pids are used again)
  local pid
  pid=$(cat "$DIR/guardian.pid" 2>/dev/null) || return 1
  [ -n "$pid" ] && tr '\0' '\n' <"/proc/$pid/cmdline" 2>/dev/null | grep -qxF -- "$DIR/root" || return 1
  echo "$pid"
}

allowed() {   # ends with one sentence where this machine does not allow a Podman of our own
  [ "$(id -u)" = 0 ] || fail "a private Podman needs root"
  command -v unshare >/dev/null || fail "a private Podman needs unshare (package util-linux)"
  unshare --pid --net --mount --fork true 2>/dev/null || fail "a private Podman needs namespaces that this machine refuses (unshare fails)"
}

install_packages() {
  local missing=() tool
  for tool in podman catatonit runc conmon curl; do command -v $tool >/dev/null || missing+=("$tool"); done
  [ ${#missing[@]} -gt 0 ] || return 0
  [ -z "${CI:-}" ] || [ "${INSTALL_ENGINE:-}" = 1 ] || fail "${missing[*]} missing, and this is a CI runner: set INSTALL_ENGINE=1 to have it installed"
  command -v apt-get >/dev/null && grep -qE '^ID(_LIKE)?=.*(debian|ubuntu)' /etc/os-release ||
    fail "${missing[*]} missing, which cannot be installed here (Debian or Ubuntu only)"
  echo "installing ${missing[*]} (apt)" >&2
  local policy=/usr/sbin/policy-rc.d
  if [ ! -e $policy ]; then   # no service may start: this one is ours, and private
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod 755 $policy
    trap "rm -f $policy" EXIT
  fi
  apt-get update -qq >&2 || fail "apt-get update failed"
  # shellcheck disable=SC2086
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $PACKAGES >/dev/null || fail "apt-get install failed: $PACKAGES"
}

configure() {   # everything that Podman would otherwise share with the machine's own
  local runtime=/usr/sbin/runc
  # Without CAP_SYS_RESOURCE (bit 24) no container may get the limits that a warm-up asks for: then a wrapper lowers them.
  (($((16#$(sed -n 's/^CapEff:\s*//p' /proc/self/status))) >> 24 & 1)) || runtime=$HERE/runc-limited
  cat >"$DIR/containers.conf" <<END
[containers]
log_driver = "k8s-file"
init_path = "$(command -v catatonit)"
[network]
network_config_dir = "$DIR/net"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "kit"
tmp_dir = "$DIR/tmp"
[engine.runtimes]
kit = ["$runtime"]
END
}

up() {   # up DIR
  local pid tries
  enter "$1"
  if guardian >/dev/null && pings; then return; fi
  allowed
  install_packages
  halt
  mkdir -p "$DIR/root" "$RUN" "$DIR/net"
  configure
  # conmon writes into the working directory.
  (cd "$RUN" && CONTAINERS_CONF=$DIR/containers.conf exec setsid nohup \
    unshare --pid --net --mount --fork --kill-child=SIGKILL --mount-proc -- \
    sh -c 'ip link set lo up; podman "$@"; exit $?' podman \
    --root "$DIR/root" --runroot "$RUN" system service --time 0 "$HOST" >>"$DIR/log" 2>&1 </dev/null) &
  pid=$!
  disown "$pid" # its end is nobody's news
  echo "$pid" >"$DIR/guardian.pid"
  for ((tries = 0; tries < 400; tries++)); do
    if pings; then return; fi
    kill -0 "$pid" 2>/dev/null || break
    sleep 0.05
  done
  tail -n 5 "$DIR/log" >&2
  halt
  fail "Podman does not start; its log is $DIR/log"
}

halt() {   # ends it and, with its namespace, everything in it
  local pid tries
  if pid=$(guardian); then
    kill -KILL "$pid" 2>/dev/null || :
    for ((tries = 0; tries < 200; tries++)); do kill -0 "$pid" 2>/dev/null || break; sleep 0.05; done
  fi
  rm -rf "$DIR/guardian.pid" "$SOCKET" "$RUN" "$DIR/tmp" 2>/dev/null || :
}

run() {
  local dir=$1 status=0 child
  shift
  enter "$dir"
  trap halt EXIT
  up "$dir"
  # Not in the foreground: a shell waits for its foreground child before it heeds a signal.
  DOCKER_HOST=$HOST env --default-signal=INT "$@" &
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
  up) up "$2"; echo "DOCKER_HOST=$HOST" ;;
  down) enter "$2"; halt ;;
  run) [ $# -ge 3 ] || usage; shift; run "$@" ;;
  *) usage ;;
esac
