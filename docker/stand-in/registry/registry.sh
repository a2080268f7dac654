#!/bin/bash
# A real image registry (Debian's docker-registry, distribution 2.8) on this machine's loopback, for tests.
#
#   registry.sh up DIR [OPTION...]  starts it and prints shell assignments: REGISTRY=127.0.0.1:PORT, REGISTRY_PID=PID, and
#                                   with --tls REGISTRY_CA=FILE. One signal to that process ends it; DIR/data stays
#     --auth USER:PASSWORD          wants this login (Basic)
#     --tls                         https, with a certificate of its own for 127.0.0.1 and localhost
#     --port N                      this port, as for a registry that comes back
#     --also-in PID                 the same one is seen on the loopback of this process's network namespace too: that of a
#                                   private engine, whose process is in ENGINE/guardian.pid
#   registry.sh down DIR            ends it
#
# Missing packages are installed (root on Debian or Ubuntu; in a CI runner only with INSTALL_ENGINE=1). The registry serves a
# damaged blob as it is: flip a byte in DIR/data/docker/registry/v2/blobs/sha256/XX/DIGEST/data.
set -euo pipefail

fail() { echo "error: $*" >&2; exit 1; }

usage() { sed -n 's/^#   //p' "$0" >&2; exit 2; }

install_packages() {
  local missing=() pair policy=/usr/sbin/policy-rc.d
  for pair in docker-registry:docker-registry curl:curl openssl:openssl perl:perl-base nsenter:util-linux; do
    command -v "${pair%%:*}" >/dev/null || missing+=("${pair#*:}")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  [ -z "${CI:-}" ] || [ "${INSTALL_ENGINE:-}" = 1 ] || fail "${missing[*]} is not installed, and this is a CI runner: set INSTALL_ENGINE=1 to install it"
  [ "$(id -u)" = 0 ] || fail "${missing[*]} is not installed, and installing it needs root"
  command -v apt-get >/dev/null && grep -qE '^ID(_LIKE)?=.*(debian|ubuntu)' /etc/os-release ||
    fail "${missing[*]} is not installed, and cannot be installed here (Debian or Ubuntu only)"
  echo "installing ${missing[*]} (apt)" >&2
  if [ ! -e $policy ]; then   # no service may start
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod 755 $policy
    trap "rm -f $policy" EXIT
  fi
  apt-get update -qq >&2 || fail "apt-get update failed"
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null || fail "apt-get install failed: ${missing[*]}"
}

free_port() {   # prints a port of this machine that no process listens on
  local port
  for port in $(shuf -i 20000-29999 -n 50); do
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || { echo "$port"; return; }
  done
  fail "no free port found"
}

configure() {   # writes DIR/config.yml
  {
    echo 'version: 0.1'
    echo 'log: {level: warn, accesslog: {disabled: true}}'
    echo "storage: {filesystem: {rootdirectory: $DIR/data}, delete: {enabled: true}}"
    # One secret: an upload that was begun at one of two processes may be finished at the other.
    echo "http: {addr: '127.0.0.1:$PORT', secret: stand-in${TLS:+, tls: {certificate: $DIR/cert.pem, key: $DIR/key.pem\}}}"
    [ -z "$AUTH" ] || echo "auth: {htpasswd: {realm: stand-in, path: $DIR/htpasswd}}"
  } >"$DIR/config.yml"
  # It takes bcrypt alone, which perl's crypt() knows where the C library does.
  [ -z "$AUTH" ] || perl -e 'my ($u, $p) = split /:/, $ARGV[0], 2; my $s = join "", map { ("a".."z")[rand 26] } 1..21; print "$u:", crypt($p, "\$2y\$05\$${s}u"), "\n"' "$AUTH" >"$DIR/htpasswd"
  if [ -n "$TLS" ] && [ ! -e "$DIR/cert.pem" ]; then
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30 -subj /CN=stand-in \
      -addext 'subjectAltName=IP:127.0.0.1,DNS:localhost' -keyout "$DIR/key.pem" -out "$DIR/cert.pem" 2>/dev/null
  fi
}

# The process whose pid is printed: a shell that ends its one or two registries when it gets a signal.
KEEPER='docker-registry serve "$0/config.yml" & pids=$!
  if [ -n "$ALSO" ]; then nsenter --net --target "$ALSO" docker-registry serve "$0/config.yml" & pids="$pids $!"; fi
  trap "kill $pids 2>/dev/null" TERM INT EXIT
  wait -n $pids'

up() {   # up DIR [OPTION...]
  local pid tries
  DIR=$1 AUTH='' TLS='' PORT='' ALSO=''
  shift
  while [ $# -gt 0 ]; do
    case $1 in
      --auth) AUTH=$2; shift 2 ;;
      --tls) TLS=1; shift ;;
      --port) PORT=$2; shift 2 ;;
      --also-in) ALSO=$2; shift 2 ;;
      *) fail "there is no option $1" ;;
    esac
  done
  mkdir -p "$DIR/data" || fail "cannot make the registry's directory $DIR"
  DIR=$(readlink -f "$DIR")
  exec 8>/tmp/warm-cache-stand-in-registry.lock   # two of them must not install at the same time, or take one port
  flock 8
  install_packages
  [ -n "$PORT" ] || PORT=$(free_port)
  configure
  ALSO=$ALSO setsid bash -c "$KEEPER" "$DIR" >>"$DIR/log" 2>&1 </dev/null 8>&- &
  pid=$!
  echo "$pid" >"$DIR/pid"
  for ((tries = 0; tries < 400; tries++)); do
    if answers && answers nsenter --net --target "${ALSO:-$$}"; then
      echo "REGISTRY=127.0.0.1:$PORT"
      echo "REGISTRY_PID=$pid"
      [ -z "$TLS" ] || echo "REGISTRY_CA=$DIR/cert.pem"
      return
    fi
    kill -0 "$pid" 2>/dev/null || break
    sleep 0.05
  done
  tail -n 3 "$DIR/log" >&2
  kill "$pid" 2>/dev/null || :
  fail "docker-registry does not start; its log is $DIR/log"
}

answers() {   # answers [CMD...]: does it, seen from where CMD runs?
  [ $# -eq 0 ] || [ -n "$ALSO" ] || return 0
  "$@" curl -so /dev/null -m 5 ${TLS:+--cacert "$DIR/cert.pem"} "http${TLS:+s}://127.0.0.1:$PORT/v2/"
}

down() {
  local pid
  pid=$(cat "$1/pid" 2>/dev/null) || return 0
  # Pids are used again: only a process of this folder is ended.
  if tr '\0' '\n' <"/proc/$pid/cmdline" 2>/dev/null | grep -qxF -- "$(readlink -f "$1")"; then
    kill "$pid" 2>/dev/null || :
    # Of a process that has ended and whose parent does not ask for it, no command line is left.
    while grep -q . "/proc/$pid/cmdline" 2>/dev/null; do sleep 0.02; done
  fi
  rm -f "$1/pid"
}

[ $# -ge 2 ] || usage
case $1 in
  up) shift; up "$@" ;;
  down) down "$2" ;;
  *) usage ;;
esac
