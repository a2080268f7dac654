"""What counts as free again: looks at a machine that a test makes up, before and after a task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from builder.errors import GpusHeldError
from builder.host.cancel import Cancel
from builder.host.gpus import GpuProcess, GpuSnapshot, GpuUsage
from builder.manifest.load import GpusSpec
from builder.report.results import GpuResult, Report
from builder.run.gpu_reservation import TOLERANCE, GpuReservation

OURS, THEIRS = "0" * 64, "f" * 64
GB = 10**9

IDLE = GpuUsage(0, "GPU-0", "NVIDIA H200", 4 << 20, 150 * GB, ())
SERVER = GpuProcess(77, 70 * GB, "sglang::scheduler_TP0", 5.0, OURS)
STRANGER = GpuProcess(88, 9 * GB, "python3", 6.0, THEIRS)


class FakeExecutor:
    """The GPUs and the context of an executor. `gpu_snapshot` returns these in turn, and the last one from then on."""

    def __init__(self, looks: Sequence[GpuSnapshot], *, allow_busy: bool = False, timeout: float = 0.0) -> None:
        self._looks = list(looks)
        self.said: list[str] = []
        self.ran: dict[str, str] = {}
        self.context = SimpleNamespace(
            cancel=Cancel(),
            manifest=SimpleNamespace(gpus=GpusSpec(release_timeout=timeout)),
            options=SimpleNamespace(allow_busy=allow_busy),
            console=SimpleNamespace(say=self.said.append),
            report=Report("warm", gpus=[GpuResult(0, "GPU-0", "", None, None, [])]),
        )

    def gpu_snapshot(self) -> GpuSnapshot:
        return self._looks.pop(0) if len(self._looks) > 1 else self._looks[0]

    def container_names(self) -> dict[str, str]:
        return {**self.ran, THEIRS: "ci-h200-2"}


def task(*after: GpuUsage | GpuSnapshot, before: GpuUsage = IDLE, ran: bool = True, **more: Any) -> FakeExecutor:
    """One task, with these looks after it."""
    looks = [
        GpuSnapshot((before,)),
        *(look if isinstance(look, GpuSnapshot) else GpuSnapshot((look,)) for look in after),
    ]
    executor = FakeExecutor(looks, **more)
    with GpuReservation(executor).free_after("model-tp8"):  # type: ignore[arg-type]
        if ran:
            executor.ran[OURS] = "warm-cache-1-run-model-tp8"
    return executor


def holding(*processes: GpuProcess, used: int | None = None) -> GpuUsage:
    return replace(IDLE, processes=processes, used=used or sum(process.memory or 0 for process in processes))


def test_idle_gpu_is_free_at_once() -> None:
    assert task(IDLE).said == ["GPUs free again after 0.0 s"]


def test_busy_gpu_is_free_after_a_while() -> None:
    executor = task(holding(SERVER), holding(SERVER), IDLE, timeout=20)
    assert executor.said[-1].startswith("GPUs free again after 0.")
    assert executor.context.report.gpus[0].free_again_seconds > 0


def test_process_that_stays_is_named_with_its_removed_container() -> None:
    with pytest.raises(GpusHeldError) as error:
        task(holding(SERVER))
    wanted = "GPU 0 is held by pid 77 (sglang::scheduler_TP0, container warm-cache-1-run-model-tp8), with 70.0 GB more"
    assert wanted in error.value.message and "after model-tp8" in error.value.message


@pytest.mark.parametrize(("extra", "free"), [(TOLERANCE, True), (TOLERANCE + 1, False)])
def test_memory_within_the_tolerance_is_free(extra: int, free: bool) -> None:
    after = replace(IDLE, used=(IDLE.used or 0) + extra)
    if free:
        task(after)
        return
    with pytest.raises(GpusHeldError, match="by no process that can be seen from here"):
        task(after)


def test_unknown_processes_leave_memory_to_decide() -> None:
    hidden = replace(IDLE, processes=None)
    task(hidden, before=hidden)
    with pytest.raises(GpusHeldError):
        task(replace(hidden, used=70 * GB), before=hidden)


def test_unknown_memory_leaves_processes_to_decide() -> None:
    blind = replace(IDLE, used=None)
    task(blind, before=blind)
    with pytest.raises(GpusHeldError, match="pid 77"):
        task(replace(blind, processes=(SERVER,)), before=blind)


def test_process_from_before_the_task_is_ignored() -> None:
    task(holding(STRANGER), before=holding(STRANGER), allow_busy=True)


def test_reused_pid_is_another_process() -> None:
    with pytest.raises(GpusHeldError, match="pid 88"):
        task(holding(replace(STRANGER, started=9.0)), before=holding(STRANGER))


def test_new_foreign_process_is_an_error_unless_busy_is_allowed() -> None:
    with pytest.raises(GpusHeldError, match="container ci-h200-2"):
        task(holding(STRANGER))
    task(holding(STRANGER), allow_busy=True)


@pytest.mark.parametrize("ending", [SERVER, GpuProcess(77, 70 * GB)], ids=["it lives", "it is ending"])
def test_own_process_that_stays_is_an_error_even_if_busy_is_allowed(ending: GpuProcess) -> None:
    with pytest.raises(GpusHeldError, match="pid 77"):
        task(holding(ending, STRANGER), before=holding(STRANGER), allow_busy=True)


def test_driver_without_answer_is_not_free() -> None:
    with pytest.raises(GpusHeldError, match=r"GPU 0 does not answer \(NVML gave no answer for 20 s\)"):
        task(GpuSnapshot(absent="NVML gave no answer for 20 s"))


def test_task_without_a_container_waits_for_nothing() -> None:
    assert task(holding(STRANGER), ran=False).said == []


def test_absent_driver_is_reported_once() -> None:
    absent = GpuSnapshot(absent="there is no NVML here (libnvidia-ml.so.1)")
    executor = FakeExecutor([absent])
    reservation = GpuReservation(executor)  # type: ignore[arg-type]
    for container in (OURS, THEIRS):
        with reservation.free_after("x"):
            executor.ran[container] = "x"
    assert len(executor.said) == 1 and "is not checked" in executor.said[0]
    assert json.loads(executor.context.report.document(0, None))["gpus_reason"] == absent.absent


def test_concurrent_task_waits_for_its_own_gpus_alone() -> None:
    """Its neighbour has just begun, on the other GPU."""
    mine, other = replace(IDLE, index=4, uuid="GPU-4"), IDLE
    looks = [
        GpuSnapshot((other, mine)),
        GpuSnapshot((holding(STRANGER), holding_on(mine, SERVER))),
        GpuSnapshot((holding(STRANGER), mine)),
    ]
    executor = FakeExecutor(looks, timeout=20)
    with GpuReservation(executor).free_after("half", (4,)):  # type: ignore[arg-type]
        executor.ran[OURS] = "warm-cache-1-run-half"
    assert executor.said[-1].startswith("half: GPUs free again after 0.")
    with GpuReservation(executor).free_after("none", ()):  # type: ignore[arg-type]
        executor.ran[THEIRS] = "x"
    assert len(executor.said) == 1, "a task without GPUs has none to give back"


def holding_on(gpu: GpuUsage, *processes: GpuProcess) -> GpuUsage:
    return replace(gpu, processes=processes, used=sum(process.memory or 0 for process in processes))
