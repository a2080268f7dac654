"""Compiles named kernels, each once: forked workers take them one by one, as many as cores and memory allow.

Every kernel ends as one answer, `done` or `failed` with its reason, whatever happens to workers, compilers or the disk.
Run again, it needs only what is missing: an entry is there as a whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import select
import signal
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.agent.prebuild_forks import (
    Answers,
    WorkerRequest,
    compile_one,
    describe_end,
    fork,
    last_lines,
    use_cache,
)

#: Bytes that a worker with its compiler is taken to need before one was measured: DeepGEMM's kernels took 0.5 GB.
FIRST_GUESS = 1 << 30
#: Of what was measured: kernels differ.
HEADROOM = 1.25
#: Kernels that fail one after the other, none done in between, after which the rest is not tried: the disk is full, or
#: the compiler is broken.
STOP_AFTER = 6
#: Tries of a kernel when its worker dies. The first death may be due to the memory that others used.
TRIES = 2
#: Percent of the last ten seconds in which some process of the machine waited for memory, or all of them for the disk:
#: no kernel is started above that.
MEMORY_PRESSURE, DISK_PRESSURE = 10.0, 40.0

_POLL = 0.5
_CGROUP_MEMORY = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


@dataclass
class _CompileFork:
    """A fork that compiles one kernel after the other. job: index of the present one."""

    pid: int
    channel: socket.socket
    log: Path
    job: int | None = None


class Pool:
    """All workers, and the kernels that wait. No method raises for what a worker does."""

    def __init__(self, request: WorkerRequest, answers: Answers, compile_utils: Any) -> None:
        self._request, self._answers, self._utils = request, answers, compile_utils
        self._scratch = Path(request.scratch)
        self._waiting = list(range(len(request.kernels)))
        self._tries: dict[int, int] = {}
        self._workers: dict[int, _CompileFork] = {}  # by the descriptor of their channel
        self._most = request.workers
        self._started, self._widest = 0, 0
        self._worker_bytes = 0
        self._parent_bytes = _own_bytes()  # with what it imported, which the workers share
        self._failures = 0  # since the last success
        self._paused, self._checked = 0.0, 0.0

    def run(self) -> None:
        """Compile everything. Ends with the answer `finished`."""
        logging.disable(logging.CRITICAL)
        begun = time.monotonic()
        while self._waiting or self._busy():
            if self._failures >= STOP_AFTER:
                self._give_up()
            elif not self._is_paused():
                self._hand_out()
            self._collect()
        for worker in list(self._workers.values()):
            self._end(worker)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        self._answers.write(
            finished=round(time.monotonic() - begun, 2),
            workers=self._widest,
            worker_bytes=self._worker_bytes,
            cpu_seconds=round(used.ru_utime + used.ru_stime, 1),
            paused=round(self._paused, 1),
        )

    # --- the parent --------------------------------------------------------------------------------------------------

    def _busy(self) -> list[_CompileFork]:
        return [worker for worker in self._workers.values() if worker.job is not None]

    def _room(self) -> int:
        """Return how many workers may compile now. One always may: it shows how much memory it takes."""
        each = int(self._worker_bytes * HEADROOM) or FIRST_GUESS
        available = len(self._busy()) * each + available_memory()
        memory = self._request.memory - self._parent_bytes if self._request.memory else available
        return max(1, min(self._most, memory // each))

    def _hand_out(self) -> None:
        idle = [worker for worker in self._workers.values() if worker.job is None]
        while self._waiting and len(self._busy()) < self._room():
            try:
                worker = idle.pop() if idle else self._start()
            except OSError as error:  # no memory, or the PID limit
                if not self._workers:
                    self._failures = STOP_AFTER
                    self._fail(self._waiting.pop(0), f"no worker can be started: {error.strerror}")
                self._most = max(1, len(self._workers))
                return
            worker.job = self._waiting.pop(0)
            kernel = self._request.kernels[worker.job]
            with contextlib.suppress(OSError):  # it died: its channel shows that
                worker.channel.sendall(json.dumps([kernel.problem, kernel.m]).encode() + b"\n")
        self._widest = max(self._widest, len(self._busy()))

    def _start(self) -> _CompileFork:
        ours, theirs = socket.socketpair()
        log = self._scratch / f"worker-{self._started}.log"
        self._started += 1
        inherited = [ours, *(worker.channel for worker in self._workers.values())]

        def work() -> None:
            for channel in inherited:  # each worker ends when the parent has closed its channel
                channel.close()
            self._serve(theirs)

        try:
            pid = fork(work, log)
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        worker = self._workers[ours.fileno()] = _CompileFork(pid, ours, log)
        return worker

    def _collect(self) -> None:
        channels = [worker.channel for worker in self._busy()]
        if not channels:
            if self._waiting and self._failures < STOP_AFTER:
                time.sleep(_POLL)  # paused
            return
        for channel in select.select(channels, [], [], _POLL)[0]:
            worker = self._workers[channel.fileno()]
            try:
                text = channel.recv(1 << 16)
            except OSError:
                text = b""
            if text.endswith(b"\n"):
                self._take(worker, json.loads(text))
            else:
                self._replace(worker)

    def _take(self, worker: _CompileFork, answer: Mapping[str, Any]) -> None:
        assert worker.job is not None
        job, worker.job = worker.job, None
        self._worker_bytes = max(self._worker_bytes, answer["bytes"])
        why = answer["failed"]
        if not why:
            cache = Path(self._request.cache, "cache")
            missing = [name for name in self._request.kernels[job].names if not (cache / name).is_dir()]
            why = f"{missing[0]} was not made: the plan does not hold" if missing else ""
        if why:
            self._failures += 1
            last = last_lines(worker.log)
            self._fail(job, why if last in why else f"{why}; {last}")
        else:
            self._failures = 0
            self._answers.write(done=job, seconds=answer["seconds"])

    def _replace(self, worker: _CompileFork) -> None:
        """Take note of a worker's death. Its kernel gets another try, with fewer workers if memory was the reason."""
        job, others = worker.job, len(self._busy()) - 1
        assert job is not None
        status = self._end(worker)
        if status == -signal.SIGKILL:
            self._most = max(1, min(self._most, others))
        self._tries[job] = self._tries.get(job, 0) + 1
        if self._tries[job] < TRIES:
            self._waiting.insert(0, job)
        else:
            self._failures += 1
            self._fail(job, describe_end(status, worker.log))

    def _end(self, worker: _CompileFork) -> int:
        del self._workers[worker.channel.fileno()]
        worker.channel.close()
        return os.waitstatus_to_exitcode(os.waitpid(worker.pid, 0)[1])

    def _give_up(self) -> None:
        for job in self._waiting:
            self._fail(job, f"not tried, because {self._failures} kernels in a row failed before it")
        self._waiting = []

    def _fail(self, job: int, why: str) -> None:
        self._answers.write(failed=job, why=why)

    def _is_paused(self) -> bool:
        """Return whether the machine is under pressure. Looks once a second."""
        now = time.monotonic()
        if not self._request.gentle or now < self._checked:
            return False
        if pressure("memory", "some") < MEMORY_PRESSURE and pressure("io", "full") < DISK_PRESSURE:
            self._checked = now + 1.0
            return False
        self._paused += _POLL
        return True

    # --- a worker ----------------------------------------------------------------------------------------------------

    def _serve(self, channel: socket.socket) -> None:
        """Compile each kernel that is read, until the parent closes the channel. Runs in a fork."""
        use_cache(Path(self._request.cache))
        with channel, channel.makefile("r", encoding="ascii") as orders:
            for line in orders:
                problem, m = json.loads(line)
                begun = time.monotonic()
                failed = compile_one(self._utils, problem, m)
                seconds = round(time.monotonic() - begun, 2)
                channel.sendall(
                    json.dumps({"failed": failed, "seconds": seconds, "bytes": _own_bytes()}).encode() + b"\n"
                )


def _own_bytes() -> int:
    """Return the bytes that this process has for itself, and those of its largest compiler."""
    own = 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        rows = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
        own = sum(int(row.split()[1]) << 10 for row in rows if row.startswith("Private_"))
    return own + (resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10)


def available_memory() -> int:
    """Return the bytes that processes may still take: of the machine, or of this control group if that is less."""
    found = 1 << 62
    with contextlib.suppress(OSError, ValueError, IndexError):
        rows = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found = next((int(row.split()[1]) << 10 for row in rows if row.startswith("MemAvailable:")), found)
    for most, used in _CGROUP_MEMORY:
        with contextlib.suppress(OSError, ValueError):
            found = min(
                found, int(Path(most).read_text(encoding="ascii")) - int(Path(used).read_text(encoding="ascii"))
            )
    return max(0, found)


def pressure(of: str, kind: str) -> float:
    """Return avg10 of /proc/pressure in percent; 0 where the kernel does not report it."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for row in Path("/proc/pressure", of).read_text(encoding="ascii").splitlines():
            if row.startswith(kind):
                return float(row.partition("avg10=")[2].split()[0])
    return 0.0
