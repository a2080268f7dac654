"""Whether an ELF file (cubin, shared object, object file) is as long as its own tables say.

A file that was cut while it was copied or written has a header that promises more than there is. Only the header and
the two tables are read: a cache holds gigabytes, and a marker's entries are checked on the way of every test job.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

from builder.warmup.files import UNREADABLE, UnreadableError, open_regular, why

MAGIC = b"\x7fELF"


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
    """Reads the header and both tables, never the contents. Field offsets are those of elf.h, 32 and 64 bit."""
    header = os.pread(fd, 64, 0)
    if header[:4] != MAGIC or (len(header) > 5 and not {header[4], header[5]} <= {1, 2}):
        return "is not ELF"
    wide = header[4:5] == b"\2"
    if len(header) < (64 if wide else 52):
        return f"is cut: {size} bytes, less than an ELF header"
    order = "<" if header[5] == 1 else ">"
    segments_at, sections_at = struct.unpack_from(order + ("QQ" if wide else "II"), header, 0x20 if wide else 0x1C)
    counts = struct.unpack_from(order + "HHHH", header, 0x36 if wide else 0x2A)
    segment_size, segment_count, section_size, section_count = counts
    # Section 0 holds the true counts where they do not fit into 16 bits.
    if sections_at and (section_count == 0 or segment_count == 0xFFFF):
        first = os.pread(fd, 64 if wide else 40, sections_at)
        if not section_count:
            (section_count,) = struct.unpack_from(order + ("Q" if wide else "I"), first, 0x20 if wide else 0x14)
        if segment_count == 0xFFFF:
            (segment_count,) = struct.unpack_from(order + "I", first, 0x2C if wide else 0x1C)
    end = 0
    for what, at, count, step, least in (
        ("section", sections_at, section_count, section_size, 64 if wide else 40),
        ("segment", segments_at, segment_count, segment_size, 56 if wide else 32),
    ):
        if not at or not count:
            continue
        if step < least:
            return "is damaged: its ELF tables do not parse"
        end = max(end, at + count * step)
        if end > size:
            return f"is cut: {size} of {end} bytes"
        table = os.pread(fd, count * step, at)
        extents = _section_extents if what == "section" else _segment_extents
        ends = [offset + length for offset, length in extents(table, count, step, order, wide)]
        if not ends:
            return f"is damaged: its {what} table is blank"
        end = max(end, *ends)
    if not end:
        return "is damaged: it has neither sections nor segments"
    return f"is cut: {size} of {end} bytes" if end > size else None


def _section_extents(table: bytes, count: int, step: int, order: str, wide: bool) -> Iterator[tuple[int, int]]:
    for index in range(count):
        (kind,) = struct.unpack_from(order + "I", table, index * step + 4)
        offset, length = struct.unpack_from(
            order + ("QQ" if wide else "II"), table, index * step + (0x18 if wide else 0x10)
        )
        if kind == 8:  # SHT_NOBITS takes no room in the file
            yield offset, 0
        elif kind:  # SHT_NULL says nothing
            yield offset, length


def _segment_extents(table: bytes, count: int, step: int, order: str, wide: bool) -> Iterator[tuple[int, int]]:
    for index in range(count):
        (kind,) = struct.unpack_from(order + "I", table, index * step)
        (offset,) = struct.unpack_from(order + ("Q" if wide else "I"), table, index * step + (8 if wide else 4))
        (length,) = struct.unpack_from(order + ("Q" if wide else "I"), table, index * step + (0x20 if wide else 0x10))
        if kind:  # PT_NULL says nothing
            yield offset, length
