"""What a marker holds, and its form on disk: one JSON document.

Every user of a machine may write to the cache root, so a document is read as a marker of a schema that is known, or as
a reason why it is none. Where markers are found is in `marker_files`, what they mean for a task in `markers`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from builder import text
from builder.cache import kernel_sources
from builder.cache.coverage import of_schema_1
from builder.cache.families import FAMILY, is_key
from builder.cache.toolchain import build_name

SCHEMA = 2
#: Schemas that are understood. Markers of schema 1 know one build and no kernel sources, and their folder has the
#: digest of a coverage with the build in it.
READABLE = (1, 2)
#: Builds that a marker keeps: the last ones that proved it.
BUILDS_KEPT = 8

#: What a marker's claim rests on:
#: verified: a second pass in a new process added nothing, and every claimed family has entries.
#: steady: the first pass ended when nothing was compiled any more; there was no second one.
#: inventory: the listed entries were valid at the end; the second pass was absent or incomplete, or a family is empty.
#: nothing-claimed: no family is claimed, so that there was nothing to prove.
#: pretended: the run was on a simulated GPU, so that it is never as good as verified.
Proof = Literal["verified", "steady", "inventory", "nothing-claimed", "pretended"]
VERIFIED: Proof = "verified"
PRETENDED: Proof = "pretended"

#: Numbers of a marker above these are not believed: seconds and GPUs, bytes.
_MOST = 10_000_000
_MOST_BYTES = 1 << 50


@dataclass(frozen=True)
class Claim:
    """What a marker states about one family. factors: what the key stands for; entries: names that must be valid."""

    key: str
    factors: Mapping[str, object]
    entries: tuple[str, ...]


@dataclass(frozen=True)
class Observed:
    """Circumstances of the run that wrote a marker. None or empty: the file holds no usable value.

    run: id of the run. image: id of the image. loaded: weights or dummies. seconds: the container's working time.
    gpus: their number. bytes: size of the listed entries by family. added_bytes: growth by family, claimed or not.
    pretended: name of the simulated GPU. others: fields that are recorded and never evaluated.
    """

    run: str | None = None
    image: str | None = None
    loaded: str | None = None
    seconds: float | None = None
    gpus: int | None = None
    bytes: Mapping[str, int] | None = None
    added_bytes: Mapping[str, int] = field(default_factory=dict)
    pretended: str | None = None
    others: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Build:
    """A build of sglang that proved a marker.

    sources: digest of its kernel sources, None if unknown. proof: see `Marker`. time: of the proof, seconds since the
    epoch; 0 if unknown.
    """

    version: str | None = None
    commit: str | None = None
    sources: str | None = None
    proof: str = ""
    time: int = 0

    @property
    def name(self) -> str | None:
        """The build for people."""
        return build_name(self.version, self.commit)


@dataclass(frozen=True)
class Prebuild:
    """What a run's prebuild, on CPU cores, was good for. keys: those that it used, by family.

    misses: DeepGEMM problems that were compiled on a GPU in spite of it, and the names of entries that are of none.
    """

    keys: Mapping[str, str] = field(default_factory=dict)
    misses: tuple[str, ...] = ()


@dataclass(frozen=True)
class Marker:
    """One marker. claims: by family. coverage: see `coverage`. toolchain: digest of all family keys of its run.

    proof: a `Proof`, or any other text that the file has. table: TABLE_VERSION of its keys. shapes: DeepGEMM problems
    that the run compiled. written: ISO 8601, UTC. builds: of sglang that proved it, the most recent first.
    sources: kernel sources of the first of them. newest: time (ns) of the newest source of each package that ninja
    compared with in its proof. prebuild: of the run, None without a complete one. schema: of the file.
    """

    label: str
    claims: Mapping[str, Claim]
    coverage: Mapping[str, object]
    proof: str
    toolchain: str | None = None
    table: int | None = None
    second_pass_added: int | None = None
    shapes: tuple[str, ...] = ()
    written: str = ""
    builds: tuple[Build, ...] = ()
    sources: Mapping[str, str] | None = None
    newest: Mapping[str, int] = field(default_factory=dict)
    prebuild: Prebuild | None = None
    schema: int = SCHEMA
    observed: Observed = field(default_factory=Observed)

    @property
    def keys(self) -> dict[str, str]:
        """Family key by claimed family."""
        return {family: claim.key for family, claim in self.claims.items()}

    def has_keys(self, present: Mapping[str, str]) -> bool:
        """Return whether the families that it claims have their present keys."""
        return all(present[family] == claim.key for family, claim in self.claims.items())


class NotAMarkerError(Exception):
    """The document is no marker. The message is the reason."""

    def __init__(self, problem: str, *, newer: bool = False) -> None:
        super().__init__(problem)
        self.newer = newer


def encoded(marker: Marker) -> bytes:
    """Return the content of the marker's file: JSON in ASCII."""
    known = {name: getattr(marker.observed, name) for name in _OBSERVED}
    document = {
        "schema": SCHEMA,
        "label": marker.label,
        "table": marker.table,
        "claims": list(marker.claims),
        "keys": marker.keys,
        "factors": {family: claim.factors for family, claim in marker.claims.items()},
        "toolchain": marker.toolchain,
        "coverage": marker.coverage,
        "entries": {family: claim.entries for family, claim in marker.claims.items()},
        "proof": marker.proof,
        "second_pass_added": marker.second_pass_added,
        "shapes": marker.shapes,
        "written": marker.written,
        "builds": [asdict(build) for build in marker.builds[:BUILDS_KEPT]],
        "sources": marker.sources,
        "newest": dict(marker.newest),
        "prebuild": None if marker.prebuild is None else asdict(marker.prebuild),
        "observed": {**marker.observed.others, **known},
    }
    return json.dumps(document, indent=1).encode("ascii") + b"\n"


