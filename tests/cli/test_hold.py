"""`warm-cache hold`: a command that cannot tell that it is held, and a lock that lasts exactly as long. No engine."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from builder.cache import layout
from builder.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
NO_ENGINE = "unix:///nowhere/engine.sock"

#: Counts SIGINTs until SIGTERM comes, and says so at once.
COUNT = """
import signal, sys
counted = []
def term(*_):
    print(f"{len(counted)} of SIGINT", flush=True)
    sys.exit(9)
signal.signal(signal.SIGINT, lambda *_: (counted.append(1), print("one", flush=True)))
signal.signal(signal.SIGTERM, term)
print("ready", flush=True)
while True:
    signal.pause()
"""


class Holder:
    """place: a directory of the test's own, with a cache root in it."""

    def __init__(self, place: Path) -> None:
        self.place, self.root = place, place / "jit"
        layout.prepare(self.root)
        self.running: list[subprocess.Popen[bytes]] = []
        self.environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith("WARM_CACHE_")},
            "DOCKER_HOST": NO_ENGINE,
            "PYTHONPATH": str(ROOT),
            "HOME": str(place),
            "XDG_RUNTIME_DIR": str(place),
            "LC_ALL": "C.UTF-8",
        }

    def argv(self, *command: str, options: tuple[str, ...] | None = None) -> list[str]:
        options = ("--cache", str(self.root)) if options is None else options
        return [sys.executable, "-m", "builder", "hold", *options, "--", *command]

    def run(
        self, *command: str, options: tuple[str, ...] | None = None, **more: Any
    ) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            self.argv(*command, options=options),
            env=self.environ,
            cwd=self.place,
            timeout=30,
            **{"capture_output": True, **more},
        )

    def start(self, *command: str, **more: Any) -> subprocess.Popen[bytes]:
        started = subprocess.Popen(
            self.argv(*command),
            env=self.environ,
            cwd=self.place,
            **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more},
        )
        self.running.append(started)
        return started

    def is_free(self) -> bool:
        """Whether a cleaner could have it to itself."""
        with layout.hold_lock(self.root).open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    def manifest(self, cache: str) -> tuple[str, ...]:
        path = self.place / "manifest.toml"
        path.write_text(
            f'schema = 1\n[image]\nref = "nobody/has:this"\n[cache]\n{cache}\n[gpus]\ncount = 0\n'
            '[[task]]\nmodel = "m"\nrecipe = "command"\nargv = ["true"]\nsuccess = "x"\n'
        )
        return ("--manifest", str(path))


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Holder]:
    made = Holder(tmp_path)
    yield made
    for process in made.running:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return process.stdout.readline()


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [0, 1, 7, 255])
def test_hold_returns_exit_status_of_command(holder: Holder, status: int) -> None:
    done = holder.run("sh", "-c", f"exit {status}")
    assert (done.returncode, done.stdout, done.stderr) == (status, b"", b"")


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_hold_returns_128_plus_signal_of_command(holder: Holder, signum: signal.Signals) -> None:
    done = holder.run("sh", "-c", f"kill -{int(signum)} $$")
    assert (done.returncode, done.stderr) == (128 + signum, b"")


def test_hold_passes_streams_unchanged(holder: Holder) -> None:
    data = bytes(range(256)) * 4096
    done = holder.run("sh", "-c", "cat; echo complaint >&2", input=data)
    assert done.stdout == data
    assert done.stderr == b"complaint\n"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (("a", "--", "b"), b"a\n--\nb\n"),
        (("--", "--json"), b"--\n--json\n"),
        (("--help", "-v", "--cache", "x"), b"--help\n-v\n--cache\nx\n"),
        (("",), b"\n"),
    ],
)
def test_hold_arguments_after_dashes_belong_to_command(
    holder: Holder, arguments: tuple[str, ...], shown: bytes
) -> None:
    done = holder.run(sys.executable, "-c", "import sys; print(*sys.argv[1:], sep='\\n')", *arguments)
    assert (done.stdout, done.stderr) == (shown, b"")


def test_hold_missing_command_is_127_and_unrunnable_126(holder: Holder) -> None:
    missing = holder.run("no-such-command", "--option")
    assert missing.returncode == 127
    assert missing.stderr == b"error: cannot run no-such-command: No such file or directory. Exit 127.\n"
    (holder.place / "text").write_text("no program")
    assert holder.run(str(holder.place / "text")).returncode == 126
    (holder.place / "text").chmod(0o755)
    assert holder.run(str(holder.place / "text")).returncode == 126
    assert holder.is_free()


@pytest.mark.parametrize("argv", [["hold"], ["hold", "--"], ["hold", "--cache", "/x", "--"], ["hold", "ls"]])
def test_hold_without_command_is_usage_error(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv, environ={}) == 2
    assert capsys.readouterr().out == ""


def test_command_after_other_verb_is_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--", "ls"], environ={}) == 2
    assert "ls" in capsys.readouterr().err


