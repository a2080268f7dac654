"""What the host says about its GPUs: which there are, who holds them, and how much of their memory is in use.

`host_gpus` reads the driver's own files below /proc and touches no GPU, as the fast path promises: NVML would wake one
without persistence mode. `Nvml` asks the driver's library, and is for runs that start containers anyway.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from builder.host.deadlines import Deadline

T = TypeVar("T")

PROC = Path("/proc/driver/nvidia")

#: Seconds for one look at all GPUs. A driver that hangs (a GPU fell off the bus) must not take the builder with it.
PATIENCE = 20.0
#: Seconds for it even when somebody wants to go: one that works takes milliseconds.
_LEAST = 0.3
#: Seconds for letting go of the driver, which only answers.
_SHUT = 1.0
#: Bytes in use on a GPU that nobody holds: contexts of services, and what the driver keeps for itself.
IDLE_BYTES = 1 << 30

#: The inode of /proc/self/ns/pid in the initial PID namespace (include/linux/proc_ns.h).
_INITIAL_PID_NAMESPACE = 0xEFFFFFFC
_CONTAINER_ID = re.compile(r"[0-9a-f]{64}")


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


# --- NVML ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Process:
    """A process with a context on a GPU. memory: bytes there; started: seconds since the epoch; container: its id.

    What cannot be read is None.
    """

    pid: int
    memory: int | None = None
    name: str | None = None
    started: float | None = None
    container: str | None = None

    @property
    def identity(self) -> tuple[int, float | None]:
        """A pid alone is given to another process sooner or later."""
        return self.pid, self.started

    def describe(self, containers: Mapping[str, str]) -> str:
        """``pid 48121 (sglang::scheduler_TP3, container ci-h200-2)``. containers: id → name, those of the engine."""
        known = [self.name or "its name cannot be read"]
        if self.container:
            known.append(f"container {containers.get(self.container) or self.container[:12] + ' of another engine'}")
        return f"pid {self.pid} ({', '.join(known)})"


@dataclass(frozen=True)
class Gpu:
    """One GPU. used and total in bytes. processes: None where it cannot be known who holds it."""

    index: int
    uuid: str
    name: str
    used: int | None
    total: int | None
    processes: tuple[Process, ...] | None


@dataclass(frozen=True)
class Look:
    """What NVML says at one moment. absent: why it says nothing. notes: what it does not say, one sentence each."""

    gpus: tuple[Gpu, ...] = ()
    absent: str | None = None
    notes: tuple[str, ...] = ()

    def chosen(self, devices: Sequence[int] | None, count: int) -> Look:
        """Of the GPUs those that a container with these devices, or with this number of them, gets: the engine hands
        out the first ones.
        """
        wanted = range(count) if devices is None else devices
        return replace(self, gpus=tuple(gpu for gpu in self.gpus if gpu.index in wanted))

    def gpu(self, uuid: str) -> Gpu | None:
        return next((gpu for gpu in self.gpus if gpu.uuid == uuid), None)


class Nvml:
    """The driver's management library, opened at the first look. Nothing here raises: what NVML cannot say is said.

    absent: a reason to not even try. initial: whether this is the initial PID namespace, where every pid that NVML
    names means what it says; None = find out.
    """

    def __init__(self, absent: str | None = None, *, initial: bool | None = None, patience: float = PATIENCE) -> None:
        self._absent = absent
        self._initial = _in_initial_namespace() if initial is None else initial
        self._patience = patience
        self._is_open = False

    def look(self, *, hurried: Callable[[], bool] = lambda: False) -> Look:
        """Every GPU of this machine, now. A driver that does not answer in time is not asked again. hurried: whether
        somebody wants to go, who does not wait for one that hangs.
        """
        if self._absent is None:
            began = time.monotonic()
            found = _within(self._patience, self._ask, hurried)
            if found is not None:
                return found
            self._absent = f"NVML gave no answer for {time.monotonic() - began:.0f} s"
        return Look(absent=self._absent)

    def close(self) -> None:
        """Lets go of the driver. May be called twice."""
        if self._is_open and self._absent is None:
            self._is_open = False
            _within(min(self._patience, _SHUT), self._shut)

    # --- in a thread of its own ---

    def _ask(self) -> Look:
        try:
            import pynvml

            if not self._is_open:
                pynvml.nvmlInit()
                self._is_open = True
            count = pynvml.nvmlDeviceGetCount()
        except ImportError:
            return Look(absent="the Python package nvidia-ml-py is not installed")
        except pynvml.NVMLError as error:
            missing = error.value == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
            return Look(absent="there is no NVML here (libnvidia-ml.so.1)" if missing else f"NVML says: {error}")
        notes: list[str] = []
        gpus = [gpu for index in range(count) if (gpu := _read_gpu(pynvml, index, notes))]
        return self._without_strangers(gpus, notes)

    def _without_strangers(self, gpus: Sequence[Gpu], notes: list[str]) -> Look:
        """In a PID namespace of our own a pid of NVML's may be nobody, or somebody else: then none of them counts."""
        if not self._initial:
            pids = {process.pid for gpu in gpus for process in gpu.processes or ()}
            if all(Path("/proc", str(pid)).exists() for pid in pids):
                notes.append("inside a PID namespace, processes outside it cannot be seen; memory counts as well")
            else:
                notes.append("inside a PID namespace, which lacks processes that NVML names: only memory counts")
                gpus = [replace(gpu, processes=None) for gpu in gpus]
        return Look(tuple(gpus), notes=tuple(notes))

    @staticmethod
    def _shut() -> bool:
        import pynvml

        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
        return True


