"""Kinds of values that only sections of a manifest have: paths, mount points, GPU indices, names in an engine."""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from builder.manifest.values import SECRET_VALUE, a_string, count, kind, list_of, matching

#: Paths that cannot be the cache's mount point: the image keeps files below them (kernels.lock, Hugging Face kernels).
OCCUPIED = ("/", "/home", "/opt", "/root", "/root/.cache", "/srv", "/tmp", "/var")  # noqa: S108 - refused, not used
#: Nor can these, or anything below them: the system, the image's sglang, this program, its model store and its views.
NEEDED = (
    *("/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/libx32", "/proc", "/run", "/sbin", "/sys", "/usr"),
    *("/sgl-workspace", "/opt/warm-cache", "/models", "/checkout", "/var/run"),
)
VOLUME = "volume:"
_MOUNT = r"/[A-Za-z0-9._/-]*"
_SPAN = r"\s*([0-9]{1,3})(?:-([0-9]{1,3}))?\s*"
#: The longest part of a wrong value in characters that a message repeats.
_SHOWN = 80


@kind("command line", **a_string.schema)
def setup_line(value: Any) -> str:
    text = a_string(value)
    if SECRET_VALUE.search(text):
        raise ValueError("it holds what looks like an access token, which the image's history would keep; leave it out")
    return text


command_lines = list_of(a_string, "command lines")
setup_lines = list_of(setup_line, "command lines")
reference = matching("[A-Za-z0-9][A-Za-z0-9._/:@-]*", "an image reference")
network_name = matching("[A-Za-z0-9][A-Za-z0-9_.-]*", "a network name")
volume_name = matching("[A-Za-z0-9][A-Za-z0-9_.-]+", "a volume name")


@kind("absolute path", type="string", pattern="^/")
def directory(value: Any) -> Path:
    text = a_string(value)
    if not text.startswith("/"):
        raise ValueError(f"expected an absolute path, found {text!r}")
    return Path(posixpath.normpath(text))


@kind("path", type="string")
def directory_option(value: Any) -> Path:
    """A path on the command line: relative to the working directory unless absolute."""
    text = a_string(value)
    try:
        return Path(os.path.abspath(text))
    except OSError as error:
        raise ValueError(f"{text!r} is relative to a directory that was removed ({error.strerror})") from None


@kind("absolute path", type="string", pattern="^/")
def cache_root(value: Any) -> Path:
    return _below_the_root(directory(value))


def cache_option(value: Any) -> tuple[Path | None, str | None]:
    """Return the directory or the name of the volume that ``--cache`` names, and None for the other."""
    text = a_string(value)
    if text.startswith(VOLUME):
        return None, volume_name(text.removeprefix(VOLUME))
    return _below_the_root(directory_option(text)), None


def _below_the_root(path: Path) -> Path:
    if path == path.parent:
        raise ValueError(f"expected a directory for the cache alone, found {str(path)!r}")
    return path


@kind("absolute path", type="string", pattern=f"^{_MOUNT}$")
def mount_point(value: Any) -> str:
    text = a_string(value)
    if not re.fullmatch(_MOUNT, text) or posixpath.normpath(text) != (text.rstrip("/") or "/"):
        raise ValueError(f"expected an absolute path of letters, digits, '.', '_' and '-', found {text!r}")
    path = posixpath.normpath(text)
    if path in OCCUPIED or any(path == needed or path.startswith(f"{needed}/") for needed in NEEDED):
        raise ValueError(f"the mount would hide what image and program have in {path}; use a new path such as /jit")
    return path


@kind(
    "indices, as a list or a string",
    type=["string", "array"],
    pattern=f"^{_SPAN}(?:,{_SPAN})*$",
    items={"type": "integer", "minimum": 0},
    minItems=1,
    uniqueItems=True,
)
def gpu_indices(value: Any) -> tuple[int, ...]:
    """GPU indices: ``"4-7"``, ``"0,2,5"``, or a list."""
    if isinstance(value, list):
        found = list(list_of(count, "GPU indices")(value))
        repeated = len(set(found)) != len(found)
    else:
        found, repeated = [], False
        for part in a_string(value).split(","):
            span = re.fullmatch(_SPAN, part)
            if not span or int(span[2] or span[1]) < int(span[1]):
                raise ValueError(f'expected GPU indices such as "4-7" or "0,2", found {_short(value)}')
            found += range(int(span[1]), int(span[2] or span[1]) + 1)
            # Stop at the first repetition: the rest of a long text may name a thousand more with every few letters.
            if repeated := len(set(found)) != len(found):
                break
    if not found or repeated:
        raise ValueError(f"expected at least one GPU, and every GPU once, found {_short(value)}")
    return tuple(found)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text)} characters)"


@kind('boolean or `"proven"`', enum=[True, False, "proven"])
def when_enabled(value: Any) -> bool | str:
    if not isinstance(value, bool) and value != "proven":
        raise ValueError(f'expected true, false or "proven", found {value!r}')
    return bool(value) if isinstance(value, bool) else "proven"
