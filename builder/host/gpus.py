"""GPUs of this machine: which exist, which processes use them, and how much of their memory is in use.

`host_gpus` reads the driver's files below /proc and touches no GPU, as the fast path promises: NVML would wake a GPU
without persistence mode. `Nvml` calls the driver's library, and is for runs that start containers anyway.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from builder.host.deadlines import Attempt, Deadline

T = TypeVar("T")

PROC = Path("/proc/driver/nvidia")

#: Seconds for one snapshot of all GPUs. A driver that hangs (a GPU fell off the bus) must not hang the builder.
SNAPSHOT_TIMEOUT = 20.0
#: Seconds for it even during a cancellation: a driver that works takes milliseconds.
_LEAST_WAIT = 0.3
#: Seconds to close the driver's library.
_CLOSE_TIMEOUT = 1.0
#: Bytes that may be in use on an idle GPU: contexts of services, and the driver's own memory.
IDLE_BYTES = 1 << 30

#: The inode of /proc/self/ns/pid in the initial PID namespace (include/linux/proc_ns.h).
_INITIAL_PID_NAMESPACE = 0xEFFFFFFC
_CONTAINER_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class HostGpus:
    """The GPUs that the kernel driver lists.

    names: one per GPU, in the driver's order.
    driver: its version, e.g. ``580.65.06``.
    partitioned: indices of GPUs that are cut into MIG slices; the driver lists them as whole ones.
    """

    names: tuple[str, ...]
    driver: str | None
    partitioned: tuple[int, ...] = ()

    @property
    def model(self) -> str:
        """The kinds of GPU on this host, in the form of the in-container probe; part of the memo."""
        return ", ".join(sorted(set(self.names)))


def host_gpus(proc: Path = PROC) -> HostGpus | None:
    """Return the NVIDIA GPUs that this host's driver lists, or None without a driver. Never raises."""
    try:
        version = (proc / "version").read_text(errors="replace")
        names = []
        for information in sorted((proc / "gpus").glob("*/information")):
            model = re.search(r"^Model:\s*(.+?)\s*$", information.read_text(errors="replace"), re.MULTILINE)
            names.append(model[1] if model else "unknown")
    except OSError:
        return None
    found = re.search(r"Kernel Module(?: for \S+)?\s+(\d[\d.]*)", version)
    return HostGpus(tuple(names), found[1] if found else None, _partitioned(proc))


def _partitioned(proc: Path) -> tuple[int, ...]:
    """Return the indices of GPUs with MIG slices: each has its folder below ``capabilities``."""
    slices = (path.parts[-3] for path in (proc / "capabilities").glob("gpu*/mig/gi*"))
    return tuple(sorted({int(name[3:]) for name in slices if name[3:].isdigit()}))


# --- NVML ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GpuProcess:
    """A process with a context on a GPU. Values that cannot be read are None.

    memory: bytes on that GPU.
    started: seconds since the epoch.
    container: id of the container it runs in.
    """

    pid: int
    memory: int | None = None
    name: str | None = None
    started: float | None = None
    container: str | None = None

    @property
    def identity(self) -> tuple[int, float | None]:
        """Distinguishes this process from a later one with the same pid."""
        return self.pid, self.started

    def describe(self, containers: Mapping[str, str]) -> str:
        """Return e.g. ``pid 48121 (sglang::scheduler_TP3, container ci-h200-2)``.

        containers: id → name of the engine's containers.
        """
        known = [self.name or "its name cannot be read"]
        if self.container:
            known.append(f"container {containers.get(self.container) or self.container[:12] + ' of another engine'}")
        return f"pid {self.pid} ({', '.join(known)})"


@dataclass(frozen=True)
class GpuUsage:
    """One GPU at one moment. used and total in bytes; None where the driver does not report a value.

    processes: None where the driver does not list them.
    """

    index: int
    uuid: str
    name: str
    used: int | None
    total: int | None
    processes: tuple[GpuProcess, ...] | None


@dataclass(frozen=True)
class GpuSnapshot:
    """All GPUs at one moment, by NVML.

    absent: why there is no data at all.
    mismatch: the reason is that the library does not fit the kernel's driver, so that no container can use a GPU.
    notes: which values are missing and why, one sentence each.
    """

    gpus: tuple[GpuUsage, ...] = ()
    absent: str | None = None
    mismatch: bool = False
    notes: tuple[str, ...] = ()

    def chosen(self, devices: Sequence[int] | None, count: int) -> GpuSnapshot:
        """Return only the GPUs of a container with these devices; devices None: with the first `count`, as the engine
        assigns them.
        """
        indices = range(count) if devices is None else devices
        return replace(self, gpus=tuple(gpu for gpu in self.gpus if gpu.index in indices))

    def gpu(self, uuid: str) -> GpuUsage | None:
        return next((gpu for gpu in self.gpus if gpu.uuid == uuid), None)


