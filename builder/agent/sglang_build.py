"""Which build of sglang this environment runs: version, commit, and the contents of its kernel sources.

A checkout that is installed as editable, or that is first on the path, differs from the image that it came into, so
what it says of itself counts before the image's labels and variables.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from builder import files
from builder.agent import packages
from builder.cache import kernel_sources
from builder.cache.toolchain import Sglang
from builder.task import ServingImage

_COMMIT_LABELS = ("ai.sglang.build.commit", "org.opencontainers.image.revision")
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
#: A local version of setuptools-scm: ``0.5.24.dev12+g1a2b3c4d5``, perhaps with the day behind it.
_LOCAL = re.compile(r"\+(?:[^.]*\.)*g([0-9a-f]{7,40})\b")
_SUFFIXES = (".py", *{suffix for suffixes, _, _ in kernel_sources.FILES for suffix in suffixes})
_SKIP = ("__pycache__", ".*")
_LARGEST = 4 << 20


def build(environ: Mapping[str, str], image: ServingImage) -> Sglang:
    """Return the build that a process with this environment imports. It reads sources: some tenths of a second."""
    package = packages.find("sglang")
    version = package.version if package else None
    folders = package.folders() if package else []
    # What is first on the path is imported, whatever is installed: a checkout in PYTHONPATH, or where it was started.
    imported = packages.imported("sglang")
    is_other = imported is not None and os.path.realpath(imported) not in map(os.path.realpath, folders)
    folders = [imported] if imported is not None and is_other else folders
    found: list[str | None] = [environ.get("SGLANG_BUILD_COMMIT"), *map(image.labels.get, _COMMIT_LABELS)]
    # ``setup.py develop`` leaves no RECORD, and no mark.
    if is_other or (package and (package.editable or package.payload is None)):
        found = [*map(_checked_out, folders), _of_version(version), *found]
    else:
        found = [*found, packages.commit("sglang"), _of_version(version)]
    commit = next((text.strip() for text in found if text and text.strip() not in ("", "unknown")), None)
    return {"version": version, "commit": commit, "sources": sources(folders[0]) if folders else None}


def sources(folder: str) -> dict[str, str]:
    """Return the kernel sources of a package folder, in the form of `kernel_sources`. Never raises OSError."""
    groups: dict[str, list[str]] = {}
    for top in kernel_sources.FOLDERS:
        for name, item in files.walk(f"{folder}/{top}", _SKIP):
            if item is None or not name.endswith(_SUFFIXES) or files.is_dir(item):
                continue
            path = f"{top}/{name}"
            try:
                content = _read(item)
            except OSError:
                continue
            if families := kernel_sources.families_of(path, content):
                groups.setdefault(" ".join(families), []).append(kernel_sources.pack(path, content))
    return {group: "".join(sorted(packed)) for group, packed in sorted(groups.items())}


def _read(item: os.DirEntry[str]) -> bytes:
    """Return a file's content; of one that is no source by its size, nothing."""
    status = item.stat()
    if not 0 <= status.st_size <= _LARGEST or not item.is_file():
        return b""
    descriptor = os.open(item.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return os.read(descriptor, status.st_size)
    finally:
        os.close(descriptor)


def _of_version(version: str | None) -> str | None:
    found = _LOCAL.search(version or "")
    return found[1] if found else None


def _checked_out(folder: str) -> str | None:
    """Return the commit that is checked out in the git repository around this folder, read without git."""
    for above in Path(folder).parents:
        git = above / ".git"
        try:
            if git.is_file():  # a worktree, or a submodule
                git = above / git.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
            head = (git / "HEAD").read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            continue
        return head if _HASH.fullmatch(head) else _reference(git, head.removeprefix("ref:").strip())
    return None


def _reference(git: Path, name: str) -> str | None:
    try:
        common = (git / "commondir").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        common = "."
    for place in (git, git / common):
        try:
            text = (place / name).read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            continue
        if _HASH.fullmatch(text):
            return text
    try:
        packed = (git / common / "packed-refs").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    found = re.search(rf"^([0-9a-f]+) {re.escape(name)}$", packed, re.MULTILINE)
    return found[1] if found else None
