"""Records the launches of one test file, in a separate process (`launch_recorder` starts and limits it).

Standard library only. The environment is compared with the one before the tests: what a test or its class sets is part
of its launches.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import os
import re
import signal
import sys
import tempfile
import threading
import traceback
import types
import unittest
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from builder.agent import launch_facts, launch_functions, launch_modules, launch_patches, launch_reach, launch_unknown
from builder.recording import FileEnd, Launch, RecordingRequest, State, TestFile, Unrecorded, encode

TEMPORARY = "TEMPORARY"
#: Variables that no launch depends on: set by an evaluation's client, in the test's process.
_CLIENTS = re.compile(r"OPENAI_\w+")
_WHY = 300
#: Audit events of system calls that change a file or folder by its path; links are made from their second one.
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate", "os.chmod", "os.chown")


class TestTimeoutError(BaseException):
    """A test took longer than it may. Not an Exception: a test that catches everything must not catch it."""

    __test__ = False


def record_file(request: RecordingRequest, file: TestFile, descriptor: int, scratch: str) -> NoReturn:
    """Run one test file and write its records to this descriptor; ends the process. scratch: where it may write."""
    write = os.write
    leave = os._exit
    lock = threading.Lock()
    sent, ended = 0, False

    def send(record: Launch | Unrecorded | FileEnd) -> None:
        nonlocal sent, ended
        with lock:
            if ended:
                return  # of a thread that goes on
            if isinstance(record, FileEnd):
                record, ended = replace(record, launches=sent), True
            sent += isinstance(record, Launch)
            data = encode(record)
            while data:
                data = data[write(descriptor, data) :]

    session = _Session(request, file, send, scratch)
    try:
        session.run()
    except BaseException as error:  # noqa: BLE001 - a test file may raise anything
        session.problem("not-understood", "", session.location_of(error), session.described(error))
    signal.setitimer(signal.ITIMER_REAL, 0)
    send(session.end())
    leave(0)


class _Session:
    """One file's run. test: the label of what is running now."""

    def __init__(self, request: RecordingRequest, file: TestFile, send: Callable[[Any], None], scratch: str) -> None:
        self._request, self._file, self._send = request, file, send
        self._path = os.path.join(os.path.realpath(request.checkout), file.path)
        self._modules = launch_modules.Modules(request.checkout, os.path.dirname(self._path), self._patch)
        self._names: dict[str, Any] = {}
        self._before: dict[str, str] = {}
        self._scratch = scratch
        self._told: set[tuple[str, ...]] = set()
        self._read: dict[str, None] = {}
        self._listed = False
        self.test = ""
        self._kind: type | None = None

    def run(self) -> None:
        self._prepare()
        with self._alarm():
            module = self._modules.load(os.path.basename(self._path)[: -len(".py")], self._path)
        result = _Result(self)
        suite = _suite(self, module)
        suite.run(result)
        # As torchrun starts them, which some of them are written for.
        ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(self._file.gpus)}
        os.environ.update(ranks)
        self._before |= ranks
        launch_functions.run(module, self._path, self)
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join(0.5)

    def end(self) -> FileEnd:
        read = [*self._modules.read, *self._read]
        inside = [self._relative(path) for path in read]
        absent = [self._relative(path) for path in self._modules.absent]
        return FileEnd(
            0,  # the sender counts
            tuple(dict.fromkeys(each for each in inside if each)),
            tuple(dict.fromkeys(each for each in absent if each)),
            self._listed,
        )

    # What is reported

    def launched(self, kind: str, model: object, argv: Sequence[object], env: Mapping[str, object] | None) -> None:
        """Report one launch. env: of the launched process; None: this process'."""
        now = os.environ if env is None else env
        changed = {
            str(name): self._plain(value)
            for name, value in now.items()
            if self._before.get(str(name)) != value and not _CLIENTS.fullmatch(str(name))
        }
        words = tuple(self._plain(word) for word in argv)
        where = self._here()
        record = Launch(self.test, where, kind, self._plain(model), words, tuple(sorted(changed.items())))  # type: ignore[arg-type]
        self._send(record)

    def problem(self, state: State, test: str, location: str, why: str) -> None:
        """Report what is not recorded, once."""
        why = self._plain(" ".join(why.split()))[:_WHY]
        if (state, test, location, why) not in self._told:
            self._told.add((state, test, location, why))
            self._send(Unrecorded(state, test, location, why))

    def guessed(self, name: str) -> None:
        """Report a branch on a predicate that is unknown; of an object, it asks about no machine."""
        if any(part[:1].isupper() for part in name.split(".")):
            return
        if name.split(".")[0] in ("torch", "sglang", "sgl_kernel", "flashinfer", "deep_gemm", "triton"):
            self.problem("not-understood", self.test, self._here(), f"a condition depends on {name}, which is unknown")

    def other_program(self, command: str) -> None:
        if self._path in command:
            return  # the file itself under torchrun: its tests are run here
        self.problem(
            "not-understood", self.test, self._here(), f"it runs a program of its own, which may launch: {command}"
        )

    def location_of(self, error: BaseException) -> str:
        """Return where in the test file this was raised; of what another file raised, where the test's class is."""
        frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
        if isinstance(error, SyntaxError) and error.filename:
            frames.append((error.filename, error.lineno or 1))
        return self._in_test_file(frames[::-1])

    def described(self, error: BaseException) -> str:
        """Return what was raised, with its place where that is in another file of the checkout."""
        frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
        place = self._place(frames[::-1])
        other = f" in {place}" if not place.startswith(f"{self._file.path}:") else ""
        return f"it raised {_described(error)}{other}"

    def may_launch_after(self, error: BaseException) -> bool:
        """Return whether what this ended may have had a launch before it."""
        codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
        own = [code for code in codes if self._relative(code.co_filename)]
        fixture = any(code.co_name in ("setUpClass", "setUpModule", "setUp") for code in own)
        return fixture or not own or launch_reach.may_launch(own, self._modules.real)

    def running(self, test: str, kind: type | None) -> None:
        """Note what runs from now on. kind: its class."""
        self.test, self._kind = test, kind

    def location_of_definition(self, value: object) -> str:
        """Return where a class or function is defined."""
        value = inspect.unwrap(getattr(value, "__func__", value))  # type: ignore[arg-type]
        code = getattr(value, "__code__", None)
        if code is not None:
            return self._place([(code.co_filename, code.co_firstlineno)])
        file = getattr(sys.modules.get(getattr(value, "__module__", "")), "__file__", None) or self._path
        with contextlib.suppress(OSError, SyntaxError, ValueError, ImportError):
            for node in ast.walk(ast.parse(self._modules.source(file))):
                if isinstance(node, ast.ClassDef) and node.name == getattr(value, "__name__", ""):
                    return self._place([(file, node.lineno)])
        return f"{self._file.path}:1"

    def _here(self) -> str:
        frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_stack(sys._getframe(1))]
        return self._in_test_file(frames)

    def _in_test_file(self, frames: Sequence[tuple[str, int]]) -> str:
        line = next((line for name, line in frames if name == self._path), None)
        if line is not None:
            return f"{self._file.path}:{line}"
        place = self.location_of_definition(self._kind) if self._kind is not None else ""
        return place if place.startswith(f"{self._file.path}:") else f"{self._file.path}:1"

    def _place(self, frames: Sequence[tuple[str, int]]) -> str:
        for wanted in (self._path, ""):
            for name, line in frames:
                relative = self._relative(name) if name == self._path or not wanted else None
                if relative:
                    return f"{relative}:{line}"
        return f"{self._file.path}:1"

    def _relative(self, path: str) -> str | None:
        root = self._modules.checkout + os.sep
        return path[len(root) :] if path.startswith(root) else None

    def _plain(self, value: object) -> str:
        """A word as text; a path below the temporary folder or the checkout is one word whatever its name."""
        text = str(value)
        return self._temporary.sub(TEMPORARY, text).encode("utf-8", "backslashreplace").decode()

    # What the file gets

    def _prepare(self) -> None:
        os.chdir(self._scratch)
        environ = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        environ |= launch_facts.CI_ENVIRONMENT | {"TMPDIR": self._scratch, "HOME": self._scratch}
        if self._request.gpu == "H200":
            environ["IS_H200"] = "1"
        os.environ.clear()
        os.environ.update(environ)
        self._before = dict(environ)
        tempfile.tempdir = self._scratch
        word, checkout = r"[^\s\"',;:]*", re.escape(self._modules.checkout)
        self._temporary = re.compile(rf"{re.escape(self._scratch)}{word}|{checkout}(?:/{word}|(?=[\s\"',;:]|$))")
        gpu = launch_facts.GPUS[self._request.gpu]
        self._names = launch_facts.table(gpu, self._file.gpus) | launch_patches.facts(self.launched)
        self._names |= {"pytest": launch_functions.module()}
        launch_unknown.answer = launch_facts.lookup(self._names)
        launch_unknown.on_guess = self.guessed
        launch_patches.install(self.launched, self.other_program, self._scratch, self._modules.checkout)
        sys.meta_path.insert(0, self._modules)
        sys.path[:] = [each for each in sys.path if "site-packages" not in each and "dist-packages" not in each]
        sys.argv = [self._path]
        sys.dont_write_bytecode = True
        sys.stdout = sys.stderr = _DiscardedText()
        threading.excepthook = self._in_thread
        signal.signal(signal.SIGALRM, _on_alarm)
        sys.addaudithook(self._audit)

    def _patch(self, module: types.ModuleType) -> None:
        launch_patches.patch_module(module, self.launched)

    def _in_thread(self, error: Any) -> None:
        if error.exc_value is not None:
            place = self.location_of(error.exc_value)
            self.problem("failed", self.test, place, f"in a thread {self.described(error.exc_value)}")

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        """Note what is read of the checkout, and refuse to change anything outside of the file's own folder."""
        if event == "open" and isinstance(args[0], str):
            flags = args[2] if isinstance(args[2], int) else 0
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self._may_change(args[0])
            elif self._relative(path := self._absolute(args[0])):
                self._read[path] = None
        elif event in ("os.listdir", "os.scandir") and isinstance(args[0], str):
            self._listed = self._listed or bool(self._relative(self._absolute(args[0])))
        elif event in _CHANGES:
            for path in args[:2]:
                if isinstance(path, str):
                    self._may_change(path)

    def _absolute(self, path: str) -> str:
        return os.path.normpath(os.path.join(self._scratch, path))

    def _may_change(self, path: str) -> None:
        if not self._absolute(path).startswith((self._scratch, "/dev/")):
            raise PermissionError(f"a test changes {path}, which is not its own")

    @contextlib.contextmanager
    def _alarm(self) -> Iterator[None]:
        self.arm()
        try:
            yield
        finally:
            self.disarm()

    def arm(self) -> None:
        # Again every second: a test that catches everything gets another one.
        signal.setitimer(signal.ITIMER_REAL, self._request.seconds_per_test, 1.0)

    def disarm(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)