def test_hold_command_inherits_signal_dispositions(holder: Holder) -> None:
    def states(*argv: str, **more: Any) -> dict[str, int]:
        done = subprocess.run(argv, env=holder.environ, capture_output=True, timeout=30, cwd=holder.place, **more)
        fields = (entry.split(b":") for entry in done.stdout.splitlines() if entry.startswith(b"Sig"))
        # 32 and 33 are the C library's own, which it ignores in whatever it spawns.
        mine = ~(0b11 << 31)
        return {
            name.decode(): int(value, 16) & mine for name, value in fields if name in (b"SigBlk", b"SigIgn", b"SigCgt")
        }

    def odd() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGWINCH})

    for prepare in (None, odd):
        plain = states("cat", "/proc/self/status", preexec_fn=prepare)
        assert states(*holder.argv("cat", "/proc/self/status"), preexec_fn=prepare) == plain
    assert plain["SigIgn"] & 1 << (signal.SIGHUP - 1)


def test_hold_passes_signal_to_command(holder: Holder) -> None:
    process = holder.start(sys.executable, "-c", COUNT)
    assert line(process) == b"ready\n"
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        assert line(process) == b"one\n"
    process.send_signal(signal.SIGTERM)
    assert line(process) == b"2 of SIGINT\n"
    assert process.wait(10) == 9
    assert holder.is_free()


def test_hold_ctrl_c_reaches_command_once(holder: Holder) -> None:
    control, terminal = pty.openpty()

    def own_terminal() -> None:
        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    process = holder.start(sys.executable, "-c", COUNT, stdin=terminal, preexec_fn=own_terminal)
    try:
        assert line(process) == b"ready\n"
        os.write(control, b"\x03")
        assert line(process) == b"one\n"
        process.send_signal(signal.SIGTERM)  # passed on after whatever was passed on for Ctrl-C
        assert line(process) == b"1 of SIGINT\n"
        assert process.wait(10) == 9
    finally:
        os.close(control)
        os.close(terminal)


# --- the hold --------------------------------------------------------------------------------------------------------


def test_hold_lasts_as_long_as_the_command(holder: Holder) -> None:
    both = [holder.start("sh", "-c", "echo at it; read answer; exit 3") for _ in range(2)]
    for process in both:
        assert line(process) == b"at it\n"
    assert not holder.is_free()
    for process in both:
        assert not holder.is_free()
        process.communicate(b"\n", 10)
        assert process.returncode == 3
    assert holder.is_free()


def test_hold_killed_releases_the_lock(holder: Holder, until: Callable[..., None]) -> None:
    process = holder.start("sh", "-c", "echo at it; read answer")
    assert line(process) == b"at it\n"
    process.kill()
    process.wait(10)
    until(holder.is_free, what="the end of the hold")


def test_hold_waits_for_prune(holder: Holder) -> None:
    with layout.hold_lock(holder.root).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = holder.start("echo", "ran")
        assert process.stderr is not None
        assert process.stderr.readline() == f"waiting for a cleaner, which removes from {holder.root}\n".encode()
        assert process.poll() is None
    assert process.communicate(timeout=10) == (b"ran\n", b"")
    assert process.returncode == 0


def test_hold_interrupted_while_waiting_runs_no_command(holder: Holder) -> None:
    with layout.hold_lock(holder.root).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = holder.start("touch", "ran")
        assert process.stderr is not None
        assert process.stderr.readline().startswith(b"waiting for a cleaner")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGTERM
    assert not (holder.place / "ran").exists()


def test_hold_of_directory_needs_no_engine(holder: Holder) -> None:
    options = holder.manifest(f'root = "{holder.root}"')
    done = holder.run("echo", "ran", options=options)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"ran\n", b"")


@pytest.mark.parametrize("place", ["missing", "empty", "a-file"])
def test_hold_of_missing_cache_runs_the_command(holder: Holder, place: str) -> None:
    (holder.place / "empty").mkdir()
    (holder.place / "a-file").touch()
    before = sorted(holder.place.iterdir())
    done = holder.run("sh", "-c", "exit 5", options=("--cache", str(holder.place / place)))
    assert (done.returncode, done.stdout) == (5, b"")
    assert done.stderr.decode() == f"there is no cache at {holder.place / place} yet, so there is nothing to hold\n"
    assert sorted(holder.place.iterdir()) == before


@pytest.mark.parametrize("named", [True, False])
def test_hold_impossible_is_warning_and_runs_the_command(holder: Holder, named: bool) -> None:
    options = holder.manifest('volume = "some-volume"') if named else ("--cache", "volume:some-volume")
    done = holder.run("sh", "-c", "exit 5", options=options)
    assert (done.returncode, done.stdout) == (5, b"")
    assert done.stderr.startswith(b"warning: the cache is not held: ")
    assert (b"cannot reach a container engine" in done.stderr) == named
    assert done.stderr.endswith(b" The command runs without it.\n")


def test_hold_of_root_without_lock_file_is_warning(holder: Holder) -> None:
    layout.hold_lock(holder.root).unlink()
    done = holder.run("true")
    assert done.returncode == 0
    assert b"hold.lock cannot be opened (No such file or directory)" in done.stderr


def test_hold_with_wrong_manifest_is_usage_error(holder: Holder) -> None:
    done = holder.run("touch", "ran", options=("--manifest", "missing.toml"))
    assert done.returncode == 2
    assert not (holder.place / "ran").exists()
