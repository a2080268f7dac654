"""What is wrong with GPUs that a driver does not hand out as whole devices: its failures by status, and MIG slices.

Sources: cuda.h (CUresult) and nvml.h (nvmlReturn_t) of CUDA 13; NVIDIA's documents on CUDA compatibility, on Fabric
Manager and on MIG.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from builder.errors import Problem


@dataclass(frozen=True)
class DriverFailure:
    """What one status of the driver means. name: as the header has it."""

    name: str
    meaning: str
    remedy: str


_UPDATED = (
    "The driver was updated while it was loaded: restart the machine, or unload its modules "
    "(rmmod nvidia_uvm nvidia_drm nvidia_modeset nvidia) and load them again."
)

#: Statuses of cuInit that a host's operator can do something about.
CUDA_FAILURES: Mapping[int, DriverFailure] = {
    802: DriverFailure(
        "CUDA_ERROR_SYSTEM_NOT_READY",
        "the GPUs' NVSwitch fabric is not set up",
        "Start Fabric Manager, of the driver's own version: systemctl start nvidia-fabricmanager.",
    ),
    803: DriverFailure(
        "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
        "the kernel's driver and the container's libcuda are of different versions",
        f"{_UPDATED} Where the image has a libcuda of its own (cuda-compat), take it out of LD_LIBRARY_PATH and "
        "/etc/ld.so.conf.d. On hosts with CDI: nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml.",
    ),
    804: DriverFailure(
        "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE",
        "the image's own libcuda (forward compatibility, cuda-compat) does not support this GPU or driver",
        "Update the host's driver, or take /usr/local/cuda/compat out of LD_LIBRARY_PATH and /etc/ld.so.conf.d.",
    ),
}

_MIG = re.compile(r"\bMIG \d+(?:c\.\d+)?g\.")


def driver_failures(cuda_status: int | None) -> Iterator[Problem]:
    """Yield the problem that this status of cuInit, in a container that was given GPUs, stands for."""
    failure = CUDA_FAILURES.get(cuda_status or 0)
    if failure is not None:
        yield Problem("driver", f"CUDA status {cuda_status} ({failure.name}): {failure.meaning}.", failure.remedy)


def mismatch(message: str) -> Problem:
    """Return the problem of a driver's library that does not fit the kernel's driver. message: the library's own."""
    return Problem("driver", f"{message}.".replace("..", "."), _UPDATED)


def slices(names: Sequence[str]) -> Iterator[Problem]:
    """Yield a problem for GPUs of these names that are MIG slices: a kernel is made for a whole GPU's SMs."""
    found = sorted({name for name in names if _MIG.search(name)})
    if found:
        yield partitioned(", ".join(found))


def partitioned(what: str) -> Problem:
    """Return the problem of GPUs in MIG mode. what: names them."""
    return Problem(
        "GPUs",
        f"{what}: slices of a GPU (MIG) are not supported, because kernels, locks and memory are a whole GPU's.",
        "Name whole GPUs in [gpus] devices, or turn MIG off: nvidia-smi -i INDEX -mig 0.",
    )
