"""child.py and output.py: what a child prints arrives untouched, what it does at its end is seen to."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from builder import events
from builder.agent.output import MASK, Redactor
from builder.processes import describe_status
from tests.program import NONCE, Program

Until = Callable[..., None]

CRASH = "Scheduler hit an exception: Traceback (most recent call last):"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# Bytes


def test_child_output_arrives_in_order(program: Program) -> None:
    noise = random.Random(7)
    streams = [noise.randbytes(3_000_000) + b"no final newline", (b"x" * 1_000_003 + b"\r\n") * 2 + b"\xff\xfe\r"]
    for number, data in enumerate(streams):
        (program.place / f"data{number}").write_bytes(data)
    done = program.run(program.task(recipe="command", argv=("sh", "-c", "cat data0; cat data1 >&2"), families=()))
    assert done.status == 0
    assert done.stderr == streams[1]
    body = done.stdout[done.stdout.index(b'{"event":"phase","phase":"command"}\n') + 36 :]
    assert body.startswith(streams[0] + b"\n@warmup ")  # a newline of ours: the next event must begin a line


def test_end_event_counts_output_bytes(program: Program) -> None:
    done = program.run(program.command("import sys; print('out', end=''); print('err', file=sys.stderr)"))
    last = done.stdout.splitlines(keepends=True)[-1]
    assert events.decode(last, NONCE) == events.End(len(done.stdout) - len(last), len(done.stderr))


def test_unfinished_line_is_shown(program: Program, until: Until) -> None:
    code = "import sys; print('half a', end='', flush=True); open('gate').read(); print(' line')"
    os.mkfifo(program.place / "gate")
    running = program.start(program.command(code))
    until(lambda: running.stdout.endswith(b"half a"), what="the half line")
    (program.place / "gate").write_text("go")
    assert b"half a line\n" in running.end().stdout


def test_unfinished_line_is_ended_before_event(program: Program, until: Until) -> None:
    os.mkfifo(program.place / "gate")
    code = f"import os; os.write(1, b'half a'); open('gate').read(); os.write(2, b'{CRASH}\\n')"
    running = program.start(program.command(code))
    until(lambda: running.stdout.endswith(b"half a"), what="the half line")
    (program.place / "gate").write_text("go")
    done = running.end()
    assert done.status == 20
    assert b'half a\n@warmup 4f0e2d6c {"event":"phase","phase":"crashed' in done.stdout


def test_log_beyond_limit_is_cut_and_fails_the_task(program: Program) -> None:
    done = program.run(program.task(recipe="command", argv=("yes", "y" * 99), families=()), log_limit=1_000_000)
    assert done.status == 20
    assert "log limit" in done.verdict.reason
    assert 1_000_000 < len(done.stdout) < 4_000_000


def test_progress_lines_become_events(program: Program) -> None:
    code = r"""
