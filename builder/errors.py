"""Every way this program fails on purpose, and the exit status each one means.

::

    BuilderError
    ├── DefectError             1   a defect in this program
    ├── UsageError              2   command line or manifest; lists every problem
    ├── ColdError              10   `check`: something is cold
    ├── TasksError             11   some tasks failed, were partial, timed out or were skipped
    ├── PreflightError         12   this machine cannot run any of it; lists every problem
    ├── RegistryRefusedError   12   a registry refused, or served what is not believed
    ├── GpusHeldError          13   GPUs were not released
    ├── BudgetError            14   the budget ended with tasks still cold
    ├── BusyError              15   cache or GPUs are in use by another builder
    ├── EngineLostError        16   the engine stopped answering
    │   ├── EngineRefusedError 16   the engine answered, and said no
    │   └── EngineTimeoutError 16   the engine got the request and did not answer in time
    ├── RegistryLostError      16   a registry cannot be reached, or stopped answering
    ├── DeferredError          17   `refresh --when-idle`: the machine never became idle
    └── Interrupted            130 / 143   a signal: 128 + its number

A message says what failed, what was seen, and what to do next. What a container last said travels with the
error as a note (``notes``), so that no caller can forget to show it.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

#: Exit statuses in the order in which they count where several apply, after a signal.
FIRST_OF_SEVERAL = (1, 16, 13, 14, 11)

#: The head of every list of preflight problems.
CANNOT_RUN = "this machine can't run it"


class BuilderError(Exception):
    """Base of everything this program raises on purpose."""

    exit_code = 1

    def __init__(self, message: str, *, notes: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.notes = tuple(notes)


class DefectError(BuilderError):
    """Something that cannot happen did: a defect here, not in what was asked. For what nobody expected: `cli.main`."""

    exit_code = 1


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong and what to do about it.

    location: where it is (``manifest.toml:12``, ``disk``, ``GPUs``); text: what was found; remedy: what would be right.
    """

    location: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.location}: {self.text}" + (f" {self.remedy}" if self.remedy else "")


class ProblemsError(BuilderError):
    """Several problems reported at once, never one per run."""

    def __init__(self, message: str, problems: Sequence[Problem] = (), *, notes: Sequence[str] = ()) -> None:
        super().__init__(message, notes=notes)
        self.problems = tuple(problems)


class UsageError(ProblemsError):
    """The command line or the manifest is wrong. Raised by `cli.parser`, `manifest.load`, and each verb's options."""

    exit_code = 2


class ColdError(BuilderError):
    """`check` found something cold. Raised by the verbs (`cli.commands`), `run.views` and `report.audit`."""

    exit_code = 10


class TasksError(BuilderError):
    """At least one task failed, was partial, timed out or was skipped. Raised by `run.outcome` and `run.prebuild`."""

    exit_code = 11


class PreflightError(ProblemsError):
    """This machine cannot run any of it. Mostly raised in `run`: its problems are listed by `run.preflight`."""

    exit_code = 12


class RegistryRefusedError(BuilderError):
    """A registry refused a request, or served what no digest or signature proves. Raised by `registry`.

    status: of HTTP; 0 where it is not the answer that was refused.
    """

    exit_code = 12

    def __init__(self, message: str, *, status: int = 0, notes: Sequence[str] = ()) -> None:
        super().__init__(message, notes=notes)
        self.status = status


class GpusHeldError(BuilderError):
    """A GPU did not become free again after a task. Raised by `run.gpu_reservation`."""

    exit_code = 13


class BudgetError(BuilderError):
    """The run's budget ended while tasks were still cold. Raised by `run.outcome`."""

    exit_code = 14


class BusyError(BuilderError):
    """Another builder works on this cache or on these GPUs. Raised by `host.locks`, `run.refresh` and `run.views`."""

    exit_code = 15


class EngineLostError(BuilderError):
    """The engine cannot be reached, or stopped answering. Raised by `engine`, and by `run` for what ended with it."""

    exit_code = 16


class EngineRefusedError(EngineLostError):
    """The engine answered and refused. Raised by `engine.connection` and `engine.images`.

    status: of HTTP; 0 where it gave none.
    """

    def __init__(self, message: str, *, status: int = 0, notes: Sequence[str] = ()) -> None:
        super().__init__(message, notes=notes)
        self.status = status


class EngineTimeoutError(EngineLostError):
    """The engine got the request and did not answer in time. Raised by `engine.errors` and `host.cancel`."""


class RegistryLostError(BuilderError):
    """A registry cannot be reached, stopped answering, or asks to come back too late. Raised by `registry`."""

    exit_code = 16


class DeferredError(BuilderError):
    """The machine never became idle, so nothing was done. Raised by `run.gpu_reservation`."""

    exit_code = 17


class Interrupted(BuilderError):
    """A signal ended the run. Raised by `host.cancel` and `cli.signals`. ``exit_code`` is 128 + the signal's number."""

    exit_code = 130

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum
        self.exit_code = 128 + signum
