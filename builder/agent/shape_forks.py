"""A process that has imported sglang and compiled nothing, of which shape workers are forked (`shape_pool`).

Both passes of a task and all their workers share its import. A worker of the second pass descends from a process that
never loaded a kernel: what it does not compile, it found on the disk. Only where the GPU is simulated: importing sglang
asks for the GPU, and a real driver does not survive a fork.

`Imported` is the side of the in-container program, `main` that of the process. It listens on a socket. For each
connection it receives three descriptors: what the worker reads (its order, then shapes), its output, its answers. When
the worker has ended, the connection gets its exit status. A pool that is refused, or whose worker ends before it is
ready, starts a worker with an import of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from builder import processes
from builder.agent import shape_worker
from builder.agent.guard import SCRATCH
from builder.task import PRETEND_VARIABLE

_ROOT = str(Path(__file__).resolve().parents[2])
#: The process, with this package last on its path: nothing of it may hide a module of the image.
_START = (
    "import sys; sys.path[:] = [*filter(None, sys.path), sys.argv[1]]; "
    "from builder.agent import shape_forks; shape_forks.main(int(sys.argv[2]))"
)
#: Descriptors of a request: orders, output, answers.
_DESCRIPTORS = 3


class Imported:
    """The process, started with the first request for its socket. Leaving the context ends it and its workers."""

    def __init__(self, env: Mapping[str, str], workdir: str) -> None:
        self._env, self._workdir = dict(env), workdir
        self._process: subprocess.Popen[bytes] | None = None
        self._place = ""

    def __enter__(self) -> Imported:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            processes.end_group(self._process, 0.0)
            processes.kill_descendants(spare=(self._process.pid,))
            self._process.wait()
        shutil.rmtree(self._place, ignore_errors=True)

    @property
    def pids(self) -> tuple[int, ...]:
        """The process that stays from one pass to the next, if there is one. What it forked does not."""
        return () if self._process is None else (self._process.pid,)

    def socket(self) -> str:
        """Return the path of its socket; "" where workers cannot be forked."""
        if not self._env.get(PRETEND_VARIABLE):
            return ""
        if not self._place:
            self._place = tempfile.mkdtemp(prefix=SCRATCH)
            self._start()
        return f"{self._place}/socket" if self._process is not None else ""

    def _start(self) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            try:
                listener.bind(f"{self._place}/socket")
                listener.listen(1024)
                self._process = subprocess.Popen(
                    ["python3", "-c", _START, _ROOT, str(listener.fileno())],
                    env=self._env,
                    cwd=self._workdir,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,  # a worker that imports sglang itself shows why this one cannot
                    stderr=subprocess.DEVNULL,
                    pass_fds=(listener.fileno(),),
                    start_new_session=True,
                )
            except OSError:
                self._process = None


def main(descriptor: int) -> None:
    """Import sglang, and fork a worker for each connection to this listening socket, without end."""
    listener = socket.socket(fileno=descriptor)
    compile_utils = shape_worker.load()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait for workers
    while True:
        connection = listener.accept()[0]
        if os.fork() == 0:
            listener.close()
            _supervise(connection, compile_utils)
        connection.close()


def _supervise(connection: socket.socket, compile_utils: Any) -> None:
    """Fork one worker, and report its end. Runs in a fork, and does not return."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        given = socket.recv_fds(connection, 1, _DESCRIPTORS)[1]
        if len(given) == _DESCRIPTORS:
            pid = os.fork()
            if pid == 0:
                connection.close()
                _work(given, compile_utils)
            for each in given:
                os.close(each)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            connection.sendall(str(status).encode())
    finally:
        os._exit(0)


def _work(given: list[int], compile_utils: Any) -> None:
    """Be a worker, as a script of its own would be. Runs in a fork, and does not return."""
    from builder.agent.prebuild_forks import allow_cuda

    status = 1
    try:
        for target, source in enumerate((given[0], given[1], given[1])):
            os.dup2(source, target)
        os.close(given[0])
        os.close(given[1])
        allow_cuda()
        with open(0, encoding="utf-8", closefd=False) as orders:
            status = shape_worker.serve(compile_utils, json.loads(orders.readline()), given[2], orders)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)
