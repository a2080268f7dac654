"""Options and variables of a server that no kernel depends on, and options that have another name by now.

The first are ignored when a launch is compared with a task, the second count as their newer name.

Names and meanings are those of ``sglang/srt/server_args.py`` of 0.5.23 and of upstream's tree of 2026-08-22
(d315eb7250). What decides a shape, a backend, a dtype, a parallelism or how a batch is made up is not in here.
"""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterable, Mapping

from builder import sglang_args

#: What an option is about → such options.
_ABOUT: Mapping[str, tuple[str, ...]] = {
    "address": (
        "--model",
        "--model-path",
        "--host",
        "--port",
        "--nccl-port",
        "--dist-init-addr",
        "--grpc-port",
        "--smg-http-sidecar-port",
        "--fastapi-root-path",
        "--disaggregation-bootstrap-port",
        "--encoder-bootstrap-port",
        "--encoder-urls",
        "--encoder-register-urls",
        "--engine-info-bootstrap-port",
        "--disaggregation-ib-device",
        "--mooncake-ib-device",
        "--base-gpu-id",
        "--gpu-id-step",
        "--numa-node",
        "--forward-pass-metrics-ipc-name",
        "--weight-cache-socket",
        "--otlp-traces-endpoint",
        "--api-key",
        "--admin-api-key",
        "--ssl-keyfile",
        "--ssl-certfile",
        "--ssl-ca-certs",
        "--ssl-keyfile-password",
        "--enable-ssl-refresh",
        "--device",
    ),
    "path": (
        "--download-dir",
        "--file-storage-path",
        "--crash-dump-folder",
        "--export-metrics-to-file-dir",
        "--spec-trace-dir",
        "--debug-tensor-dump-output-folder",
    ),
    "requests and answers": (
        "--reasoning-parser",
        "--tool-call-parser",
        "--tool-server",
        "--chat-template",
        "--hf-chat-template-name",
        "--completion-template",
        "--served-model-name",
        "--weight-version",
        "--sampling-defaults",
        "--default-chat-template-kwargs",
        "--preferred-sampling-params",
        "--enable-strict-thinking",
        "--strip-thinking-cache",
        "--stream-interval",
        "--incremental-streaming-output",
        "--enable-cache-report",
        "--stream-response-default-include-usage",
        "--batch-notify-size",
        "--constrained-json-whitespace-pattern",
        "--constrained-json-disable-any-whitespace",
        "--allow-auto-truncate",
    ),
    "logs": (
        "--log-level",
        "--log-level-http",
        "--log-requests",
        "--log-requests-level",
        "--log-requests-format",
        "--log-requests-target",
        "--uvicorn-access-log-exclude-prefixes",
        "--show-time-cost",
        "--decode-log-interval",
        "--enable-request-time-stats-logging",
        "--gc-warning-threshold-secs",
    ),
    "metrics": (
        "--enable-metrics",
        "--enable-mfu-metrics",
        "--enable-metrics-for-all-schedulers",
        "--enable-forward-pass-metrics",
        "--forward-pass-metrics-worker-id",
        "--extra-metric-labels",
        "--tokenizer-metrics-custom-labels-header",
        "--tokenizer-metrics-allowed-custom-labels",
        "--bucket-time-to-first-token",
        "--bucket-inter-token-latency",
        "--bucket-e2e-request-latency",
        "--prompt-tokens-buckets",
        "--generation-tokens-buckets",
        "--export-metrics-to-file",
        "--stat-loggers",
        "--kv-events-config",
        "--enable-trace",
        "--trace-modules",
        "--load-snapshot-publish-interval",
    ),
    "waiting": (
        "--watchdog-timeout",
        "--soft-watchdog-timeout",
        "--dist-timeout",
        "--sleep-on-idle",
        "--gc-threshold",
        "--skip-server-warmup",
        "--weight-cache-timeout",
        "--elastic-ep-scale-timeout",
    ),
    "seed": ("--random-seed",),
    "how weights are read": (
        "--model-loader-extra-config",
        "--weight-loader-prefetch-checkpoints",
        "--weight-loader-disable-mmap",
        "--weight-loader-prefetch-num-threads",
        "--weight-loader-drop-cache-after-load",
        "--model-checksum",
        "--startup-weight-load-mode",
    ),
    "tokenizers": (
        "--tokenizer-worker-num",
        "--detokenizer-worker-num",
        "--enable-dynamic-batch-tokenizer",
        "--dynamic-batch-tokenizer-batch-size",
        "--dynamic-batch-tokenizer-batch-timeout",
        "--enable-tokenizer-batch-encode",
        "--disable-tokenizer-batch-decode",
        "--mm-processor-worker-num",
        "--mm-io-worker-num",
    ),
}
#: Option → what it is about. An address, a path or a seed differs from run to run, and is left out of a manifest.
OPTIONS: Mapping[str, str] = {name: about for about, names in _ABOUT.items() for name in names}

