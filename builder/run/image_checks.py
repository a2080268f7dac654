"""What an image itself has that may spoil a warm-up, or the jobs after it: its USER, and variables of sglang."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from builder.cache import leaves
from builder.engine.api import Image
from builder.errors import Problem
from builder.manifest.load import Manifest
from builder.task import Task
from builder.text import counted, printable

#: sglang deletes all but so many builds of a module after each of its own (`cache.leaves`).
KEEP = "SGLANG_JIT_CACHE_KEEP"
_ACL = "system.posix_acl_access"


def user_problems(manifest: Manifest, image: Image, info: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield the problem of an image whose USER cannot write the cache root of this machine.

    Containers drop the capabilities of root, and another user has none. A name is left to the container: only it knows
    the number. So are groups, access lists and remapped users. info: the engine's description.
    """
    root, user = manifest.cache.root, re.fullmatch(r"0*([0-9]+)(:.*)?", image.user)
    options = [str(option) for option in info.get("SecurityOptions") or ()]
    if any(name in option for option in options for name in ("name=userns", "name=rootless")):
        return
    if root is None or user is None or user[1] == "0" or not root.is_dir():
        return
    uid, status = int(user[1]), root.stat()
    if _is_writable(root, status, uid):
        return
    yield Problem(
        "image",
        f"its containers run as user {uid} (USER of {manifest.image.ref}), which cannot write {root}: it belongs to "
        f"user {status.st_uid} and has mode {status.st_mode & 0o7777:04o}.",
        f"Run: sudo chown -R {uid} {root}",
    )


def user_state(image: Image | None) -> tuple[str, str]:
    """Return ``ok`` or ``unknown``, and a sentence about the user that an image's containers run as."""
    if image is None:
        return "unknown", "the engine does not have the image"
    user = printable(image.user)[:80]
    if user.partition(":")[0] in ("", "0", "root"):
        return "ok", "its containers run as root, without root's capabilities over other programs and devices"
    if re.fullmatch(r"[0-9]+(:.*)?", user):
        return "ok", f"its containers run as user {user}, which may write the cache root as far as can be seen"
    return "unknown", (
        f"its containers run as {user}, whose number is in the image alone: a container tells whether there is such a "
        "user and whether it may write the cache root, and a run then ends with 12"
    )


def keep_warnings(tasks: Iterable[Task], inherited: Mapping[str, str], root: Path | None) -> list[str]:
    """Return a warning where sglang would remove builds that markers list. inherited: variables of all tasks."""
    told = {task.env[KEEP]: f"task {task.label}" for task in tasks if KEEP in task.env}
    if KEEP in inherited:
        told.setdefault(inherited[KEEP], "the image or this environment")
    values = {int(text): where for text, where in told.items() if text.strip().isdecimal() and len(text) < 10}
    if not values or root is None:
        return []
    listed, module = leaves.most_listed(root)
    least = min(values)
    if listed < least or not listed:
        return []
    text = (
        f"{KEEP}={least} ({values[least]}): a job that compiles a module of sglang's JIT removes all but its "
        f"{counted(least, 'newest build')}, and markers list {listed} of {printable(module)[:100]}. Unset it; "
        "warm-cache prune keeps what markers list"
    )
    return [text]


def variables(image: Image | None) -> dict[str, str]:
    """Return the variables that an image sets."""
    return dict(entry.partition("=")[::2] for entry in (image.env if image else ()))


def _is_writable(path: Path, status: os.stat_result, uid: int) -> bool:
    """Return whether this user may write here, or may be able to by what cannot be seen from outside."""
    if status.st_mode & 0o022 or (status.st_uid == uid and status.st_mode & 0o200):
        return True
    try:
        return _ACL in os.listxattr(path)
    except OSError:
        return False
