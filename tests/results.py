"""Results of three tasks: warm, warmed and failed."""

from __future__ import annotations

from builder.report.results import TaskResult

RESULTS = [
    TaskResult(
        "V3-tp8",
        "deepseek-ai/V3",
        "0a",
        "warm",
        entries={"deep_gemm": 412},
        proof="verified",
        verified=True,
        since="2026-11-23",
    ),
    TaskResult(
        "V3.2-tp8",
        "deepseek-ai/V3.2",
        "0b",
        "warmed",
        seconds=221.0,
        added={"deep_gemm": 518},
        proof="verified",
        verified=True,
    ),
    TaskResult(
        "Flash-tp4",
        "x/Flash",
        "0c",
        "failed",
        'crash: "Scheduler hit an exception"',
        seconds=52.2,
        proof="verified",
        verified=True,
        log="logs/Flash-tp4.log",
    ),
]
