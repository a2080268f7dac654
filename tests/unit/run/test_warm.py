"""The story of a run, over an executor that compiles nothing: its tasks publish a marker, or whatever a test needs."""

from __future__ import annotations

import contextlib
import io
import json
import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builder import events
from builder.cache import environment, marker_writing
from builder.cache.families import FAMILIES
from builder.cache.marker_format import Observed, Proof
from builder.cache.toolchain import Record
from builder.errors import BudgetError, EngineLostError, Interrupted, PreflightError, TasksError
from builder.host.cancel import Cancel
from builder.host.deadlines import Deadline
from builder.job import PrebuildRequest
from builder.manifest.load import without_tasks
from builder.manifest.sections import GpusSpec, RunSpec
from builder.report.console import Console
from builder.report.results import Report, TaskResult
from builder.run.context import Context, Options
from builder.run.executor import Allocation, Ended, Execution, Executor, Watcher
from builder.run.plan import Item, Plan, make_plan
from builder.run.schedule import Capacity
from builder.run.warm import warm
from builder.task import Task

RUN = "0123456789ab"
WARMED = events.Verdict(state="warmed", proof="nothing-claimed", added={"triton": 3}, added_bytes={"triton": 99})


def task(label: str, **more: Any) -> Task:
    return Task(label=label, model=f"org/{label}", recipe="command", argv=(label,), families=(), **more)


def record() -> Record:
    names = {factor for family in FAMILIES for factor in family.factors}
    return {
        "schema": 2,
        "factors": {**{name: f"{name} 1" for name in names}, "mount": "/jit"},
        "gpus": [],
        "sglang": {"version": "0.5.23", "commit": "abc", "sources": None},
        "variables": {},
        "observed": {"driver": None, "python": "3.12.3", "problems": []},
    }


def publish(
    root: Path, task: Task, *, run: str = RUN, seconds: float | None = None, proof: Proof = "nothing-claimed"
) -> None:
    """Write a marker of the task, as the agent does at its end."""
    marker = marker_writing.build(
        task,
        record=record(),
        config_digest=None,
        shapes=[],
        claims=[],
        entries={},
        proof=proof,
        second_pass_added=None,
        observed=Observed(run=run, seconds=seconds),
    )
    marker_writing.publish(root, marker)


class FakeExecutor:
    """An executor over a root on disk. do: what a task's program does; by default it publishes its marker."""

    def __init__(self, root: Path, *tasks: Task, budget: float | None = None, gpus: int = 8, force: bool = False):
        self.root, self.steps = root, list[str]()
        self.do: Callable[[Task], Execution] = self.warmed
        self.output = io.StringIO()
        manifest = replace(
            without_tasks(), tasks=tasks, gpus=GpusSpec(count=gpus), run=RunSpec(budget=budget, parallel=2)
        )
        self.context = Context(
            manifest=manifest,
            options=Options(log_dir=root / "logs", state_dir=root, environ={}, force=force),
            console=Console(self.output, terminal=False),
            report=Report("warm"),
            cancel=Cancel(),
            budget=Deadline(budget),
            run_id=RUN,
        )

    def warmed(self, task: Task) -> Execution:
        publish(self.root, task)
        return ended(WARMED)

    def result(self, label: str) -> TaskResult:
        return self.context.report.of(label)

    # --- Executor ----------------------------------------------------------------------------------------------------

    root_name = "a root"

    def direct_root(self) -> Path | None:
        return self.root

    def missing_root(self) -> str:
        return ""

    def records(self, tasks: Sequence[Task]) -> dict[Any, Record]:
        return {(): record()}

    def unknown(self, tasks: Sequence[Task]) -> Sequence[Task]:
        return ()

    def plan(self, tasks: Sequence[Task]) -> Plan:
        return make_plan(tasks, self.records(tasks), root=self.root, store=None, run=RUN)

    @contextlib.contextmanager
    def snapshot(self, tasks: Sequence[Task]) -> Iterator[tuple[Path, Plan]]:
        yield self.root, self.plan(tasks)

    def described(self) -> list[Any]:
        return []

    def sweep(self) -> None:
        self.steps.append("sweep")

    def sweep_pending(self) -> None:
        self.steps.append("sweep pending")

    def prepare(self) -> None:
        self.steps.append("prepare")

    @contextlib.contextmanager
    def run_lock(self) -> Iterator[None]:
        self.steps.append("lock")
        yield
        self.steps.append("unlock")

    shares_machine = True

    def gpus_in_use(self) -> str:
        return ""

    def run_prebuild(self, mode: str, env: Any, request: PrebuildRequest, seconds: float, on_event: Any) -> str:
        raise AssertionError("no task here asks for a prebuild")

    @contextlib.contextmanager
    def reserve_gpus(self, items: Sequence[Item]) -> Iterator[FakeExecutor]:
        self.steps.append(f"reserve for {len(items)}")
        yield self

    def free_after(self, label: str, devices: tuple[int, ...] | None = None) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def capacity(self) -> Capacity:
        return Capacity(tuple(range(self.context.manifest.gpus.count)), self.context.manifest.run.parallel)

    def heading(self) -> str:
        return "in a test"

    def start(self) -> None:
        self.steps.append("start")

    def execute(self, item: Item, allocation: Allocation, watcher: Watcher) -> Execution:
        self.steps.append(f"{item.task.label} on {allocation.visible_gpus}")
        return self.do(item.task)


