"""Identity of installed Python packages, read without importing them.

A package's identity is its version and a digest of its payload: the rows of its RECORD that the wheel brought, which
pip and uv write alike. Left out are ``.dist-info`` (INSTALLER, REQUESTED, direct_url.json), ``__pycache__`` (only pip
lists it) and everything outside of site-packages (scripts: their text names the interpreter). An editable install has
no such rows: a digest of its files' contents stands for them.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from builder import files
from builder.cache.families import DEEP_GEMM_PACKAGES

if TYPE_CHECKING:
    import importlib.metadata
    from importlib.machinery import ModuleSpec

#: What a distribution installs for import, where its name does not tell.
MODULES: Mapping[str, tuple[str, ...]] = {
    "flashinfer-python": ("flashinfer",),
    "apache-tvm-ffi": ("tvm_ffi",),
    "sgl-deep-gemm": ("deep_gemm",),
    "sgl-kernel": ("sgl_kernel", "deep_gemm"),
    "quack-kernels": ("quack",),
    "nvidia-cutlass-dsl": ("nvidia_cutlass_dsl", "cutlass"),
}

#: Names in a source tree that are not the package's code.
_NO_CONTENT = ("__pycache__", "*.pyc", ".git", "build", "*.egg-info")
#: What ninja's inputs are called.
_SOURCES = (".cu", ".cuh", ".h", ".hpp", ".cpp", ".cc", ".inc", ".inl")
#: Headers that are looked at: CUDA and libstdc++ have about ten thousand, many without a suffix.
_MOST_HEADERS = 200_000
#: Bytes of a file above which its size and time stand for its content (libraries of an editable torch have gigabytes).
_WHOLE = 64 << 20

#: The first sgl-deep-gemm with ``meta.json`` and ``.committed`` in its cache, and without paths in its keys.
_DEEP_JIT = (0, 2, 0)

#: Marks that an editable install leaves where direct_url.json is missing (setuptools, hatchling, scikit-build-core).
_EDITABLE = re.compile(r"^_*editable_|_editable\.(py|pth)$")


@dataclass(frozen=True)
class Package:
    """One installed distribution."""

    name: str
    version: str
    payload: tuple[tuple[str, str], ...] | None  # path and hash of each file of its wheel; None: it has no RECORD
    editable: bool
    place: str  # the folder that it is installed in
    source: str | None = None  # the folder that an editable install was made of

    def identity(self) -> str:
        """Return a line that differs if the package differs."""
        if self.editable or self.payload is None:
            how = "editable" if self.editable else "without RECORD"
            return f"{self.version} {how} {self._contents() or 'its files were not found'}"
        rows = "\n".join(f"{path} {digest}" for path, digest in sorted(self.payload))
        return f"{self.version} {hashlib.sha256(rows.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}"

    def folders(self) -> list[str]:
        """Return the folders of its code: where it is installed, or in the tree of an editable install."""
        names = MODULES.get(self.name) or (self.name.replace("-", "_"),)
        places = [self.place]
        if self.source is not None:
            places = [f"{self.source}/{below}".rstrip("/") for below in ("", "python", "src")]
        elif self.editable:  # no direct_url.json: import finds it, without importing it
            specs = [_spec(name) for name in names]
            return [place for spec in specs if spec for place in spec.submodule_search_locations or ()]
        found = [f"{place}/{name}" for place in places for name in names]
        return [folder for folder in found if Path(folder).is_dir()]

    def _contents(self) -> str | None:
        """Return 16 hex digits over the contents of its files; None where there are none."""
        digest, any_file = hashlib.sha256(), False
        for folder in self.folders():
            for name, item in sorted(files.walk(folder, _NO_CONTENT), key=lambda found: found[0]):
                if item is not None and not files.is_dir(item):
                    digest.update(f"{name}\0{_content(item)}\0".encode("utf-8", "surrogateescape"))
                    any_file = True
        return digest.hexdigest()[:16] if any_file else None

    def holds(self, prefix: str) -> bool:
        """Return whether a path of the payload begins with the prefix."""
        return any(path.startswith(prefix) for path, _ in self.payload or ())


def _content(item: os.DirEntry[str]) -> str:
    """Return a digest of a file's content; of a very large one, or what is no file, its size and time."""
    try:
        status = item.stat()
        if stat.S_ISREG(status.st_mode) and status.st_size <= _WHOLE:
            with Path(item.path).open("rb") as file:
                return hashlib.sha256(file.read()).hexdigest()
        return f"{status.st_size} {status.st_mtime_ns}"
    except OSError as error:
        return f"unreadable: {error.errno}"


def _spec(name: str) -> ModuleSpec | None:
    from importlib.util import find_spec  # with the finders of editable installs

    try:
        return find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return None


def imported(name: str) -> str | None:
    """Return the folder that ``import`` takes this package from in this process, or None; nothing is imported."""
    spec = _spec(name)
    if spec is None or spec.origin is None or not spec.submodule_search_locations:
        return None  # a folder without __init__.py, which happens to have the name, is no package
    return os.path.dirname(spec.origin)  # noqa: PTH120


def newest(package: Package) -> int:
    """Return the time (ns) of the package's newest C++ or CUDA source; 0 where it has none."""
    latest = 0
    for folder in package.folders():
        for name, item in files.walk(folder, _NO_CONTENT):
            if item is not None and name.endswith(_SOURCES):
                try:
                    latest = max(latest, item.stat().st_mtime_ns)
                except OSError:
                    continue
    return latest


