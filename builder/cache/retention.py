"""What of a cache root a policy removes: a decision from markers, memos, times and sizes; nothing is deleted here.

Markers are the roots, entries the objects. What the image of the manifest needs stays. Other markers are dropped by age
and by count, and with them the family directories that nothing kept refers to. Where the root is still too large, the
least recently used is dropped next: entries that no kept marker lists, or a whole toolchain.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from builder.cache import blocked, leaves, removal, usage
from builder.cache.families import FAMILY, whole
from builder.cache.survey import Dir, Holdings, Memo, Object, SurveyedMarker, survey
from builder.job import PrunePolicy
from builder.text import age, counted, size

NO_ACCESS_TIMES = (
    "the cache's mount records no access times (noatime), so nothing is removed for its age: what jobs read is unknown"
)


@dataclass(frozen=True)
class PruneStep:
    """One removal. kind: ``marker``, ``memo``, ``family`` (a whole directory) or ``entries``.

    name: below the root, for people. why: the reason for the removal. bytes: what it frees. stays: why it is not
    removed after all; "" where it is. names: of the entries.
    """

    kind: str
    name: str
    why: str
    bytes: int = 0
    family: str = ""
    key: str = ""
    stays: str = ""
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class PrunePlan:
    """before, after: bytes of the root before the first and after the last step.

    left: what keeps the root larger, one sentence each. images: of the markers and memos that are removed.
    kept_images: of those that stay. refused: names, as in `cache.blocked`, of what is kept waiting; waits: until now.
    """

    steps: tuple[PruneStep, ...]
    before: int
    after: int
    left: tuple[str, ...] = ()
    images: frozenset[str] = frozenset()
    kept_images: frozenset[str] = frozenset()
    refused: frozenset[str] = frozenset()
    waits: blocked.Waits = field(default_factory=lambda: blocked.Waits({}, 0.0, 0.0))


def plan(root: Path, policy: PrunePolicy, *, job_max: float, now: float) -> PrunePlan:
    """Return what this policy removes, with what cannot be removed now.

    Reads only; locks are tried for a moment. job_max: seconds that a test job may last. now: seconds since the epoch.
    """
    held, waits = survey(root), blocked.read(root, now=now, job_max=job_max)
    unknown: tuple[str, ...] = ()
    if policy.older_than is not None and not usage.has_access_times(root):
        # Readers leave no other trace than an access time: what seems idle may be in use each day.
        policy, unknown = replace(policy, older_than=None), (NO_ACCESS_TIMES,)
    pinned: dict[Dir, str] = {}
    while True:
        # Entries that jobs touch again and again keep a root above its limit for job_max, and no longer.
        patience = 0.0 if waits.is_over(blocked.SIZE) else job_max
        found = decide(held, policy, job_max=job_max, now=now, pinned=pinned, patience=patience)
        refused = {
            place: refusal
            for step in found.steps
            if step.family and (place := (step.family, step.key)) not in pinned
            if (refusal := _refusal(root, step, waits))
        }
        if not refused:
            break
        pinned.update(refused)
    names = {f"{family}/{key}" for family, key in pinned}
    is_held = (bool(found.steps) or removal.HELD in pinned.values()) and removal.is_held(root)
    names |= {blocked.HOLD} if is_held else set()
    names |= {blocked.SIZE} if policy.max_size is not None and found.after > policy.max_size else set()
    found = replace(found, left=(*found.left, *unknown, *_delayed(waits, names)), waits=waits, refused=frozenset(names))
    if is_held and not waits.is_over(blocked.HOLD):
        # While a test job holds the cache no part of it is removed, markers included.
        steps = tuple(replace(step, stays=removal.HELD) for step in found.steps)
        return replace(found, steps=steps, after=held.bytes, images=frozenset())
    return found


def _delayed(waits: blocked.Waits, names: Collection[str]) -> Iterator[str]:
    seconds = waits.seconds(names)
    if seconds:
        yield (
            f"removals wait since {age(seconds)} for jobs; what jobs delay for {age(waits.job_max)} in all is removed "
            "all the same"
        )


def _refusal(root: Path, step: PruneStep, waits: blocked.Waits) -> str | None:
    """Return why this may not be removed now; of entries by the locks alone, for their times are known already."""
    with removal.may_remove(
        root,
        step.family,
        step.key,
        job_max=waits.job_max if step.kind == "family" else 0.0,
        now=waits.now,
        create=False,
        past_hold=waits.is_over(blocked.HOLD),
        past_use=is_past_use(waits, step),
    ) as refusal:
        return refusal


def is_past_use(waits: blocked.Waits, step: PruneStep) -> bool:
    """Return whether this step has waited for long enough for jobs that touch what it removes."""
    return waits.is_over(f"{step.family}/{step.key}") or (step.kind == "entries" and waits.is_over(blocked.SIZE))


@dataclass
class _Choice:
    """Which markers are dropped, and why; everything else follows from that."""

    held: Holdings
    policy: PrunePolicy
    job_max: float
    now: float
    pinned: Mapping[Dir, str]
    patience: float  # seconds since its last use for which an entry is not removed

    def __post_init__(self) -> None:
        self.dropped: dict[str, str] = {}
        pins = set(self.policy.pins)
        # An image has other names in other engines, and its memo has them all.
        pins = pins.union(*(memo.names for memo in self.held.memos if not memo.names.isdisjoint(pins)))
        self.needed = {mark.path for mark in self.held.marks if mark.image in pins or self._serves(mark)}
        stay = {self.policy.image, *pins}
        self.current = {name for memo in self.held.memos if memo.names & stay for name in memo.toolchains}
        # A directory that cannot be removed keeps the markers that claim it: they stay true as long as it exists.
        self.stuck = {
            mark.path: why for mark in self.held.marks for place in mark.dirs if (why := self.pinned.get(place))
        }

    def _serves(self, mark: SurveyedMarker) -> bool:
        """Return whether tasks of the current image, or of the manifest, need this marker."""
        if mark.folder not in self.policy.folders and mark.task not in self.policy.tasks:
            return False
        return any(all(keys.get(family) == key for family, key in mark.keys.items()) for keys in self.policy.keys)

    def drop(self, mark: SurveyedMarker, why: str) -> None:
        if mark.path not in self.needed and mark.path not in self.stuck:
            self.dropped.setdefault(mark.path, why)

    @property
    def kept(self) -> list[SurveyedMarker]:
        return [mark for mark in self.held.marks if mark.path not in self.dropped]

    def generations(self) -> set[str]:
        """Return the toolchains of kept markers, and the current ones.

        A marker that is kept only because the current image needs it too does not keep the rest of its toolchain.
        """
        return self.current | {mark.toolchain for mark in self.kept if mark.path not in self.needed}

    def kept_memos(self) -> list[Memo]:
        """Return the memos of images that kept toolchains need: no key holds an image, so that many may have one.

        These are the images that markers name, the current ones, and of the others the newest, as many as the policy
        has toolchains of a task.
        """
        generations = self.generations()
        images = {mark.image for mark in self.kept} | {self.policy.image, *self.policy.pins}
        others: dict[str, list[str]] = {}
        kept = []
        for memo in sorted(self.held.memos, key=lambda memo: memo.written, reverse=True):
            # A young memo was probed for a warm-up that has not written its markers yet.
            needed = self.now - memo.written < self.job_max
            for toolchain in generations.intersection(memo.toolchains):
                newer = others.setdefault(toolchain, [])
                if memo.path not in newer:
                    newer.append(memo.path)
                is_new = newer.index(memo.path) < self.policy.keep
                needed = needed or is_new or not images.isdisjoint(memo.names)
            kept += [memo] if needed else []
        return kept

    def places(self) -> set[Dir]:
        """Return the family directories that a kept marker or memo, or the policy, refers to."""
        found = {place for keys in self.policy.keys for place in keys.items()}
        for memo in self.kept_memos():
            found |= {place for keys in memo.keys for place in keys.items()}
        for mark in self.kept:
            found |= mark.dirs
        return found

    def loose(self, places: set[Dir]) -> Iterator[tuple[Dir, str, Object]]:
        """Yield entries of directories that stay, which no kept marker lists and no process has used lately."""
        listed: dict[Dir, set[str]] = {}
        for mark in self.kept:
            for family, names in mark.entries.items():
                mine = {whole(FAMILY[family], name) for name in names} if family in FAMILY else names
                listed.setdefault((family, mark.keys[family]), set()).update(mine)
        for place in () if self.held.newer else (places & self.held.entries.keys()) - self.pinned.keys():
            mine = listed.get(place, set())
            for name, entry in self.held.entries[place].items():
                if name not in mine and self.now - entry.used >= self.patience:
                    yield place, name, entry


def decide(
    held: Holdings,
    policy: PrunePolicy,
    *,
    job_max: float,
    now: float,
    pinned: Mapping[Dir, str] | None = None,
    patience: float | None = None,
) -> PrunePlan:
    """Return what this policy removes.

    pinned: directories that cannot be removed now, and why.
    patience: seconds since its last use for which an entry is not removed; job_max by default.
    """
    choice = _Choice(held, policy, job_max, now, pinned or {}, job_max if patience is None else patience)
    _by_age(choice)
    _by_count(choice)
    goes: dict[Dir, dict[str, Object]] = {}
    if policy.older_than is not None:
        for place, name, entry in choice.loose(choice.places()):
            if now - entry.used >= policy.older_than:
                goes.setdefault(place, {})[name] = entry
    _by_number(choice, goes)
    after = _bysize(choice, goes)
    named = {mark.image for mark in held.marks}.union(*(memo.names for memo in held.memos))
    kept = {mark.image for mark in choice.kept}.union(
        {policy.image, *policy.pins}, *(memo.names for memo in choice.kept_memos())
    )
    return PrunePlan(
        steps=tuple(_steps(choice, goes)),
        before=held.bytes,
        after=after,
        left=tuple(_left(choice, goes, after)),
        images=frozenset(named - kept - {""}),
        kept_images=frozenset(kept - {""}),
    )


def _by_age(choice: _Choice) -> None:
    limit = choice.policy.older_than
    for mark in choice.held.marks if limit is not None else ():
        idle = choice.now - mark.used
        if limit is not None and idle >= limit:
            choice.drop(mark, f"not used for {age(idle)}")


def _by_count(choice: _Choice) -> None:
    """Keep the newest toolchains of each task, as many as the policy has."""
    keep = choice.policy.keep
    tasks: dict[str, list[str]] = {}
    for mark in sorted(choice.held.marks, key=lambda mark: mark.written, reverse=True):
        newer = tasks.setdefault(mark.task, [])
        if mark.toolchain not in newer:
            newer.append(mark.toolchain)
        if newer.index(mark.toolchain) >= keep:
            choice.drop(mark, f"{counted(keep, 'newer toolchain')} of the task")


def _by_number(choice: _Choice, goes: dict[Dir, dict[str, Object]]) -> None:
    """Keep so few builds of each module that sglang's look-up reaches all that kept markers list."""
    for place in choice.places():
        there = choice.held.entries.get(place, {})
        loose = {name: entry.used for _, name, entry in choice.loose({place})}
        for name in leaves.surplus(FAMILY[place[0]], there, loose):
            goes.setdefault(place, {})[name] = there[name]


