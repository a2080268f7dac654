"""Processors and memory of this machine, as /proc and /sys report them: what a stage may take while other work runs."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_TOPOLOGY = Path("/sys/devices/system/cpu")
_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class Memory:
    """Bytes of this machine. free: that nothing uses, not even the page cache. available: without swapping."""

    free: int
    available: int


def memory(meminfo: Path = _MEMINFO) -> Memory | None:
    """Return the machine's memory as it is now; None where it is not reported."""
    with contextlib.suppress(OSError, ValueError, LookupError):
        rows = dict(row.split(":", 1) for row in meminfo.read_text(encoding="ascii").splitlines() if ":" in row)
        free, available = (int(rows[name].split()[0]) << 10 for name in ("MemFree", "MemAvailable"))
        return Memory(free, available)
    return None


def processors() -> tuple[int, ...]:
    """Return the processors that this process may use."""
    return tuple(sorted(os.sched_getaffinity(0)))


def half_of_cores(topology: Path = _TOPOLOGY, among: Iterable[int] | None = None) -> tuple[int, ...]:
    """Return the processors of half the cores, rounded down and at least one: each core with all its threads.

    A thread of another core's sibling would slow down what runs there. among: processors; None: this process's.
    """
    left = sorted(processors() if among is None else among)
    cores: list[tuple[int, ...]] = []
    while left:
        siblings = [cpu for cpu in left if cpu in {left[0], *_siblings(topology, left[0])}]
        cores.append(tuple(siblings))
        left = [cpu for cpu in left if cpu not in siblings]
    chosen = cores[len(cores) - max(1, len(cores) // 2) :] if cores else []  # low numbers have most interrupts
    return tuple(sorted(cpu for core in chosen for cpu in core))


def _siblings(topology: Path, cpu: int) -> set[int]:
    """Return the hardware threads of a processor's core; the processor alone where that is not reported."""
    try:
        text = (topology / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text(encoding="ascii")
    except OSError:
        return {cpu}
    found: set[int] = set()
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text):
        found |= set(range(int(first), int(last or first) + 1))
    return found or {cpu}
