"""Proofs by builds of sglang: whether a proof is of this build, and if of another, whether that one's kernels do here.

A build changes with every commit of sglang; its kernels only where its kernel sources change.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Literal

from builder.cache import kernel_sources as sources_of
from builder.cache import reasons
from builder.cache.kernel_sources import Changed, Relation
from builder.cache.marker_format import Build, Marker
from builder.cache.toolchain import Sglang, release
from builder.text import printable

#: Whose proof counts: that of any build of sglang of the same release, or of this build alone.
Builds = Literal["any", "same"]


@dataclass(frozen=True)
class ProofWanted:
    """Which proof counts. strict: only one with the kind ``verified``. max_age: seconds; None: any age.

    mounted: the root that is read is the one that is mounted, and no copy, so that its mount counts as well.
    inside: the files of the environment that is judged can be seen, so that inputs can be compared one by one.
    """

    strict: bool = False
    build: Builds = "any"
    max_age: float | None = None
    mounted: bool = True
    inside: bool = False


ANY_PROOF = ProofWanted()


@dataclass(frozen=True)
class BuildProof:
    """What the proof of one build of sglang is worth for this build.

    same: it is this build. kernel_sources: whether both compile from the same sources. changed: how these differ,
    where it is known.
    """

    build: Build
    this: Build
    same: bool
    kernel_sources: Relation
    changed: Changed | None = None

    @property
    def age(self) -> float:
        """Seconds since the proof."""
        return max(0.0, time.time() - self.build.time)

    @property
    def date(self) -> str:
        return time.strftime("%Y-%m-%d", time.gmtime(self.build.time))

    @property
    def sentence(self) -> str:
        """Return which build proved the task, and when; "" for this build."""
        if self.same:
            return ""
        before, now = (printable(each.name or "unknown")[:80] for each in (self.build, self.this))
        text = f"proven by build {before} on {self.date}, this is {now}"
        if self.this.version is not None and release(self.this.version) is None:
            text += ", of an unknown release"
        return f"{text}; {self.warning}" if self.warning else text

    @property
    def warning(self) -> str:
        """Return what to expect of changed kernel sources; "" where they are the same."""
        if self.kernel_sources != "changed":
            return ""
        if self.changed is None:
            return "kernel-relevant files differ: expect compilation"
        number = self.changed.files
        files = "1 kernel-relevant file differs" if number == 1 else f"{number} kernel-relevant files differ"
        return f"{files}: expect compilation in {', '.join(reasons.by_cost(self.changed.families))}"


def build_of(sglang: Sglang) -> Build:
    """Return the build of a record, as a marker has it."""
    return Build(sglang["version"], sglang["commit"], sources_of.digest(sglang["sources"]))


def is_same(one: Build, other: Build) -> bool:
    """Return whether two proofs are of one build."""
    return (one.version, one.commit, one.sources) == (other.version, other.commit, other.sources)


def of_marker(marker: Marker, sglang: Sglang, *, written: float) -> list[BuildProof]:
    """Return what each build of a marker proves for this one: of this build, of its sources, then the newest.

    written: time of its file.
    """
    this, found = build_of(sglang), []
    for number, build in enumerate(marker.builds or (Build(proof=marker.proof),)):
        each = build if build.time else replace(build, time=int(written))
        relation: Relation = "unknown"
        changed = None
        if each.sources is not None and this.sources is not None:
            relation = "same" if each.sources == this.sources else "changed"
            if relation == "changed" and number == 0 and marker.sources and sglang["sources"]:
                changed = sources_of.changed(marker.sources, sglang["sources"])
        same = marker.schema != 1 and bool(marker.builds) and is_same(each, this)
        found.append(BuildProof(each, this, same, "same" if same else relation, changed))
    return sorted(found, key=lambda proof: (not proof.same, proof.kernel_sources != "same", proof.changed is None))
