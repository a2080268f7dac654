"""Memos: what an image is made of, kept in the root so that a builder that knows the image asks no container.

``<root>/images/<digest>.json`` holds the records of one image, without the factors of the machine that they were made
on (`toolchain.HOST_FACTORS`), so that it is true wherever the image runs. ``<root>/images/hosts.json`` holds what those
machines had; a memo's reader adds what its own machine has::

    {"schema": 2, "image": name, "names": [name], "memos": [{"table", "env", "record"}]}
    {"schema": 2, "hosts": [{"env", "gpus", "driver", "isa"}]}

An image has several names: the digest of its config is its id in one image store, that of its manifest in another, and
a pod knows only the latter. The file is named by the digest of its layers and environment where they can be seen.
"""

from __future__ import annotations

import contextlib
import json
import posixpath
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from builder import files
from builder.beneath import Tree
from builder.cache.families import TABLE_VERSION
from builder.cache.toolchain import (
    HOST_FACTORS,
    PROBE_ENV,
    SCHEMA,
    Record,
    RecordObserved,
    digest,
    distinct,
    family_keys,
    sound,
)
from builder.task import PRETEND_VARIABLE, ServingImage

_LIMIT = 4 << 20
_KEEP = 16
_HOSTS = "hosts.json"
#: Files of images that are looked at for a name.
_MOST_FILES = 2000

#: Folder of the memos, below the root.
FOLDER = "images"


@dataclass(frozen=True)
class ProbeMemo:
    """A remembered record, without the factors of a machine.

    image: as the writer named the image; names: every known name. env: the variables of the task that a probe sees.
    table: TABLE_VERSION of the program that wrote it.
    """

    image: str
    names: frozenset[str]
    env: Mapping[str, Any]
    table: Any
    record: Record


@dataclass(frozen=True)
class Host:
    """What a probe found of its machine, under these variables of a task. gpus: as a record has them."""

    env: Mapping[str, Any]
    gpus: list[dict[str, Any]]
    driver: str | None
    isa: str | None

    @property
    def model(self) -> str | None:
        """Its GPU models as `read_memo` compares them; "" for no GPU, None for nameless ones."""
        names = distinct(self.gpus, "name")
        return names if names is not None else (None if self.gpus else "")


def memo_path(root: Path, name: str) -> Path:
    """Return the file of an image's records, without the colon of its name, which other programs mistake."""
    return root / FOLDER / f"{re.sub(r'[^A-Za-z0-9._-]', '-', name).lstrip('.-') or 'image'}.json"


def memos_in(path: Path) -> list[ProbeMemo]:
    """Return the memos of a file, most recent first, of any table version; none where it holds none."""
    document = _document(path)
    image, names, memos = document.get("image"), document.get("names"), document.get("memos")
    if document.get("schema") != SCHEMA or not isinstance(image, str) or not isinstance(memos, list):
        return []
    known = frozenset([image, *(name for name in (names if isinstance(names, list) else ()) if isinstance(name, str))])
    return [
        ProbeMemo(image, known, row["env"], row.get("table"), row["record"])
        for row in memos
        if isinstance(row, dict) and isinstance(row.get("env"), dict) and sound(row.get("record"))
    ]


def hosts(root: Path) -> list[Host]:
    """Return what is known of machines that used this root, most recent first."""
    document = _document(root / FOLDER / _HOSTS)
    rows = document.get("hosts")
    if document.get("schema") != SCHEMA or not isinstance(rows, list):
        return []
    return [found for row in rows if (found := _host(row)) is not None]


def read_memo(
    root: Path,
    image: ServingImage,
    *,
    mount: str,
    gpus: str | None,
    driver: str | None,
    isa: str | None,
    env: Mapping[str, str],
) -> Record | None:
    """Return the record that a probe would make in this image on this machine, if enough of it is remembered.

    gpus: names of the GPU models that the machine sees, sorted and joined by ", " ("" for none).
    driver, isa: its driver's version and instruction set level. None for any: the caller cannot see it, and what was
    seen last counts.
    env: the task's environment. With a simulated GPU the machine's do not count.
    """
    wanted = probe_env(env)
    if wanted.get(PRETEND_VARIABLE):
        gpus = driver = None
    host = _seen(root, wanted, gpus, driver, isa)
    if host is None:
        return None
    for memo in _current(root, image):
        if memo.record["factors"].get("mount") == posixpath.normpath(mount) and memo.env == wanted:
            return on_host(memo.record, host)
    return None


def on_host(record: Record, host: Host) -> Record:
    """Return a memo's record as it is on this machine."""
    factors = {
        **record["factors"],
        "compute_capability": distinct(host.gpus, "compute_capability"),
        "driver": host.driver,
        "gpu_name": distinct(host.gpus, "name"),
        "isa": host.isa,
        "sm_count": distinct(host.gpus, "sm_count"),
    }
    return {**record, "factors": factors, "gpus": host.gpus, "observed": {**record["observed"], "driver": host.driver}}


