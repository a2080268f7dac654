"""The job: what the host asks the in-container program to do, as one JSON document in ``WARM_CACHE_JOB``.

It never holds a secret.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from builder.task import Task

T = TypeVar("T")


JOB_VARIABLE = "WARM_CACHE_JOB"


SCHEMA = 1

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class PrunePolicy:
    """What may go from a cache root (mode ``prune``). keep: so many toolchains of each task stay. older_than: seconds
    without use after which it goes, None: never. max_size: bytes that the root may have, None: no limit.

    image, keys and folders say what never goes: the identity of the manifest's image, its family keys (of every
    environment that its tasks have), where the markers of its tasks lie, and the labels of tasks of which that cannot
    be told now, because their model is not there. dry_run: it is only said.
    """

    keep: int = 2
    older_than: float | None = None
    max_size: int | None = None
    image: str = ""
    keys: tuple[Mapping[str, str], ...] = ()
    folders: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    dry_run: bool = False


@dataclass(frozen=True)
class Job:
    """Everything the in-container program is told.

    mode: ``probe`` | ``run`` | ``lock`` | ``hold`` | ``sweep`` | ``verify`` | ``prune`` | ``status`` | ``families`` |
    ``survey`` | ``record``, or one of `views`. mount: the cache root inside the container. workdir: the image's own
    working directory, where children start. lifetime: seconds after which the container ends by itself. grace: seconds
    between SIGTERM and giving up on children. secrets: NAMES of environment variables whose values are never printed.
    image: id, digest, labels of the serving image (identity of image-bound families). job_max: seconds that a test job
    may last, and use the cache without a word (``sweep``). repair: bad entries move aside (``verify``). beside: other
    tasks of this run may compile into the root at the same time. prune: what may go (``prune``). view: which view, and
    what is known of it outside (modes of views, and ``sweep``). record: path of a `recording.Request` (``record``).
    """

    mode: str
    nonce: str
    mount: str
    image: Mapping[str, Any] = field(default_factory=dict)
    task: Task | None = None
    lease: str | None = None
    lifetime: float = 7200.0
    grace: float = 8.0
    log_limit: int = 2 << 30
    workdir: str = "/"
    secrets: tuple[str, ...] = ()
    job_max: float = 6 * 3600.0
    repair: bool = False
    beside: bool = False
    prune: PrunePolicy | None = None
    view: Mapping[str, Any] = field(default_factory=dict)
    record: str = ""
    observed: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The document for ``WARM_CACHE_JOB``: valid UTF-8, and short, because Linux takes no environment string above
        128 KiB. Only what cannot be UTF-8 (half a surrogate pair) is escaped."""
        text = json.dumps({"schema": SCHEMA, **asdict(self)}, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Raises ValueError with one sentence when the document is not a job of this schema."""
        try:
            data = json.loads(text)
            if not isinstance(data, dict) or data.pop("schema", None) != SCHEMA:
                raise ValueError(f"schema {SCHEMA} expected")
            job = _made(cls, data, "job")
            if not re.fullmatch(r"[!-~]+", job.nonce):
                raise ValueError("nonce is not of printable ASCII characters")
        except RecursionError:
            raise ValueError(f"{JOB_VARIABLE} does not hold a job: it is nested too deeply") from None
        except ValueError as error:
            raise ValueError(f"{JOB_VARIABLE} does not hold a job: {error}") from None
        return job


def _made(kind: type[T], data: Mapping[str, Any], name: str) -> T:
    """An object of this dataclass from a JSON object of its fields. Raises ValueError, naming the one that is wrong."""
    hints, known = get_type_hints(kind), {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    for given in data:
        if given not in known:
            raise ValueError(f"{name} has no field {given[:40]!r}")
    for wanted in known.values():
        if wanted.name not in data and wanted.default is MISSING and wanted.default_factory is MISSING:
            raise ValueError(f"{name} needs {wanted.name!r}")
    return kind(**{given: _value(hints[given], value, given) for given, value in data.items()})


def _value(kind: Any, value: Any, name: str) -> Any:
    """A JSON value as a field's type has it. Every float is a number of seconds that can be waited for."""
    origin, parts = get_origin(kind), get_args(kind)
    if type(None) in parts:
        return None if value is None else _value(parts[0], value, name)
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
        return _made(kind, value, name)
    if origin is tuple and isinstance(value, list):
        kinds = parts[:1] * len(value) if parts[1:] == (...,) else parts
        if len(kinds) == len(value):
            return tuple(_value(inner, item, name) for inner, item in zip(kinds, value, strict=True))
    elif origin is Mapping and isinstance(value, dict):
        return {key: item if parts[1] is Any else _value(parts[1], item, name) for key, item in value.items()}
    elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if 0 <= value < threading.TIMEOUT_MAX:
            return float(value)
    elif kind in (str, bool, int) and type(value) is kind:
        return value
    raise ValueError(f"{name} is not of its kind")
