"""How an entry of each layout looks on disk, and what can be wrong with one.

Names keep their undecodable bytes as Python's surrogate escapes; problems are always printable. What cannot be read is
an entry with a problem, never an exception.

The text of a problem holds names that a job has chosen, so nothing is decided by it: `ProblemKind` is what counts.
"""

from __future__ import annotations

import enum
import errno
import os
import posixpath
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from builder.beneath import Tree, TreeItem
from builder.cache import elf
from builder.cache.families import Family, whole
from builder.files import UNREADABLE, UnreadableError, matches, parsed, read_whole, unreadable, why
from builder.openat import open_regular_at
from builder.text import printable


class ProblemKind(enum.Enum):
    """What a problem means for the entry."""

    #: There is no such entry.
    MISSING = enum.auto()
    #: Something of it cannot be read, so that it may be good.
    UNREADABLE = enum.auto()
    #: A Triton entry without its group file, which is written last: a compile in progress looks the same.
    UNFINISHED = enum.auto()
    #: It is not what its program writes.
    INVALID = enum.auto()


@dataclass(frozen=True)
class EntryProblem:
    """Why an entry is not valid. text: for people, printable, names the file."""

    kind: ProblemKind
    text: str

    def __str__(self) -> str:
        return self.text


MISSING = EntryProblem(ProblemKind.MISSING, "missing")
NO_ENTRY = EntryProblem(ProblemKind.INVALID, "not a name of an entry")
_UNFINISHED = EntryProblem(ProblemKind.UNFINISHED, "no __grp__ file")
_UNLISTED = EntryProblem(ProblemKind.UNREADABLE, f"{UNREADABLE}: a directory that cannot be listed")

#: Bytes of a JSON file of one entry (about 2 kB as they are written), files of one entry (about ten), and groups of
#: them in one of Triton's (one): each group costs its document and all of its files.
_JSON_LIMIT = 256 << 10
_FILES = 256
_GROUPS = 16
_TRITON_PARTS = (".source", ".ttir", ".ttgir", ".llir", ".ptx", ".cubin", ".amdgcn", ".hsaco")

#: The symbol of the cubin by which the plan pass of a prebuild names kernels (agent.prebuild_plan). DeepGEMM would load
#: it. Its size by nvcc 13.0 is 3.6 kB (sm_90a) and 5.1 kB (sm_100a), and that of the smallest kernel 12 kB.
PLAN_ONLY = "warm_cache_plan_only"
_PLAN_ONLY_BYTES = 8192


# Names of entries, by layout


def _deep_gemm_names(family: Family, tree: Tree) -> Iterator[str]:
    items = tree.listing("cache")
    if items is None and not tree.is_dir("cache"):
        yield "cache"  # a link to a directory, with a name that nothing else has
    for item in items or ():
        # <name>.<hash>: a directory without a dot (lost+found) is no entry.
        if item.is_dir and "." in item.last[1:] and not matches(item.last, family.transient):
            yield item.name


def _triton_names(family: Family, tree: Tree) -> Iterator[str]:
    for item in tree.listing() or ():
        # Triton makes the directory before its first file: with nothing finished in it, it is no entry yet.
        if item.is_dir and not matches(item.last, family.transient) and _finished(family, tree, item.name) != []:
            yield item.name


def _file_names(family: Family, tree: Tree) -> Iterator[str]:
    for name, item in tree.walk("", family.transient):
        host_specific = "/" not in name and matches(name, family.host_specific)
        if name.partition("/")[0] in family.apart or host_specific:
            continue
        if item is None or item.is_file or (item.is_dir and tree.is_too_deep(name)):
            yield name


#: Functions that list the names of a layout's entries: (family, its directory) -> names from that directory.
NAMES: Mapping[str, Callable[[Family, Tree], Iterator[str]]] = {
    "deep_gemm": _deep_gemm_names,
    "triton": _triton_names,
    "files": _file_names,
}


# Problems, by layout


