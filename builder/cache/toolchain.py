"""What the kernels of one environment depend on: a readable record, and from it the key of each family.

The record is JSON::

    {"schema": 2,
     "factors":  {name: text or null},                 # every factor that families.py names
     "gpus":     [{"index", "uuid", "name", "compute_capability", "sm_count", "memory_bytes",
                  "shared_bytes", "l2_bytes"}],     # of one block, and of the GPU; earlier versions had neither
     "sglang":   {"version": text or null, "commit": text or null, "sources": see `kernel_sources`, or null},
     "switches": {variable: text},                     # that every process there has, a task's own not among them
     "variables": {variable: text},                    # factors of families, where they are set (`variables`)
     "newest":   {factor: time in ns},                 # of the newest source, or header, that ninja compares with
     "observed": {"driver", "python", "cuda_status", "problems": [text], "pretended": a GPU that is not there, or null}}

`agent.probe` makes it. What is absent is null, never guessed: an absent compiler is another toolchain than any
compiler.

`memos` keeps records, so that a host that knows the image asks no container.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict, TypeGuard

from builder import files
from builder.cache import kernel_sources, variables
from builder.cache.families import FAMILIES, FAMILY, TABLE_VERSION
from builder.task import GPUS, PRETEND_VARIABLE, Gpu

SCHEMA = 2


class Sglang(TypedDict):
    """The build of the serving framework. sources: its kernel sources, as `kernel_sources` has them."""

    version: str | None
    commit: str | None
    sources: dict[str, str] | None


class RecordObserved(TypedDict, total=False):
    """What a probe saw besides the factors.

    cuda_home: the toolkit, by a variable or by PATH. cuda_status: of cuInit, 0 for success. problems: in words.
    pretended: name of a simulated GPU.
    """

    cuda_home: str
    driver: str | None
    python: str
    cuda_status: int | None
    problems: list[str]
    pretended: str | None


class _Variables(TypedDict, total=False):
    switches: dict[str, str]  # earlier versions did not record them
    variables: dict[str, str]  # nor these
    newest: dict[str, int]  # absent where no family is built from such sources


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

#: Factors of the machine, which are never in a memo: its reader adds those of its own machine.
HOST_FACTORS = ("compute_capability", "driver", "gpu_name", "isa", "sm_count")

#: What a version has behind its release while it is developed: ``.dev12+g1a2b3c4``.
_DEVELOPMENT = re.compile(r"(\.dev\d+)?(\+.*)?$")
#: What setuptools-scm 10.3 takes for a release where a checkout has no tags, as those of sglang's workflow have none
#: (actions/checkout@v4 without fetch-depth; sglang's fallback_version is 0.0.0.dev0).
_NO_RELEASE = re.compile(r"|0\.1|0(\.0)*")
#: Of x86-64, features of the CPU by instruction set level (Linux' names; the psABI's levels). torch's inductor compiles
#: for AVX2, AVX-512 or AMX, and on arm64 for NEON or SVE (``cpu_vec_isa.py``).
_LEVELS = (
    ("x86-64-v4", {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
    ("x86-64-v3", {"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}),
    ("x86-64-v2", {"cx16", "popcnt", "sse4_1", "sse4_2", "ssse3"}),
)
_EXTRA = ("amx_tile", "sve")


def switches(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of this environment that may change what is compiled, without those of cache paths."""
    return {
        name: value
        for name, value in sorted(environ.items())
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in SWITCHES)
        and name not in _PLACES
        and not variables.is_inert(name)
    }


def factor_variables(environ: Mapping[str, str], cuda_home: str | None) -> dict[str, str]:
    """Return the variables of this environment that are factors of families. cuda_home: as a variable names it."""
    return variables.of_process({**environ, variables.CUDA_HOME: cuda_home or ""}, _PLACES)


def of_task(record: Record, own: Mapping[str, str]) -> Record:
    """Return the record as it is for a task with these variables."""
    return {**record, "variables": variables.of_task(record.get("variables", {}), own, _PLACES)}


