"""Runs of the real program on the real engine: the ways in which tasks end, and what is left of each."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from builder.cli import invocation
from builder.engine.api import ContainerSpec
from builder.engine.client import Engine
from builder.host.deadlines import Deadline
from builder.job import JOB_VARIABLE
from tests.engine.cli import GATE, READY, Cli, Ended, command, server, shapes, wait_for

pytestmark = pytest.mark.engine

Group = tuple[Cli, Ended]

# --- success ---------------------------------------------------------------------------------------------------------

TRITON = "from triton.cache import compile_kernel; compile_kernel('k', 'x'); print('KERNELS READY')"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, docker_host: str, tiny_image: str) -> Iterator[Group]:
    """One run of every recipe. ``half`` finds its shapes cut short by memory, and finishes them by a sweep."""
    cli = Cli(tmp_path_factory.mktemp("good"), docker_host, tiny_image)
    model = cli.model("org/model")
    cli.manifest(
        server(model),
        server(model, "serve"),
        shapes(),
        command("command", TRITON, families=["triton"]),
        server(cli.model("org/half"), play="reducing", argv=["--tp", "4"]),
    )
    yield cli, cli.warm()
    cli.close()


@pytest.mark.parametrize(
    ("label", "added", "last"),
    [
        ("model-tp8-compile-deep-gemm", 11, "shapes done in"),
        ("model-tp8-serve", 2, "SIGTERM received. signum=15 Draining requests"),
        ("shapes", 0, "shapes done in"),
        ("command", 1, "KERNELS READY"),
        ("half-tp4", 6, "shapes done in"),
    ],
)
def test_every_recipe_warms_and_is_verified(good: Group, label: str, added: int, last: str) -> None:
    cli, ended = good
    task = ended.task(label)
    assert (task["state"], task["verified"], task["proof"]) == ("warmed", True, "verified"), task
    assert task["entries_added"] == added
    assert last in cli.last_lines(label)
    (marker,) = cli.root.glob(f"markers/{label}-{task['key']}/*.json")
    assert json.loads(marker.read_text())["second_pass_added"] == 0


def test_warm_reports_what_it_found(good: Group) -> None:
    cli, ended = good
    document = ended.document
    assert document["image"]["ref"] == cli.image
    assert document["image"]["id"].startswith("sha256:")
    assert document["cache"] == str(cli.root)
    assert len(document["toolchain"]) == 16
    assert document["warnings"] == []
    assert "5 warmed in" in ended.err
    assert "finishing what memory cut short" in ended.err


# --- failure ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory, docker_host: str, tiny_image: str) -> Iterator[dict[str, Group]]:
    """Two builders side by side, whose tasks all end differently, by label."""
    tasks: list[dict[str, Any]] = [
        server("org/exit", play="exit-3"),
        server("org/crash", play="crash-exit-0"),
        server("org/silent", "serve", "silent-hang", silence="6s"),
        server("org/missing"),
        server("org/nothing", play="no-kernels"),
        server("org/dies", play="dies-in-second-pass"),
        shapes("fine"),
        server("org/slow", play="refuses-sigterm", timeout="12s"),
        server("org/stuck", play="crash-hang"),
        server("org/partial", play="reducing-always"),
        server("org/grows", play="grows-in-second-pass"),
    ]
    groups: dict[str, Group] = {}
    clis = [Cli(tmp_path_factory.mktemp(f"bad{half}"), docker_host, tiny_image) for half in (1, 2)]
    running = []
    for cli, half in zip(clis, (tasks[:7], tasks[7:]), strict=True):
        for task in half:
            if task["recipe"] != "shapes" and task["model"] != "org/missing":
                cli.model(task["model"])
        cli.manifest(*half)
        running.append(cli.start("warm", "--json", environ={"GITHUB_ACTIONS": "true"}))
    for cli, builder in zip(clis, running, strict=True):
        ended = builder.end()
        cli.left_nothing()
        groups |= {task["label"].removesuffix("-tp8"): (cli, ended) for task in ended.document["tasks"]}
    yield groups
    for cli in clis:
        cli.close()


CRASH = 'crash: "Scheduler hit an exception" (RuntimeError: a test double plays a crash)'


@pytest.mark.parametrize(
    ("label", "state", "reason", "last"),
    [
        ("exit", "failed", "exit status 3", "Load weight begin"),
        ("crash", "failed", CRASH, "Received sigquit from a child process"),
        ("stuck", "failed", CRASH, "Received sigquit from a child process"),
        ("nothing", "failed", "deep_gemm is required and it holds no valid entry", "SIGQUIT received"),
        ("silent", "failed", "silence: no output for 6 s", "Load weight begin"),
        ("slow", "failed", "timeout: not finished after 12 s", "SIGTERM is refused"),
        ("partial", "partial", "sglang reduced max_m for lack of memory", "shapes done in"),
        ("grows", "failed", "the second pass added", "shapes done in"),
        ("dies", "failed", "second pass: 0 of 3 shapes done", "0 of 3 shapes done"),
    ],
)
def test_failed_task_is_reported_with_reason(
    bad: dict[str, Group], label: str, state: str, reason: str, last: str
) -> None:
    cli, ended = bad[label]
    task = ended.task(f"{label}-tp8")
    assert (task["state"], task["verified"]) == (state, False)
    assert reason in task["reason"]
    assert task["seconds"] < 40
    assert last in cli.last_lines(f"{label}-tp8")
    assert not list(cli.root.glob(f"markers/{label}-*"))


def test_failed_task_leaves_other_tasks_alone(bad: dict[str, Group]) -> None:
    cli, ended = bad["fine"]
    assert ended.status == 11
    assert ended.task("fine")["state"] == "warmed"
    assert len(cli.markers()) == 1
    assert ended.document["error"]["message"] == "5 failed, 1 skipped of 7 tasks"
    assert bad["slow"][1].status == 11
    assert not bad["slow"][0].markers()


def test_missing_model_is_skipped(bad: dict[str, Group]) -> None:
    cli, ended = bad["missing"]
    task = ended.task("missing-tp8")
    assert (task["state"], task["seconds"], task["log"]) == ("skipped", None, None)
    assert "org/missing is not in the store" in task["reason"]
    assert not (cli.logs / "missing-tp8.log").exists()


def test_github_actions_groups_tasks_and_annotates_failures(bad: dict[str, Group]) -> None:
    _, ended = bad["fine"]
    lines = [line for line in ended.err.splitlines() if line.startswith("::")]
    labels = [task["label"] for task in ended.document["tasks"]]
    assert [line for line in lines if line.startswith("::group::")] == [
        f"::group::[{number}/7] {label}" for number, label in enumerate(labels, 1)
    ]
    opened = 0
    for line in lines:
        opened += line.startswith("::group::") - line.startswith("::endgroup::")
        assert opened in (0, 1), "a group in a group"
    assert opened == 0
    errors = [line for line in lines if line.startswith("::error ")]
    assert len(errors) == 1, errors
    assert errors[0].startswith("::error title=exit-tp8 failed::exit status 3")
    assert errors[0].endswith("%0A5 failed, 1 skipped of 7 tasks")


def test_failed_task_shows_log_tail(bad: dict[str, Group]) -> None:
    _, ended = bad["crash"]
    shown = ended.err.split("crash-tp8: failed: ")[1].split("::group::")[0]
    assert "lines of its log:\n" in shown
    assert "Received sigquit from a child process" in shown


def test_dry_run_shows_the_plan_and_runs_nothing(cli: Cli) -> None:
    again = command("again", "print('KERNELS READY')")
    cli.manifest(shapes("first"), command("second", "print('KERNELS READY')"), {**again, "timeout": "2h"})
    assert "there is no cache" in cli.run("warm", "--dry-run").said
    cli.root.mkdir()
    planned = cli.run("warm", "--dry-run", "--json", "--budget", "1h")
    assert planned.status == 0
    rows = {row["task"]: row for row in planned.document["plan"]}
    assert set(rows) == {"first", "second", "again"}
    assert rows["first"]["start"] == 0 and not rows["first"]["timed"]
    assert {task["state"] for task in planned.document["tasks"]} == {"cold"}
    assert cli.markers() == [] and not cli.logs.exists()
    shown = cli.run("warm", "--dry-run", "--only", "first").out
    assert "at most" in shown and "no-marker" in shown and "nothing was started" in shown
    cli.warm("--only", "first")
    rows = {row["task"]: row for row in cli.run("warm", "--dry-run", "--json").document["plan"]}
    assert "first" not in rows
    (row,) = cli.run("warm", "--dry-run", "--json", "--force", "--only", "first").document["plan"]
    assert row["timed"] and row["seconds"] < 60


# --- deadlines of the run --------------------------------------------------------------------------------------------


def test_budget_exhausted_ends_run(cli: Cli) -> None:
    cli.manifest(server(cli.model("org/m"), play="silent-hang"), shapes("never"))
    ended = cli.run("warm", "--json", "--budget", "2s")
    assert ended.status == 14
    assert ended.task("m-tp8")["state"] == "cold"
    assert (ended.task("never")["state"], ended.task("never")["seconds"]) == ("cold", None)
    assert "2 of 2 tasks still cold" in ended.document["error"]["message"]
    assert ended.seconds < 20


def test_task_finished_before_budget_stays_warm(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    cli.manifest(shapes("first"), command("second", "print('at it', flush=True)\n" + GATE))
    log = cli.logs / "second.log"

    def clock() -> float:
        return 10.0 if log.exists() and "at it" in log.read_text() else 0.0

    monkeypatch.setattr(invocation, "Deadline", lambda _: Deadline(5.0, clock=clock))
    status = cli.here("warm", "--json")
    document = json.loads(capfd.readouterr().out)
    assert (status, document["exit"]) == (14, 14)
    assert [task["state"] for task in document["tasks"]] == ["warmed", "cold"]
    cli.left_nothing()
    assert len(cli.markers()) == 1


# --- what containers say ---------------------------------------------------------------------------------------------


def test_log_flood_is_complete_with_flat_memory(cli: Cli) -> None:
    lines = 1_000_000
    cli.manifest(server(cli.model("org/flood"), play="flood"))
    builder = cli.start("warm", "--json")
    builder.says("Load weight begin")
    process = psutil.Process(builder.process.pid)
    before = process.memory_info().rss
    peak = before

    def over() -> bool:
        nonlocal peak
        try:
            peak = max(peak, process.memory_info().rss)
        except psutil.NoSuchProcess:
            return True
        return builder.process.poll() is not None

    wait_for(over, 90, "the end of the flood")
    ended = builder.end()
    cli.left_nothing()
    assert ended.status == 0
    with (cli.logs / "flood-tp8.log").open(encoding="utf-8") as log:
        numbers = [line[11:18] for line in log if line.startswith("out| flood ")]
    assert numbers == [f"{number:07d}" for number in range(lines)]
    assert peak - before < 48 << 20


def test_invalid_utf8_in_log_is_kept(cli: Cli) -> None:
    cli.manifest(server(cli.model("org/binary"), play="binary"))
    ended = cli.warm()
    log = (cli.logs / "binary-tp8.log").read_bytes()
    assert b"out| \xff\xfe not UTF-8 \x00 NUL \xe2\x82\n" in log
    # An event may stand in a line that is long in the making, and then the line goes on behind it.
    assert sum(line.count(b"x") for line in log.split(b"\n") if line.startswith(b"out| xx")) == 1 << 20
    assert b"\xc3(" * 1000 in log
    assert "\0" not in ended.err


def test_secret_appears_nowhere(cli: Cli, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    token = "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZ012345"
    specs: list[ContainerSpec] = []
    create = Engine.create

    def recorded(engine: Engine, spec: ContainerSpec) -> str:
        specs.append(spec)
        return create(engine, spec)

    monkeypatch.setattr(Engine, "create", recorded)
    cli.manifest(server(cli.model("org/leak"), play="leak-secret"))
    assert cli.here("warm", "--json", "-v", environ={"HF_TOKEN": token}) == 0
    cli.left_nothing()
    said = capfd.readouterr()
    assert json.loads(said.out)["tasks"][0]["state"] == "warmed"
    log = cli.log("leak-tp8")
    assert "the token is " in log
    assert "in two writes: " in log
    for part in (token, token[: len(token) // 2], token[len(token) // 2 :]):
        assert part not in log
        assert part not in said.out + said.err
        for path in cli.root.rglob("*"):
            assert not path.is_file() or part.encode() not in path.read_bytes(), path
    assert specs
    for spec in specs:
        env = {name: value for name, value in spec.env.items() if name != "HF_TOKEN"}
        assert token not in json.dumps([dict(spec.labels), spec.name, list(spec.command), env])
    assert json.loads(specs[-1].env[JOB_VARIABLE])["secrets"] == ["HF_TOKEN"]


# --- processes -------------------------------------------------------------------------------------------------------

#: Leaves grandchildren in sessions of their own, deaf to SIGTERM, with the log in their hands; fails if it sees older.
GRANDCHILDREN = """
import os, signal, sys
from pathlib import Path
old = [pid for pid in Path('/proc').glob('[0-9]*') if (pid / 'cmdline').read_bytes().startswith(b'grandchild')]
if old:
    sys.exit(f'still there: {old}')
