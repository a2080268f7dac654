"""A server that generates nothing: loads nothing, warms the shapes of its flags, answers with tokens."""

import argparse
import json
import signal
import subprocess
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from sglang import caches, log, plays
from sglang.srt.layers.deep_gemm_wrapper import compile_utils
from triton import cache as triton_cache


def parse(argv):
    """The flags that change what is warmed or where it listens; all others are taken and ignored."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model-path", "--model", required=True)
    parser.add_argument("--revision")
    parser.add_argument("--tp", "--tp-size", "--tensor-parallel-size", type=int, default=1, dest="tp_size")
    parser.add_argument("--dp", "--dp-size", "--data-parallel-size", type=int, default=1, dest="dp_size")
    parser.add_argument("--enable-dp-attention", action="store_true")
    parser.add_argument("--chunked-prefill-size", type=int, default=8192)
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--model-loader-extra-config", default="{}")
    parser.add_argument("--json-model-override-args", default="{}")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--timeout", type=int, default=3600)
    args, _ = parser.parse_known_args(argv)
    if args.load_format == "dummy" and json.loads(args.model_loader_extra_config):
        raise ValueError("Unexpected extra config keys for load format dummy")
    plays.DUMMIES = args.load_format == "dummy"
    if args.enable_dp_attention and args.dp_size > 1:
        args.chunked_prefill_size //= args.dp_size
    return args


def load(args):
    """Up to the point where a real server has its weights."""
    shown = {key: value for key, value in vars(args).items() if key != "timeout"}
    log.info(f"server_args={shown}")
    log.info("Load weight begin. avail mem=139.21 GB")
    plays.at_load()
    for shard in range(1, 4):
        log.bar("Loading safetensors checkpoint shards", shard, 3)
    log.info("Load weight end. elapsed=0.01 s, type=DeepseekV3ForCausalLM, avail mem=58.11 GB, mem usage=81.10 GB.")
    context = types.SimpleNamespace(chunked_prefill_size=args.chunked_prefill_size, base_gpu_id=0)
    compile_utils.get_schedule = compile_utils.get_device = lambda: context
    compile_utils.IN_SERVER = True
    compile_utils.update_deep_gemm_config(0)


def forward(args):
    """The first request reaches every GEMM of the model; each is warmed once per process."""
    if plays.play() == "no-kernels":
        return
    kind = compile_utils.DeepGemmKernelType
    for kernel_type, n, k, groups in (
        (kind.GEMM_NT_F8F8BF16, 4096, 7168, 1),
        (kind.GEMM_NT_F8F8BF16, 24576 // args.tp_size, 1536, 1),
        (kind.GROUPED_GEMM_NT_F8F8BF16_CONTIG, 4096, 7168 // args.tp_size, 32),
    ):
        compile_utils._maybe_compile_deep_gemm_one_type_all(kernel_type, n, k, groups)


class Handler(BaseHTTPRequestHandler):
    """The routes that readiness probes and warm-ups use."""

    args = None
    ready = threading.Event()
    lock = threading.Lock()

    def do_GET(self):
        known = {"/health": {}, "/health_generate": {}, "/v1/models": {"data": [{"id": str(self.args.model_path)}]}}
        if self.path not in known:
            self._answer(404, {"error": "no such route"})
        else:
            self._answer(200 if self.ready.is_set() else 503, known[self.path])

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", "0"))) or b"{}")
        if self.path != "/generate" or "input_ids" not in body:
            self._answer(400, {"error": "input_ids wanted"})
            return
        ids = body["input_ids"]
        prompts = ids if ids and isinstance(ids[0], list) else [ids]
        new = int(body.get("sampling_params", {}).get("max_new_tokens", 16))
        with self.lock:
            forward(self.args)
            if plays.play() == "all-families":
                caches.fill()
            if plays.play() != "no-kernels":
                for prompt in prompts:
                    triton_cache.compile_kernel("prefill", f"blocks {-(-len(prompt) // 256)} tp {self.args.tp_size}")
        answers = [
            {"text": "", "output_ids": [7] * new, "meta_info": {"prompt_tokens": len(prompt), "completion_tokens": new}}
            for prompt in prompts
        ]
        self._answer(200, answers if prompts is ids else answers[0])

    def _answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, text, *values):
        sys.stderr.write(f'INFO:     127.0.0.1 - "{text % values}"\n')


def serve(args):
    """Until SIGTERM."""
    load(args)
    Handler.args = args
    server = ThreadingHTTPServer((args.host, args.port), Handler)
    server.daemon_threads = True

    def drain(*_):
        log.info("SIGTERM received. signum=15 Draining requests and shutting down...")
        threading.Thread(target=server.shutdown).start()

    signal.signal(signal.SIGTERM, drain)
    log.info(f"Uvicorn running on http://{args.host}:{args.port} (Press CTRL+C to quit)")
    ready = threading.Timer(0.1, lambda: (Handler.ready.set(), log.info("The server is fired up and ready to roll!")))
    ready.start()
    # A worker in the server's process group: whoever signals the group hears the complaint of the original.
    worker = subprocess.Popen(["sleep", "3600"])
    server.serve_forever(poll_interval=0.02)
    if worker.poll() is not None:
        log.info(
            f"Subprocess scheduler_0 (pid={worker.pid}) crashed with exit code {worker.returncode}. Triggering SIGQUIT"
        )
    worker.kill()
    worker.wait()