def release(version: str | None) -> str | None:
    """Return the release of a version: without the commit and the number of a development build; None if unknown."""
    found = _DEVELOPMENT.sub("", version or "")
    return None if _NO_RELEASE.fullmatch(found) else found


def build_name(version: str | None, commit: str | None) -> str | None:
    """Return a build of sglang for people: its version and the beginning of its commit."""
    if commit is None or (version and commit[:7] in version):
        return version
    return f"{version or 'sglang'} ({commit[:12]})"


@functools.cache
def isa(path: str = "/proc/cpuinfo") -> str | None:
    """Return the instruction set level of this machine's CPU; None where Linux does not tell."""
    try:
        text = files.read_proc(path)
    except files.UnreadableError:
        return None
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    if found is None:
        return None
    flags = set(found[1].split())
    level = next((name for name, wanted in _LEVELS if wanted <= flags), os.uname().machine)
    return "+".join([level, *(name for name in _EXTRA if name in flags)])


def family_factors(record: Record, family: str) -> dict[str, str | None]:
    """Return the factors of one family, in the table's order, and then the variables that are set."""
    factors = record["factors"]
    return {
        **{name: factors.get(name) for name in FAMILY[family].factors},
        **variables.of_family(record.get("variables", {}), family),
    }


def family_key(record: Record, family: str) -> str:
    """Return 16 hex digits that name the family's directory: equal exactly where every factor is equal."""
    return key_of(family, family_factors(record, family))


def key_of(family: str, factors: Mapping[str, object]) -> str:
    """Return the key that these factors of a family have, by this program's table."""
    return _digest([family, TABLE_VERSION, dict(factors)])


def family_keys(record: Record) -> dict[str, str]:
    """Return the key of every family."""
    return {family.name: family_key(record, family.name) for family in FAMILIES}


def digest(keys: Mapping[str, str]) -> str:
    """Return 16 hex digits over these family keys, in any order: for people, and for file names of markers."""
    return _digest(dict(keys))


def gpu_of(record: Record) -> Gpu:
    """Return the GPU of a probe record, as it can be simulated. What it lacks are the figures of the nearest model.

    Raises ValueError where it has no GPU, or several kinds.
    """
    gpus = record["gpus"]
    kinds = {(gpu.get("compute_capability"), gpu.get("sm_count")) for gpu in gpus}
    if len(kinds) != 1 or None in next(iter(kinds)):
        raise ValueError(f"the probe found {'GPUs that it cannot tell, or of several kinds' if gpus else 'no GPU'}")
    first = gpus[0]
    major, _, minor = str(first["compute_capability"]).partition(".")
    capability, memory = (int(major), int(minor or 0)), int(first.get("memory_bytes") or 0)
    same = [gpu for gpu in GPUS.values() if gpu.capability == capability]
    near = min(same or GPUS.values(), key=lambda gpu: abs(gpu.memory - memory))
    return Gpu(
        name=str(first.get("name") or near.name),
        capability=capability,
        sms=int(first["sm_count"]),
        memory=memory or near.memory,
        shared=int(first.get("shared_bytes") or near.shared),
        l2=int(first.get("l2_bytes") or near.l2),
    )


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
        and (sglang.get("sources", False) is None or kernel_sources.is_sources(sglang.get("sources")))
        and _texts(record.get("switches", {}), (str,))
        and _texts(record.get("variables", {}), (str,))
        and _texts(record.get("newest", {}), (int,))
        and isinstance(observed, dict)
    )


def _texts(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(text, kinds) for name, text in value.items()
    )


def distinct(gpus: Iterable[Mapping[str, Any]], field: str) -> str | None:
    """Return the different values among the GPUs, sorted: a mixed machine is another toolchain."""
    return ", ".join(sorted({str(gpu[field]) for gpu in gpus if gpu.get(field)})) or None


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:16]
