"""The entries of the families that one task may claim: what was there, what its run used, and what is damaged.

Counted in the same directories before, between and after the passes; decides nothing about the task but what a marker
of it may state.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from pathlib import Path

from builder.agent.compile_lock import CompileLock
from builder.agent.log_watch import Watch
from builder.agent.pass_context import Partial
from builder.agent.process import Failed
from builder.beneath import Tree
from builder.cache import inventory
from builder.cache.entries import EntryProblem
from builder.cache.families import CLAIMABLE, FAMILY
from builder.cache.inventory import Inventory
from builder.task import RECIPES, Task
from builder.text import counted


class TaskEntries:
    """Entries by family. keys: of all families, once they are known. before: the state at the start of the run."""

    def __init__(self, root: Path, task: Task, compile_lock: CompileLock) -> None:
        self._root, self._task, self._compile_lock = root, task, compile_lock
        self.keys: Mapping[str, str] = {}
        self.before: Mapping[str, Inventory] = {}

    def tree(self, family: str) -> Tree:
        """Return the directory of a family under its present key."""
        return Tree(self._root, f"{family}/{self.keys[family]}")

    def scan(self) -> dict[str, Inventory]:
        """Return what is there now, of every family that can be claimed."""
        return {family.name: inventory.scan(family, self.tree(family.name)) for family in CLAIMABLE}

    def trees(self) -> dict[str, Tree]:
        """Return the directory of each family that the task may claim."""
        names = self._task.claimed
        if names is None:
            names = tuple(family.name for family in CLAIMABLE)
        return {name: self.tree(name) for name in names}

    def claim(
        self, first: Watch, before: Mapping[str, Inventory], after: Mapping[str, Inventory]
    ) -> tuple[list[str], dict[str, set[str]]]:
        """Return the families that the task claims, and the entries it used. Raises Failed if it used none of one."""
        used = {name: inventory.used(before[name], found) for name, found in after.items()}
        wanted = self._task.claimed
        claims = list(wanted) if wanted is not None else [name for name in used if used[name]]
        for name in claims:
            broken = {
                entry: why
                for entry, why in after[name].invalid.items()
                if entry not in before[name].entries and not self._is_in_progress(name, entry, why)
            }
            if broken:
                entry = min(broken)
                raise Failed(f"{name}: {len(broken)} new entries are not valid (first: {entry}: {broken[entry]})")
            if not used[name]:
                held = len(after[name].valid)
                why = f"none of its {held} entries was used" if held else "it holds no valid entry"
                sweeps = bool(RECIPES[self._task.recipe].requires)  # its log then names each shape
                compiled = ": the log names no shape, so nothing was compiled" if sweeps and not first.shapes else ""
                raise Failed(f"{name} is required and {why}{compiled}")
        return claims, used

    def require_undamaged(self, claims: list[str]) -> None:
        """Raise Partial for entries of claimed families that were damaged before and still are.

        They could not be quarantined (another owner, another file system, written to just now), and a program that
        takes what exists for complete would fail on them.
        """
        suspect = [name for name in claims if self.before[name].invalid]
        after = self.scan() if suspect else {}
        for name in suspect:
            damaged = {
                entry: problem
                for entry, problem in after[name].invalid.items()
                if entry in self.before[name].invalid and not self._is_in_progress(name, entry, problem)
            }
            if damaged:
                first = min(damaged)
                raise Partial(
                    f"{name}: {counted(len(damaged), 'damaged entry')} could not be quarantined (first: {first}: "
                    f"{damaged[first]}); warm-cache verify --repair tries again"
                )

    def weigh(self, entries: Mapping[str, Collection[str]]) -> dict[str, int]:
        """Return the bytes of these entries by family."""
        return {
            name: sum(inventory.weigh(FAMILY[name], self.tree(name), entry) for entry in found)
            for name, found in entries.items()
        }

    def _is_in_progress(self, family: str, entry: str, problem: EntryProblem) -> bool:
        """Return whether another task may be making this invalid entry now."""
        return self._compile_lock.active and inventory.may_be_in_progress(
            FAMILY[family], self.tree(family), entry, problem, now=time.time()
        )
