"""What stands in the place of launchers, processes, clocks and assertions while a test file is recorded.

Everything is replaced for good: the process ends with its file. Standard library only.
"""

from __future__ import annotations

import asyncio
import builtins
import concurrent.futures
import contextlib
import io
import json
import multiprocessing
import os
import queue
import random
import re
import shlex
import subprocess
import threading
import time
import types
import unittest
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from builder.agent.launch_unknown import MARK, Unknown, UnknownBase

#: Called with kind, model, argv and the launched process' environment (None: this process').
Launched = Callable[[str, object, Sequence[object], Mapping[str, object] | None], None]

_FIRST_PID = 1 << 22  # PID_MAX_LIMIT of Linux: no process has this number or a greater one
#: Modules that serve a model (after ``python -m``), and those that load one to measure it.
_SERVERS = ("sglang.launch_server", "sglang.launch_pd_server", "sglang.srt.entrypoints.http_server")
_BENCHES = re.compile(r"sglang\.(bench_|benchmark\.)(one_batch|offline_throughput|one_batch_server|latency)\w*")
#: Functions of ``sglang.test`` that evaluate a server, or download what it is evaluated with.
_MEASUREMENTS = ("run_eval", "get_input_ids")
#: Fields of ServerArgs whose option is not spelt like the field (``cli_name`` of ``server_args.py``, 2026-08-22).
_OPTION_OF_FIELD = {
    "fp8_gemm_runner_backend": "--fp8-gemm-backend",
    "fp4_gemm_runner_backend": "--fp4-gemm-backend",
    "ep_join_mode": "--elastic-ep-join-mode",
    "ep_join_rank_offset": "--elastic-ep-join-rank-offset",
}
_LOCATED = ("--model-path", "--model", "--host", "--port", "--lb-host", "--lb-port", "--api-key")


def install(launched: Launched, other_program: Callable[[str], None], scratch: str, checkout: str) -> None:
    """Replace what starts processes, waits or asserts.

    other_program: called with a command that may launch unseen; scratch: the folder that stands in the place of /tmp.
    """
    random.seed(0)
    _temporary_files(scratch, checkout)
    _clock()
    _processes(launched, other_program)
    _multiprocessing()
    _assertions()
    _text()


def facts(launched: Launched) -> dict[str, Any]:
    """Return launchers of code that is not run, by qualified name."""

    class ServerArgs(UnknownBase):
        """Keeps what it is given, for the launch that it is passed to."""

        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            object.__setattr__(self, "_given", kwargs)

    class Engine(UnknownBase):
        """Records its construction."""

        def __init__(self, *args: Any, server_args: Any = None, **kwargs: Any) -> None:
            super().__init__()
            given = getattr(server_args, "_given", None) if server_args is not None else kwargs
            _launch_with_fields(launched, given if isinstance(given, dict) else {"model_path": server_args}, args)

    def launch_server(server_args: Any = None, *_args: Any, **_kwargs: Any) -> None:
        given = getattr(server_args, "_given", None)
        _launch_with_fields(launched, given if isinstance(given, dict) else {"model_path": server_args}, ())

    return {
        "sglang.Engine": Engine,
        "sglang.Runtime": Engine,
        "sglang.srt.entrypoints.engine.Engine": Engine,
        "sglang.srt.server_args.ServerArgs": ServerArgs,
        "sglang.srt.entrypoints.http_server.launch_server": launch_server,
        # A server takes the name of what is downloaded as well as its path.
        "huggingface_hub.snapshot_download": lambda repo_id=None, *_args, **_kwargs: repo_id,
    }


