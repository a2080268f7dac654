"""One task from its job to its verdict: prepare, first pass, inventory, second pass, marker last.

The order is what makes a marker true. Entries are counted before and after in the same directories; the second pass
runs in a new process after everything of the first one is gone; host-specific files leave before anything vouches for
the directory; and the marker is published when nothing can fail any more.
"""

from __future__ import annotations

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
from builder.agent import dummy_weights, probe, recipes, simulated_gpu
from builder.agent import model_shapes as shapes
from builder.agent.compile_lock import Beside
from builder.agent.counter import Counter
from builder.agent.guard import Guard, Stopped
from builder.agent.log_watch import Watch
from builder.agent.output import Output
from builder.agent.pass_context import Partial, Setting
from builder.agent.process import Failed
from builder.agent.recipes import Recipe
from builder.cache import families, inventory, layout, markers, model_store, removal, toolchain
from builder.cache.coverage import needs_config
from builder.cache.families import FAMILIES, FAMILY
from builder.cache.inventory import Inventory
from builder.cache.marker_files import Observed
from builder.events import FAILED, PARTIAL, SKIPPED, WARMED
from builder.job import Job
from builder.task import Task

State = Literal["warmed", "failed", "partial", "skipped", "stopped"]
STATUS = {"warmed": WARMED, "failed": FAILED, "partial": PARTIAL, "skipped": SKIPPED, "stopped": FAILED}


@dataclass(frozen=True)
class Proven:
    """What both passes came to. doubt: why the proof is weaker than asked for, or what it took."""

    claims: list[str]
    used: Mapping[str, set[str]]
    proof: str
    doubt: str


class _Disturbed(Failed):
    """The second pass compiled something, or somebody else did meanwhile."""


