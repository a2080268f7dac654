"""What ninja would build again, read from the files that it keeps: ``build.ninja``, ``.ninja_deps``, ``.ninja_log``.

ninja builds an output again if any input is newer than it, or than the start of the build that its log has. Inputs are
those of the build statement, and the headers that the compiler reported (ninja 1.13: graph.cc, deps_log.cc version 4,
build_log.cc version 7). Order-only inputs do not count.

The files are in a cache that others may have written: they are read with bounds, and what does not parse says nothing.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from builder import files
from builder.beneath import Tree

#: Names of ninja's files, in the folder that it was started in or beside the build file.
BUILD, DEPS, LOG = "build.ninja", ".ninja_deps", ".ninja_log"
_SIGNATURE, _LARGEST = b"# ninjadeps\n\4\0\0\0", 64 << 20
_BUILD_LARGEST = 4 << 20
#: Inputs that are looked at for one family: FlashInfer's modules share about five thousand headers.
_MOST = 200_000
_VARIABLE = re.compile(r"\$(?:\{([\w.-]+)\}|([\w-]+)|([ :$]))")
_BINDING = re.compile(r"([\w.-]+)\s*=\s*(.*)")


@dataclass
class Made:
    """What ninja noted of the outputs of one folder, by the names that it has for them.

    times: (ns) of an output with reported headers when it was made. inputs: of build statements, and reported headers.
    began: (ns) when the build of an output began.
    """

    times: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, list[str]] = field(default_factory=dict)
    began: dict[str, int] = field(default_factory=dict)


class Ninja:
    """What ninja knows of one family directory."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._folders: dict[str, Made] = {}
        self._times: dict[str, int | None] = {}

    def of(self, entry: str) -> Iterator[tuple[str, str, Made]]:
        """Yield (folder, ninja's name of the entry, notes) of each folder with notes of it, the nearest first."""
        parts = entry.split("/")
        for at in range(len(parts) - 1, -1, -1):
            folder = "/".join(parts[:at])
            if folder not in self._folders:
                self._folders[folder] = self._read(folder)
            name = "/".join(parts[at:])
            made = self._folders[folder]
            for known in (name, str(self._tree.path / entry)):
                if known in made.times or known in made.inputs:
                    yield folder, known, made

    def newer_input(self, entry: str) -> tuple[str, int] | None:
        """Return the newest input for which ninja builds this entry again, with its time in ns; 0 for one that is gone.

        None: there is none. Raises LookupError where ninja has no notes of the entry.
        """
        known = False
        for folder, name, made in self.of(entry):
            if name not in made.inputs:
                continue
            known = True
            built = self.time(entry)
            begun = made.began.get(name, built)
            found = [(self._input(folder, each), each) for each in dict.fromkeys(made.inputs[name])]
            gone = next((each for time, each in found if time is None), None)
            if gone is not None:
                return gone, 0
            latest = max(((time, each) for time, each in found if time is not None), default=(0, ""))
            if built and latest[0] > min(built, begun):
                return latest[1], latest[0]
        if not known:
            raise LookupError(entry)
        return None

    def time(self, entry: str) -> int:
        """Return the time (ns) of a file of the family; 0 where there is none."""
        try:
            return self._tree.lstat(entry).st_mtime_ns
        except (OSError, ValueError):
            return 0

    def _input(self, folder: str, name: str) -> int | None:
        """Return the time of an input, None for one that is gone; 0 for one that is not looked at."""
        own = f"{self._tree.path}/"
        if not name.startswith("/"):
            name = f"{own}{folder}/{name}" if folder else f"{own}{name}"
        if name.startswith(own):
            name = os.path.normpath(name)
            return self.time(name[len(own) :]) or None if name.startswith(own) else 0
        if name not in self._times:
            if len(self._times) >= _MOST:
                return 0
            try:
                self._times[name] = os.stat(name).st_mtime_ns  # noqa: PTH116  # as ninja does, with links followed
            except FileNotFoundError:
                self._times[name] = None
            except (OSError, ValueError):
                self._times[name] = 0
        return self._times[name]

    def _read(self, folder: str) -> Made:
        made = Made()
        above = f"{folder}/" if folder else ""
        for name, time, headers in _deps(self._bytes(f"{above}{DEPS}", _LARGEST)):
            made.times[name] = time
            made.inputs[name] = headers
        for name, began in _log(self._bytes(f"{above}{LOG}", _LARGEST)):
            made.began[name] = began
        # A build file's names count from where ninja was started: there is its log. FlashInfer starts it one level up.
        builds = [f"{above}{BUILD}"]
        if made.began:
            builds += [f"{item.name}/{BUILD}" for item in self._tree.listing(folder) or () if item.is_dir]
        for build in builds:
            for outputs, inputs in statements(self._bytes(build, _BUILD_LARGEST).decode("utf-8", "replace")):
                for name in outputs:
                    made.inputs[name] = [*made.inputs.get(name, ()), *inputs]
        return made

    def _bytes(self, name: str, limit: int) -> bytes:
        try:
            return self._tree.read_bytes(name, limit)
        except (OSError, ValueError, files.UnreadableError):
            return b""