def records(root: Path, memo: ProbeMemo) -> Iterator[Record]:
    """Yield a memo's record as it is on every known machine."""
    for host in hosts(root):
        if host.env == memo.env:
            yield on_host(memo.record, host)


def known_images(root: Path) -> list[ProbeMemo]:
    """Return every memo below `root` that is valid for this program."""
    return [memo for path in _files(root) for memo in memos_in(path) if memo.table == TABLE_VERSION]


def write_memo(root: Path, image: ServingImage, record: Record, *, env: Mapping[str, str], known: bool = False) -> None:
    """Remember the record of this image and task environment, next to those of others. Raises OSError.

    known: keep what is there of this machine with the same factors: a task may see fewer GPUs than there are.
    """
    if image.id is None:
        return
    wanted = probe_env(env)
    host = Host(wanted, list(record["gpus"]), record["factors"].get("driver"), record["factors"].get("isa"))
    portable = _portable(record)
    before = _current(root, image)
    if not any(_same(memo, wanted, portable) for memo in before[:_KEEP] if memo.names >= _names(image)):
        mount = portable["factors"].get("mount")
        others = [memo for memo in before if (memo.env, memo.record["factors"].get("mount")) != (wanted, mount)]
        rows = [{"table": TABLE_VERSION, "env": wanted, "record": portable}]
        rows += [{"table": memo.table, "env": memo.env, "record": memo.record} for memo in others]
        names = _names(image).union(*(memo.names for memo in before))
        document = {"schema": SCHEMA, "image": image.id, "names": sorted(names), "memos": rows[:_KEEP]}
        path = _path(root, image)
        # An earlier version, or a writer who did not see the layers, named the file by another name.
        others_of_it = {*_named(root, image), memo_path(root, image.id)} - {path}
        _write(path, document)
        for other in others_of_it:
            _remove(other)
    _write_host(root, host, known)