class Warming:
    """One task's run. ``verdict`` is filled as the run goes on, so that a stop can report what there was."""

    def __init__(self, job: Job, task: Task, output: Output, guard: Guard) -> None:
        self._job, self._task, self._output, self._guard = job, task, output, guard
        self._root = Path(job.mount)
        self._begun = time.monotonic()
        self._temporary: str | None = None
        self._keys: dict[str, str] = {}
        self._before: dict[str, Inventory] = {}
        self._locks: dict[str, int] = {}
        self._beside = Beside(self._root, guard, output, active=job.concurrent)
        self._watches: list[Watch] = []
        self.verdict = events.Verdict()

    def run(self) -> int:
        """Exit status of the program. Emits every event except the last one."""
        try:
            status = self._run()
        finally:
            self._leave()
            if self._temporary is not None:
                shutil.rmtree(self._temporary, ignore_errors=True)
        seconds = round(time.monotonic() - self._begun, 3)
        self.verdict = replace(self.verdict, seconds=seconds, shapes=self._shapes())
        if self._before and not self.verdict.entries:
            self._count(self._scan(), only=self._candidates())
        self._output.event(self.verdict)
        return status

    def _run(self) -> int:
        """Warm, and put the outcome into the verdict. Returns the exit status."""
        try:
            self._warm()
            return self._conclude("warmed", self.verdict.reason)
        except model_store.Skipped as skipped:
            return self._conclude("skipped", str(skipped))
        except Partial as partial:
            return self._conclude("partial", str(partial))
        except (Failed, layout.LayoutError, simulated_gpu.Impossible) as failed:
            return self._conclude("failed", str(failed), unusable=isinstance(failed, layout.LayoutError))
        except OSError as error:
            reason = f"{error.filename or self._root}: {error.strerror or error}"
            return self._conclude("failed", reason, unusable=error.errno == errno.EROFS)
        except Stopped as stopped:
            self._conclude("stopped", str(stopped))
            return 128 + stopped.signum

    def _conclude(self, state: State, reason: str, *, unusable: bool = False) -> int:
        self.verdict = replace(self.verdict, state=state, reason=reason, unusable=unusable)
        return STATUS[state]

    def _warm(self) -> None:
        task = self._task
        recipe = recipes.RECIPES.get(task.recipe)
        if recipe is None:
            raise Failed(f"no recipe is called {task.recipe!r}")
        unknown = [name for name in task.families or () if name not in FAMILY or not FAMILY[name].claimable]
        if unknown:
            raise Failed(f"no claimable family is called {unknown[0]!r}")
        layout.prepare(self._root)
        self._temporary = tempfile.mkdtemp(prefix="warm-cache-")
        environ = simulated_gpu.environment({**os.environ, **task.env}, self._temporary)
        record = probe.probe(environ=environ, mount=self._job.mount, image=self._job.image)
        self._keys = toolchain.family_keys(record)
        self._output.event(events.Started(os.getpid(), self._guard.mode, self._keys, toolchain.digest(self._keys)))
        self._guard.check()
        self._prepare_families(record)
        self._beside.begin()
        digest = model_store.require(task, environ) if needs_config(task) else None
        # Over the image's variables and the task's come the families', which nothing may redirect.
        environ = {**model_store.defaults(environ, self._temporary), **environ}
        environ.update(families.environment(self._job.mount, self._keys))
        self._before = self._scan()
        done = self._compile(recipe, environ)
        pretended = record["observed"]["pretended"]
        proof = markers.PRETENDED if pretended else done.proof
        self.verdict = replace(self.verdict, proof=proof, reason=done.doubt)
        marker = markers.build(
            task,
            record=record,
            config_digest=digest,
            claims=done.claims,
            entries={name: sorted(done.used[name]) for name in done.claims},
            proof=proof,
            second_pass_added=self.verdict.second_pass_added,
            shapes=self._shapes(),
            observed=self._observed(done, pretended),
        )
        reason = "; ".join(filter(None, (markers.reservation(marker), done.doubt)))
        self._guard.check()
        self.verdict = replace(self.verdict, reason=reason, marker=markers.publish(self._root, marker))

    def _compile(self, recipe: Recipe, environ: Mapping[str, str]) -> Proven:
        """Both passes; with dummy weights and then with real ones, where the task leaves the choice to the proof."""
        task, why = self._task, ""
        if not recipe.needs_model:
            return self._passes(recipe, environ, self._with_shapes(environ))
        if task.load != "weights":
            self.verdict = replace(self.verdict, loaded=dummy_weights.describe(task))
            try:
                return self._passes(recipe, environ, self._with_dummies(environ))
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
            done = self._passes(recipe, environ, task)
        except (Failed, Partial) as failed:
            raise type(failed)(f"{failed} (and {why})" if why else str(failed)) from None
        except model_store.Skipped as skipped:
            raise Failed(f"{why}; and with weights: {skipped}") from None
        return replace(done, doubt="; ".join(filter(None, (f"with weights, because {why}" if why else "", done.doubt))))

    def _with_shapes(self, environ: Mapping[str, str]) -> Task:
        """The task with every shape that it asks for, from wherever."""
        task = self._task
        if not task.shapes_from:
            return task
        try:
            wanted = shapes.wanted(self._root, task, environ)
        except shapes.NotUnderstood as why:
            raise Failed(str(why)) from None
        told = " and ".join(task.shapes_from)
        self._output.say(f"{len(wanted)} shapes, {len(wanted) - len(set(task.shapes))} of them from {told}")
        return replace(task, shapes=wanted)

    def _with_dummies(self, environ: Mapping[str, str]) -> Task:
        try:
            return dummy_weights.task_of(
                self._task, model_store.config(self._task, environ) if self._task.layers else None
            )
        except ValueError as error:
            raise Failed(str(error)) from None

    def _passes(self, recipe: Recipe, environ: Mapping[str, str], task: Task) -> Proven:
        """First pass, inventory, second pass."""
        self._watches = []
        before = self._scan()
        setting = Setting(
            watches=self._watches,
            task=task,
            env=environ,
            workdir=self._job.workdir,
            output=self._output,
            guard=self._guard,
            grace=max(0.5, self._job.grace - 1.0),
            beside=self._beside,
            entries=lambda: sum(len(found.valid) for found in self._scan().values()),
            on_tick=Counter(self._output, {name: self._directory(name) for name in self._candidates()}).tick,
        )
        self._phase(task.recipe)
        first = recipe.first(setting)
        if recipe.sweeps and first.reduced:
            self._phase("finishing what memory cut short")
            recipes.finish(setting, first)
        after = self._scan()
        claims, used = self._claim(recipe, first, before, after)
        self._count(after, only=claims)
        if not claims:
            return Proven(claims, used, "nothing-claimed", "the task claims no family, so there was nothing to prove")
        return Proven(claims, used, *self._prove(recipe, setting, first, after, claims))

    def _leave(self) -> None:
        """Whatever became of the task: what is true on this host alone does not stay for other users of the root."""
        for name in [family.name for family in FAMILIES if family.host_specific and family.name in self._locks]:
            os.close(self._locks.pop(name))  # our own lock is one that would keep it there
            removal.clear_host_specific(self._root, name, self._keys[name])

    def _prepare_families(self, record: toolchain.Record) -> None:
        """Directories, shared locks until the process ends, memo, leftovers of killed processes moved aside."""
        for name, key in sorted(self._keys.items()):
            layout.describe_family(self._root, name, key, toolchain.family_factors(record, name))
            if FAMILY[name].host_specific:
                removal.clear_host_specific(self._root, name, key)  # of one that was killed
            self._locks[name] = self._guard.acquire(layout.family_lock(self._root, name, key), exclusive=False)
        write_memo(self._root, self._job, record, self._task.env, known=True)
        for family in FAMILIES:
            key = self._keys[family.name]
            moved = inventory.sweep(
                family,
                self._directory(family.name),
                layout.quarantine(self._root, family.name, key),
                now=time.time(),
                older_than=inventory.IN_PROGRESS,
            )
            for path, why in moved:
                self._output.event(events.Quarantined(family.name, key, path, why))

    def _claim(
        self, recipe: Recipe, first: Watch, before: Mapping[str, Inventory], after: Mapping[str, Inventory]
    ) -> tuple[list[str], dict[str, set[str]]]:
        """The families this task vouches for, and the entries it used. Raises Failed where a required one has none."""
        used = {name: inventory.used(before[name], found) for name, found in after.items()}
        asked = self._task.families if self._task.families is not None else recipe.requires or None
        claims = list(asked) if asked is not None else [name for name in used if used[name]]
        for name in claims:
            broken = {
                entry: why
                for entry, why in after[name].invalid.items()
                if entry not in before[name].entries and not self._is_neighbours(name, entry, why)
            }
            if broken:
                entry = min(broken)
                raise Failed(f"{name}: {len(broken)} new entries are not valid (first: {entry}: {broken[entry]})")
            if not used[name]:
                held = len(after[name].valid)
                why = f"none of its {held} entries was used" if held else "it holds no valid entry"
                compiled = (
                    "" if first.shapes or not recipe.requires else ": the log names no shape, so nothing was compiled"
                )
                raise Failed(f"{name} is required and {why}{compiled}")
        return claims, used

    def _prove(
        self, recipe: Recipe, setting: Setting, first: Watch, after: Mapping[str, Inventory], claims: list[str]
    ) -> tuple[str, str]:
        """The proof's name and, where it is weaker than asked for, why."""
        if self._task.verify == "inventory":
            return "inventory", ""
        if self._task.verify == "steady" and recipe.steady:
            return "steady", ""
        try:
            return self._second_pass(recipe, setting, first, after, claims)
        except _Disturbed:
            if not self._beside.active:
                raise
        # A neighbour's work, maybe. What our own pass added is on disk now, and a pass that adds nothing is the proof.
        with self._beside.undisturbed():
            return self._second_pass(recipe, setting, first, self._scan(), claims)

    def _is_neighbours(self, family: str, entry: str, problem: str) -> bool:
        """Whether an invalid entry may be one that a task beside this one is just making."""
        return self._beside.active and inventory.may_be_in_progress(
            FAMILY[family], self._directory(family), entry, problem, now=time.time()
        )

    def _second_pass(
        self, recipe: Recipe, setting: Setting, first: Watch, after: Mapping[str, Inventory], claims: list[str]
    ) -> tuple[str, str]:
        self._phase("second pass")
        doubt = ""
        try:
            doubt = recipe.second(setting, first)
        except Failed as failed:
            raise Failed(f"second pass: {failed}") from None
        except Partial as partial:
            raise Failed(f"second pass: {partial}") from None
        again = self._scan()
        grown = [f"{name}/{entry}" for name in claims for entry in sorted(inventory.added(after[name], again[name]))]
        anew = [
            f"{name}/{entry}" for name in claims for entry in sorted(inventory.recompiled(after[name], again[name]))
        ]
        lost = [f"{name}/{entry}" for name in claims for entry in sorted(after[name].valid - again[name].valid)]
        self.verdict = replace(self.verdict, second_pass_added=len(grown))
        self._count(again, only=claims)
        if grown:
            noun = "entry" if len(grown) == 1 else "entries"
            raise _Disturbed(
                f"the second pass added {len(grown)} {noun} (first: {grown[0]}): the first one did not warm everything"
            )
        if anew:
            noun = "entry" if len(anew) == 1 else "entries"
            raise _Disturbed(
                f"the second pass compiled {len(anew)} {noun} again (first: {anew[0]}): it did not use them"
            )
        if lost:
            raise Failed(
                f"{len(lost)} entries were valid before the second pass and are not after it (first: {lost[0]})"
            )
        return ("inventory", doubt) if doubt else ("verified", "")

    def _candidates(self) -> list[str]:
        recipe = recipes.RECIPES.get(self._task.recipe)
        if self._task.families is not None:
            return list(self._task.families)
        if recipe is not None and recipe.requires:
            return list(recipe.requires)
        return [family.name for family in FAMILIES if family.claimable]

    def _scan(self) -> dict[str, Inventory]:
        return {
            family.name: inventory.scan(family, self._directory(family.name)) for family in FAMILIES if family.claimable
        }

    def _count(self, found: Mapping[str, Inventory], *, only: list[str]) -> None:
        """What the families in ``only`` hold, and what the run added to any family: its work is all of that. Beside
        others it is not, and only those families count.
        """
        counted = only if self._beside.active else list(found)
        entries = {name: len(found[name].valid) for name in only if found[name].valid}
        added = {name: inventory.added(self._before[name], found[name]) for name in counted}
        self.verdict = replace(
            self.verdict,
            entries=entries,
            added={name: len(new) for name, new in added.items() if new or name in entries},
            added_bytes={
                name: sum(found[name].entries[entry].bytes for entry in new) for name, new in added.items() if new
            },
        )

    def _shapes(self) -> tuple[str, ...]:
        """What the first pass went over, as far as it came."""
        return tuple(str(shape) for shape in self._watches[0].shapes) if self._watches else ()

    def _directory(self, family: str) -> Path:
        return Path(families.directory(self._job.mount, family, self._keys[family]))

    def _phase(self, phase: str) -> None:
        self._guard.check()
        self._output.event(events.Phase(phase))

    def _weigh(self, done: Proven) -> dict[str, int]:
        """Bytes of the entries that the marker lists: what the next warm-up under other keys will need again."""
        return {
            name: sum(inventory.weigh(FAMILY[name], self._directory(name), entry) for entry in done.used[name])
            for name in done.claims
        }

    def _observed(self, done: Proven, pretended: str | None) -> Observed:
        origin = {} if self._job.observed is None else asdict(self._job.observed)
        return Observed(
            run=origin.get("run"),
            image=self._job.image.id,
            loaded=self.verdict.loaded,
            seconds=round(time.monotonic() - self._begun, 3),
            gpus=self._task.gpus,
            bytes=self._weigh(done),
            added_bytes=dict(self.verdict.added_bytes),
            pretended=pretended,
            others={
                "host": socket.gethostname(),
                **origin,
                "time": int(time.time()),
                "compiled-on": "no GPU" if pretended else "GPU",
            },
        )


def write_memo(root: Path, job: Job, record: toolchain.Record, env: Mapping[str, str], *, known: bool = False) -> None:
    """Remembers the record for the image, where it has an id. Raises OSError."""
    if job.image.id:
        toolchain.write_memo(root, job.image.id, record, env=env, known=known)
