#!/bin/bash
# Gathers what prove.sh needs on a machine that has a GPU, Python 3.12, torch and nvcc, but no network and no engine.
#
#   carry.sh DIR        makes DIR: wheels that such a machine lacks, this program, and prove.py; at most 60 MB
#
# Copy DIR there, and run DIR/prove.sh DIR. Wheels come from wherever pip is configured to find them.
set -euo pipefail

DIR=${1:?usage: carry.sh DIR}
HERE=$(dirname "$(readlink -f "$0")")
ROOT=$(readlink -f "$HERE/../..")
PINS=$ROOT/docker/stand-in/real/requirements.txt
MOST=60000000

# What `import sglang.srt.layers.deep_gemm_wrapper.compile_utils` loads and torch, transformers and their like do not bring.
PACKAGES="sglang sgl-deep-gemm apache-tvm-ffi pydantic pydantic_core soundfile pyzmq ipython msgspec cffi orjson dill httpx2
  httpcore2 pybase64 starlette traitlets python-multipart truststore typing-inspection sniffio"

mkdir -p "$DIR/wheels"
pins=$(mktemp)
trap 'rm -f "$pins"' EXIT
for name in $PACKAGES; do
  grep -i "^$name==" "$PINS" || { echo "error: $PINS has no $name" >&2; exit 1; }
done >"$pins"
platforms=()
for libc in 2_34 2_28 2_27 2_26 2_17 2_12 2_5; do platforms+=(--platform "manylinux_${libc}_x86_64"); done
pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none \
  "${platforms[@]}" --platform manylinux2014_x86_64 --dest "$DIR/wheels" --requirement "$pins"

mkdir -p "$DIR/builder/agent" "$DIR/builder/cache"
cp "$ROOT"/builder/*.py "$DIR/builder/"
cp "$ROOT"/builder/cache/*.py "$DIR/builder/cache/"
cp -r "$ROOT"/builder/agent/*.py "$ROOT/builder/agent/stub_driver" "$DIR/builder/agent/"
cp "$HERE/prove.sh" "$HERE/prove.py" "$DIR/"

bytes=$(du -sb "$DIR" | cut -f1)
echo "$DIR: $((bytes / 1000000)) MB, $(find "$DIR/wheels" -name '*.whl' | wc -l) wheels"
[ "$bytes" -le "$MOST" ] || { echo "error: more than $((MOST / 1000000)) MB" >&2; exit 1; }