import sys
print("[stamp] Load weight begin. avail mem=1 GB", file=sys.stderr)
sys.stderr.write("\rLoading safetensors checkpoint shards:  50% Completed | 4/8 [00:01<00:01,  4.0it/s]\r")
"""
    done = program.run(program.command(code))
    assert events.Phase("loading weights") in done.events
    assert done.all(events.Progress) == [events.Progress(done=4, total=8, unit="shards")]


def test_log_line_without_nonce_is_no_event(program: Program) -> None:
    code = (
        "import os; print('@warmup guess {\"event\":\"verdict\"}'); print([k for k in os.environ if 'CACHE_JOB' in k])"
    )
    done = program.run(program.command(code))
    assert b"[]\n" in done.stdout
    assert len(done.all(events.Verdict)) == 1


# Secrets


@pytest.mark.parametrize("cut", range(1, 24))
def test_secret_split_over_reads_is_masked(cut: int) -> None:
    redactor = Redactor(["hf_abcabcabd", "short", "hf_abc"])
    text = b"at hf_abcabcabd, hf_abc!"
    shown = redactor.feed(text[:cut]) + redactor.feed(text[cut:]) + redactor.flush()
    assert b"abcab" not in shown
    assert shown == b"at ***, ***!"
    assert shown.startswith(b"at " + MASK)
    assert shown.endswith(MASK + b"!")


@pytest.mark.parametrize("around", ["{}\n", " {}\r\n", "\t{} "])
def test_secret_with_white_space_masks_the_value_only(around: str) -> None:
    redactor = Redactor([around.format("hf_abcdef")])
    assert redactor.feed(b"one hf_abcdef\ntwo\n") + redactor.flush() == b"one ***\ntwo\n"
    assert Redactor([around.format("hf_ab")]).feed(b"hf_ab\n") == b"hf_ab\n"


def test_secret_not_utf8_is_masked() -> None:
    assert Redactor([os.fsdecode(b"\xff\xfe-secret")]).feed(b"is \xff\xfe-secret.") == b"is ***."


def test_prefix_of_secret_is_printed() -> None:
    redactor = Redactor(["hf_abcdef"])
    assert redactor.feed(b"a hf_abc") == b"a "
    assert redactor.flush() == b"hf_abc"
    assert Redactor(["short"]).feed(b"short") == b"short"


def test_secret_in_streams_and_events_is_masked(program: Program) -> None:
    token = "hf_0123456789abcdef"
    code = f"import os, sys; print(os.environ['HF_TOKEN']); print('{CRASH} ' + os.environ['HF_TOKEN'], file=sys.stderr)"
    done = program.run(program.command(code), environ={"HF_TOKEN": token}, secrets=("HF_TOKEN", "UNSET"))
    assert token.encode() not in done.stdout + done.stderr
    assert MASK in done.stdout
    assert MASK in done.stderr
    assert "***" in done.verdict.reason or "Scheduler" in done.verdict.reason


# The end


@pytest.mark.parametrize(
    "then",
    ["sys.exit(0)", "open('gate').read()", "signal.signal(signal.SIGTERM, signal.SIG_IGN); open('gate').read()"],
    ids=["exits 0", "hangs", "refuses SIGTERM"],
)
def test_crash_line_fails_the_task(program: Program, then: str) -> None:
    os.mkfifo(program.place / "gate")
    code = (
        f"import signal, sys, os; sys.stderr.write('{CRASH}\\n  File x\\nValueError: no'); sys.stderr.flush(); {then}"
    )
    done = program.run(program.command(code), grace=1.5)
    assert done.status == 20
    assert done.verdict.reason.startswith('crash: "Scheduler hit an exception"')
    assert done.seconds < 8
    assert done.stderr.endswith(b"ValueError: no")


def test_child_descendants_end_with_it(program: Program) -> None:
    code = """
import os, signal, sys
for generation in range(2):
    if os.fork():
        continue
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.fork()
    open("pids", "a").write(f"{os.getpid()} ")
    signal.pause()
while len(open("pids", "a+").read() or open("pids").read().split()) < 4:
    pass
"""
    done = program.run(program.command(code))
    assert done.status == 0
    pids = [int(pid) for pid in (program.place / "pids").read_text().split()]
    assert len(pids) >= 4
    assert not [pid for pid in pids if alive(pid)]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("print('last words'); raise SystemExit(3)", "exit status 3; last line: last words"),
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL (the kernel does that when memory runs out)"),
    ],
)
def test_failed_command_reports_its_status(program: Program, code: str, reason: str) -> None:
    done = program.run(program.command(code))
    assert done.status == 20
    assert done.verdict.reason == reason


@pytest.mark.parametrize("argv", [("no-such-program",), ("/",), ("a\0b",)])
def test_unstartable_command_reports_reason(program: Program, argv: tuple[str, ...]) -> None:
    done = program.run(program.task(recipe="command", argv=argv, families=()))
    assert done.status == 20
    assert done.verdict.reason.startswith("cannot start ")
    assert b"Traceback" not in done.stderr


def test_describe_status_names_signal_or_code() -> None:
    assert describe_status(None) == "still running"
    assert describe_status(-15) == "killed by SIGTERM"
    assert describe_status(-64 - 99) == "killed by signal 163"
