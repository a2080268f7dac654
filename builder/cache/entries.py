"""How an entry of each layout looks on disk, and what can be wrong with one.

Names keep their undecodable bytes as Python's surrogate escapes; problems are always printable. What cannot be read is
an entry with a problem, never an exception.

The text of a problem holds names that a job has chosen, so nothing is decided by it: `ProblemKind` is what counts.
"""

from __future__ import annotations

import enum
import os
import posixpath
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from builder.cache.families import Family
from builder.files import UNREADABLE, UnreadableError, is_dir, listing, matches, open_regular, read_json, walk, why
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
_UNFINISHED = EntryProblem(ProblemKind.UNFINISHED, "no __grp__ file")
_UNLISTED = EntryProblem(ProblemKind.UNREADABLE, f"{UNREADABLE}: a directory that cannot be listed")

_JSON_LIMIT = 4 << 20
_ELF_SUFFIXES = (".so", ".o", ".cubin")
_TRITON_PARTS = (".source", ".ttir", ".ttgir", ".llir", ".ptx", ".cubin", ".amdgcn", ".hsaco")

_ELF_MAGIC = b"\x7fELF"

#: The symbol of the cubin by which the plan pass of a prebuild names kernels (agent.prebuild_plan). DeepGEMM would load
#: it. Its size by nvcc 13.0 is 3.6 kB (sm_90a) and 5.1 kB (sm_100a), and that of the smallest kernel 12 kB.
PLAN_ONLY = "warm_cache_plan_only"
_PLAN_ONLY_BYTES = 8192

#: By whether the file is a 64-bit one, from elf.h; other fields are skipped. Header: where the segments and the
#: sections are, then size and number of each. Row of a table: kind, offset and length of what it describes.
_HEADER = {True: "32xQQ6xHHHH2x", False: "28xII6xHHHH2x"}
_SECTION = {True: "4xI16xQQ24x", False: "4xI8xII16x"}
_SEGMENT = {True: "I4xQ16xQ16x", False: "II8xI12x"}
_SHT_NOBITS = 8


# Names of entries, by layout


def _deep_gemm_names(family: Family, base: str) -> Iterator[str]:
    for item in listing(f"{base}/cache") or ():
        # <name>.<hash>: a directory without a dot (lost+found) is no entry.
        if "." in item.name[1:] and not matches(item.name, family.transient) and is_dir(item):
            yield f"cache/{item.name}"


def _triton_names(family: Family, base: str) -> Iterator[str]:
    for item in listing(base) or ():
        # Triton makes the directory before its first file: with nothing finished in it, it is no entry yet.
        if not matches(item.name, family.transient) and is_dir(item) and _finished(family, item.path) != []:
            yield item.name


def _file_names(family: Family, base: str) -> Iterator[str]:
    for name, item in walk(base, family.transient):
        host_specific = "/" not in name and matches(name, family.host_specific)
        if name.partition("/")[0] in family.apart or host_specific:
            continue
        if item is None or item.is_file(follow_symlinks=False):
            yield name


#: Functions that list the names of a layout's entries: (family, its directory) -> names from that directory.
NAMES: Mapping[str, Callable[[Family, str], Iterator[str]]] = {
    "deep_gemm": _deep_gemm_names,
    "triton": _triton_names,
    "files": _file_names,
}


# Problems, by layout


def problem_of(family: Family, base: str, name: str, mount: str | None) -> EntryProblem | None:
    """Return what is wrong with an entry, naming the file; None when it is valid; MISSING when it does not exist."""
    path = f"{base}/{name}"
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return MISSING
    except (OSError, ValueError) as error:
        return _refused(error)
    if family.layout == "files":
        if stat.S_ISDIR(mode):
            return MISSING if listing(path) is not None else _UNLISTED
        return _file_problem(path, name)
    if not stat.S_ISDIR(mode):
        return _invalid("is not a directory")
    if family.layout == "deep_gemm":
        return _joined(_deep_gemm_problems(path, name))
    return _joined(_triton_problems(family, base, name, mount))


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