class _Result(unittest.TestResult):
    """Reports what did not run to its end."""

    def __init__(self, session: _Session) -> None:
        super().__init__()
        self._session = session

    def startTest(self, test: unittest.TestCase) -> None:  # noqa: N802 - unittest's name
        super().startTest(test)
        self._session.running(label(test), type(test))
        self._session.arm()

    def stopTest(self, test: unittest.TestCase) -> None:  # noqa: N802
        self._session.disarm()
        super().stopTest(test)

    def addError(self, test: Any, err: Any) -> None:  # noqa: N802
        error = err[1]
        why = "it took too long" if isinstance(error, TestTimeoutError) else self._session.described(error)
        state: State = "failed" if self._session.may_launch_after(error) else "failed-after-launch"
        self._session.problem(state, label(test), self._session.location_of(error), why)

    def addFailure(self, test: Any, err: Any) -> None:  # noqa: N802
        self.addError(test, err)

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:  # noqa: N802
        if err is not None:
            self.addError(test, err)

    def addExpectedFailure(self, test: Any, err: Any) -> None:  # noqa: N802
        self.addError(test, err)

    def addSkip(self, test: Any, reason: str) -> None:  # noqa: N802
        kind = type(test)
        if getattr(kind, "__unittest_skip__", False):
            self._session.problem("skipped", kind.__name__, self._session.location_of_definition(kind), str(reason))
            return
        method = getattr(kind, getattr(test, "_testMethodName", ""), kind)
        # A skip for a reason that is unknown may not happen on the machine itself.
        state: State = "not-understood" if launch_unknown.MARK.search(str(reason)) else "skipped"
        self._session.problem(state, label(test), self._session.location_of_definition(method), str(reason))


