#!/bin/bash
# Makes the real stand-in image, a TEST DOUBLE: real torch, sglang, DeepGEMM, nvcc and Triton, and CUDA libraries that do
# nothing. No image registry is needed; packages come from wherever apt and pip are configured to find them.
#
#   build.sh [TAG]        default tag: warm-cache-stand-in:real; DOCKER_HOST says which engine gets it
#
# WARM_CACHE_STAND_IN_CACHE (default ~/.cache/warm-cache-stand-in) keeps packages, wheels and the finished root file
# system. An image that is there and was made from these very sources is left alone, so that its id stays what it is.
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

KEY=$({
  cd "$HERE" && find . -type f ! -name '*.pyc' ! -name README.md | LC_ALL=C sort | xargs sha256sum
  cd "$DRIVER" && sha256sum driver.c runtime.c
} | sha256sum | cut -c1-16)
mkdir -p "$CACHE"
CACHE=$(readlink -f "$CACHE")
TAR=$CACHE/real-$KEY.tar

command -v docker >/dev/null || fail "the docker command is missing; install the Docker CLI"
docker version >/dev/null 2>&1 || fail "no Docker engine answers at ${DOCKER_HOST:-the default socket}"
if [ "$(docker image inspect -f "{{index .Config.Labels \"$LABEL\"}}" "$TAG" 2>/dev/null)" = "$KEY" ]; then
  exit 0
fi

import_image() {
  docker import --message "warm-cache stand-in $KEY" \
    -c "ENV PATH=$HOME_IN_IMAGE/venv/bin:$CUDA/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" \
    -c "ENV CUDA_HOME=$CUDA" -c "ENV LD_LIBRARY_PATH=$HOME_IN_IMAGE/stubs" -c "ENV PYTHONPATH=$HOME_IN_IMAGE/shim" \
    -c 'ENV PYTHONUNBUFFERED=1' -c 'ENV HF_HUB_OFFLINE=1' -c 'WORKDIR /tmp' -c 'CMD ["bash"]' \
    -c "LABEL $LABEL=$KEY" - "$TAG" <"$TAR" >/dev/null
  step "imported as $TAG"
}

exec 9>"$CACHE/real.lock"   # one maker per cache
flock 9
if [ -e "$TAR" ]; then import_image; exit; fi

[ "$(id -u)" = 0 ] || fail "making the stand-in image needs root (it unpacks packages and uses chroot)"
grep -q '^VERSION_CODENAME=bookworm' /etc/os-release || fail "the stand-in image is made from Debian 12 (bookworm) packages; run this on Debian 12"
for tool in apt-get dpkg-deb unshare chroot strip pip; do
  command -v "$tool" >/dev/null || fail "$tool is missing (Debian packages: binutils, python3-pip, util-linux)"
done

ROOT=$CACHE/real-root
SCRATCH=$ROOT/.build
DEBS=$CACHE/debs
WHEELS=$CACHE/uv
rm -rf "$ROOT"
mkdir -p "$ROOT"/usr/{bin,sbin,lib,lib64} "$ROOT"/{tmp,proc,sys,dev,etc,root,run,var/tmp,opt} "$DEBS/partial" "$WHEELS"
for name in bin sbin lib lib64; do ln -s "usr/$name" "$ROOT/$name"; done
chmod 1777 "$ROOT/tmp" "$ROOT/var/tmp"

# 1. The base system: what these packages need, asked of an empty package database; unpacked, no maintainer scripts.
PACKAGES="python3.11 libpython3.11-dev gcc g++ binutils libc-bin coreutils bash dash sed grep gawk findutils procps util-linux numactl tini"
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
step "base system unpacked"

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

cat >"$SCRATCH/install.sh" <<IN_ROOT
set -e
export UV_CACHE_DIR=/.build/uv-cache UV_LINK_MODE=hardlink SSL_CERT_FILE=/.build/ca.crt UV_HTTP_TIMEOUT=180 UV_NO_CONFIG=1
export UV_PYTHON_DOWNLOADS=never CUDA_HOME=$CUDA ${UV_DEFAULT_INDEX:+UV_DEFAULT_INDEX=$UV_DEFAULT_INDEX}
ldconfig
/.build/uv venv -q --python /usr/bin/python3.11 $HOME_IN_IMAGE/venv
/.build/uv pip install -q --no-deps --python $HOME_IN_IMAGE/venv/bin/python -r /.build/requirements.txt
/usr/bin/python3.11 /.build/src/mkstubs.py $SITE $HOME_IN_IMAGE/stubs
# The stub takes the runtime's place, and its names: programs that are linked while they run look for them in lib64.
ln -sf $HOME_IN_IMAGE/stubs/libcudart.so.13 $CUDA/lib/libcudart.so.13
ln -s libcudart.so.13 $CUDA/lib/libcudart.so
ln -s lib $CUDA/lib64
cp -r /.build/src/src/shim /.build/src/shapes.py /.build/src/tri.py $HOME_IN_IMAGE/
cp -r /.build/src/tiny-model $HOME_IN_IMAGE/tiny
IN_ROOT
in_root bash /.build/install.sh
step "python packages and stubs installed"

# 3. Nothing here runs device code, and nobody debugs it. New files instead of changed ones: the wheel cache shares them.
replace() { chmod --reference="$1" "$1.new"; touch -r "$1" "$1.new"; mv "$1.new" "$1"; }
for lib in libtorch_cuda.so libtorch_cuda_linalg.so; do
  lib=$ROOT$SITE/torch/lib/$lib
  [ -e "$lib" ] || continue
  python3 "$HERE/elfcut.py" "$lib" "$lib.new" >/dev/null
  replace "$lib"
done
for lib in triton/_C/libtriton.so torch/lib/libtorch_cpu.so torch/lib/libtorch_python.so; do
  lib=$ROOT$SITE/$lib
  strip --strip-unneeded -o "$lib.new" "$lib"
  replace "$lib"
done
rm -rf "$ROOT$SITE"/triton/{backends/nvidia/lib/cupti*,_C/libproton.so,instrumentation} \
  "$ROOT$SITE"/torch/{bin/protoc*,bin/test_*,test,lib/*.a} "$ROOT$CUDA"/lib/*.a \
  "$ROOT"/usr/share/gcc/python "$ROOT/usr/bin/lto-dump-12" "$ROOT"/usr/lib/gcc/x86_64-linux-gnu/12/{lto1,*san*.a,*san*.so} \
  "$ROOT"/usr/lib/x86_64-linux-gnu/libpython3.11*.a "$ROOT"/usr/lib/python3.11/config-3.11-x86_64-linux-gnu
step "slimmed"

# 4. One start of each mode writes the byte code that is really used (all of it would be 370 MB).
cat >"$SCRATCH/start.sh" <<IN_ROOT
ip link set lo up 2>/dev/null
cd /tmp
export CUDA_HOME=$CUDA LD_LIBRARY_PATH=$HOME_IN_IMAGE/stubs PYTHONPATH=$HOME_IN_IMAGE/shim HF_HUB_OFFLINE=1
export PATH=$HOME_IN_IMAGE/venv/bin:$CUDA/bin:\$PATH
LD_PRELOAD=$HOME_IN_IMAGE/stubs/fakert.so SGLANG_CACHE_DIR=/.build/sglang python $HOME_IN_IMAGE/shapes.py NONE || exit 1
TRITON_CACHE_DIR=/.build/triton python $HOME_IN_IMAGE/tri.py || exit 1
SGLANG_USE_CPU_ENGINE=1 timeout 330 python -m sglang.launch_server --device cpu --load-format dummy \
  --model-path $HOME_IN_IMAGE/tiny --attention-backend torch_native --sampling-backend pytorch --host 127.0.0.1 --port 31997 \
  --mem-fraction-static 0.2 --max-total-tokens 4096 & server=\$!
python - \$server <<'PYTHON' || exit 1
import os, sys, time, urllib.request
for _ in range(600):  # of a machine under load
    time.sleep(0.5)
    os.stat("/proc/" + sys.argv[1])
    try:
        urllib.request.urlopen("http://127.0.0.1:31997/health_generate", timeout=20)
        break
    except OSError:
        pass
else:
    sys.exit("the server does not become ready")
import sglang.compile_deep_gemm
PYTHON
kill \$server
wait
rm -rf /root/.cache /root/.triton /tmp/* /tmp/.[!.]*
exit 0
IN_ROOT
if ! unshare --net --pid --mount --fork --kill-child bash -c "ip link set lo up; $(declare -f in_root); ROOT='$ROOT'; LOCAL=(); in_root bash /.build/start.sh" >"$CACHE/start.log" 2>&1; then
  tail -n 20 "$CACHE/start.log" >&2
  fail "the stand-in does not start; its output is in $CACHE/start.log"
fi
step "started once in each mode"

# 5. One tar, from which any engine gets the image in seconds.
mv "$SCRATCH/uv-cache" "$WHEELS"
trap - EXIT
rm -rf "$SCRATCH" "$ROOT/root/.cache"
: >"$ROOT/etc/resolv.conf"
rm -f "$CACHE"/real-*.tar
tar -C "$ROOT" --sort=name --numeric-owner -cf "$TAR.new" .
mv "$TAR.new" "$TAR"
rm -rf "$ROOT"
step "root file system written"
import_image