def _deep_gemm_problems(path: str, name: str) -> list[EntryProblem]:
    """sgl-deep-gemm <= 0.1.7 writes ``kernel.<name>.<hash>/{kernel.cu,kernel.cubin}``; 0.2 writes ``<name>.<hash>/``
    with ``meta.json`` and ``.committed`` as well, and takes a directory without the latter for a miss, forever."""
    directory = name.rpartition("/")[2]
    old = directory.startswith("kernel.") and directory.count(".") >= 2
    problems = []
    if not old and not _is_regular(f"{path}/.committed"):
        problems.append(_invalid("no .committed"))
    if problem := elf_problem(f"{path}/kernel.cubin", "kernel.cubin"):
        problems.append(problem)
    if problem := _not_empty(f"{path}/kernel.cu", "kernel.cu"):
        problems.append(problem)
    if not old:
        try:
            if not isinstance(read_json(f"{path}/meta.json", _JSON_LIMIT), dict):
                problems.append(_invalid("meta.json is not an object"))
        except UnreadableError as error:
            problems.append(_unusable(error, "meta.json"))
    return problems


def _triton_problems(family: Family, base: str, name: str, mount: str | None) -> list[EntryProblem]:
    """A kernel is found through ``__grp__<file>``, which lists its files by absolute path. Directories without a group
    hold a compiled launcher or driver helper (``.so``), or autotune results."""
    items = _finished(family, f"{base}/{name}")
    if items is None:
        return [_UNLISTED]
    if not items:
        return [MISSING]
    names = sorted(item.name for item in items)
    groups = [file for file in names if file.startswith("__grp__")]
    if groups:
        loose = [file for file in names if file.endswith(".so")]
    elif any(file.endswith(_TRITON_PARTS) for file in names):
        return [_UNFINISHED]
    else:
        loose = names
    problems = [problem for file in loose if (problem := _file_problem(f"{base}/{name}/{file}", file))]
    for group in groups:
        problems += _group_problems(family, base, name, group, mount)
    return problems


def _group_problems(family: Family, base: str, name: str, group: str, mount: str | None) -> list[EntryProblem]:
    try:
        document = read_json(f"{base}/{name}/{group}", _JSON_LIMIT)
    except UnreadableError as error:
        return [_unusable(error, group)]
    children = document.get("child_paths") if isinstance(document, dict) else None
    if not isinstance(children, dict) or not children:
        return [_invalid(f"{group} has no child_paths")]
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
        if problem := _file_problem(f"{base}/{name}/{child}", child):
            problems.append(problem)
    return problems


def _file_problem(path: str, name: str) -> EntryProblem | None:
    """Return the problem of a file that must be regular, not empty, and whole if its name or first bytes are ELF's."""
    label = printable(name.rpartition("/")[2])
    if name.endswith(_ELF_SUFFIXES):
        return elf_problem(path, label)
    try:
        fd, size = open_regular(path)
    except UnreadableError as error:
        return _unusable(error, label)
    try:
        magic = os.pread(fd, 4, 0)
    except OSError as error:
        return _refused(error, label)
    finally:
        os.close(fd)
    if not size:
        return _invalid(f"{label} is empty")
    return elf_problem(path, label) if magic == _ELF_MAGIC else None


# ELF


def elf_problem(path: str, label: str) -> EntryProblem | None:
    """Return what is wrong with an ELF file, beginning with `label`; None when it is as long as its tables require.

    Only the header and the two tables are read: a cache holds gigabytes, and every check reads a marker's entries.
    """
    try:
        fd, size = open_regular(path)
    except UnreadableError as error:
        return _unusable(error, label)
    try:
        problem = _tables(fd, size) if size else "is empty"
        if problem is None and size <= _PLAN_ONLY_BYTES and PLAN_ONLY.encode() in os.pread(fd, size, 0):
            problem = "is of the plan pass of a prebuild, and no kernel"
    except OSError as error:
        return _refused(error, label)
    except struct.error:
        problem = "is damaged: its ELF tables do not parse"
    finally:
        os.close(fd)
    return _invalid(f"{label} {problem}") if problem else None


