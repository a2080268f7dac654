#!/bin/bash
# Makes the real stand-in image, a TEST DOUBLE: real torch, sglang, DeepGEMM, nvcc and Triton, and CUDA libraries that do
# nothing.
#
#   build.sh [TAG]        default tag: warm-cache-stand-in:real; DOCKER_HOST says which engine gets it
#
# An engine that has the image debian:12, or can pull it, builds the stand-in from Dockerfile: on any system, by any user.
# Where there is no registry it is put together here, from Debian 12 packages and wheels (root on Debian 12), wherever apt
# and pip are configured to find them. WARM_CACHE_STAND_IN_CACHE (default ~/.cache/warm-cache-stand-in) keeps packages,
# wheels and the finished root file system of this second way. WARM_CACHE_BUILD_OPTIONS are more options of docker build,
# e.g. a network; PIP_INDEX_URL is used in it.
#
# An image that is there and was made from these very sources is left alone, so that its id stays what it is.
set -eEuo pipefail
trap 'echo "error: build.sh line $LINENO failed: $BASH_COMMAND" >&2' ERR

TAG=${1:-warm-cache-stand-in:real}
HERE=$(dirname "$(readlink -f "$0")")
DRIVER=$(readlink -f "$HERE/../../../builder/agent/stub_driver")   # shared with the warm-up image
CACHE=${WARM_CACHE_STAND_IN_CACHE:-$HOME/.cache/warm-cache-stand-in}
HOME_IN_IMAGE=/opt/standin
SITE=$HOME_IN_IMAGE/venv/lib/python3.11/site-packages
CUDA=$SITE/nvidia/cu13
LABEL=io.sglang.warm-cache.stand-in

fail() { trap - ERR; echo "error: $*" >&2; exit 1; }
step() { printf '%6ds  %s\n' "$SECONDS" "$1" >&2; }
digest() { if command -v sha256sum >/dev/null; then sha256sum "$@"; else shasum -a 256 "$@"; fi; }

KEY=$({
  cd "$HERE" && find . -type f ! -name '*.pyc' ! -name README.md | LC_ALL=C sort | while read -r name; do digest "$name"; done
  cd "$DRIVER" && digest driver.c runtime.c
} | digest | cut -c1-16)
mkdir -p "$CACHE"
CACHE=$(readlink -f "$CACHE")
TAR=$CACHE/real-$KEY.tar
BASE=debian:12

