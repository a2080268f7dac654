#!/bin/bash
# What the stand-in image holds beside its base system, made inside it: by Dockerfile, or by build.sh in a chroot (start.sh is
# the last step).
#
#   inside.sh install UV REQUIREMENTS   Python packages, stubs of NVIDIA's libraries, and programs of the stand-in
#   inside.sh slim                      leaves out device code, symbols and tools that nothing here uses
set -euo pipefail

SOURCES=$(dirname "$(readlink -f "$0")")
HOME_IN_IMAGE=/opt/standin
SITE=$HOME_IN_IMAGE/venv/lib/python3.11/site-packages
export CUDA_HOME=$SITE/nvidia/cu13

install() {   # install UV REQUIREMENTS
  export UV_PYTHON_DOWNLOADS=never UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-180}
  ldconfig
  "$1" venv -q --python /usr/bin/python3.11 $HOME_IN_IMAGE/venv
  "$1" pip install --no-deps --python $HOME_IN_IMAGE/venv/bin/python -r "$2"
  /usr/bin/python3.11 "$SOURCES/mkstubs.py" $SITE $HOME_IN_IMAGE/stubs
  # The stub takes the runtime's place, and its names: programs that are linked while they run look for them in lib64.
  ln -sf $HOME_IN_IMAGE/stubs/libcudart.so.13 "$CUDA_HOME/lib/libcudart.so.13"
  ln -s libcudart.so.13 "$CUDA_HOME/lib/libcudart.so"
  ln -s lib "$CUDA_HOME/lib64"
  cp -r "$SOURCES/src/shim" "$SOURCES/shapes.py" "$SOURCES/tri.py" $HOME_IN_IMAGE/
  cp -r "$SOURCES/tiny-model" $HOME_IN_IMAGE/tiny
}

# Nothing here runs device code, and nobody debugs it. New files instead of changed ones: a wheel cache may share them.
replace() { chmod --reference="$1" "$1.new"; touch -r "$1" "$1.new"; mv "$1.new" "$1"; }

slim() {
  local lib
  for lib in libtorch_cuda.so libtorch_cuda_linalg.so; do
    lib=$SITE/torch/lib/$lib
    [ -e "$lib" ] || continue
    python3 "$SOURCES/elfcut.py" "$lib" "$lib.new" >/dev/null
    replace "$lib"
  done
  for lib in triton/_C/libtriton.so torch/lib/libtorch_cpu.so torch/lib/libtorch_python.so; do
    lib=$SITE/$lib
    strip --strip-unneeded -o "$lib.new" "$lib"
    replace "$lib"
  done
  rm -rf $SITE/triton/{backends/nvidia/lib/cupti*,_C/libproton.so,instrumentation} \
    $SITE/torch/{bin/protoc*,bin/test_*,test,lib/*.a} "$CUDA_HOME"/lib/*.a
}

case ${1:-} in
  install) install "$2" "$3" ;;
  slim) slim ;;
  *) sed -n 's/^#   //p' "$0" >&2; exit 2 ;;
esac
