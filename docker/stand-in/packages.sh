#!/bin/bash
# Sourced by stand-ins: installs what is missing, and starts no service.

fail() { echo "error: $*" >&2; exit 1; }

install_packages() {   # install_packages COMMAND:PACKAGE...
  local missing=() pair policy=/usr/sbin/policy-rc.d
  for pair; do
    command -v "${pair%%:*}" >/dev/null || missing+=("${pair#*:}")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  [ -z "${CI:-}" ] || [ "${INSTALL_ENGINE:-}" = 1 ] || fail "${missing[*]} is not installed, and this is a CI runner: set INSTALL_ENGINE=1 to install it"
  [ "$(id -u)" = 0 ] || fail "${missing[*]} is not installed, and installing it needs root"
  command -v apt-get >/dev/null && grep -qE '^ID(_LIKE)?=.*(debian|ubuntu)' /etc/os-release ||
    fail "${missing[*]} is not installed, and cannot be installed here (Debian or Ubuntu only)"
  echo "installing ${missing[*]} (apt)" >&2
  if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod 755 $policy
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
  fi
  (
    flock 9   # apt's own lock would make the second of two fail
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
  ) 9>/tmp/warm-cache-stand-in-apt.lock >/dev/null 2>&1 || fail "apt-get install failed: ${missing[*]}"
}
