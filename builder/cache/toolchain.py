"""What the kernels of one environment depend on: a readable record, and from it the key of each family.

The record is JSON::

    {"schema": 1,
     "factors":  {name: text or null},                 # every factor that families.py names
     "gpus":     [{"index", "uuid", "name", "compute_capability", "sm_count", "memory_bytes"}],
     "sglang":   {"version": text or null, "commit": text or null},
     "switches": {variable: text},                     # that every process there has, a task's own not among them
     "variables": {variable: text},                    # factors of families, where they are set (`variables`)
     "observed": {"driver", "python", "problems": [text], "pretended": a GPU that is not there, or null}}

`agent.probe` makes it. What is absent is null, never guessed: an absent compiler is another toolchain than any
compiler.

The memo (``<root>/images/<image id>.json``) keeps records, so that a host that knows the image id asks no container.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import posixpath
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, TypeGuard

from builder import files
from builder.cache import variables
from builder.cache.families import FAMILIES, FAMILY, TABLE_VERSION
from builder.task import PRETEND_VARIABLE

SCHEMA = 1


class Sglang(TypedDict):
    """The serving framework of a record."""

    version: str | None
    commit: str | None


class RecordObserved(TypedDict, total=False):
    """What a probe saw besides the factors. problems: in words. pretended: name of a simulated GPU."""

    driver: str | None
    python: str
    problems: list[str]
    pretended: str | None


class _Variables(TypedDict, total=False):
    switches: dict[str, str]  # earlier versions did not record them
    variables: dict[str, str]  # nor these


class Record(_Variables):
    """A toolchain record as JSON holds it; `sound` checks what was read."""

    schema: int
    factors: dict[str, str | None]
    gpus: list[dict[str, Any]]
    sglang: Sglang
    observed: RecordObserved


#: Variables of a task's environment that change what a probe sees; a memo holds only where these are the same.
PROBE_ENV: tuple[str, ...] = (
    "CUDA_DEVICE_ORDER",
    "CUDA_HOME",
    "CUDA_PATH",
    "CUDA_VISIBLE_DEVICES",
    "CXX",
    "DG_JIT_NVCC_COMPILER",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "NVIDIA_VISIBLE_DEVICES",
    "PATH",
    "PYTHONHOME",
    "PYTHONPATH",
    "SGLANG_BUILD_COMMIT",
    "TRITON_PTXAS_BLACKWELL_PATH",
    "TRITON_PTXAS_PATH",
    PRETEND_VARIABLE,
)

#: Variables by which sglang and DeepGEMM decide what to compile: they are part of what a task covers.
SWITCHES: tuple[str, ...] = ("SGLANG_*", "SGL_*", "DG_*")

_PLACES = frozenset(variable for family in FAMILIES for variable, _ in family.env)

_MEMO_LIMIT = 4 << 20
_MEMO_KEEP = 16


def switches(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of this environment that may change what is compiled, without those of cache paths."""
    return {
        name: value
        for name, value in sorted(environ.items())
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in SWITCHES)
        and name not in _PLACES
        and not variables.is_inert(name)
    }


def factor_variables(environ: Mapping[str, str], cuda_home: str) -> dict[str, str]:
    """Return the variables of this environment that are factors of families. cuda_home: as compilers find it."""
    return variables.of_process({**environ, variables.CUDA_HOME: cuda_home}, _PLACES)


def of_task(record: Record, own: Mapping[str, str]) -> Record:
    """Return the record as it is for a task with these variables of its own."""
    return {**record, "variables": variables.of_task(record.get("variables", {}), own, _PLACES)}


def family_factors(record: Record, family: str) -> dict[str, str | None]:
    """Return the factors of one family, in the table's order, and then the variables that are set."""
    factors = record["factors"]
    return {
        **{name: factors.get(name) for name in FAMILY[family].factors},
        **variables.of_family(record.get("variables", {}), family),
    }


def family_key(record: Record, family: str) -> str:
    """Return 16 hex digits that name the family's directory: equal exactly where every factor is equal."""
    return _digest([family, TABLE_VERSION, family_factors(record, family)])


def family_keys(record: Record) -> dict[str, str]:
    """Return the key of every family."""
    return {family.name: family_key(record, family.name) for family in FAMILIES}


def digest(keys: Mapping[str, str]) -> str:
    """Return 16 hex digits over these family keys, in any order: for people, and for file names of markers."""
    return _digest(dict(keys))


def gpu_model(record: Record) -> str | None:
    """Return the GPU models of a record as `read_memo` compares them; "" for no GPU, None for nameless ones."""
    names = distinct(record["gpus"], "name")
    return names if names is not None else (None if record["gpus"] else "")


def sound(record: Any) -> TypeGuard[Record]:
    """Return whether a document read from disk or from a container is a record of this schema."""
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        return False
    gpus, sglang, observed = record.get("gpus"), record.get("sglang"), record.get("observed")
    return (
        _texts(record.get("factors"), (str, type(None)))
        and isinstance(gpus, list)
        and all(isinstance(gpu, dict) and isinstance(gpu.get("name"), (str, type(None))) for gpu in gpus)
        and isinstance(sglang, dict)
        and all(name in sglang and isinstance(sglang[name], (str, type(None))) for name in ("version", "commit"))
        and _texts(record.get("switches", {}), (str,))
        and _texts(record.get("variables", {}), (str,))
        and isinstance(observed, dict)
    )


