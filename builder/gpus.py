"""What the host says about its GPUs without touching one: the driver's own files below /proc.

Reading NVML would wake a GPU without persistence mode, and the fast path promises to touch none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc/driver/nvidia")


@dataclass(frozen=True)
class HostGpus:
    """names: one per GPU, in the driver's order. driver: its version, e.g. ``580.65.06``."""

    names: tuple[str, ...]
    driver: str | None

    @property
    def model(self) -> str:
        """For the memo: which kinds of GPU this host has, as the in-container probe writes them."""
        return ", ".join(sorted(set(self.names)))


def host_gpus(proc: Path = PROC) -> HostGpus | None:
    """The NVIDIA GPUs that this host's driver knows, or None where there is no driver. Never raises."""
    try:
        version = (proc / "version").read_text(errors="replace")
        names = []
        for information in sorted((proc / "gpus").glob("*/information")):
            model = re.search(r"^Model:\s*(.+?)\s*$", information.read_text(errors="replace"), re.MULTILINE)
            names.append(model[1] if model else "unknown")
    except OSError:
        return None
    found = re.search(r"Kernel Module(?: for \S+)?\s+(\d[\d.]*)", version)
    return HostGpus(tuple(names), found[1] if found else None)