def _bysize(choice: _Choice, goes: dict[Dir, dict[str, Object]]) -> int:
    """Drop the least recently used until the root is small enough; return its size then."""
    limit = None if choice.held.newer else choice.policy.max_size
    while True:
        places = choice.places()
        for place in [place for place in goes if place not in places]:
            del goes[place]  # removed as a whole
        after = choice.held.bytes - _freed(choice, places, goes)
        if limit is None or after <= limit:
            return after
        oldest = _oldest_generation(choice)
        loose = sorted(
            (found for found in choice.loose(places) if found[1] not in goes.get(found[0], {})),
            key=lambda found: found[2].used,
        )
        for place, name, entry in loose:
            if oldest is not None and entry.used > oldest[0]:
                break
            goes.setdefault(place, {})[name] = entry
            after -= entry.bytes
            if after <= limit:
                return after
        if oldest is None:
            return after
        for mark in oldest[1]:
            choice.drop(mark, f"least recently used, and the root is over {size(limit)}")


def _oldest_generation(choice: _Choice) -> tuple[float, list[SurveyedMarker]] | None:
    """Return the least recently used toolchain of those that may be dropped, with its last use."""
    found: dict[str, list[SurveyedMarker]] = {}
    for mark in choice.kept:
        if mark.path not in choice.needed and mark.path not in choice.stuck:
            found.setdefault(mark.toolchain, []).append(mark)
    dated = [(max(_used(choice, mark) for mark in marks), marks) for marks in found.values()]
    return min(dated, key=lambda pair: pair[0], default=None)