def problem_of(family: Family, tree: Tree, name: str, mount: str | None) -> EntryProblem | None:
    """Return what is wrong with an entry, naming the file; None when it is valid; MISSING when it does not exist.

    tree: the family's directory.
    """
    try:
        if family.layout == "files":
            return _single_problem(tree, name)
        folder = tree.descriptor(name)
    except FileNotFoundError:
        return MISSING
    except NotADirectoryError:
        return _invalid("is not a directory")
    except (OSError, ValueError) as error:
        return _invalid(why(error)) if getattr(error, "errno", None) == errno.ELOOP else _refused(error)
    if family.layout == "deep_gemm" and "/" not in name:  # the folder of all entries, which is one only as a link
        return NO_ENTRY
    if family.layout == "deep_gemm":
        return _joined(_deep_gemm_problems(folder, name))
    return _joined(_triton_problems(family, tree, name, mount))


def _single_problem(tree: Tree, name: str) -> EntryProblem | None:
    """Return the problem of an entry that is a file. Raises OSError."""
    if not stat.S_ISDIR(tree.lstat(name).st_mode):
        return file_problem(tree, name)
    if tree.is_too_deep(name):
        return _invalid("is nested too deeply")
    return MISSING if tree.some(name, 1) is not None else _UNLISTED


def _joined(problems: list[EntryProblem]) -> EntryProblem | None:
    """Return all problems of an entry as one: with something unreadable in it, all of it may be good."""
    if len(problems) < 2:
        return problems[0] if problems else None
    kinds = {problem.kind for problem in problems}
    kind = ProblemKind.UNREADABLE if ProblemKind.UNREADABLE in kinds else ProblemKind.INVALID
    return EntryProblem(kind, "; ".join(problem.text for problem in problems[:3]))


def _invalid(text: str) -> EntryProblem:
    return EntryProblem(ProblemKind.INVALID, printable(text))


def _refused(error: Exception, label: str = "") -> EntryProblem:
    return EntryProblem(ProblemKind.UNREADABLE, printable(f"{label} {UNREADABLE}: {why(error)}".lstrip()))


def _unusable(error: UnreadableError, label: str) -> EntryProblem:
    return EntryProblem(ProblemKind.UNREADABLE if error.refused else ProblemKind.INVALID, printable(f"{label} {error}"))


def _deep_gemm_problems(folder: int, name: str) -> list[EntryProblem]:
    """sgl-deep-gemm <= 0.1.7 writes ``kernel.<name>.<hash>/{kernel.cu,kernel.cubin}``; 0.2 writes ``<name>.<hash>/``
    with ``meta.json`` and ``.committed`` as well, and takes a directory without the latter for a miss, forever."""
    directory = name.rpartition("/")[2]
    old = directory.startswith("kernel.") and directory.count(".") >= 2
    problems = []
    if not old and not _is_regular(folder, ".committed"):
        problems.append(_invalid("no .committed"))
    if problem := _file_problem(folder, "kernel.cubin"):
        problems.append(problem)
    if problem := _not_empty(folder, "kernel.cu"):
        problems.append(problem)
    if not old:
        try:
            meta = parsed(read_whole(*open_regular_at(folder, "meta.json"), _JSON_LIMIT))
            if not isinstance(meta, dict):
                problems.append(_invalid("meta.json is not an object"))
        except UnreadableError as error:
            problems.append(_unusable(error, "meta.json"))
    return problems


def _triton_problems(family: Family, tree: Tree, name: str, mount: str | None) -> list[EntryProblem]:
    """A kernel is found through ``__grp__<file>``, which lists its files by absolute path. Directories without a group
    hold a compiled launcher or driver helper (``.so``), or autotune results."""
    items = _finished(family, tree, name)
    if items is None:
        return [_UNLISTED]
    if not items:
        return [MISSING]
    if len(items) > _FILES:
        return [_invalid(f"it holds more than {_FILES} files")]
    names = sorted(item.last for item in items)
    groups = [file for file in names if file.startswith("__grp__")]
    if len(groups) > _GROUPS:
        return [_invalid(f"it holds more than {_GROUPS} groups of files")]
    if groups:
        loose = [file for file in names if file.endswith(".so")]
    elif any(file.endswith(_TRITON_PARTS) for file in names):
        return [_UNFINISHED]
    else:
        loose = names
    problems = [problem for file in loose if (problem := file_problem(tree, f"{name}/{file}"))]
    for group in groups:
        problems += _group_problems(family, tree, name, group, mount)
    return problems