class Nvml:
    """The driver's management library, opened by the first snapshot. Never raises: `GpuSnapshot.absent` has the reason.

    absent: a reason not to try at all.
    initial: whether this is the initial PID namespace, where the pids that NVML reports are ours; None: find out.
    timeout: seconds for one snapshot.
    """

    def __init__(
        self, absent: str | None = None, *, initial: bool | None = None, timeout: float = SNAPSHOT_TIMEOUT
    ) -> None:
        self._absent = absent
        self._initial = _in_initial_namespace() if initial is None else initial
        self._timeout = timeout
        self._is_open = False

    def snapshot(self, *, hurried: Callable[[], bool] = lambda: False) -> GpuSnapshot:
        """Return all GPUs of this machine as they are now. After one timeout the driver is not called again.

        hurried: whether the run is being cancelled; a driver that hangs is then not waited for.
        """
        if self._absent is None:
            began = time.monotonic()
            try:
                snapshot = _within(self._timeout, self._read, hurried)
            except Exception as error:  # noqa: BLE001 - whatever a driver does, the run goes on without its data
                self._absent = f"NVML failed: {type(error).__name__}: {error}"
            else:
                if snapshot is not None:
                    return snapshot
                self._absent = f"NVML gave no answer for {time.monotonic() - began:.0f} s"
        return GpuSnapshot(absent=self._absent)

    def close(self) -> None:
        """Close the driver's library. May be called twice."""
        if self._is_open and self._absent is None:
            self._is_open = False
            _within(min(self._timeout, _CLOSE_TIMEOUT), self._shut)

    # --- in a background thread ---

    def _read(self) -> GpuSnapshot:
        try:
            import pynvml

            if not self._is_open:
                pynvml.nvmlInit()
                self._is_open = True
            count = pynvml.nvmlDeviceGetCount()
        except ImportError:
            return GpuSnapshot(absent="the Python package nvidia-ml-py is not installed")
        except pynvml.NVMLError as error:
            missing = error.value == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
            reason = "there is no NVML here (libnvidia-ml.so.1)" if missing else f"NVML: {error}"
            return GpuSnapshot(absent=reason, mismatch=error.value == pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)
        notes: list[str] = []
        gpus = [gpu for index in range(count) if (gpu := _read_gpu(pynvml, index, notes))]
        return self._with_known_pids(gpus, notes)

    def _with_known_pids(self, gpus: Sequence[GpuUsage], notes: list[str]) -> GpuSnapshot:
        """Drop the processes if NVML's pids do not exist in our PID namespace: any of them may then be another one."""
        if not self._initial:
            pids = {process.pid for gpu in gpus for process in gpu.processes or ()}
            if all(Path("/proc", str(pid)).exists() for pid in pids):
                notes.append("inside a PID namespace, processes outside it cannot be seen; memory counts as well")
            else:
                notes.append("inside a PID namespace, which lacks processes that NVML names: only memory counts")
                gpus = [replace(gpu, processes=None) for gpu in gpus]
        return GpuSnapshot(tuple(gpus), notes=tuple(notes))

    @staticmethod
    def _shut() -> bool:
        import pynvml

        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
        return True


def _read_gpu(nvml: Any, index: int, notes: list[str]) -> GpuUsage | None:
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        uuid, name = nvml.nvmlDeviceGetUUID(handle), nvml.nvmlDeviceGetName(handle)
    except nvml.NVMLError as error:
        notes.append(f"GPU {index} cannot be read: {error}")
        return None
    used = total = processes = None
    try:
        memory = _read_memory(nvml, handle)
        used, total = int(memory.used), int(memory.total)
    except nvml.NVMLError as error:
        notes.append(f"GPU {index} does not report its memory in use: {error}")
    try:
        running = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
        processes = tuple(_process(one.pid, one.usedGpuMemory) for one in running)
    except nvml.NVMLError as error:
        notes.append(f"GPU {index} does not list its processes: {error}")
    return GpuUsage(index, uuid, name, used, total, processes)


def _read_memory(nvml: Any, handle: Any) -> Any:
    """Return the memory in use without the driver's own, if the driver is new enough to separate them (R510)."""
    try:
        return nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    except nvml.NVMLError:
        return nvml.nvmlDeviceGetMemoryInfo(handle)


def _process(pid: int, memory: int | None) -> GpuProcess:
    import psutil

    name = started = None
    with contextlib.suppress(psutil.Error, OSError):
        process = psutil.Process(pid)
        started = process.create_time()
        # A process chooses its own name: control characters must not reach the terminal.
        name = "".join(letter if letter.isprintable() else "?" for letter in process.name()) or None
    return GpuProcess(pid, memory, name, started, container_of(pid))


def container_of(pid: int, proc: Path = Path("/proc")) -> str | None:
    """Return the id of the container that a process runs in, by its control group; None outside of one or unknown."""
    try:
        found = _CONTAINER_ID.findall((proc / str(pid) / "cgroup").read_text(errors="replace"))
    except OSError:
        return None
    # The innermost: an engine may itself run in a container.
    return found[-1] if found else None


def _in_initial_namespace() -> bool:
    try:
        return Path("/proc/self/ns/pid").stat().st_ino == _INITIAL_PID_NAMESPACE
    except OSError:
        return False


def _within(seconds: float, call: Callable[[], T], hurried: Callable[[], bool] = lambda: False) -> T | None:
    """Return `call()`'s result, or None if it takes longer; it then continues in its thread."""
    attempt, limit, least = Attempt(call), Deadline(seconds), Deadline(_LEAST_WAIT)
    while attempt.running and not limit.expired and not (least.expired and hurried()):
        attempt.join(limit.within(0.05).left())
    return None if attempt.running else attempt.result()
