"""Warms one task, from its job to its verdict: prepare, first pass, inventory, second pass, marker last.

The order makes the marker true. Entries are counted before and after in the same directories; the second pass runs in a
process that has loaded no kernel, after every process that compiled in the first one has ended; and the marker is
published when nothing can fail any more.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from builder import events
from builder.agent import dummy_weights, model_shapes, probe, recipes, simulated_gpu
from builder.agent.compile_lock import CompileLock
from builder.agent.guard import SCRATCH, Guard, Stopped
from builder.agent.log_watch import Watch
from builder.agent.output import Output
from builder.agent.pass_context import Partial, PassContext
from builder.agent.process import Failed
from builder.agent.progress import EntryProgress
from builder.agent.recipes import Passes
from builder.agent.shape_forks import Imported
from builder.agent.task_entries import TaskEntries
from builder.cache import (
    families,
    history,
    inventory,
    layout,
    leaves,
    marker_format,
    marker_writing,
    markers,
    memos,
    model_store,
    removal,
    toolchain,
)
from builder.cache.coverage import needs_config
from builder.cache.families import FAMILIES, FAMILY
from builder.cache.inventory import Inventory
from builder.cache.marker_format import Observed, Prebuild, Proof
from builder.events import FAILED, PARTIAL, SKIPPED, WARMED
from builder.job import Job
from builder.task import GPUS, RECIPES, Shape, Task
from builder.text import counted

State = Literal["warmed", "failed", "partial", "skipped", "stopped"]
STATUS = {"warmed": WARMED, "failed": FAILED, "partial": PARTIAL, "skipped": SKIPPED, "stopped": FAILED}


@dataclass(frozen=True)
class Proven:
    """The result of both passes."""

    claims: list[str]  # families
    used: Mapping[str, set[str]]  # entries by family
    proof: Proof
    doubt: str  # why the proof is weaker than requested, or how it was reached
    missed: tuple[str, ...] = ()  # DeepGEMM problems that were compiled after a prebuild


class _Disturbed(Failed):
    """The second pass compiled something, or another task did meanwhile."""


class Warming:
    """One task's run. `verdict` is filled during the run, so that a stop can report what was done by then."""

    def __init__(self, job: Job, task: Task, output: Output, guard: Guard) -> None:
        self._job, self._task, self._output, self._guard = job, task, output, guard
        self._root = Path(job.mount)
        self._begun = time.monotonic()
        self._temporary: str | None = None
        self._chunked_prefill_size = GPUS["H200"].chunked_prefill_size
        self._locks: dict[str, int] = {}
        self._compile_lock = CompileLock(self._root, guard, output, active=job.concurrent)
        self._entries = TaskEntries(self._root, task, self._compile_lock)
        self._watches: list[Watch] = []
        self.verdict = events.Verdict()

    def run(self) -> int:
        """Warm the task and write its events, the last one excepted. Returns the program's exit status."""
        try:
            status = self._run()
        finally:
            self._clear_host_specific()
            if self._temporary is not None:
                shutil.rmtree(self._temporary, ignore_errors=True)
        self.verdict = replace(self.verdict, seconds=round(time.monotonic() - self._begun, 3), shapes=self._shapes())
        if self._entries.before and not self.verdict.entries:
            self._count(self._entries.scan(), only=list(self._entries.trees()))
        self._output.event(self.verdict)
        history.add_task(self._root, self._job, self.verdict, self._entries.keys)
        return status

    def _run(self) -> int:
        """Warm, and put the outcome into the verdict. Returns the exit status."""
        try:
            self._warm()
            return self._finish("warmed", self.verdict.reason)
        except model_store.Skipped as skipped:
            return self._finish("skipped", str(skipped))
        except Partial as partial:
            return self._finish("partial", str(partial))
        except (Failed, layout.LayoutError, simulated_gpu.Impossible) as failed:
            return self._finish("failed", str(failed), unusable=isinstance(failed, layout.LayoutError))
        except OSError as error:
            reason = f"{error.filename or self._root}: {error.strerror or error}"
            return self._finish("failed", reason, unusable=error.errno == errno.EROFS)
        except Stopped as stopped:
            self._finish("stopped", str(stopped))
            return 128 + stopped.signum

    def _finish(self, state: State, reason: str, *, unusable: bool = False) -> int:
        self.verdict = replace(self.verdict, state=state, reason=reason, unusable=unusable)
        return STATUS[state]

    def _warm(self) -> None:
        task = self._task
        passes = recipes.PASSES.get(task.recipe)
        if passes is None:
            raise Failed(f"no recipe is called {task.recipe!r}")
        unknown = [name for name in task.families or () if name not in FAMILY or not FAMILY[name].claimable]
        if unknown:
            raise Failed(f"no claimable family is called {unknown[0]!r}")
        layout.prepare(self._root)
        self._temporary = tempfile.mkdtemp(prefix=SCRATCH)
        environ = simulated_gpu.environment({**os.environ, **task.env}, self._temporary)
        probed = probe.probe(environ=environ, mount=self._job.mount, image=self._job.image)
        record = toolchain.of_task(probed, task.env)
        with contextlib.suppress(ValueError):  # no GPU, or none that is known
            self._chunked_prefill_size = toolchain.gpu_of(record).chunked_prefill_size
        self._entries.keys = keys = toolchain.family_keys(record)
        self._output.event(events.Started(os.getpid(), self._guard.mode, keys, toolchain.digest(keys)))
        self._guard.check()
        self._prepare_families(record)
        memos.write_memo(self._root, self._job.image, probed, env=task.env, known=True)
        self._quarantine_leftovers()
        self._compile_lock.acquire()
        digest = model_store.require(task, environ) if needs_config(task) else None
        # The families' variables override those of the image and of the task.
        environ = {**model_store.defaults(environ, self._temporary), **environ}
        environ.update(families.environment(self._job.mount, keys))
        self._entries.before = self._entries.scan()
        done = self._compile(passes, environ, record)
        try:
            self._entries.require_undamaged(done.claims)
        except Partial:
            # An older marker does not list the damaged entries, and would have `check` say warm all the same.
            marker_writing.withdraw(self._root, task, record=record, config_digest=digest)
            raise
        pretended = record["observed"]["pretended"]
        proof = marker_format.PRETENDED if pretended else done.proof
        self.verdict = replace(self.verdict, proof=proof, reason=done.doubt)
        marker = marker_writing.build(
            task,
            record=record,
            config_digest=digest,
            claims=done.claims,
            entries={name: sorted(done.used[name]) for name in done.claims},
            proof=proof,
            second_pass_added=self.verdict.second_pass_added,
            shapes=self._shapes(),
            observed=self._observed(done, pretended),
            prebuild=Prebuild(dict(self._job.prebuilt), done.missed) if self._job.prebuilt else None,
        )
        reason = "; ".join(filter(None, (markers.reservation(marker), done.doubt)))
        self._guard.check()
        self.verdict = replace(self.verdict, reason=reason, marker=marker_writing.publish(self._root, marker))

    def _compile(self, passes: Passes, environ: Mapping[str, str], record: toolchain.Record) -> Proven:
        """Run both passes; with dummy weights first, then with real ones, if the task allows them."""
        task, why = self._task, ""
        if not RECIPES[task.recipe].server:
            return self._run_passes(passes, environ, self._with_shapes(environ, record))
        if task.load != "weights":
            self.verdict = replace(self.verdict, loaded=dummy_weights.describe(task))
            try:
                return self._run_passes(passes, environ, self._with_dummies(environ))
            except (Failed, Partial) as failed:
                if task.load == "dummy":
                    raise
                why = f"{dummy_weights.describe(task)} did not do: {failed}"
            self._phase("falling back to weights")
            self._output.say(f"falling back to weights, because {why}")
        self.verdict = replace(self.verdict, loaded="weights")
        task = replace(task, load="weights")
        try:
            if why:
                model_store.require(task, environ)
            done = self._run_passes(passes, environ, task)
        except (Failed, Partial) as failed:
            raise type(failed)(f"{failed} (and {why})" if why else str(failed)) from None
        except model_store.Skipped as skipped:
            raise Failed(f"{why}; and with weights: {skipped}") from None
        return replace(done, doubt="; ".join(filter(None, (f"with weights, because {why}" if why else "", done.doubt))))

    def _with_shapes(self, environ: Mapping[str, str], record: toolchain.Record) -> Task:
        """Return the task with every shape that it asks for, whatever the source."""
        task = self._task
        if not task.shapes_from:
            return task

        def walk(task: Task) -> tuple[Shape, ...]:
            from builder.agent import prebuild

            return prebuild.shapes_by_sglang(task, record, environ, self._job.workdir, self._output, self._guard)

        try:
            wanted = model_shapes.wanted(self._root, task, environ, walk, self._output.say)
        except model_shapes.NotUnderstood as why:
            raise Failed(str(why)) from None
        sources = " and ".join(task.shapes_from)
        self._output.say(f"{len(wanted)} shapes, {len(wanted) - len(set(task.shapes))} of them from {sources}")
        return replace(task, shapes=wanted)

    def _with_dummies(self, environ: Mapping[str, str]) -> Task:
        try:
            return dummy_weights.task_of(
                self._task, model_store.config(self._task, environ) if self._task.layers else None
            )
        except ValueError as error:
            raise Failed(str(error)) from None

    def _run_passes(self, passes: Passes, environ: Mapping[str, str], task: Task) -> Proven:
        with Imported(environ, self._job.workdir) as imported:
            return self._prove_passes(passes, environ, task, imported)

    def _prove_passes(self, passes: Passes, environ: Mapping[str, str], task: Task, imported: Imported) -> Proven:
        entries = self._entries
        # A second attempt begins where the first one left off.
        before = entries.scan() if self._watches else entries.before
        self._watches = []
        context = PassContext(
            watches=self._watches,
            task=task,
            env=environ,
            workdir=self._job.workdir,
            output=self._output,
            guard=self._guard,
            grace=max(0.5, self._job.grace - 1.0),
            compile_lock=self._compile_lock,
            chunked_prefill_size=self._chunked_prefill_size,
            imported=imported,
            entries=lambda: sum(len(found.valid) for found in entries.scan().values()),
            on_tick=EntryProgress(self._output, entries.trees()).tick,
        )
        self._phase(task.recipe)
        first = passes.first(context)
        if passes.resumable and first.reduced:
            self._phase("finishing what memory cut short")
            recipes.finish_shapes(context, first)
        after = entries.scan()
        claims, used = entries.claim(first, before, after)
        self._count(after, only=claims)
        missed = self._missed(first, before, after)
        if not claims:
            nothing = "the task claims no family, so there was nothing to prove"
            return Proven(claims, used, "nothing-claimed", nothing, missed)
        return Proven(claims, used, *self._prove(passes, context, first, after, claims), missed)

    def _missed(self, first: Watch, before: Mapping[str, Inventory], after: Mapping[str, Inventory]) -> tuple[str, ...]:
        """Return what was compiled although a prebuild had named every kernel: problems, or entries of none."""
        if self._job.prebuilt.get(family := "deep_gemm") != self._entries.keys[family]:
            return ()
        new = sorted(inventory.added(before[family], after[family]))
        return model_shapes.missed(self._entries.tree(family), new, first.shapes)

    def _clear_host_specific(self) -> None:
        """Remove, on every way out, files that are true on this host alone."""
        for name in [family.name for family in FAMILIES if family.host_specific and family.name in self._locks]:
            os.close(self._locks.pop(name))  # our own lock would prevent the removal
            removal.clear_host_specific(self._root, name, self._entries.keys[name])

    def _prepare_families(self, record: toolchain.Record) -> None:
        """Make the directory of every family, for jobs to mount, and take shared locks until the process ends."""
        for name, key in sorted(self._entries.keys.items()):
            layout.describe_family(self._root, name, key, toolchain.family_factors(record, name))
            if FAMILY[name].host_specific:
                removal.clear_host_specific(self._root, name, key)  # left by a killed container
            self._locks[name] = self._guard.acquire(layout.family_lock(self._root, name, key), exclusive=False)

    def _quarantine_leftovers(self) -> None:
        leaves.refresh(self._root)  # what markers list is no leftover
        for family in FAMILIES:
            key = self._entries.keys[family.name]
            moved = inventory.sweep(
                family,
                self._entries.tree(family.name),
                layout.quarantine(self._root, family.name, key),
                now=time.time(),
                older_than=inventory.IN_PROGRESS,
            )
            for path, why, stays in moved:
                if stays:
                    self._output.event(events.Kept(family.name, key, path, f"{why}; {stays}"))
                else:
                    self._output.event(events.Quarantined(family.name, key, path, why))

    def _prove(
        self, passes: Passes, context: PassContext, first: Watch, after: Mapping[str, Inventory], claims: list[str]
    ) -> tuple[Proof, str]:
        """Return the proof's name and, if it is weaker than requested, why."""
        if self._task.verify == "inventory":
            return "inventory", ""
        if self._task.verify == "steady" and passes.steady:
            return "steady", ""
        try:
            return self._second_pass(passes, context, first, after, claims)
        except _Disturbed:
            if not self._compile_lock.active:
                raise
        # Another task may have added it. What our own pass added is on disk now: a pass that adds nothing is the proof.
        with self._compile_lock.exclusive():
            return self._second_pass(passes, context, first, self._entries.scan(), claims)

    def _second_pass(
        self, passes: Passes, context: PassContext, first: Watch, after: Mapping[str, Inventory], claims: list[str]
    ) -> tuple[Proof, str]:
        self._phase("second pass")
        try:
            doubt = passes.second(context, first)
        except (Failed, Partial) as failed:
            raise Failed(f"second pass: {failed}") from None
        again = self._entries.scan()
        grown = [f"{name}/{entry}" for name in claims for entry in sorted(inventory.added(after[name], again[name]))]
        anew = [
            f"{name}/{entry}" for name in claims for entry in sorted(inventory.recompiled(after[name], again[name]))
        ]
        lost = [f"{name}/{entry}" for name in claims for entry in sorted(after[name].valid - again[name].valid)]
        self.verdict = replace(self.verdict, second_pass_added=len(grown))
        self._count(again, only=claims)
        if grown:
            raise _Disturbed(
                f"the second pass added {counted(len(grown), 'entry')} (first: {grown[0]}): "
                "the first one did not warm everything"
            )
        if anew:
            raise _Disturbed(
                f"the second pass compiled {counted(len(anew), 'entry')} again (first: {anew[0]}): it did not use them"
            )
        if lost:
            raise Failed(
                f"{len(lost)} entries were valid before the second pass and are not after it (first: {lost[0]})"
            )
        return ("inventory", doubt) if doubt else ("verified", "")

    def _count(self, found: Mapping[str, Inventory], *, only: list[str]) -> None:
        """Put into the verdict the valid entries of these families, and what the run added to any family.

        While other tasks compile, additions count for these families alone: others may not be this task's work.
        """
        names = only if self._compile_lock.active else list(found)
        entries = {name: len(found[name].valid) for name in only if found[name].valid}
        added = {name: inventory.added(self._entries.before[name], found[name]) for name in names}
        self.verdict = replace(
            self.verdict,
            entries=entries,
            added={name: len(new) for name, new in added.items() if new or name in entries},
            added_bytes={
                name: sum(found[name].entries[entry].bytes for entry in new) for name, new in added.items() if new
            },
        )

    def _shapes(self) -> tuple[str, ...]:
        """Return the shapes of the first pass, as far as it got."""
        return tuple(str(shape) for shape in self._watches[0].shapes) if self._watches else ()

    def _phase(self, phase: str) -> None:
        self._guard.check()
        self._output.event(events.Phase(phase))

    def _observed(self, done: Proven, pretended: str | None) -> Observed:
        origin = {} if self._job.observed is None else asdict(self._job.observed)
        return Observed(
            run=origin.get("run"),
            image=self._job.image.id,
            loaded=self.verdict.loaded,
            seconds=round(time.monotonic() - self._begun, 3),
            gpus=self._task.gpus,
            bytes=self._entries.weigh({name: done.used[name] for name in done.claims}),
            added_bytes=dict(self.verdict.added_bytes),
            pretended=pretended,
            others={
                "host": socket.gethostname(),
                **origin,
                "time": int(time.time()),
                "compiled-on": "no GPU" if pretended else "GPU",
            },
        )
