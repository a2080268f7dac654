"""Markers as files: where they lie, and whether one is a marker at all.

Anybody may have written to the cache root. Whatever lies where a marker should be is a marker of this schema, or a
reason why not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder import files, text
from builder.cache.coverage import coverage_digest
from builder.cache.families import FAMILY

SCHEMA = 1

_LIMIT = 64 << 20


@dataclass(frozen=True)
class Found:
    """A file where a marker should be: the marker, or why it is none. path: below the root. written: its mtime."""

    path: str
    written: float
    marker: dict[str, Any] | None
    problem: str = ""


def read(path: Path) -> dict[str, Any] | None:
    """The marker in this file, or None where it holds none that this program understands."""
    return _load(path)[0]


def claimed_keys(path: Path) -> dict[str, str]:
    """Family key by claimed family of the marker in this file; empty where it holds none."""
    marker = read(path)
    return {} if marker is None else {family: marker["keys"][family] for family in marker["claims"]}


def _label(label: str) -> str:
    """The label as a file name may hold it."""
    return re.sub(r"[^A-Za-z0-9._+=@-]+", "-", label).lstrip(".-")[:120] or "task"


def folder_name(label: str, factors: Mapping[str, Any]) -> str:
    """Where the markers of a task with this label and coverage lie, below ``markers/``."""
    return f"{_label(label)}-{coverage_digest(factors)}"


def neighbours(root: Path, label: str) -> list[Found]:
    """Every marker of this label, whatever it covers."""
    pattern = re.compile(re.escape(_label(label)) + "-[0-9a-f]{12}")
    folders = [item.name for item in files.listing(str(root / "markers")) or () if pattern.fullmatch(item.name)]
    return [found for name in folders for found in folder(root, name)]


def twins(root: Path, name: str) -> list[Found]:
    """Markers of other labels that cover the same as those in the folder of this name."""
    suffix = name[name.rindex("-") :]
    names = [item.name for item in files.listing(str(root / "markers")) or ()]
    return [found for other in names if other.endswith(suffix) and other != name for found in folder(root, other)]


def folder(root: Path, name: str) -> list[Found]:
    """What lies where a task's markers belong, most recent first."""
    base = root / "markers" / name
    items = files.listing(str(base))
    if items is None:
        return [Found(f"markers/{name}", 0.0, None, "the directory cannot be read")]
    found = []
    for item in items:
        if item.name.endswith(".json") and not item.name.startswith("."):
            marker, problem = _load(base / item.name)
            try:
                written = item.stat(follow_symlinks=False).st_mtime
            except OSError:
                written = 0.0
            found.append(Found(text.printable(f"markers/{name}/{item.name}"), written, marker, problem))
    return sorted(found, key=lambda item: item.written, reverse=True)


def _load(path: Path) -> tuple[dict[str, Any] | None, str]:
    try:
        marker = files.read_json(str(path), _LIMIT)
    except files.UnreadableError as error:
        return None, f"it {error}"
    problem = _problem(marker)
    return (None, problem) if problem else (marker, "")


def _problem(marker: Any) -> str:
    """Why a document is not a marker of this schema; "" where it is."""
    if not isinstance(marker, dict):
        return "it is not an object"
    if marker.get("schema") != SCHEMA:
        return f"its schema is {_shown(marker.get('schema'))}, this program knows {SCHEMA}"
    claims: Any = marker.get("claims")
    if not _texts(claims):
        return "its claims are not a list of names"
    for family in claims:
        if family not in FAMILY or not FAMILY[family].claimable:
            return f"it claims {_shown(family)}, which is no family that can be claimed"
    keys, listed, factors = marker.get("keys"), marker.get("entries"), marker.get("factors")
    if not isinstance(keys, dict) or not all(_is_key(keys.get(family)) for family in claims):
        return "it has no key for a family that it claims"
    if not isinstance(listed, dict) or not all(_texts(listed.get(family)) for family in claims):
        return "it has no entries for a family that it claims"
    if not isinstance(factors, dict) or not all(isinstance(factors.get(family), dict) for family in claims):
        return "it has no factors for a family that it claims"
    if not isinstance(marker.get("coverage"), dict) or not isinstance(marker.get("proof"), str):
        return "it has no coverage or no proof"
    return ""


def _shown(value: Any) -> str:
    plain = value is None or isinstance(value, (str, int, float))
    return text.printable(json.dumps(value)[:60]) if plain else "not a name or number"


def _is_key(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{16}", value) is not None


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