def ended(verdict: events.Verdict | None = None, how: Ended = "exited", **more: Any) -> Execution:
    values: dict[str, Any] = {"succeeded": True, "how": "the program ended", "oom": False, "tail": ()}
    return Execution(ended=how, verdict=verdict, seconds=1.0, log=None, **{**values, **more})


def run(executor: Executor) -> None:
    warm(executor)


def test_cold_tasks_are_warmed_in_order_of_steps(tmp_path: Path) -> None:
    executor = FakeExecutor(tmp_path, task("one"))
    run(executor)
    steps = ["sweep", "prepare", "lock", "reserve for 1", "start", "one on None", "unlock"]
    assert executor.steps == steps
    result = executor.result("one")
    assert (result.state, result.added, result.added_bytes) == ("warmed", {"triton": 3}, {"triton": 99})
    assert "one: warmed in" in executor.output.getvalue()


def test_warm_tasks_start_nothing(tmp_path: Path) -> None:
    publish(tmp_path, task("one"))
    executor = FakeExecutor(tmp_path, task("one"))
    run(executor)
    assert executor.steps == ["sweep pending"]


def test_forced_warm_task_runs_again(tmp_path: Path) -> None:
    publish(tmp_path, task("one"), run="another")
    executor = FakeExecutor(tmp_path, task("one"), force=True)
    run(executor)
    assert executor.result("one").state == "warmed"


def test_forced_task_on_simulated_gpu_is_warmed_although_a_real_gpu_has_a_marker(tmp_path: Path) -> None:
    publish(tmp_path, task("one"), run="another")
    executor = FakeExecutor(tmp_path, task("one"), force=True)

    def do(task: Task) -> Execution:
        publish(tmp_path, task, proof="pretended")
        return ended(replace(WARMED, proof="pretended"))

    executor.do = do
    run(executor)
    assert (executor.result("one").state, executor.result("one").proof) == ("warmed", "pretended")


def test_tasks_that_fit_run_at_the_same_time_on_other_gpus(tmp_path: Path) -> None:
    executor = FakeExecutor(tmp_path, task("one", gpus=4), task("two", gpus=4))
    together = threading.Barrier(2, timeout=10)

    def do(task: Task) -> Execution:
        together.wait()
        return executor.warmed(task)

    executor.do = do
    run(executor)
    assert {"one on (0, 1, 2, 3)", "two on (4, 5, 6, 7)"} <= set(executor.steps)


def test_task_longer_than_the_budget_does_not_start(tmp_path: Path) -> None:
    publish(tmp_path, task("long"), run="another", seconds=500.0)
    executor = FakeExecutor(tmp_path, task("long"), budget=60.0, force=True)
    run(executor)  # it was warm, and still is
    assert executor.result("long").reason == "budget: needs about 8 min, the whole budget is 60 s: raise it"
    assert not [step for step in executor.steps if " on " in step]


def test_titles_count_the_tasks_that_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path, task("long"), run="another", seconds=500.0)
    tasks = task("long"), task("short"), replace(task("short"), label="twin")
    executor = FakeExecutor(tmp_path, *tasks, budget=60.0, force=True)
    publish(tmp_path, task("short"), run="another", seconds=1.0)
    titles: list[str] = []
    execute = executor.execute

    def keep_title(item: Item, where: Allocation, watcher: Watcher) -> Execution:
        titles.append(where.title)
        return execute(item, where, watcher)

    monkeypatch.setattr(executor, "execute", keep_title)
    run(executor)
    assert [title.split()[0] for title in titles] == ["[1/1]"]


def test_proof_of_a_warmed_task_is_that_of_its_marker(tmp_path: Path) -> None:
    executor = FakeExecutor(tmp_path, task("one"))

    def do(task: Task) -> Execution:
        publish(tmp_path, task, proof="pretended")
        return ended(replace(WARMED, proof="verified"))

    executor.do = do
    run(executor)
    result = executor.result("one")
    assert (result.state, result.proof, result.verified, bool(result.reservation)) == (
        "warmed", "pretended", False, True
    )  # fmt: skip


def test_task_without_a_turn_is_cold_for_the_budget(tmp_path: Path) -> None:
    executor = FakeExecutor(tmp_path, task("one"), task("two"), budget=0.0)
    with pytest.raises(BudgetError, match="the budget ended with 2 of 2 tasks still cold"):
        run(executor)
    assert executor.result("two").reason == "budget: it ended before this task had its turn"
    assert executor.result("two").short_of_budget


def test_budget_that_ends_a_task_is_a_budget_error(tmp_path: Path) -> None:
    executor = FakeExecutor(tmp_path, task("one"), budget=3600.0)
    executor.do = lambda _: ended(how="budget")
    with pytest.raises(BudgetError, match="is used as far as it goes, with 1 of 1 task still cold"):
        run(executor)