def newest_header(folders: Iterable[str]) -> int:
    """Return the time (ns) of the newest file below these folders of headers; 0 where there is none."""
    latest, looked = 0, 0
    places = sorted({os.path.realpath(folder) for folder in folders})
    for place in places:
        if any(place.startswith(f"{above}/") for above in places):
            continue
        for _, item in files.walk(place, ()):
            if looked >= _MOST_HEADERS:
                return latest
            if item is not None and not files.is_dir(item):
                looked += 1
                with contextlib.suppress(OSError):
                    latest = max(latest, item.stat().st_mtime_ns)
    return latest


def payload_of(record: str) -> tuple[tuple[str, str], ...]:
    """Return the rows (path, hash) of a RECORD that do not depend on the installer."""
    rows = []
    for row in csv.reader(record.splitlines()):
        if len(row) < 2 or not row[0] or row[0].startswith(("../", "/")):
            continue
        parts = row[0].split("/")
        if parts[0].endswith((".dist-info", ".data")) or "__pycache__" in parts or parts[-1].endswith(".pyc"):
            continue
        rows.append((row[0], row[1]))
    return tuple(rows)


def find(name: str, path: Sequence[str] | None = None) -> Package | None:
    """Return the installed distribution of this name, or None. path: folders to search instead of ``sys.path``."""
    found = _distribution(name, path)
    try:
        # Reading an absent field warns in Python 3.12 and raises in later versions.
        version = found.metadata["Version"] if found and "Version" in found.metadata else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if found is None or not version:
        return None
    record = _text(found, "RECORD")
    try:
        payload = payload_of(record) if record else None
    except csv.Error:
        payload = None
    source = _editable_source(_text(found, "direct_url.json"))
    place = str(found.locate_file(""))
    editable = source is not None or _looks_editable(payload)
    if path is None and not editable and (shadow := _shadow(name, place)) is not None:
        # What is first on the path is imported: the contents there count, and no row of what is installed.
        payload, place = None, shadow
    return Package(
        name=name,
        version=version,
        payload=payload or None,
        editable=editable,
        place=place,
        source=source,
    )


def _shadow(name: str, place: str) -> str | None:
    """Return the folder, other than place, from which a module of this distribution is imported; None for none."""
    for module in MODULES.get(name) or (name.replace("-", "_"),):
        folder = imported(module)
        above = os.path.realpath(place)
        if folder is not None and not f"{os.path.realpath(folder)}/".startswith(f"{above.rstrip('/')}/"):
            return os.path.dirname(folder)  # noqa: PTH120
    return None


def identity(names: Iterable[str], path: Sequence[str] | None = None) -> str | None:
    """Return the identity of these distributions together; None if none of them is installed."""
    found = [package for name in names if (package := find(name, path))]
    if len(found) < 2:
        return found[0].identity() if found else None
    return "; ".join(f"{package.name} {package.identity()}" for package in found)


def deep_gemm(path: Sequence[str] | None = None) -> dict[str, str | None]:
    """Return the factors ``deep_gemm``, ``deep_gemm_format`` and ``deep_gemm_path`` of the DeepGEMM in use."""
    for name in DEEP_GEMM_PACKAGES:
        package = find(name, path)
        if package is None or (name == "sgl-kernel" and not package.holds("deep_gemm/")):
            continue
        if name == "sgl-deep-gemm":
            new = _release(package.version) >= _DEEP_JIT
        else:
            new = package.holds("deep_gemm/include/deep_jit/")
        return {
            "deep_gemm": package.identity() if name == "sgl-deep-gemm" else f"{name} {package.identity()}",
            "deep_gemm_format": "deep_jit" if new else "jit",
            "deep_gemm_path": None if new else f"{package.place.rstrip('/')}/deep_gemm",
        }
    return {"deep_gemm": None, "deep_gemm_format": None, "deep_gemm_path": None}


def commit(name: str, path: Sequence[str] | None = None) -> str | None:
    """Return the commit that a distribution was installed from (direct_url.json of a VCS install), or None."""
    found = _distribution(name, path)
    info = _json(_text(found, "direct_url.json") if found else None).get("vcs_info")
    value = info.get("commit_id") if isinstance(info, dict) else None
    return value if isinstance(value, str) else None


def _release(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: (0, 2, 3) for 0.2.3.post2."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number[:9]) for number in numbers.group().split(".")) if numbers else ()


def _distribution(name: str, path: Sequence[str] | None) -> importlib.metadata.Distribution | None:
    # Slow to import.
    from importlib.metadata import DistributionFinder, MetadataPathFinder

    context = DistributionFinder.Context(name=name, **({} if path is None else {"path": list(path)}))
    try:
        return next(iter(MetadataPathFinder.find_distributions(context)), None)
    except OSError:
        return None


def _text(found: importlib.metadata.Distribution, file: str) -> str | None:
    try:
        return found.read_text(file)
    except (OSError, ValueError):
        return None


def _json(text: str | None) -> dict[str, object]:
    try:
        data = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _editable_source(text: str | None) -> str | None:
    """Return the folder of an editable install; None for any other install."""
    document = _json(text)
    info, url = document.get("dir_info"), document.get("url")
    if not isinstance(info, dict) or info.get("editable") is not True:
        return None
    try:
        return unquote(urlsplit(url).path).rstrip("/") if isinstance(url, str) else ""
    except ValueError:
        return ""


def _looks_editable(payload: tuple[tuple[str, str], ...] | None) -> bool:
    return bool(payload) and any("/" not in path and _EDITABLE.search(path) for path, _ in payload or ())