def patch_module(module: types.ModuleType, launched: Launched) -> None:
    """Replace the launchers and the measurements of a module of ``sglang.test``."""
    names = vars(module)

    def launcher(kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
        import inspect

        signature = inspect.signature(original)

        def launch(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            env = given.get("env")
            merged = None if env is None else {**os.environ, **env}
            launched(kind, given.get("model"), given.get("other_args") or (), merged)
            return Process(["sglang", "serve"])

        return launch

    if module.__name__ == "sglang.test.test_utils":
        for name, kind in (("popen_launch_server", "server"), ("popen_launch_pd_server", "pd")):
            if name in names:
                names[name] = launcher(kind, names[name])
        for name in ("run_bench_one_batch", "run_bench_offline_throughput"):
            if name in names:
                names[name] = _bench(launched, name)
        names["_wait_for_gpu_idle_in_ci"] = lambda *_args, **_kwargs: None
    if module.__name__ == "sglang.test.runners" and "HFRunner" in names:
        names["HFRunner"] = Unknown("HFRunner")
    if module.__name__ == "sglang.test.nightly_utils" and "NightlyBenchmarkRunner" in names:
        # The file that a benchmark writes, which is not run.
        names["NightlyBenchmarkRunner"].load_benchmark_results = lambda *_args, **_kwargs: ([Unknown("result")], True)
    for name in _MEASUREMENTS:
        if module.__name__.startswith("sglang.test.") and callable(names.get(name)):
            names[name] = _unknown_result(name)


def _unknown_result(name: str) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: Unknown(f"{name}()")


def _bench(launched: Launched, name: str) -> Callable[..., Any]:
    def run(model: object = None, other_args: Sequence[object] = (), *_args: Any, **_kwargs: Any) -> Any:
        launched("bench", model, other_args, None)
        return Unknown(f"{name}()")

    return run


def _launch_with_fields(launched: Launched, given: Mapping[str, Any], args: Sequence[object]) -> None:
    """Record fields of ServerArgs as the options of its command line."""
    fields = dict(given)
    model = fields.pop("model_path", None)
    if args:
        model = args[0] if model is None else model
    words: list[object] = []
    adapters = fields.get("lora_paths")
    if isinstance(adapters, dict):
        fields["lora_paths"] = [f"{name}={path}" for name, path in adapters.items()]
    for name, value in fields.items():
        option = _OPTION_OF_FIELD.get(name) or "--" + name.replace("_", "-")
        if value is None or value is False:
            continue
        if value is True:
            words.append(option)
        elif isinstance(value, (list, tuple)):
            words += [option, *(json.dumps(each) if isinstance(each, dict) else each for each in value)]
        else:
            words += [option, json.dumps(value) if isinstance(value, dict) else value]
    launched("engine", model, words, None)


# Processes


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


def _processes(launched: Launched, other_program: Callable[[str], None]) -> None:
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
    """Record a server's command line without what says where it listens."""
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


def _multiprocessing() -> None:
    """Run processes as threads, and let queues say that they are empty rather than wait for ever."""

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


# Time, text and assertions


def _clock() -> None:
    """Let sleeping pass at once: the clocks go on by as much, so that a loop with a deadline comes to its end."""
    ahead = 0.0
    main = threading.main_thread()
    sleep, wait, join = time.sleep, threading.Event.wait, threading.Thread.join

    def pass_time(seconds: Any) -> None:
        nonlocal ahead
        seconds = max(0.0, float(seconds))
        if threading.current_thread() is main:
            ahead += seconds
            sleep(0.0005)  # other threads come to their launches
        else:
            sleep(min(seconds, 0.02))

    def moved(clock: Callable[[], Any], unit: float) -> Callable[[], Any]:
        return lambda: clock() + type(clock())(ahead * unit)

    for name in ("time", "monotonic", "perf_counter"):
        setattr(time, name, moved(getattr(time, name), 1.0))
        setattr(time, f"{name}_ns", moved(getattr(time, f"{name}_ns"), 1e9))
    vars(time)["sleep"] = pass_time

    asleep = asyncio.sleep

    async def pass_time_async(delay: Any, result: Any = None) -> Any:
        pass_time(delay)
        return await asleep(0, result)

    vars(asyncio)["sleep"] = pass_time_async

    def short_wait(self: threading.Event, timeout: float | None = None) -> bool:
        return wait(self, 2.0 if timeout is None else min(timeout, 0.2))

    def short_join(self: threading.Thread, timeout: float | None = None) -> None:
        join(self, 2.0 if timeout is None else min(timeout, 2.0))

    threading.Event.wait = short_wait  # type: ignore[method-assign]
    threading.Thread.join = short_join  # type: ignore[method-assign]


def _temporary_files(scratch: str, checkout: str) -> None:
    """Let paths below /tmp lie in the file's own folder, so that no run finds what an earlier one left."""

    def moved(path: Any) -> Any:
        text = os.fspath(path) if isinstance(path, os.PathLike) else path
        if isinstance(text, str) and text.startswith("/tmp/") and not text.startswith((scratch, checkout)):  # noqa: S108
            return f"{scratch}/{text[5:]}"
        return path

    def moving(module: Any, name: str) -> None:
        original = getattr(module, name)

        def call(path: Any = ".", *args: Any, **kwargs: Any) -> Any:
            # An unknown path counts as a number elsewhere, and here it would be a descriptor of this process.
            return Unknown(f"{name}()") if isinstance(path, Unknown) else original(moved(path), *args, **kwargs)

        setattr(module, name, call)

    for name in ("stat", "lstat", "mkdir", "open", "listdir", "scandir", "remove", "unlink", "rmdir", "access"):
        moving(os, name)
    for module in (builtins, io):
        moving(module, "open")


def _text() -> None:
    """Let what parses text take an unknown one."""

    def taking_unknown(module: Any, name: str, position: int) -> None:
        original = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if len(args) > position and isinstance(args[position], Unknown):
                return Unknown(f"{name}()")
            return original(*args, **kwargs)

        setattr(module, name, call)

    loads = json.loads

    def read_json(text: Any = "", *args: Any, **kwargs: Any) -> Any:
        if isinstance(text, Unknown) or (isinstance(text, str) and MARK.search(text)):
            return Unknown("json.loads(…)")
        return loads(text, *args, **kwargs)

    vars(json)["loads"] = read_json
    taking_unknown(json, "load", 0)
    for name in ("search", "match", "fullmatch", "findall", "finditer", "split"):
        taking_unknown(re, name, 1)
    taking_unknown(re, "sub", 2)
    for name in ("ord", "chr"):
        taking_unknown(builtins, name, 0)
    as_json = json.JSONEncoder.default

    def default(self: json.JSONEncoder, value: object) -> Any:
        return str(value) if isinstance(value, Unknown) else as_json(self, value)

    json.JSONEncoder.default = default  # type: ignore[method-assign,assignment]
    vars(urllib.request)["urlopen"] = lambda *_args, **_kwargs: Unknown("urlopen()")


def _assertions() -> None:
    """Let every assertion hold: what is compared is unknown here."""

    def holds(self: unittest.TestCase, *_args: Any, **_kwargs: Any) -> None:
        return None

    class Caught:
        """The context of an assertion about what is raised."""

        def __init__(self) -> None:
            self.exception = self.warning = Unknown("exception")
            self.output: list[Any] = []
            self.records: list[Any] = []

        def __enter__(self) -> Caught:
            return self

        def __exit__(self, kind: type[BaseException] | None, *_error: object) -> bool:
            return kind is not None and issubclass(kind, Exception)

    def raises(self: unittest.TestCase, *args: Any, **kwargs: Any) -> Any:
        function = next((each for each in args[1:] if callable(each)), None)
        if function is None:
            return Caught()
        with contextlib.suppress(Exception):
            function(*args[args.index(function) + 1 :], **kwargs)
        return None

    for name in dir(unittest.TestCase):
        if name.startswith("assert"):
            setattr(unittest.TestCase, name, raises if re.search("Raises|Warns|Logs", name) else holds)
    unittest.TestCase.fail = holds  # type: ignore[method-assign,assignment]