def test_duplicate_task_gets_the_result_of_the_first(tmp_path: Path) -> None:
    twin = replace(task("one"), label="twin")
    executor = FakeExecutor(tmp_path, task("one"), twin)
    run(executor)
    assert [step for step in executor.steps if " on " in step] == ["one on None"]
    assert executor.result("twin").reason.startswith("the same work as one")


@pytest.mark.parametrize(
    ("execution", "state", "reason"),
    [
        (ended(), "failed", "the program ended and gave no verdict"),
        (ended(how="timeout"), "failed", "timeout: not finished after 1200 s"),
        (ended(how="start"), "failed", "start: no output within 120 s of the container's start"),
        (ended(how="cancelled"), "cold", "interrupted"),
        (ended(events.Verdict(state="partial", reason="two of three")), "partial", "two of three"),
        (ended(events.Verdict(state="stopped", reason="stopped")), "failed", "stopped"),
        (
            ended(events.Verdict(state="failed", reason="killed"), oom=True),
            "failed",
            "out of memory inside the container; killed",
        ),
        (ended(WARMED, succeeded=False), "failed", "its verdict is warmed, but the program ended"),
        (ended(WARMED), "failed", "its marker does not hold: no-marker"),
    ],
)
def test_program_that_warms_nothing_is_judged_by_its_end(
    tmp_path: Path, execution: Execution, state: str, reason: str
) -> None:
    executor = FakeExecutor(tmp_path, task("one"))
    executor.do = lambda _: execution
    with pytest.raises(TasksError):
        run(executor)
    assert (executor.result("one").state, executor.result("one").reason) == (state, reason)


def test_marker_of_another_run_makes_nothing_warmed(tmp_path: Path) -> None:
    executor = FakeExecutor(tmp_path, task("one"))

    def do(task: Task) -> Execution:
        publish(tmp_path, task, run="another")
        return ended(WARMED)

    executor.do = do
    with pytest.raises(TasksError):
        run(executor)
    assert executor.result("one").reason == "its verdict is warmed, but the marker is an older one"


def test_failed_task_shows_the_end_of_its_log_below_its_group(tmp_path: Path) -> None:
    executor = FakeExecutor(tmp_path, task("one"))
    executor.context.console.github = True
    executor.do = lambda _: ended(events.Verdict(reason="exit status 3"), tail=("first", "second"))
    with pytest.raises(TasksError, match="1 failed of 1 task"):
        run(executor)
    assert "exit status 3\nthe last 2 lines of its log:\n  │ first\n  │ second\n" in executor.output.getvalue()


def test_task_whose_marker_is_removed_by_a_later_one_is_failed(tmp_path: Path) -> None:
    executor = FakeExecutor(tmp_path, task("one", gpus=8), task("two", gpus=8))

    def do(task: Task) -> Execution:
        for path in tmp_path.glob("markers/*/*.json"):
            path.unlink()
        return executor.warmed(task)

    executor.do = do
    with pytest.raises(TasksError):
        run(executor)
    states = sorted(task.state for task in executor.context.report.tasks)
    assert states == ["failed", "warmed"]
    (failed,) = [task for task in executor.context.report.tasks if task.state == "failed"]
    assert failed.reason == "no longer warm at the end of the run: no-marker"


@pytest.mark.parametrize(
    ("execution", "error"),
    [(ended(how="lost"), EngineLostError), (ended(events.Verdict(reason="full", unusable=True)), PreflightError)],
)
def test_fatal_end_starts_no_more_tasks(tmp_path: Path, execution: Execution, error: type[Exception]) -> None:
    executor = FakeExecutor(tmp_path, task("one", gpus=8), task("two", gpus=8))
    executor.do = lambda _: execution
    with pytest.raises(error):
        run(executor)
    assert len([step for step in executor.steps if " on " in step]) == 1
    assert sorted(task.state for task in executor.context.report.tasks) == ["cold", "failed"]


def test_signal_ends_the_run_after_its_tasks(tmp_path: Path) -> None:
    executor = FakeExecutor(tmp_path, task("one", gpus=8), task("two", gpus=8))

    def do(task: Task) -> Execution:
        executor.context.cancel.set(signal.SIGTERM)
        return ended(how="cancelled")

    executor.do = do
    with pytest.raises(Interrupted):
        run(executor)
    assert executor.context.report.count("cold") == 2


def test_expected_time_of_the_run_is_reported(tmp_path: Path) -> None:
    known = task("known", gpus=8)
    publish(tmp_path, known, run="another", seconds=120.0)
    executor = FakeExecutor(tmp_path, known, task("new", gpus=8, timeout=300.0), force=True)
    run(executor)
    expected = json.loads(executor.context.report.document(0, None))["expected"]
    assert math.isclose(expected["seconds"], 240.0) and expected["never_timed"] == ["new"]
    said = executor.output.getvalue()
    assert "2 tasks: 1 warm, 2 to do · at most 4 min (1 never timed)" in said
    rows_of_explain = environment.compare([], executor.plan([known]).items[0].record)
    assert f" of {len(rows_of_explain)} families, logs in" in said