def _used(choice: _Choice, mark: SurveyedMarker) -> float:
    """Return the last use of a marker, or of directories that only its toolchain has."""
    alone = [
        choice.held.dirs[place].used
        for place in mark.dirs & choice.held.dirs.keys()
        if all(other.toolchain == mark.toolchain for other in choice.held.marks if place in other.dirs)
    ]
    return max([mark.used, *alone])


def _freed(choice: _Choice, places: set[Dir], goes: Mapping[Dir, Mapping[str, Object]]) -> int:
    whole = sum(item.bytes for place, item in choice.held.dirs.items() if _may_go(choice, place, places))
    return whole + sum(entry.bytes for entries in goes.values() for entry in entries.values())


def _may_go(choice: _Choice, place: Dir, places: set[Dir]) -> bool:
    return place not in places and place not in choice.pinned and not choice.held.newer


def _steps(choice: _Choice, goes: Mapping[Dir, Mapping[str, Object]]) -> Iterator[PruneStep]:
    """Yield the removals in their order: markers and memos first."""
    for mark in choice.held.marks:
        if mark.path in choice.dropped:
            yield PruneStep("marker", mark.path, choice.dropped[mark.path])
    kept = choice.kept_memos()
    for memo in choice.held.memos:
        if memo not in kept:
            same = not choice.generations().isdisjoint(memo.toolchains)
            why = "newer images have its toolchain" if same else "its toolchain is not kept"
            yield PruneStep("memo", memo.path, why, key=(*memo.toolchains, "")[0])
    places = choice.places()
    for place, item in sorted(choice.held.dirs.items()):
        if place not in places and not choice.held.newer:
            family, key = place
            why = "no kept marker or memo refers to it"
            stays = choice.pinned.get(place, "")
            yield PruneStep("family", f"{family}/{key}", why, item.bytes, family, key, stays)
    for (family, key), entries in sorted(goes.items()):
        freed = sum(entry.bytes for entry in entries.values())
        why = f"{len(entries)} entries that no kept marker lists" if len(entries) > 1 else "no kept marker lists it"
        name = f"{family}/{key}" if len(entries) > 1 else f"{family}/{key}/{next(iter(entries))}"
        yield PruneStep("entries", name, why, freed, family, key, names=tuple(sorted(entries)))


