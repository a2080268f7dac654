"""What the kernels of one environment depend on: a readable record, and from it the key of each family.

The record is JSON::

    {"schema": 1,
     "factors":  {name: text or null},                 # every factor that families.py names
     "gpus":     [{"index", "uuid", "name", "compute_capability", "sm_count", "memory_bytes"}],
     "sglang":   {"version": text or null, "commit": text or null},
     "switches": {variable: text},                     # that every process there has, a task's own not among them
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
from pathlib import Path
from typing import Any

from builder import files
from builder.cache.families import FAMILIES, FAMILY, TABLE_VERSION
from builder.task import PRETEND_VARIABLE

Record = dict[str, Any]
SCHEMA = 1

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

#: Of those, what cannot change a kernel: who and where it is, how loud, for how long, and what continuous integration
#: keeps its books with (srt/environ.py of 0.5.23; DeepGEMM's own, by what enters its keys).
INERT: tuple[str, ...] = (
    "SGLANG_BUILD_COMMIT",
    "SGLANG_CI_*",
    "SGLANG_CUDA_COREDUMP*",
    "SGLANG_HEALTH_CHECK_TIMEOUT",
    "SGLANG_HOST_IP",
    "SGLANG_IMAGE_TAG",
    "SGLANG_IS_IN_CI*",
    "SGLANG_LOG*",
    "SGLANG_PORT",
    "SGLANG_TEST_*",
    "SGLANG_WARMUP_TIMEOUT",
    "DG_JIT_DUMP_*",
    "DG_JIT_PRINT_*",
    "DG_PRINT_CONFIGS",
    # Whatever else they are: no secret's value is recorded.
    "*_KEY",
    "*PASSWORD*",
    "*SECRET*",
    "*_TOKEN",
)
_PLACES = frozenset(variable for family in FAMILIES for variable, _ in family.env)

_MEMO_LIMIT = 4 << 20
_MEMO_KEEP = 16


def switches(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of this environment that may change what is compiled, but for those that say where it goes."""
    return {
        name: value
        for name, value in sorted(environ.items())
        if _matches(name, SWITCHES) and name not in _PLACES and not _matches(name, INERT)
    }


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def family_factors(record: Record, family: str) -> dict[str, str | None]:
    """The factors of one family, in the table's order."""
    factors = record["factors"]
    return {name: factors.get(name) for name in FAMILY[family].factors}


def family_key(record: Record, family: str) -> str:
    """16 hex digits that name the family's directory: equal exactly where every factor is equal."""
    return _digest([family, TABLE_VERSION, family_factors(record, family)])


def family_keys(record: Record) -> dict[str, str]:
    """The key of every family."""
    return {family.name: family_key(record, family.name) for family in FAMILIES}


def digest(keys: Mapping[str, str]) -> str:
    """16 hex digits over these family keys, in any order: for people, and for file names of markers."""
    return _digest(dict(keys))


def gpu_model(record: Record) -> str | None:
    """The GPU models of a record in the words that `read_memo` compares; "" for no GPU, None for nameless ones."""
    names = distinct(record["gpus"], "name")
    return names if names is not None else (None if record["gpus"] else "")


def sound(record: Any) -> bool:
    """Whether a document read from disk or from a container has the shape of a record of this schema."""
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        return False
    factors, gpus, sglang = record.get("factors"), record.get("gpus"), record.get("sglang")
    switched = record.get("switches", {})  # which earlier versions did not record
    return (
        isinstance(factors, dict)
        and all(isinstance(name, str) and isinstance(value, (str, type(None))) for name, value in factors.items())
        and isinstance(gpus, list)
        and all(isinstance(gpu, dict) and isinstance(gpu.get("name"), (str, type(None))) for gpu in gpus)
        and isinstance(sglang, dict)
        and all(name in sglang and isinstance(sglang[name], (str, type(None))) for name in ("version", "commit"))
        and isinstance(switched, dict)
        and all(isinstance(name, str) and isinstance(value, str) for name, value in switched.items())
        and isinstance(record.get("observed"), dict)
    )


# The memo


def memo_path(root: Path, image_id: str) -> Path:
    """Where the records of an image are kept. A colon is no good in a file name that people pass to tools."""
    return root / "images" / f"{re.sub(r'[^A-Za-z0-9._-]', '-', image_id).lstrip('.-') or 'image'}.json"