def _tables(fd: int, size: int) -> str | None:
    """Return what is wrong by header and both tables, without the label; never reads the contents."""
    header = os.pread(fd, 64, 0)
    if header[:4] != _ELF_MAGIC or (len(header) > 5 and not (header[4] in (1, 2) and header[5] in (1, 2))):
        return "is not ELF"
    wide = header[4:5] == b"\2"
    if len(header) < (64 if wide else 52):
        return f"is cut: {size} bytes, less than an ELF header"
    order = "<" if header[5] == 1 else ">"
    segments_at, sections_at, *counts = struct.unpack_from(order + _HEADER[wide], header)
    segment_size, segment_count, section_size, section_count = counts
    # Section 0 holds the true counts where they do not fit into 16 bits.
    if sections_at and (section_count == 0 or segment_count == 0xFFFF):
        least = 64 if wide else 40
        if sections_at + least > size:
            return f"is cut: {size} of {sections_at + least} bytes"
        first = os.pread(fd, least, sections_at)
        if not section_count:
            (section_count,) = struct.unpack_from(order + ("Q" if wide else "I"), first, 0x20 if wide else 0x14)
        if segment_count == 0xFFFF:
            (segment_count,) = struct.unpack_from(order + "I", first, 0x2C if wide else 0x1C)
    end = 0
    for what, at, count, step, least, row in (
        ("section", sections_at, section_count, section_size, 64 if wide else 40, _SECTION[wide]),
        ("segment", segments_at, segment_count, segment_size, 56 if wide else 32, _SEGMENT[wide]),
    ):
        if not at or not count:
            continue
        if step < least:
            return "is damaged: its ELF tables do not parse"
        end = max(end, at + count * step)
        if end > size:
            return f"is cut: {size} of {end} bytes"
        rows = struct.iter_unpack(f"{order}{row}{step - least}x", os.pread(fd, count * step, at))
        # A row of kind NULL describes nothing, and a section of kind NOBITS takes no room in the file.
        nobits = _SHT_NOBITS if what == "section" else None
        ends = [offset if kind == nobits else offset + length for kind, offset, length in rows if kind]
        if not ends:
            return f"is damaged: its {what} table is blank"
        end = max(end, *ends)
    if not end:
        return "is damaged: it has neither sections nor segments"
    return f"is cut: {size} of {end} bytes" if end > size else None


# Details


def _finished(family: Family, path: str) -> list[os.DirEntry[str]] | None:
    items = listing(path)
    return None if items is None else [item for item in items if not matches(item.name, family.transient)]


def size_and_times(family: Family, base: str, name: str) -> tuple[int, int, int]:
    """Return bytes, use and writing of an entry, times in nanoseconds.

    use: mtime of its ``.committed``, which a hit touches; 0 without one.
    writing: newest mtime of its other files, which only compiling changes; 0 where a use changes it too.
    """
    path, size, used, written = f"{base}/{name}", 0, 0, 0
    try:
        status = os.lstat(path)
        if not stat.S_ISDIR(status.st_mode):
            steady = not matches(name.rpartition("/")[2], family.rewritten)
            return status.st_size, 0, status.st_mtime_ns if steady else 0
        for item in listing(path) or ():
            found = item.stat(follow_symlinks=False)
            size += found.st_size if stat.S_ISREG(found.st_mode) else 0
            if item.name == ".committed":
                used = found.st_mtime_ns
            elif not matches(item.name, family.transient):
                written = max(written, found.st_mtime_ns)
    except (OSError, ValueError):
        return size, used, 0
    return size, used, written


def _is_regular(path: str) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return False


def _not_empty(path: str, label: str) -> EntryProblem | None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return _invalid(f"{label} is missing")
    except OSError as error:
        return _refused(error, label)
    if not stat.S_ISREG(status.st_mode):
        return _invalid(f"{label} is not a regular file")
    return None if status.st_size else _invalid(f"{label} is empty")
