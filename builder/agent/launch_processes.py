"""What stands in the place of processes while a test file is recorded: no program starts, and what would launch counts.

Everything is replaced for good: the process ends with its file. Standard library only.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import io
import multiprocessing
import os
import queue
import re
import shlex
import subprocess
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from builder.agent.launch_unknown import Unknown

#: Called with kind, model, argv and the launched process' environment (None: this process').
Launched = Callable[[str, object, Sequence[object], Mapping[str, object] | None], None]

_FIRST_PID = 1 << 22  # PID_MAX_LIMIT of Linux: no process has this number or a greater one
#: Modules that serve a model (after ``python -m``), and those that load one to measure it.
_SERVERS = ("sglang.launch_server", "sglang.launch_pd_server", "sglang.srt.entrypoints.http_server")
_BENCHES = re.compile(r"sglang\.(bench_|benchmark\.)(one_batch|offline_throughput|one_batch_server|latency)\w*")
_LOCATED = ("--model-path", "--model", "--host", "--port", "--lb-host", "--lb-port", "--api-key")


class Process:
    """A process that was never started: it runs until it is ended, and then has ended well."""

    numbers = iter(range(_FIRST_PID, 1 << 30))

    def __init__(self, args: Any = (), *_args: Any, **kwargs: Any) -> None:
        self.args, self.pid = args, next(self.numbers)
        self.returncode: int | None = None
        text = any(kwargs.get(name) for name in ("text", "universal_newlines", "encoding", "errors"))
        self.stdin = self.stdout = self.stderr = None
        for name in ("stdin", "stdout", "stderr"):
            if kwargs.get(name) == subprocess.PIPE:
                setattr(self, name, io.StringIO() if text else io.BytesIO())

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self.returncode = 0
        return 0

    def communicate(self, *_args: Any, **_kwargs: Any) -> tuple[Any, Any]:
        self.wait()
        return Unknown("stdout"), Unknown("stderr")

    def send_signal(self, _number: int) -> None:
        self.wait()

    def terminate(self) -> None:
        self.wait()

    kill = terminate

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_error: object) -> None:
        self.wait()

    def __class_getitem__(cls, _item: object) -> type:
        return cls


def replace_processes(launched: Launched, other_program: Callable[[str], None]) -> None:
    """Record what would be started, and start nothing. other_program: see `launch_patches.install`."""

    def note(args: Any, kwargs: Mapping[str, Any]) -> None:
        words = shlex.split(args) if isinstance(args, str) else list(args) if isinstance(args, (list, tuple)) else []
        env = kwargs.get("env")
        _note(words, env if isinstance(env, Mapping) else None, launched, other_program)

    class Popen(Process):
        def __init__(self, args: Any = (), *rest: Any, **kwargs: Any) -> None:
            super().__init__(args, *rest, **kwargs)
            note(args, kwargs)

    def run(args: Any = (), *_rest: Any, **kwargs: Any) -> Any:
        note(args, kwargs)
        return subprocess.CompletedProcess(args, 0, Unknown("stdout"), Unknown("stderr"))

    def output(args: Any = (), *_rest: Any, **kwargs: Any) -> Any:
        note(args, kwargs)
        return Unknown("stdout")

    def call(args: Any = (), *_rest: Any, **kwargs: Any) -> int:
        note(args, kwargs)
        return 0

    vars(subprocess).update(Popen=Popen, run=run, check_output=output, getoutput=output, call=call, check_call=call)
    vars(subprocess).update(getstatusoutput=lambda args, **kwargs: (call(args, **kwargs), Unknown("stdout")))
    vars(os)["system"] = call

    def signal_process(number: int, *_args: Any) -> None:
        if number < _FIRST_PID:
            raise PermissionError("a test signals a process that it did not start")

    os.kill = os.killpg = signal_process

    async def started(*args: Any, **kwargs: Any) -> Any:
        note(list(args), kwargs)
        return Unknown("process")

    vars(asyncio).update(create_subprocess_exec=started, create_subprocess_shell=started)


def _note(
    words: list[Any],
    env: Mapping[str, Any] | None,
    launched: Launched,
    other_program: Callable[[str], None],
) -> None:
    """Record a command if it launches a model, and name it if it is a program that might."""
    names = [str(word) for word in words]
    program = os.path.basename(names[0]) if names else ""
    while program in ("env", "nohup", "timeout", "setsid", "numactl") and len(names) > 1:
        names, words = names[1:], words[1:]
        if not names[0].startswith("-") and "=" not in names[0] and not names[0].isdigit():
            program = os.path.basename(names[0])
    at = names.index("-m") + 1 if "-m" in names[:-1] else 0
    module = names[at] if at else ""
    if program == "sglang" and names[1:2] == ["serve"]:
        _command(words[2:], "process", env, launched)
    elif module in _SERVERS:
        _command(words[at + 1 :], "process", env, launched)
    elif _BENCHES.fullmatch(module):
        if not any(name == "--base-url" or name.startswith("--base-url=") for name in names):
            _command(words[at + 1 :], "bench", env, launched)
    elif re.fullmatch(r"python[0-9.]*|torchrun|pytest|bash|sh|nsys", program) and _may_launch(module):
        other_program(" ".join(names)[:200])


def _may_launch(module: str) -> bool:
    """Return whether a program might launch a model: a script, a test, or a module of sglang that is no client."""
    ours = module.startswith(("sglang.", "pytest", "unittest"))
    return not module or (ours and not module.startswith(("sglang.bench", "sglang.launch_router")))


def _command(words: list[Any], kind: str, env: Mapping[str, Any] | None, launched: Launched) -> None:
    """Record a server's command line without its host and port."""
    model: object = None
    kept: list[Any] = []
    skip = False
    for index, word in enumerate(words):
        option, equals, value = str(word).partition("=")
        if option in _LOCATED:
            if option in ("--model-path", "--model"):
                model = value if equals else words[index + 1] if index + 1 < len(words) else None
            skip = not equals
        elif skip:
            skip = False
        else:
            kept.append(word)
    launched(kind, model, kept, env)


def replace_multiprocessing() -> None:
    """Run processes as threads, and let queues report that they are empty rather than wait for ever."""

    class Child(threading.Thread):
        def __init__(
            self, group: Any = None, target: Any = None, name: Any = None, args: Any = (), **kwargs: Any
        ) -> None:
            super().__init__(None, target, name, args, kwargs.get("kwargs") or {}, daemon=True)
            self.exitcode, self.pid = 0, next(Process.numbers)

        def terminate(self) -> None:
            return None

        kill = close = terminate

    class Queue(queue.Queue[Any]):
        def __init__(self, maxsize: int = 0, **_kwargs: Any) -> None:
            super().__init__(maxsize)

        def get(self, block: bool = True, timeout: float | None = None) -> Any:
            return super().get(block, min(timeout or 2.0, 2.0))

        def close(self) -> None:
            return None

        join_thread = cancel_join_thread = close

    def get_context(_method: str | None = None) -> Any:
        return multiprocessing

    vars(multiprocessing).update(
        Process=Child,
        Queue=Queue,
        SimpleQueue=Queue,
        JoinableQueue=Queue,
        Event=threading.Event,
        get_context=get_context,
        Lock=threading.Lock,
        Barrier=threading.Barrier,
        set_start_method=lambda *_args, **_kwargs: None,
    )
    vars(multiprocessing).update(Value=lambda _kind, value=0, **_kwargs: types.SimpleNamespace(value=value))
    vars(concurrent.futures)["ProcessPoolExecutor"] = concurrent.futures.ThreadPoolExecutor
