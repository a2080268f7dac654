#!/bin/bash
# Starts the stand-in once in each of its modes, inside it: what does not start is no image, and the byte code of what is
# really used is there afterwards (all of it would be 370 MB).
set -euo pipefail

HOME_IN_IMAGE=/opt/standin
SITE=$HOME_IN_IMAGE/venv/lib/python3.11/site-packages
export CUDA_HOME=$SITE/nvidia/cu13
export LD_LIBRARY_PATH=$HOME_IN_IMAGE/stubs PYTHONPATH=$HOME_IN_IMAGE/shim HF_HUB_OFFLINE=1
export PATH=$HOME_IN_IMAGE/venv/bin:$CUDA_HOME/bin:$PATH
scratch=$(mktemp -d)
cd /tmp

LD_PRELOAD=$HOME_IN_IMAGE/stubs/fakert.so SGLANG_CACHE_DIR=$scratch python $HOME_IN_IMAGE/shapes.py NONE
TRITON_CACHE_DIR=$scratch python $HOME_IN_IMAGE/tri.py
# The limits are for machines under load.
SGLANG_USE_CPU_ENGINE=1 timeout 1200 python -m sglang.launch_server --device cpu --load-format dummy \
  --model-path $HOME_IN_IMAGE/tiny --attention-backend torch_native --sampling-backend pytorch --host 127.0.0.1 --port 31997 \
  --mem-fraction-static 0.2 --max-total-tokens 4096 &
server=$!
python - $server <<'PYTHON'
import sys, time, urllib.request
while True:
    time.sleep(0.5)
    with open(f"/proc/{sys.argv[1]}/stat") as stat:
        if stat.read().rpartition(")")[2].split()[0] == "Z":
            sys.exit("the server ended before it was ready")
    try:
        urllib.request.urlopen("http://127.0.0.1:31997/health_generate", timeout=20)
        break
    except OSError:
        pass
import sglang.compile_deep_gemm
PYTHON
kill $server
wait || :
rm -rf "$scratch" /root/.cache /root/.triton /tmp/* /tmp/.[!.]*