def read_memo(
    root: Path, image_id: str, *, mount: str, gpus: str | None, driver: str | None, env: Mapping[str, str]
) -> Record | None:
    """The record that a probe would make in this image, if it was made before; None where that cannot be told.

    gpus: names of the GPU models that the host sees, sorted and joined by ", " ("" for none); driver: its version.
    None = the host cannot see it: not compared, nor is what the container could not see. env: the task's environment;
    where it pretends a GPU the host's do not count, and its memos are never those of a real one.
    """
    if env.get(PRETEND_VARIABLE):
        gpus = driver = None
    for memo in _memos(memo_path(root, image_id), image_id):
        record = memo["record"]
        model, seen = gpu_model(record), _text(record["observed"].get("driver"))
        if (
            record["factors"].get("mount") == posixpath.normpath(mount)
            and memo.get("env") == _probe_env(env)
            and (gpus is None or model is None or gpus == model)
            and (driver is None or seen is None or driver == seen)
        ):
            return dict(record)
    return None


def known_images(root: Path) -> list[tuple[str, Record]]:
    """(image id, record) of every memo below `root` that this program understands."""
    found = []
    for item in files.listing(str(root / "images")) or ():
        try:
            document = files.read_json(item.path, _MEMO_LIMIT)
        except files.UnreadableError:
            continue
        image_id = document.get("image") if isinstance(document, dict) else None
        if isinstance(image_id, str) and Path(item.path) == memo_path(root, image_id):
            found += [(image_id, memo["record"]) for memo in _understood(document, image_id)]
    return found


def write_memo(root: Path, image_id: str, record: Record, *, env: Mapping[str, str], known: bool = False) -> None:
    """Remembers the record for this image and task environment, beside what is known for others. Raises OSError.

    known: what is remembered already, and says the same, stays: a task may see fewer GPUs than there are.
    """
    path = memo_path(root, image_id)
    new = {"table": TABLE_VERSION, "env": _probe_env(env), "record": record}
    same = _circumstances(new)
    before = _memos(path, image_id)
    facts = record["factors"]
    if known and any(_circumstances(memo) == same and memo["record"]["factors"] == facts for memo in before):
        return
    memos = [new, *(memo for memo in before if _circumstances(memo) != same)]
    document = {"schema": SCHEMA, "image": image_id, "memos": memos[:_MEMO_KEEP]}
    files.write_atomically(path, json.dumps(document, indent=1).encode("ascii"))


def drop_memos(path: Path, toolchain: str) -> None:
    """Forgets what a memo file says about environments of this toolchain, and with the last of them the file. Raises
    OSError.
    """
    try:
        document = files.read_json(str(path), _MEMO_LIMIT)
    except files.UnreadableError:
        return
    memos = [memo for memo in document["memos"] if not _is_of(memo, toolchain)]
    if memos:
        files.write_atomically(path, json.dumps({**document, "memos": memos}, indent=1).encode("ascii"))
    else:
        path.unlink(missing_ok=True)


def _is_of(memo: Any, toolchain: str) -> bool:
    record = memo.get("record") if isinstance(memo, dict) else None
    return record is not None and sound(record) and digest(family_keys(record)) == toolchain


def _memos(path: Path, image_id: str) -> list[dict[str, Any]]:
    """The memos of the file that this program understands, most recent first; none where there is no such file."""
    try:
        document = files.read_json(str(path), _MEMO_LIMIT)
    except files.UnreadableError:
        return []
    return _understood(document, image_id)


def _understood(document: Any, image_id: str) -> list[dict[str, Any]]:
    if not isinstance(document, dict) or document.get("schema") != SCHEMA or document.get("image") != image_id:
        return []
    memos = document.get("memos")
    return [
        memo
        for memo in (memos if isinstance(memos, list) else [])
        if isinstance(memo, dict) and memo.get("table") == TABLE_VERSION and sound(memo.get("record"))
    ]


def _circumstances(memo: Mapping[str, Any]) -> tuple[Any, ...]:
    record = memo["record"]
    return memo.get("env"), record["factors"].get("mount"), gpu_model(record), record["observed"].get("driver")


def _probe_env(env: Mapping[str, str]) -> dict[str, str]:
    return {name: env[name] for name in PROBE_ENV if name in env}


def distinct(gpus: Iterable[Mapping[str, Any]], field: str) -> str | None:
    """The different values among the GPUs, sorted: a mixed machine is a toolchain of its own."""
    return ", ".join(sorted({str(gpu[field]) for gpu in gpus if gpu.get(field)})) or None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:16]