def statements(text: str) -> Iterator[tuple[list[str], list[str]]]:
    """Yield (outputs, inputs) of each build statement of a build file; order-only inputs are left out."""
    variables: dict[str, str] = {}
    for line in re.sub(r"\$\r?\n[ \t]*", "", text).splitlines():
        if line.startswith("build "):
            before, colon, after = _cut(line[len("build ") :], ":")
            if colon:
                inputs = _words(re.split(r"\|\||\|@", after)[0], variables)[1:]
                yield [name for name in _words(before, variables) if name != "|"], [x for x in inputs if x != "|"]
        elif found := _BINDING.fullmatch(line):
            variables[found[1]] = _expanded(found[2], variables)


def _cut(text: str, mark: str) -> tuple[str, str, str]:
    """Split at the first mark that is not escaped."""
    found = re.match(rf"((?:\$.|[^$])*?){mark}", text)
    return (found[1], mark, text[found.end() :]) if found else (text, "", "")


def _words(text: str, variables: Mapping[str, str]) -> list[str]:
    return [_expanded(word, variables) for word in re.findall(r"(?:\$.|[^\s$])+", text)]


def _expanded(text: str, variables: Mapping[str, str]) -> str:
    return _VARIABLE.sub(lambda found: found[3] or variables.get(found[1] or found[2], ""), text)


def _deps(data: bytes) -> Iterator[tuple[str, int, list[str]]]:
    """Yield (output, its time in ns, headers) of a deps log; a later record of an output replaces an earlier one."""
    if not data.startswith(_SIGNATURE):
        return
    paths, at = [], len(_SIGNATURE)
    while at + 4 <= len(data):
        (size,) = struct.unpack_from("<I", data, at)
        is_deps, size, at = size >> 31, size & 0x7FFFFFFF, at + 4
        if not is_deps:
            paths.append(os.fsdecode(data[at : max(at, at + size - 4)].rstrip(b"\0")))
        elif size >= 12 and at + 12 <= len(data):
            number, made = struct.unpack_from("<IQ", data, at)
            count = max(0, min(size, len(data) - at) - 12) // 4
            headers = struct.unpack_from(f"<{count}I", data, at + 12)
            if number < len(paths) and made:
                yield paths[number], made, [paths[each] for each in headers if each < len(paths)]
        at += size


def _log(data: bytes) -> Iterator[tuple[str, int]]:
    """Yield (output, the time in ns that the log has of it)."""
    for line in data.decode("utf-8", "surrogateescape").splitlines():
        fields = line.split("\t")
        # Before version 5 the log had whole seconds.
        if len(fields) == 5 and fields[2].isascii() and fields[2].isdigit() and 10**15 < int(fields[2][:19]) < 1 << 63:
            yield fields[3], int(fields[2][:19])
