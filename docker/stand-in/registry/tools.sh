#!/bin/bash
# Other clients of registries, for tests: Debian 13's cosign 2.5 and oras 1.2, unpacked and not installed (Debian 12 has
# neither, and runs both).
#
#   tools.sh DIR PROGRAM...   puts DIR/PROGRAM there (cosign, oras), nothing to do where it is; 12 s and 35 MB the first time
#
# Uses a private apt, which leaves the machine's own as it is: root on Debian or Ubuntu.
set -euo pipefail

fail() { echo "error: $*" >&2; exit 1; }

[ $# -ge 2 ] || { sed -n 's/^#   //p' "$0" >&2; exit 2; }
mkdir -p "$1"
DIR=$(readlink -f "$1")
shift

exec 8>"$DIR/lock"
flock 8
missing=()
for program; do [ -x "$DIR/$program" ] || missing+=("$program"); done
[ ${#missing[@]} -gt 0 ] || exit 0

command -v apt-get >/dev/null || fail "there is no apt-get to get ${missing[*]} with (Debian or Ubuntu only)"
[ "$(id -u)" = 0 ] || fail "getting ${missing[*]} from Debian 13 needs root"
site=$(apt-get indextargets --format '$(SITE)' 2>/dev/null | grep -m1 '/debian/*$') || fail "apt has no mirror of Debian"
home=$DIR/apt
rm -rf "$home"
trap 'rm -rf "$home"' EXIT
mkdir -p "$home"/{lists/partial,archives/partial,root}
: >"$home/status"   # nothing is installed: downloads need no check of dependencies
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $site trixie main" >"$home/sources.list"
options=(-qq -o "Dir::Etc::sourcelist=$home/sources.list" -o Dir::Etc::sourceparts=/nonexistent -o "Dir::State=$home"
  -o "Dir::State::lists=$home/lists" -o "Dir::State::status=$home/status" -o "Dir::Cache=$home"
  -o "Dir::Cache::archives=$home/archives" -o APT::Sandbox::User=root)
apt-get "${options[@]}" update >&2 || fail "apt-get update for Debian 13 failed"
cd "$home/archives"
apt-get "${options[@]}" download "${missing[@]}" >/dev/null || fail "apt-get download ${missing[*]} failed"
for package in *.deb; do dpkg-deb -x "$package" "$home/root"; done
for program in "${missing[@]}"; do
  mv "$home/root/usr/bin/$program" "$DIR/$program" || fail "Debian 13 has no $program"
done