#: An option's older name → the words that take its place, in front of its values. Both are read by the server of
#: 2026-08-22, the older ones with a warning; most of those are gone from 0.5.23.
_RENAMED: Mapping[str, tuple[str, ...]] = {
    "--cuda-graph-bs": ("--cuda-graph-bs-decode",),
    "--cuda-graph-max-bs": ("--cuda-graph-max-bs-decode",),
    "--disable-piecewise-cuda-graph": ("--cuda-graph-backend-prefill", "disabled"),
    "--enable-breakable-cuda-graph": ("--cuda-graph-backend-prefill", "breakable"),
    "--enforce-piecewise-cuda-graph": ("--cuda-graph-backend-prefill", "tc_piecewise"),
    "--piecewise-cuda-graph-compiler": ("--cuda-graph-tc-compiler",),
    "--piecewise-cuda-graph-max-tokens": ("--cuda-graph-max-bs-prefill",),
    "--piecewise-cuda-graph-tokens": ("--cuda-graph-bs-prefill",),
    "--enable-dsa-prefill-context-parallel": ("--enable-prefill-cp",),
    "--enable-nsa-prefill-context-parallel": ("--enable-prefill-cp",),
    "--enable-prefill-context-parallel": ("--enable-prefill-cp",),
    "--enable-gdn-replayssm-spec": ("--enable-linear-replayssm-spec",),
    "--mamba-scheduler-strategy": ("--mamba-radix-cache-strategy",),
    "--nsa-decode-backend": ("--dsa-decode-backend",),
    "--nsa-prefill-backend": ("--dsa-prefill-backend",),
    "--speculative-dflash-draft-window-size": ("--speculative-draft-window-size",),
    "--stream-output": ("--incremental-streaming-output",),
}

#: Variables, with * for any rest: where something listens, writes, logs or waits.
VARIABLES = (
    "MC_*",  # Mooncake's transfer engine
    "NIXL_*",
    "UCX_*",
    "SGLANG_DISAGGREGATION_*",
    "SGLANG_HICACHE_*_DIR",
    "SGLANG_WAIT_PORT_TIMEOUT",
    "SGLANG_LOG_*",
    "SGLANG_TEST_*",
    "SGLANG_TORCH_PROFILER_DIR",
    "SGLANG_PRECISION_*",
    "PROMETHEUS_*",
    "PYTHONUNBUFFERED",
    "HF_*",
    "NO_PROXY",
    "no_proxy",
)


def is_neutral_option(name: str) -> bool:
    """Return whether no kernel depends on this option."""
    return name in OPTIONS


def differs_from_run_to_run(name: str) -> bool:
    """Return whether a manifest is better without this option: an address, a path, a GPU's number."""
    return OPTIONS.get(name) in ("address", "path", "seed")


def is_neutral_variable(name: str) -> bool:
    """Return whether no kernel depends on this variable."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in VARIABLES)


def with_newer_names(argv: Iterable[str]) -> list[str]:
    """Return a server's arguments with the newer name of each option that has one."""
    front, options, rest = sglang_args.split(argv)
    words = ((*_RENAMED[each.spelt], *each.values) if each.spelt in _RENAMED else each.words for each in options)
    return [*front, *itertools.chain.from_iterable(words), *rest]