def _left(choice: _Choice, goes: Mapping[Dir, Mapping[str, Object]], after: int) -> Iterator[str]:
    for path, problem in sorted(choice.held.strangers.items()):
        yield f"{path} is left alone: {problem}"
    if choice.held.newer:
        yield "a newer builder's marker is here, and what it needs is unknown: no kernels are removed"
    for why in sorted(set(choice.pinned.values())):
        places = [f"{family}/{key}" for (family, key), reason in sorted(choice.pinned.items()) if reason == why]
        more = f" and {len(places) - 1} more stay" if len(places) > 1 else " stays"
        yield f"{places[0]}{more}, with the markers for it: {why}"
    for place in sorted(choice.places()):
        stay = choice.held.entries.get(place, {}).keys() - goes.get(place, {}).keys()
        most = FAMILY[place[0]].looked_at
        for scope, names in leaves.scopes(stay).items() if most else ():
            if len(names) > most:
                yield (
                    f"{place[0]}/{place[1]}/{scope} keeps {len(names)} builds, listed by markers or in "
                    f"use, and sglang looks at the {most} newest alone"
                )
    if choice.held.view_bytes:
        yield f"{size(choice.held.view_bytes)} more are held by generations and views alone; sweep removes unused ones"
    limit = choice.policy.max_size
    if limit is not None and after > limit:
        yield f"{size(after)} stay, more than the limit of {size(limit)}: it is needed, in use, or was used just now"