class _Suite(unittest.TestSuite):
    """A suite whose class fixtures run under the alarm and under their own name."""

    session: _Session

    def _handleClassSetUp(self, test: Any, result: Any) -> None:  # noqa: N802
        self._limited("setUpClass", type(test), lambda: super(_Suite, self)._handleClassSetUp(test, result))  # type: ignore[misc]

    def _tearDownPreviousClass(self, test: Any, result: Any) -> None:  # noqa: N802
        previous = getattr(result, "_previousTestClass", None)
        if previous is not None and previous is not type(test):
            self._limited(
                "tearDownClass",
                previous,
                lambda: super(_Suite, self)._tearDownPreviousClass(test, result),  # type: ignore[misc]
            )

    def _limited(self, fixture: str, kind: type, call: Callable[[], None]) -> None:
        self.session.running(f"{kind.__name__}.{fixture}", kind)
        self.session.arm()
        try:
            call()
        finally:
            self.session.disarm()


def _suite(session: _Session, module: types.ModuleType) -> unittest.TestSuite:
    loader = unittest.TestLoader()
    loader.suiteClass = type("Suite", (_Suite,), {"session": session})
    return loader.loadTestsFromModule(module)


def label(test: Any) -> str:
    """Return ``Class.method``, also of what stands for a class fixture."""
    method = getattr(test, "_testMethodName", "")
    if method:
        return f"{type(test).__name__}.{method}"
    inner = getattr(test, "test_case", None)
    if inner is not None:
        return label(inner)
    found = re.fullmatch(r"(\w+) \((?:.*\.)?(\w+)\)", str(getattr(test, "description", test)))
    return f"{found[2]}.{found[1]}" if found else str(test)


class _DiscardedText(io.TextIOBase):
    """Text that nothing keeps."""

    def write(self, text: str) -> int:
        return len(text)

    def fileno(self) -> int:
        return 2


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _on_alarm(_number: int, _frame: types.FrameType | None) -> None:
    raise TestTimeoutError