def _group_problems(family: Family, tree: Tree, name: str, group: str, mount: str | None) -> list[EntryProblem]:
    try:
        document = tree.read_json(f"{name}/{group}", _JSON_LIMIT)
    except UnreadableError as error:
        return [_unusable(error, group)]
    children = document.get("child_paths") if isinstance(document, dict) else None
    if not isinstance(children, dict) or not children:
        return [_invalid(f"{group} has no child_paths")]
    if len(children) > _FILES:
        return [_invalid(f"{group} lists more than {_FILES} files")]
    base = str(tree.path)
    below = f"/{family.name}/{posixpath.basename(posixpath.normpath(base))}/{name}/"
    problems = []
    for child, recorded in children.items():
        if not isinstance(recorded, str) or "/" in child or "\0" in child:
            problems.append(_invalid(f"{group} has no path for {child[:100]}"))
            continue
        place = posixpath.normpath(recorded)
        if mount is not None:
            here = place == posixpath.normpath(mount) + below + child
        else:
            here = place == posixpath.normpath(f"{base}/{name}/{child}") or place.endswith(below + child)
        if not here:
            # All other children have the same problem.
            elsewhere = f"{group} points to {recorded[:300]}, not here: it was made under another mount path"
            return [*problems, _invalid(elsewhere)]
        if problem := file_problem(tree, f"{name}/{child}"):
            problems.append(problem)
    return problems


def file_problem(tree: Tree, name: str) -> EntryProblem | None:
    """Return the problem of a file of this name, see `_file_problem`."""
    above, _, last = name.rpartition("/")
    try:
        folder = tree.descriptor(above)
    except (OSError, ValueError) as error:
        return _unusable(unreadable(error), last)
    return _file_problem(folder, last)


def _file_problem(folder: int, last: str) -> EntryProblem | None:
    """Return the problem of a file that must be regular, not empty, and whole if its name or first bytes are ELF's."""
    try:
        fd, size = open_regular_at(folder, last)
    except UnreadableError as error:
        return _unusable(error, last)
    try:
        if not size:
            return _invalid(f"{last} is empty")
        header = os.pread(fd, 64, 0)
        if not elf.expected(header, last):
            return None
        problem = elf.problem(fd, size, header, last)
        if problem is None and size <= _PLAN_ONLY_BYTES and PLAN_ONLY.encode() in os.pread(fd, size, 0):
            problem = "is of the plan pass of a prebuild, and no kernel"
    except OSError as error:
        return _refused(error, last)
    finally:
        os.close(fd)
    return _invalid(f"{last} {problem}") if problem else None


# Details


def _finished(family: Family, tree: Tree, name: str) -> list[TreeItem] | None:
    """Return the files of an entry that are no longer being written; one more than `_FILES` at most."""
    items = tree.some(name, _FILES + 1)
    return None if items is None else [item for item in items if not matches(item.last, family.transient)]


def size_and_times(family: Family, tree: Tree, name: str) -> tuple[int, int, int]:
    """Return bytes, use and writing of an entry, times in nanoseconds.

    use: mtime of its ``.committed``, or of the directory that it was published with, which a hit touches; 0 without.
    writing: newest mtime of its other files, which only compiling changes; 0 where a use changes it too.
    """
    size, used, written = 0, 0, 0
    try:
        status = tree.lstat(name)
        if not stat.S_ISDIR(status.st_mode):
            steady = not matches(name.rpartition("/")[2], family.rewritten)
            leaf = whole(family, name)
            used = tree.lstat(leaf).st_mtime_ns if leaf != name else 0
            return status.st_size, used, status.st_mtime_ns if steady else 0
        for item in tree.some(name, _FILES) or ():
            found = item.stat()
            size += found.st_size if stat.S_ISREG(found.st_mode) else 0
            if item.last == ".committed":
                used = found.st_mtime_ns
            elif not matches(item.last, family.transient):
                written = max(written, found.st_mtime_ns)
    except (OSError, ValueError):
        return size, used, 0
    return size, used, written


def _is_regular(folder: int, last: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(last, dir_fd=folder, follow_symlinks=False).st_mode)
    except OSError:
        return False


def _not_empty(folder: int, last: str) -> EntryProblem | None:
    try:
        status = os.stat(last, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return _invalid(f"{last} is missing")
    except OSError as error:
        return _refused(error, last)
    if not stat.S_ISREG(status.st_mode):
        return _invalid(f"{last} is not a regular file")
    return None if status.st_size else _invalid(f"{last} is empty")