command -v docker >/dev/null || fail "the docker command is missing; install the Docker CLI"
docker version >/dev/null 2>&1 || fail "no Docker engine answers at ${DOCKER_HOST:-the default socket}"
if [ "$(docker image inspect -f "{{index .Config.Labels \"$LABEL\"}}" "$TAG" 2>/dev/null)" = "$KEY" ]; then
  exit 0
fi

import_image() {
  step "importing the image from $TAR"
  docker import --message "warm-cache stand-in $KEY" \
    -c "ENV PATH=$HOME_IN_IMAGE/venv/bin:$CUDA/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" \
    -c "ENV CUDA_HOME=$CUDA" -c "ENV LD_LIBRARY_PATH=$HOME_IN_IMAGE/stubs" -c "ENV PYTHONPATH=$HOME_IN_IMAGE/shim" \
    -c 'ENV PYTHONUNBUFFERED=1' -c 'ENV HF_HUB_OFFLINE=1' -c 'WORKDIR /tmp' -c 'CMD ["bash"]' \
    -c "LABEL $LABEL=$KEY" - "$TAG" <"$TAR" >/dev/null
  step "imported as $TAG"
}

build_image() {   # by the engine, from Dockerfile
  local context
  context=$(mktemp -d)
  trap 'rm -rf "$context"' RETURN
  cp -R "$HERE/." "$context/"
  mkdir "$context/src/stub_driver"
  cp "$DRIVER/driver.c" "$DRIVER/runtime.c" "$context/src/stub_driver/"
  step "building $TAG from Dockerfile: packages, 1 GB of wheels, a first start (once; 3 to 10 minutes)"
  # shellcheck disable=SC2086
  docker build ${WARM_CACHE_BUILD_OPTIONS:-} --platform linux/amd64 --label "$LABEL=$KEY" \
    ${PIP_INDEX_URL:+--build-arg "PIP_INDEX_URL=$PIP_INDEX_URL"} --tag "$TAG" "$context" >&2 ||
    fail "docker build of the stand-in failed; its output is above"
  step "built as $TAG"
}

[ ! -e "$TAR" ] || { import_image; exit; }
if docker image inspect "$BASE" >/dev/null 2>&1; then
  build_image
  exit
fi
step "asking the engine to pull $BASE"
if pulled=$(docker pull --platform linux/amd64 "$BASE" 2>&1); then
  build_image
  exit
fi
step "it cannot (${pulled##*$'\n'}); so the image is put together from Debian packages and wheels"
WITHOUT="an engine without a registry gets the stand-in image from packages of Debian 12 (bookworm)"
grep -q '^VERSION_CODENAME=bookworm' /etc/os-release 2>/dev/null ||
  fail "$WITHOUT, and this is no Debian 12. Use an engine that can pull $BASE, and a network"
[ "$(id -u)" = 0 ] || fail "$WITHOUT, which takes root. Use an engine that can pull $BASE, or run this as root"
for tool in apt-get dpkg-deb unshare chroot pip flock; do
  command -v "$tool" >/dev/null || fail "$tool is missing (Debian packages: python3-pip, util-linux)"
done
exec 9>"$CACHE/real.lock"   # one maker per cache
flock 9
[ ! -e "$TAR" ] || { import_image; exit; }
step "base system, 1 of 5: $(wc -l <"$HERE/packages.txt") packages and what they need (the whole takes 2 to 10 minutes, once)"

ROOT=$CACHE/real-root
SCRATCH=$ROOT/.build
DEBS=$CACHE/debs
WHEELS=$CACHE/uv
rm -rf "$ROOT"
mkdir -p "$ROOT"/usr/{bin,sbin,lib,lib64} "$ROOT"/{tmp,proc,sys,dev,etc,root,run,var/tmp,opt} "$DEBS/partial" "$WHEELS"
for name in bin sbin lib lib64; do ln -s "usr/$name" "$ROOT/$name"; done
chmod 1777 "$ROOT/tmp" "$ROOT/var/tmp"

# 1. The base system: what these packages need, asked of an empty package database; unpacked, no maintainer scripts.
PACKAGES=$(cat "$HERE/packages.txt")
: >"$CACHE/no-packages"
apt_get() {
  apt-get -qq -o Dir::State::status="$CACHE/no-packages" -o Dir::Cache::archives="$DEBS" -o APT::Install-Recommends=0 \
    -o Debug::NoLocking=1 -o APT::Sandbox::User=root -o APT::Keep-Downloaded-Packages=1 \
    -o Binary::apt-get::APT::Keep-Downloaded-Packages=1 "$@"
}
EMPTY=$(mktemp -d)   # --print-uris leaves out what is already downloaded, so it is asked with an empty folder
mkdir -p "$EMPTY/partial"
# shellcheck disable=SC2086
LIST=$(apt_get -o Dir::Cache::archives="$EMPTY" install -y --print-uris $PACKAGES | awk '{print $2}') || fail "apt does not find the packages; run: apt-get update"
rm -rf "$EMPTY"
# shellcheck disable=SC2086
apt_get install -y --download-only $PACKAGES >/dev/null
for deb in $LIST; do
  dpkg-deb --fsys-tarfile "$DEBS/$deb" | tar -C "$ROOT" -x --keep-directory-symlink \
    --exclude=./usr/share/{doc,man,locale,info,perl5,bash-completion,lintian,zoneinfo}
done
[ -e "$ROOT/bin/sh" ] || ln -s dash "$ROOT/bin/sh"
[ -e "$ROOT/usr/bin/awk" ] || ln -s gawk "$ROOT/usr/bin/awk"
ln -sf gcc "$ROOT/usr/bin/cc"
ln -sf g++ "$ROOT/usr/bin/c++"
ln -sf python3.11 "$ROOT/usr/bin/python3"
printf 'root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534::/:/bin/false\n' >"$ROOT/etc/passwd"
printf 'root:x:0:\nnogroup:x:65534:\n' >"$ROOT/etc/group"
printf 'hosts: files dns\n' >"$ROOT/etc/nsswitch.conf"
step "Python packages, 2 of 5: torch, sglang, nvcc and $(wc -l <"$HERE/requirements.txt") in all"

# 2. Python packages, installed from inside the root so that every path is final. The wheel cache is moved below the root
#    for that time: on one file system, packages are hard links. Wheels that lie on this disk (pip's configuration names
#    such places as file:// indexes) are bound into the root.
UV=$(command -v uv || echo "$CACHE/uv-program/bin/uv")
[ -x "$UV" ] || pip install -q --target "$CACHE/uv-program" uv
mapfile -t LOCAL < <(pip config list 2>/dev/null | grep -oE "file://[^ '\"]+" | sed -E 's#^file://##; s#/simple/?$##' | sort -u)
mkdir -p "$SCRATCH/src" "$SCRATCH/local"
for n in "${!LOCAL[@]}"; do mkdir -p "$SCRATCH/local/$n"; done
mv "$WHEELS" "$SCRATCH/uv-cache"
trap 'mv "$SCRATCH/uv-cache" "$WHEELS" 2>/dev/null || :' EXIT
cp "$UV" "$SCRATCH/uv"
cp -r "$HERE/." "$SCRATCH/src/"
mkdir "$SCRATCH/src/src/stub_driver"
cp "$DRIVER/driver.c" "$DRIVER/runtime.c" "$SCRATCH/src/src/stub_driver/"
cp /etc/resolv.conf "$ROOT/etc/resolv.conf"
cp -L "${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}" "$SCRATCH/ca.crt"

local_wheel() {   # a wheel on this disk (its path inside the root), else the requirement
  local n found
  for n in "${!LOCAL[@]}"; do
    found=$(find "${LOCAL[$n]}" -name "$2" -type f 2>/dev/null | head -1)
    if [ -n "$found" ]; then echo "/.build/local/$n${found#"${LOCAL[$n]}"}"; return; fi
  done
  echo "$1"
}
while read -r requirement; do
  name=${requirement%%==*} version=${requirement##*==}
  case $requirement in
    torch==* | torchvision==* | nvidia-*) local_wheel "$requirement" "${name//-/_}-$version-*" ;;
    *) echo "$requirement" ;;
  esac
done <"$HERE/requirements.txt" >"$SCRATCH/requirements.txt"

in_root() {   # in_root COMMAND...: with /dev, /proc and the local wheels, in a mount namespace of its own
  LOCALS=$(printf '%s\n' ${LOCAL[@]+"${LOCAL[@]}"}) unshare --mount sh -c '
    root=$1; shift; n=0
    for folder in $LOCALS; do mount --bind -r "$folder" "$root/.build/local/$n" 2>/dev/null || :; n=$((n + 1)); done
    mount --rbind /dev "$root/dev"; mount --rbind /sys "$root/sys"; mount -t proc proc "$root/proc"
    exec env -i HOME=/root PATH=/usr/sbin:/usr/bin "https_proxy=$https_proxy" "http_proxy=$http_proxy" "no_proxy=$no_proxy" \
      chroot "$root" "$@"' _ "$ROOT" "$@"
}
export https_proxy=${https_proxy:-} http_proxy=${http_proxy:-} no_proxy=${no_proxy:-}

in_root env UV_CACHE_DIR=/.build/uv-cache UV_LINK_MODE=hardlink SSL_CERT_FILE=/.build/ca.crt UV_NO_CONFIG=1 \
  ${UV_DEFAULT_INDEX:+UV_DEFAULT_INDEX=$UV_DEFAULT_INDEX} \
  bash /.build/src/inside.sh install /.build/uv /.build/requirements.txt >&2
step "leaving out what is not needed, 3 of 5"

# 3. Without device code and symbols, and without what the base system has for programs that are not here.
in_root bash /.build/src/inside.sh slim
rm -rf "$ROOT"/usr/share/gcc/python "$ROOT/usr/bin/lto-dump-12" \
  "$ROOT"/usr/lib/gcc/x86_64-linux-gnu/12/{lto1,*san*.a,*san*.so} \
  "$ROOT"/usr/lib/x86_64-linux-gnu/libpython3.11*.a "$ROOT"/usr/lib/python3.11/config-3.11-x86_64-linux-gnu
step "a first start in each mode, 4 of 5 (its output: $CACHE/start.log)"

# 4. One start of each mode.
if ! unshare --net --pid --mount --fork --kill-child bash -c "ip link set lo up; $(declare -f in_root); ROOT='$ROOT'; LOCAL=(); in_root bash /.build/src/start.sh" >"$CACHE/start.log" 2>&1; then
  tail -n 20 "$CACHE/start.log" >&2
  fail "the stand-in does not start; its output is in $CACHE/start.log"
fi
step "writing the root file system, 5 of 5"

# 5. One tar, from which any engine gets the image in seconds.
mv "$SCRATCH/uv-cache" "$WHEELS"
trap - EXIT
rm -rf "$SCRATCH" "$ROOT/root/.cache"
: >"$ROOT/etc/resolv.conf"
rm -f "$CACHE"/real-*.tar
tar -C "$ROOT" --sort=name --numeric-owner -cf "$TAR.new" .
mv "$TAR.new" "$TAR"
rm -rf "$ROOT"
import_image