def parsed(document: Any) -> Marker:
    """Return the marker that this document is. Raises NotAMarkerError."""
    if not isinstance(document, dict):
        raise NotAMarkerError("it is not an object")
    schema = document.get("schema")
    if type(schema) is not int or schema not in READABLE:
        # Newer ones stop the removal of kernels, so nothing else may count as one. A bool is no schema.
        newer = type(schema) is int and schema > SCHEMA
        raise NotAMarkerError(f"its schema is {_shown(schema)}, this program knows 1 and {SCHEMA}", newer=newer)
    claims: Any = document.get("claims")
    if not _is_texts(claims):
        raise NotAMarkerError("its claims are not a list of names")
    for family in claims:
        if family not in FAMILY or not FAMILY[family].claimable:
            raise NotAMarkerError(f"it claims {_shown(family)}, which is no family that can be claimed")
    keys = _each(document.get("keys"), claims, _is_key, "key")
    entries = _each(document.get("entries"), claims, _is_texts, "entries")
    factors = _each(document.get("factors"), claims, _is_object, "factors")
    coverage, proof, sources = document.get("coverage"), document.get("proof"), document.get("sources")
    if not isinstance(coverage, dict) or not isinstance(proof, str):
        raise NotAMarkerError("it has no coverage or no proof")
    builds = _builds(document.get("builds")) if schema == SCHEMA else _of_schema_1(document, coverage, proof)
    return Marker(
        label=_text(document.get("label")) or "",
        claims={name: Claim(keys[name], factors[name], tuple(entries[name])) for name in claims},
        coverage=coverage if schema == SCHEMA else of_schema_1(coverage),
        proof=proof,
        toolchain=_text(document.get("toolchain")),
        table=_whole(document.get("table")),
        second_pass_added=_whole(document.get("second_pass_added")),
        shapes=_texts(document.get("shapes")),
        written=_text(document.get("written")) or "",
        builds=builds,
        sources=sources if kernel_sources.is_sources(sources) else None,
        newest=_times(document.get("newest")),
        prebuild=_prebuild(document.get("prebuild")),
        schema=schema,
        observed=_observed(document.get("observed")),
    )


def _builds(rows: Any) -> tuple[Build, ...]:
    return tuple(
        Build(
            version=_text(row.get("version")),
            commit=_text(row.get("commit")),
            sources=_text(row.get("sources")),
            proof=_text(row.get("proof")) or "",
            time=_second(row.get("time")),
        )
        for row in (rows[:BUILDS_KEPT] if isinstance(rows, list) else ())
        if isinstance(row, dict)
    )


def _of_schema_1(document: Mapping[str, Any], coverage: Mapping[str, Any], proof: str) -> tuple[Build, ...]:
    """Return the one build of a marker of schema 1, which had it in its coverage."""
    observed = document.get("observed")
    time = _second(observed.get("time")) if isinstance(observed, dict) else 0
    return (Build(_text(coverage.get("sglang")), _text(coverage.get("sglang commit")), None, proof, time),)


def _prebuild(document: Any) -> Prebuild | None:
    if not isinstance(document, dict):
        return None
    keys = document.get("keys")
    sound = {name: key for name, key in keys.items() if _is_key(key)} if isinstance(keys, dict) else {}
    return Prebuild(sound, _texts(document.get("misses")))


def _observed(document: Any) -> Observed:
    if not isinstance(document, dict):
        return Observed()
    return Observed(
        run=_text(document.get("run")),
        image=_text(document.get("image")),
        loaded=_text(document.get("loaded")),
        seconds=_number(document.get("seconds")),
        gpus=_whole(document.get("gpus")),
        bytes=_sizes(document.get("bytes")),
        added_bytes=_sizes(document.get("added_bytes")) or {},
        pretended=_text(document.get("pretended")),
        others={name: value for name, value in document.items() if name not in _OBSERVED},
    )


_OBSERVED = tuple(each.name for each in fields(Observed) if each.name != "others")


def _each(values: Any, claims: list[str], test: Callable[[Any], bool], name: str) -> dict[str, Any]:
    """Return `values` as an object that has a sound value for every claimed family. Raises NotAMarkerError."""
    if isinstance(values, dict) and all(test(values.get(family)) for family in claims):
        return values
    raise NotAMarkerError(f"it has no {name} for a family that it claims")


def _shown(value: Any) -> str:
    plain = value is None or isinstance(value, (str, int, float))
    return text.printable(json.dumps(value)[:60]) if plain else "not a name or number"


def _is_key(value: Any) -> bool:
    return isinstance(value, str) and is_key(value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list) else ()


def _times(value: Any) -> dict[str, int]:
    """Return the times in ns among the values of an object."""
    if not isinstance(value, dict):
        return {}
    return {name: time for name, time in value.items() if type(time) is int and 0 <= time < 1 << 63}


def _second(value: Any) -> int:
    """Return a time in seconds since the epoch, 0 for what is none."""
    return value if type(value) is int and 0 <= value < 1 << 40 else 0


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _number(value: Any) -> float | None:
    sound = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < _MOST
    return float(value) if sound else None


def _whole(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < _MOST else None


def _sizes(value: Any) -> dict[str, int] | None:
    """Return the sizes among the values of an object, without what is none."""
    if not isinstance(value, dict):
        return None
    return {name: size for name, size in value.items() if type(size) is int and 0 <= size < _MOST_BYTES}
