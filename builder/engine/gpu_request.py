"""Asks an engine for GPUs: by its NVIDIA driver, or as devices of the Container Device Interface (CDI).

Docker names the first by a count, the second by the names of a CDI specification (``nvidia.com/gpu=0``). Podman knows
the second alone, from 5.4 on. Docker lists the devices that it found in its description from 28.3 on. Sources: the
engine API 1.51, moby #49824 and #50228, podman #22645.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

#: The kind of NVIDIA's devices in CDI specifications that nvidia-ctk makes; their names are the GPUs' indices.
CDI_KIND = "nvidia.com/gpu"

#: The first Podman whose Docker API takes device requests.
PODMAN_WITH_CDI = (5, 4)

#: Programs by which dockerd hands out GPUs, found in its PATH when it starts. Its description does not name them.
HOOKS = ("nvidia-container-runtime-hook", "nvidia-container-toolkit")


def device_requests(gpus: int | Sequence[str], *, cdi: bool) -> list[dict[str, Any]]:
    """Return the ``DeviceRequests`` for so many GPUs (-1: all), or for those of these indices or UUIDs."""
    if cdi:
        every = ["all"] if gpus == -1 else map(str, range(gpus)) if isinstance(gpus, int) else gpus
        names = list(every)
        return [{"Driver": "cdi", "DeviceIDs": [f"{CDI_KIND}={name}" for name in names]}]
    devices = {"Count": gpus} if isinstance(gpus, int) else {"DeviceIDs": list(gpus)}
    return [{"Driver": "", "Capabilities": [["gpu"]], **devices}]


def uses_cdi(
    info: Mapping[str, Any], *, podman: bool, local: bool, which: Callable[[str], str | None] = shutil.which
) -> bool:
    """Return whether this engine gets GPUs by CDI: where it lists CDI devices and knows no other way.

    info: the engine's description; local: it runs on this machine, so that its hook would be in PATH here.
    """
    if podman:
        return podman_version(info) >= PODMAN_WITH_CDI
    return bool(cdi_devices(info)) and not other_ways(info, local=local, which=which)


def cdi_devices(info: Mapping[str, Any]) -> list[str]:
    """Return the names of NVIDIA's CDI devices that the engine found."""
    found = info.get("DiscoveredDevices")
    names = [str(each.get("ID")) for each in found if isinstance(each, dict)] if isinstance(found, list) else []
    return [name for name in names if name.startswith(f"{CDI_KIND}=")]


def other_ways(info: Mapping[str, Any], *, local: bool, which: Callable[[str], str | None] = shutil.which) -> list[str]:
    """Return the names of the runtimes and hooks by which the engine can hand out GPUs without CDI."""
    runtimes = info.get("Runtimes")
    ways = [name for name in runtimes if name.startswith("nvidia")] if isinstance(runtimes, dict) else []
    return ways + [hook for hook in HOOKS if local and which(hook)][:1]


def podman_version(info: Mapping[str, Any]) -> tuple[int, int]:
    """Return major and minor version of Podman; (0, 0) where it does not report one."""
    found = re.match(r"(\d+)\.(\d+)", str(info.get("ServerVersion") or ""))
    return (int(found[1]), int(found[2])) if found else (0, 0)
