"""GPU facts from libcuda and NVML through ctypes; never through torch, because importing it takes seconds.

It runs in a separate process (`probe` starts it): a driver that hangs or crashes ends that process alone, and the
caller never holds an initialised CUDA that a fork would break.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# CUdevice_attribute, cuda.h
_MULTIPROCESSOR_COUNT = 16
_L2_CACHE_SIZE = 38
_CAPABILITY_MAJOR = 75
_CAPABILITY_MINOR = 76
_SHARED_MEMORY_PER_BLOCK = 97  # that a kernel may opt in to

_DRIVER_FILES = ("/proc/driver/nvidia/version", "/sys/module/nvidia/version")


def facts() -> dict[str, Any]:
    """Return ``gpus`` in CUDA's order, ``driver`` version, ``cuda_status`` of cuInit, ``problems``. Absent: None."""
    problems: list[str] = []
    cuda = _library("libcuda.so.1")
    status = _call(cuda, ["cuInit"], 0) if cuda is not None else None
    gpus = _gpus(cuda, status, problems) if cuda is not None else []
    return {"gpus": gpus, "driver": _driver(), "cuda_status": status, "problems": problems}


def _library(name: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def _call(library: ctypes.CDLL, names: Sequence[str], *arguments: Any) -> int | None:
    """Return the status of the first of these functions that the library has; None if it has none of them."""
    for name in names:
        function = getattr(library, name, None)
        if function is not None:
            return int(function(*arguments))
    return None


def _gpus(cuda: ctypes.CDLL, status: int | None, problems: list[str]) -> list[dict[str, Any]]:
    if status != 0:
        if status != 100:  # CUDA_ERROR_NO_DEVICE is no problem
            problems.append(f"cuInit: status {status}")
        return []
    count = ctypes.c_int(0)
    status = _call(cuda, ["cuDeviceGetCount"], ctypes.byref(count))
    if status != 0:
        problems.append(f"cuDeviceGetCount: status {status}")
        return []
    return [gpu for index in range(max(0, min(count.value, 1024))) if (gpu := _gpu(cuda, index, problems))]


def _gpu(cuda: ctypes.CDLL, index: int, problems: list[str]) -> dict[str, Any] | None:
    device = ctypes.c_int(0)
    if _call(cuda, ["cuDeviceGet"], ctypes.byref(device), index) != 0:
        problems.append(f"cuDeviceGet {index} failed")
        return None

    def attribute(which: int) -> int:
        value = ctypes.c_int(0)
        status = _call(cuda, ["cuDeviceGetAttribute"], ctypes.byref(value), which, device)
        return value.value if status == 0 else 0

    name = ctypes.create_string_buffer(256)
    _call(cuda, ["cuDeviceGetName"], name, len(name), device)
    memory = ctypes.c_size_t(0)
    _call(cuda, ["cuDeviceTotalMem_v2", "cuDeviceTotalMem"], ctypes.byref(memory), device)
    raw = ctypes.create_string_buffer(16)
    _call(cuda, ["cuDeviceGetUuid_v2", "cuDeviceGetUuid"], raw, device)
    major = attribute(_CAPABILITY_MAJOR)
    return {
        "index": index,
        "uuid": f"GPU-{uuid.UUID(bytes=raw.raw)}" if any(raw.raw) else None,
        "name": name.value.decode("utf-8", "replace") or None,
        "compute_capability": f"{major}.{attribute(_CAPABILITY_MINOR)}" if major else None,
        "sm_count": attribute(_MULTIPROCESSOR_COUNT) or None,
        "memory_bytes": memory.value or None,
        "shared_bytes": attribute(_SHARED_MEMORY_PER_BLOCK) or None,
        "l2_bytes": attribute(_L2_CACHE_SIZE) or None,
    }


def _driver() -> str | None:
    """Return the kernel driver's version: from NVML, else as the kernel module publishes it."""
    nvml = _library("libnvidia-ml.so.1")
    if nvml is not None and _call(nvml, ["nvmlInit_v2", "nvmlInit"]) == 0:
        version = ctypes.create_string_buffer(96)
        status = _call(nvml, ["nvmlSystemGetDriverVersion"], version, len(version))
        _call(nvml, ["nvmlShutdown"])
        if status == 0 and version.value:
            return version.value.decode("ascii", "replace")
    for path in _DRIVER_FILES:
        try:
            text = Path(path).read_text(encoding="ascii", errors="replace")
        except OSError:
            continue
        if found := re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text):
            return found.group()
    return None


def main() -> None:
    """Write the facts as one line of JSON."""
    sys.stdout.write(json.dumps(facts()) + "\n")