def _read_gpu(nvml: Any, index: int, notes: list[str]) -> Gpu | None:
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        uuid, name = nvml.nvmlDeviceGetUUID(handle), nvml.nvmlDeviceGetName(handle)
    except nvml.NVMLError as error:
        notes.append(f"GPU {index} cannot be asked: {error}")
        return None
    used = total = processes = None
    try:
        memory = _read_memory(nvml, handle)
        used, total = int(memory.used), int(memory.total)
    except nvml.NVMLError as error:
        notes.append(f"GPU {index} does not say how much of its memory is in use: {error}")
    try:
        running = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
        processes = tuple(_process(one.pid, one.usedGpuMemory) for one in running)
    except nvml.NVMLError as error:
        notes.append(f"GPU {index} does not say who holds it: {error}")
    return Gpu(index, uuid, name, used, total, processes)


def _read_memory(nvml: Any, handle: Any) -> Any:
    """Without what the driver reserves, where the driver is new enough to tell it apart (R510)."""
    try:
        return nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    except nvml.NVMLError:
        return nvml.nvmlDeviceGetMemoryInfo(handle)


def _process(pid: int, memory: int | None) -> Process:
    import psutil

    name = started = None
    with contextlib.suppress(psutil.Error, OSError):
        process = psutil.Process(pid)
        started = process.create_time()
        # A process names itself as it likes; a terminal shall not do as it likes.
        name = "".join(letter if letter.isprintable() else "?" for letter in process.name()) or None
    return Process(pid, memory, name, started, container_of(pid))


def container_of(pid: int, proc: Path = Path("/proc")) -> str | None:
    """The id of the container that a process runs in, by its control group; None outside of one, or where that
    cannot be read.
    """
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
    """What the call returns, or None when it takes longer; it then goes on in its thread for as long as it likes."""
    box: list[T] = []
    thread = threading.Thread(target=lambda: box.append(call()), name="nvml", daemon=True)
    thread.start()
    limit, least = Deadline(seconds), Deadline(_LEAST)
    while thread.is_alive() and not limit.over and not (least.over and hurried()):
        thread.join(limit.within(0.05).left())
    return box[0] if box else None