if os.fork() == 0:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:
        os.setsid()
    os.execv(sys.executable, ['grandchild', '-c', 'import time; time.sleep(3600)'])
from triton.cache import compile_kernel
compile_kernel('k', 'x')
print('KERNELS READY')
"""


def test_grandchildren_end_before_second_pass_and_run(cli: Cli) -> None:
    cli.manifest(command("forks", GRANDCHILDREN, verify="second-pass", families=["triton"]))
    ended = cli.warm()
    assert (ended.task("forks")["state"], ended.task("forks")["proof"]) == ("warmed", "verified")
    assert cli.log("forks").count("KERNELS READY") == 2


# --- two builders ----------------------------------------------------------------------------------------------------


@pytest.mark.alone
def test_second_builder_waits_and_finds_warm(cli: Cli) -> None:
    cli.manifest(command("one", "print('at it', flush=True)\n" + GATE + READY))
    first = cli.start("warm", "--json")
    first.says("at it")
    second = cli.start("warm", "--json", "--lock-timeout", "60s")
    second.says("waiting for ")
    assert f"waiting for pid {first.process.pid} (" in second.err
    assert "builder warm" in second.err
    assert not cli.lock_is_free()
    third = cli.start("warm", "--json", "--lock-timeout", "1s").end()
    assert third.status == 15
    assert f"pid {first.process.pid}" in third.document["error"]["message"]
    assert third.task("one")["state"] == "cold"
    fourth = cli.start("warm", "--json")
    fourth.says("waiting for ")
    fourth.send(signal.SIGINT)
    assert fourth.end(5).status == 130
    (cli.root / "go").touch()
    assert first.end().task("one")["state"] == "warmed"
    waited = second.end()
    assert (waited.status, waited.task("one")["state"]) == (0, "warm")
    assert "Nothing to do." in waited.err
    cli.left_nothing()