def _texts(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(text, kinds) for name, text in value.items()
    )


# The memo


@dataclass(frozen=True)
class ProbeMemo:
    """A remembered record. image: id of the image it was made in. env: the variables of the task that a probe sees.

    table: TABLE_VERSION of the program that wrote it.
    """

    image: str
    env: Mapping[str, Any]
    table: Any
    record: Record

    def circumstances(self) -> tuple[Any, ...]:
        """Return what must differ for another record of the same image to be kept next to this one."""
        factors, observed = self.record["factors"], self.record["observed"]
        return self.env, factors.get("mount"), gpu_model(self.record), observed.get("driver")


def memo_path(root: Path, image_id: str) -> Path:
    """Return the file of an image's records, without the colon of its id, which other programs mistake."""
    return root / "images" / f"{re.sub(r'[^A-Za-z0-9._-]', '-', image_id).lstrip('.-') or 'image'}.json"


def memos_in(path: Path) -> list[ProbeMemo]:
    """Return the memos of a file, most recent first, of any table version; none where it holds none."""
    document = _document(path)
    image, memos = document.get("image"), document.get("memos")
    if document.get("schema") != SCHEMA or not isinstance(image, str) or not isinstance(memos, list):
        return []
    return [found for memo in memos if (found := _memo(image, memo)) is not None]


def read_memo(
    root: Path, image_id: str, *, mount: str, gpus: str | None, driver: str | None, env: Mapping[str, str]
) -> Record | None:
    """Return the record that a probe would make in this image, if it was made before; else None.

    gpus: names of the GPU models that the host sees, sorted and joined by ", " ("" for none).
    driver: its version. None for either: the host cannot see it, so that it is not compared.
    env: the task's environment. With a simulated GPU the host's do not count, and its memos are never those of a real
    one.
    """
    if env.get(PRETEND_VARIABLE):
        gpus = driver = None
    for memo in _current(memo_path(root, image_id), image_id):
        record = memo.record
        model, seen = gpu_model(record), _text(record["observed"].get("driver"))
        if (
            "variables" in record  # else an earlier version's: it may lack factors that a task's container finds
            and record["factors"].get("mount") == posixpath.normpath(mount)
            and memo.env == _probe_env(env)
            and (gpus is None or model is None or gpus == model)
            and (driver is None or seen is None or driver == seen)
        ):
            return record
    return None


def known_images(root: Path) -> list[tuple[str, Record]]:
    """Return (image id, record) of every memo below `root` that is valid for this program."""
    return [
        (memo.image, memo.record)
        for item in files.listing(str(root / "images")) or ()
        for memo in memos_in(Path(item.path))
        if memo.table == TABLE_VERSION and Path(item.path) == memo_path(root, memo.image)
    ]


def write_memo(root: Path, image_id: str, record: Record, *, env: Mapping[str, str], known: bool = False) -> None:
    """Remember the record for this image and task environment, next to those of others. Raises OSError.

    known: keep a memo with the same factors as it is: a task may see fewer GPUs than there are.
    """
    path = memo_path(root, image_id)
    new = ProbeMemo(image_id, _probe_env(env), TABLE_VERSION, record)
    same = new.circumstances()
    before = _current(path, image_id)
    if known and any(m.circumstances() == same and _alike(m.record, record) for m in before):
        return
    memos = [new, *(memo for memo in before if memo.circumstances() != same)][:_MEMO_KEEP]
    rows = [{"table": memo.table, "env": memo.env, "record": memo.record} for memo in memos]
    _write(path, {"schema": SCHEMA, "image": image_id, "memos": rows})


def _alike(one: Record, other: Record) -> bool:
    return one["factors"] == other["factors"] and one.get("variables") == other.get("variables")


def drop_memos(path: Path, toolchain: str) -> None:
    """Remove the memos of this toolchain from a file, and with the last memo the file. Raises OSError."""
    document = _document(path)
    rows = document.get("memos")
    if not isinstance(rows, list):
        return
    left = [row for row in rows if (memo := _memo("", row)) is None or digest(family_keys(memo.record)) != toolchain]
    if left:
        _write(path, {**document, "memos": left})
    else:
        path.unlink(missing_ok=True)


def _document(path: Path) -> dict[str, Any]:
    try:
        document = files.read_json(str(path), _MEMO_LIMIT)
    except files.UnreadableError:
        return {}
    return document if isinstance(document, dict) else {}


def _write(path: Path, document: Mapping[str, Any]) -> None:
    files.write_atomically(path, json.dumps(document, indent=1).encode("ascii"))


def _memo(image: str, row: Any) -> ProbeMemo | None:
    record = row.get("record") if isinstance(row, dict) else None
    return ProbeMemo(image, row.get("env"), row.get("table"), record) if sound(record) else None


def _current(path: Path, image_id: str) -> list[ProbeMemo]:
    """Return the memos of this image and of this program's table."""
    return [memo for memo in memos_in(path) if memo.image == image_id and memo.table == TABLE_VERSION]


def _probe_env(env: Mapping[str, str]) -> dict[str, str]:
    return {name: env[name] for name in PROBE_ENV if name in env}


def distinct(gpus: Iterable[Mapping[str, Any]], field: str) -> str | None:
    """Return the different values among the GPUs, sorted: a mixed machine is another toolchain."""
    return ", ".join(sorted({str(gpu[field]) for gpu in gpus if gpu.get(field)})) or None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:16]
