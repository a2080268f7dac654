"""Whether an ELF file (cubin, shared object, object file) is as long as its own tables say.

A file that was cut while it was copied or written has a header that promises more than there is. Only the header and
the two tables are read: a cache holds gigabytes, and a marker's entries are checked on the way of every test job.
"""

from __future__ import annotations

import os
import struct

from builder.files import UNREADABLE, UnreadableError, open_regular, why

MAGIC = b"\x7fELF"

#: By whether the file is a 64-bit one, from elf.h; what is not wanted is skipped. Header: where the segments and the
#: sections are, then size and number of each. Row of a table: kind, offset and length of what it describes.
_HEADER = {True: "32xQQ6xHHHH2x", False: "28xII6xHHHH2x"}
_SECTION = {True: "4xI16xQQ24x", False: "4xI8xII16x"}
_SEGMENT = {True: "I4xQ16xQ16x", False: "II8xI12x"}
_SHT_NOBITS = 8


def problem_of(path: str, label: str) -> str | None:
    """What is wrong with the file, in words that begin with `label`; None when it is a whole ELF file."""
    try:
        fd, size = open_regular(path)
    except UnreadableError as error:
        return f"{label} {error}"
    try:
        if not size:
            return f"{label} is empty"
        problem = _tables(fd, size)
    except OSError as error:
        problem = f"{UNREADABLE}: {why(error)}"
    except struct.error:
        problem = "is damaged: its ELF tables do not parse"
    finally:
        os.close(fd)
    return f"{label} {problem}" if problem else None


def _tables(fd: int, size: int) -> str | None:
    """Reads the header and both tables, never the contents."""
    header = os.pread(fd, 64, 0)
    if header[:4] != MAGIC or (len(header) > 5 and not (header[4] in (1, 2) and header[5] in (1, 2))):
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
        # A row of kind NULL says nothing, and a section of kind NOBITS takes no room in the file.
        nobits = _SHT_NOBITS if what == "section" else None
        ends = [offset if kind == nobits else offset + length for kind, offset, length in rows if kind]
        if not ends:
            return f"is damaged: its {what} table is blank"
        end = max(end, *ends)
    if not end:
        return "is damaged: it has neither sections nor segments"
    return f"is cut: {size} of {end} bytes" if end > size else None
