"""Signals, and worse, while a container runs: everything is over in seconds, and nothing of it stays."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from builder.engine.errors import NotFoundError
from builder.host.deadlines import Deadline, poll
from tests.engine.cli import Cli, command, server, shapes, wait_for
from tests.engine.faults import Aftermath, numbers

pytestmark = [pytest.mark.engine, pytest.mark.alone]  # seconds count

#: A cancelled CI step has 7.5 s.
SECONDS = 5.0


@pytest.fixture
def stubborn(cli: Cli) -> Cli:
    """A task whose server never ends and refuses SIGTERM, under the default grace of 8 s."""
    cli.manifest(server(cli.model("org/m"), "serve", "refuses-sigterm"), shapes("never"), run={"grace": None})
    return cli


@pytest.mark.fault(
    "signal to the builder",
    how="SIGINT, SIGTERM and SIGHUP, with a server inside that refuses SIGTERM",
    holds="130, 143 and 129, within 5 s; the JSON document is written",
)
@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=lambda value: value
)
def test_signal_ends_run_in_time(stubborn: Cli, aftermath: Aftermath, signum: int, status: int) -> None:
    builder = stubborn.start("warm", "--json")
    builder.says("SIGTERM is refused")
    aftermath.begins()
    builder.send(signal.SIGTSTP)  # refused: a reader that is stopped blocks its container
    sent = time.monotonic()
    builder.send(signum)
    ended = builder.end(SECONDS)
    assert time.monotonic() - sent < SECONDS
    stubborn.left_nothing()
    aftermath.clean()
    assert ended.status == status
    assert ended.document["error"]["message"] == f"interrupted by {signal.Signals(signum).name}"
    assert (ended.task("m-tp8")["state"], ended.task("m-tp8")["reason"]) == ("cold", "interrupted")
    assert ended.task("never")["seconds"] is None
    assert ended.document["warnings"] == []
    assert "SIGTERM is refused" in stubborn.last_lines("m-tp8")
    assert not stubborn.markers()


def test_second_signal_skips_grace(stubborn: Cli) -> None:
    builder = stubborn.start("warm", "--json")
    builder.says("SIGTERM is refused")
    sent = time.monotonic()
    builder.send(signal.SIGINT)
    builder.send(signal.SIGTERM)
    ended = builder.end(SECONDS)
    assert time.monotonic() - sent < 2.5
    stubborn.left_nothing()
    assert ended.status == 130
    assert "SIGTERM is refused" in stubborn.last_lines("m-tp8")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=lambda value: value.name)
def test_many_signals_still_print_json_document(stubborn: Cli, signum: signal.Signals) -> None:
    builder = stubborn.start("warm", "--json")
    builder.says("SIGTERM is refused")
    limit = Deadline(SECONDS)

    def hit() -> bool:
        if builder.process.poll() is None:
            builder.send(signum)
        return builder.process.poll() is not None

    assert poll(hit, limit, every=0.005)
    stubborn.left_nothing()
    # The last moments of a process are nobody's: a signal that comes then ends it in its own way.
    assert builder.end().status in (128 + signum, -signum)
    assert json.loads(builder.out)["exit"] == 128 + signum


@pytest.mark.fault(
    "signal to the builder while nobody reads what it says (`| less`)",
    how="a full pipe that is not read, two tasks side by side that print without end; SIGTERM",
    holds="143, within 5 s; the logs are whole",
)
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_signal_with_unread_output_ends_run_in_time(cli: Cli, aftermath: Aftermath, stream: str) -> None:
    code = "n = 0\nwhile True:\n    print('line', n)\n    n += 1\n"
    cli.manifest(command("one", code), command("two", code), run={"parallel": 2})
    reader, writer = os.pipe()
    builder = cli.start("warm", stdout=writer) if stream == "stdout" else cli.start("warm", "--json", stderr=writer)
    os.close(writer)
    # More than a pipe takes.
    logs = [cli.logs / f"{label}.log" for label in ("one", "two")]
    wait_for(lambda: any(log.exists() and log.stat().st_size > 500_000 for log in logs), 30, "a long log")
    aftermath.begins()
    builder.send(signal.SIGTERM)
    ended = builder.end(SECONDS)
    cli.left_nothing()
    aftermath.clean()
    os.close(reader)
    assert ended.status == 143
    assert stream == "stdout" or ended.document
    for log in filter(Path.exists, logs):  # the other one may have waited for its turn to speak
        found = numbers(log.read_text())
        assert found == list(range(len(found)))


@pytest.mark.parametrize("moment", ["created ", "1 task: ", "▸ shapes", "Required memory", "▸ second pass"])
def test_signal_at_any_moment_ends_clean(cli: Cli, moment: str) -> None:
    cli.manifest(shapes(env={"TINY_COMPILE_SECONDS": "0.1"}))
    builder = cli.start("warm", "--json")
    builder.says(moment)
    builder.send(signal.SIGINT)
    ended = builder.end(SECONDS)
    cli.left_nothing()
    assert ended.document["exit"] == 130
    # Once a task runs, the signal is answered before its container has ended.
    assert "stopping 1 task (a second signal: at once)" in ended.err or moment in ("created ", "1 task: ")
    assert not cli.markers()


def test_signal_during_image_build_ends_run_in_time(cli: Cli) -> None:
    cli.manifest(shapes(), image={"setup": ["echo it is being built; sleep 60"]})
    builder = cli.start("warm", "-v")
    builder.says("it is being built")
    builder.send(signal.SIGINT)
    assert builder.end(SECONDS).status == 130
    cli.left_nothing()


@pytest.mark.fault(
    "builder killed",
    how="SIGKILL, with a server inside that refuses SIGTERM",
    holds="its container ends by the lease within 5 s (aim: 2 s), and the next builder removes it",
)
def test_builder_killed_container_ends_and_next_run_sweeps(stubborn: Cli, aftermath: Aftermath) -> None:
    builder = stubborn.start("warm")
    builder.says("SIGTERM is refused")
    with stubborn.engine() as engine:
        (container,) = stubborn.containers(engine)
        aftermath.begins()
        builder.send(signal.SIGKILL)
        assert builder.end(SECONDS).status == -signal.SIGKILL
        assert stubborn.lock_is_free()
        wait_for(lambda: engine.state(container).finished, SECONDS, "the end of the container")
        aftermath.clean()
        assert engine.state(container).exit_code == 70
    assert not stubborn.markers()

    stubborn.manifest(shapes())
    ended = stubborn.run("warm", "--json")
    assert ended.status == 0
    # Any builder on this engine removes it. Where that was this one it says so.
    with stubborn.engine() as engine, pytest.raises(NotFoundError):
        engine.state(container)
    assert ("removed warm-cache-" in ended.err) == ("its builder is gone" in ended.err)
    for log in stubborn.logs.glob("swept-*.log"):
        assert f"the end of its log is in {log}" in ended.err
        assert "SIGTERM is refused" in log.read_text()


def test_builder_killed_while_waiting_for_lock_leaves_nothing(cli: Cli) -> None:
    cli.manifest(command("one", "import time; print('at it', flush=True); time.sleep(3600)"))
    first = cli.start("warm")
    first.says("at it")
    second = cli.start("warm")
    second.says("waiting for pid ")
    second.send(signal.SIGKILL)
    second.end(SECONDS)
    assert not cli.lock_is_free()
    first.send(signal.SIGTERM)
    assert first.end(SECONDS).status == 143
    assert cli.lock_is_free()
    with cli.engine() as engine:
        assert cli.containers(engine) == []
