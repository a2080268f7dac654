"""Whether an ELF file is whole, and for which machine it is, by its header and its two tables alone.

A cache holds gigabytes, and every check reads a marker's entries: the contents of a file are never read.
"""

from __future__ import annotations

import os
import struct

#: Bytes of a table of an ELF file, and of it that are read at once: a sparse file of 4 kB can claim any number.
_TABLE_LIMIT = 1 << 20
_CHUNK = 64 << 10

_SUFFIXES = (".so", ".o", ".cubin")
_MAGIC = b"\x7fELF"

#: By whether the file is a 64-bit one, from elf.h; other fields are skipped. Header: where the segments and the
#: sections are, then size and number of each. Row of a table: kind, offset and length of what it describes.
_HEADER = {True: "32xQQ6xHHHH2x", False: "28xII6xHHHH2x"}
_SECTION = {True: "4xI16xQQ24x", False: "4xI8xII16x"}
_SEGMENT = {True: "I4xQ16xQ16x", False: "II8xI12x"}
_SHT_NOBITS = 8
#: Machines that hosts are, by e_machine. GPUs have numbers of their own (190 is CUDA's).
_MACHINES = {3: "i686", 21: "ppc64le", 22: "s390x", 62: "x86_64", 183: "aarch64", 243: "riscv64"}


def expected(header: bytes, name: str) -> bool:
    """Return whether a file has to be whole as an ELF file, by its first bytes or its name."""
    return header[:4] == _MAGIC or name.endswith(_SUFFIXES)


def problem(fd: int, size: int, header: bytes, name: str) -> str | None:
    """Return what is wrong with an ELF file, without its name; None if nothing is. Raises OSError.

    header: its first 64 bytes, or fewer.
    """
    try:
        return _tables(fd, size, header) or _machine(header, name)
    except (struct.error, OverflowError, MemoryError):
        return "is damaged: its ELF tables do not parse"


def _tables(fd: int, size: int, header: bytes) -> str | None:
    """Return what is wrong by header and both tables, without the label; never reads the contents."""
    if header[:4] != _MAGIC or (len(header) > 5 and not (header[4] in (1, 2) and header[5] in (1, 2))):
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
        if count * step > _TABLE_LIMIT:
            return f"is damaged: its {what} table has {count * step} bytes"
        nobits = _SHT_NOBITS if what == "section" else None
        last = _last_byte(fd, at, count, step, f"{order}{row}{step - least}x", nobits)
        if last is None:
            return f"is damaged: its {what} table is blank"
        end = max(end, last)
    if not end:
        return "is damaged: it has neither sections nor segments"
    return f"is cut: {size} of {end} bytes" if end > size else None


def _machine(header: bytes, name: str) -> str | None:
    """Return for which other machine a file is; None if it is for this one, or for one that is no host's."""
    (number,) = struct.unpack_from("<H" if header[5] == 1 else ">H", header, 18)
    theirs = _MACHINES.get(number)
    if theirs is None:
        return None
    ours = os.uname().machine
    if theirs == ours and not name.endswith(".cubin"):
        return None
    return f"is for {theirs}, " + ("and no GPU" if name.endswith(".cubin") else f"and this machine is {ours}")


def _last_byte(fd: int, at: int, count: int, step: int, row: str, nobits: int | None) -> int | None:
    """Return the end of what a table describes furthest into the file; None where it describes nothing."""
    rows = max(1, _CHUNK // step)
    last: int | None = None
    for first in range(0, count, rows):
        data = os.pread(fd, min(rows, count - first) * step, at + first * step)
        # A row of kind NULL describes nothing, and a section of kind NOBITS takes no room in the file.
        ends = [
            offset if kind == nobits else offset + length
            for kind, offset, length in struct.iter_unpack(row, data)
            if kind
        ]
        if ends:
            last = max(ends) if last is None else max(last, *ends)
    return last
