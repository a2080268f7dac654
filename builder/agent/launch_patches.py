"""What stands in the place of launchers, clocks, files and assertions while a test file is recorded.

Everything is replaced for good: the process ends with its file. Standard library only.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import io
import json
import os
import random
import re
import threading
import time
import types
import unittest
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from builder.agent.launch_processes import Launched, Process, replace_multiprocessing, replace_processes
from builder.agent.launch_unknown import MARK, Unknown, UnknownBase

#: Functions of ``sglang.test`` that evaluate a server, or download what it is evaluated with.
_MEASUREMENTS = ("run_eval", "get_input_ids")
#: Fields of ServerArgs whose option is not spelt like the field (``cli_name`` of ``server_args.py``, 2026-08-22).
_OPTION_OF_FIELD = {
    "fp8_gemm_runner_backend": "--fp8-gemm-backend",
    "fp4_gemm_runner_backend": "--fp4-gemm-backend",
    "ep_join_mode": "--elastic-ep-join-mode",
    "ep_join_rank_offset": "--elastic-ep-join-rank-offset",
}


def install(launched: Launched, other_program: Callable[[str], None], scratch: str, checkout: str) -> None:
    """Replace what starts processes, waits or asserts.

    other_program: called with a command that may launch unseen; scratch: the folder that stands in the place of /tmp.
    """
    random.seed(0)
    _temporary_files(scratch, checkout)
    _clock()
    replace_processes(launched, other_program)
    replace_multiprocessing()
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