def probe_env(env: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of a task by which memos are told apart."""
    return {name: env[name] for name in PROBE_ENV if name in env}


def exported(root: Path, names: Collection[str], envs: Collection[Mapping[str, str]]) -> dict[str, Mapping[str, Any]]:
    """Return the documents of a root that knows no more than these images, for these environments of tasks, by name.

    No GPU is named by its UUID, which is one machine's.
    """
    documents: dict[str, Mapping[str, Any]] = {}
    for path in _files(root):
        memos = [memo for memo in memos_in(path) if memo.names & set(names) and dict(memo.env) in map(dict, envs)]
        current = [memo for memo in memos if memo.table == TABLE_VERSION]
        if current:
            rows = [{"table": memo.table, "env": memo.env, "record": memo.record} for memo in current]
            known = sorted(current[0].names)
            documents[path.name] = {"schema": SCHEMA, "image": current[0].image, "names": known, "memos": rows}
    found = [host for host in hosts(root) if dict(host.env) in map(dict, envs)]
    if documents and found:
        rows = [_host_row(replace(host, gpus=[_nameless(gpu) for gpu in host.gpus])) for host in found]
        documents[_HOSTS] = {"schema": SCHEMA, "hosts": rows}
    return documents


def adopt(root: Path, other: Path) -> None:
    """Add the memos of another root that this one does not have. What this one knows stays. Raises OSError."""
    known = [(memo.names, memo.env, memo.record["factors"].get("mount")) for memo in known_images(root)]
    for path in _files(other):
        rows = []
        for memo in memos_in(path):
            mount = memo.record["factors"].get("mount")
            if memo.table == TABLE_VERSION and not any(
                names & memo.names and (env, its) == (memo.env, mount) for names, env, its in known
            ):
                rows.append(memo)
        if rows:
            before = [memo for each in _files(root) for memo in memos_in(each) if memo.names & rows[0].names]
            target = root / FOLDER / path.name
            every = [{"table": memo.table, "env": memo.env, "record": memo.record} for memo in (*before, *rows)]
            names = sorted(rows[0].names.union(*(memo.names for memo in before)))
            _write(target, {"schema": SCHEMA, "image": rows[0].image, "names": names, "memos": every[:_KEEP]})
    mine = hosts(root)
    added = [host for host in hosts(other) if all((host.env, host.model) != (own.env, own.model) for own in mine)]
    if added:
        document = [_host_row(host) for host in (*mine, *added)][:_KEEP]
        _write(root / FOLDER / _HOSTS, {"schema": SCHEMA, "hosts": document})


def drop_memos(root: Path, path: Path, toolchain: str) -> None:
    """Remove the memos of this toolchain, on the machine that used the root last. Raises OSError.

    With the last memo the file is removed. toolchain: "" for memos of no known machine.
    """
    document = _document(path)
    rows = document.get("memos")
    if not isinstance(rows, list):
        return
    gone = []
    for memo in memos_in(path):
        last = next(records(root, memo), None)
        if toolchain == ("" if last is None else digest(family_keys(last))):
            gone.append((memo.env, memo.record))
    left = [row for row in rows if not isinstance(row, dict) or (row.get("env"), row.get("record")) not in gone]
    if left:
        _write(path, {**document, "memos": left})
    else:
        _remove(path)


def _seen(root: Path, env: Mapping[str, str], gpus: str | None, driver: str | None, isa: str | None) -> Host | None:
    """Return this machine: as it was seen before, with what the caller sees now."""
    for host in hosts(root):
        if host.env == env and (gpus is None or host.model is None or gpus == host.model):
            return Host(env, host.gpus, driver or host.driver, isa or host.isa)
    return None


def _same(memo: ProbeMemo, env: Mapping[str, str], record: Record) -> bool:
    return memo.env == env and memo.record == record


def _portable(record: Record) -> Record:
    """Return the record without what is the machine's."""
    factors = {name: value for name, value in record["factors"].items() if name not in HOST_FACTORS}
    observed: RecordObserved = {**record["observed"], "driver": None}
    return {**record, "factors": factors, "gpus": [], "observed": observed}


def _write_host(root: Path, host: Host, known: bool) -> None:
    def circumstances(each: Host) -> tuple[object, ...]:
        return each.env, each.model, each.isa

    before = hosts(root)
    same = [each for each in before if circumstances(each) == circumstances(host)]
    kept = next((each for each in same if each == host or (known and each.driver == host.driver)), None)
    # Of those with its variables, the first is what a reader gets that cannot see the GPUs itself.
    if kept is not None and kept == next(each for each in before if each.env == host.env):
        return
    rows = [kept or host, *(each for each in before if each not in same)][:_KEEP]
    _write(root / FOLDER / _HOSTS, {"schema": SCHEMA, "hosts": [_host_row(each) for each in rows]})


def _host_row(host: Host) -> dict[str, object]:
    return {"env": host.env, "gpus": host.gpus, "driver": host.driver, "isa": host.isa}


def _nameless(gpu: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in gpu.items() if name != "uuid"}


def _host(row: Any) -> Host | None:
    if not isinstance(row, dict):
        return None
    env, gpus = row.get("env"), row.get("gpus")
    sound_gpus = isinstance(gpus, list) and all(
        isinstance(gpu, dict) and isinstance(gpu.get("name"), (str, type(None))) for gpu in gpus
    )
    if not isinstance(env, dict) or not sound_gpus:
        return None
    return Host(env, list(gpus or ()), _text(row.get("driver")), _text(row.get("isa")))


def _names(image: ServingImage) -> frozenset[str]:
    return frozenset(name for name in (image.id, image.content, *image.names) if name)


def _path(root: Path, image: ServingImage) -> Path:
    """Return the image's file: by its content, or the one that has its name, or a new one of its name."""
    if image.content:
        return memo_path(root, image.content)
    named = _named(root, image)
    return named[0] if named else memo_path(root, image.id or "")


def _named(root: Path, image: ServingImage) -> list[Path]:
    """Return the files that know the image by one of its names."""
    wanted = _names(image)
    return [path for path in _files(root) if any(memo.names & wanted for memo in memos_in(path)[:1])]


def _files(root: Path) -> list[Path]:
    """Return the files of images, by name; of a folder with more than that, as many as are read."""
    with Tree(root, FOLDER) as tree:
        names = sorted(item.last for item in tree.some("", _MOST_FILES) or ())
    return [root / FOLDER / name for name in names if name.endswith(".json") and name != _HOSTS]


def _folder(path: Path) -> Tree:
    """Return the directory of this file, which is always a folder of the root."""
    return Tree(path.parent.parent, path.parent.name)


def _remove(path: Path) -> None:
    with _folder(path) as tree, contextlib.suppress(FileNotFoundError):
        tree.unlink(path.name)


def _current(root: Path, image: ServingImage) -> list[ProbeMemo]:
    """Return the memos of this image and of this program's table: by its content if they are there, else by name."""
    own = memos_in(memo_path(root, image.content)) if image.content else []
    paths = [] if own else _named(root, image)
    return [memo for memo in (own or [m for path in paths for m in memos_in(path)]) if memo.table == TABLE_VERSION]


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _document(path: Path) -> dict[str, Any]:
    try:
        with _folder(path) as tree:
            document = tree.read_json(path.name, _LIMIT)
    except files.UnreadableError:
        return {}
    return document if isinstance(document, dict) else {}


def _write(path: Path, document: Mapping[str, object]) -> None:
    tree = _folder(path)
    tree.make()
    with tree:
        tree.write_atomically(path.name, json.dumps(document, indent=1).encode("ascii"))
