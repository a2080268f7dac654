"""Copies an ELF64 shared object without its device code, which nothing here can run.

    elfcut.py IN OUT        prints the bytes saved; 0 = copied as it is

All virtual addresses stay. The PT_LOAD around .nv_fatbin is split in two, the slot of PT_NOTE holds the new header, the
section table goes, and the hole is simply not mapped.
"""

import shutil
import struct
import sys
from pathlib import Path

PAGE = 0x1000
PT_LOAD, PT_NOTE = 1, 4
OFFSET, VADDR, PADDR, FILESZ, MEMSZ = 2, 3, 4, 5, 6  # in a program header


def fatbin(data):
    """(offset, size) of .nv_fatbin, or None."""
    (table,) = struct.unpack_from("<Q", data, 0x28)
    count, names_index = struct.unpack_from("<HH", data, 0x3C)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, table + 64 * index) for index in range(count)]
    names = sections[names_index][4]
    for section in sections:
        start = names + section[0]
        if data[start : start + 11] == b".nv_fatbin\0":
            return section[4], section[5]
    return None


def cut(data):
    """The shortened file, or None where there is nothing to gain."""
    found = fatbin(data)
    if found is None:
        return None
    offset, size = found
    low, high = -(-offset // PAGE) * PAGE, (offset + size) // PAGE * PAGE
    (table,) = struct.unpack_from("<Q", data, 0x20)
    (count,) = struct.unpack_from("<H", data, 0x38)
    headers = [list(struct.unpack_from("<IIQQQQQQ", data, table + 56 * index)) for index in range(count)]
    notes = [header for header in headers if header[0] == PT_NOTE]
    around = [h for h in headers if h[0] == PT_LOAD and h[OFFSET] <= low and high <= h[OFFSET] + h[FILESZ]]
    if high - low < 1 << 20 or not notes or not around:
        return None
    headers.remove(notes[0])
    first = around[0]
    second = list(first)
    skipped = high - first[OFFSET]
    for field in (OFFSET, VADDR, PADDR):
        second[field] += skipped
    for field in (FILESZ, MEMSZ):
        second[field] -= skipped
    first[FILESZ] = first[MEMSZ] = low - first[OFFSET]
    headers.insert(headers.index(first) + 1, second)
    end = max(h[OFFSET] + h[FILESZ] for h in headers if h[0] == PT_LOAD)
    for header in headers:
        if header[OFFSET] >= high:
            header[OFFSET] -= high - low
    result = bytearray(data[:low] + data[high:end])
    for index, header in enumerate(headers):
        struct.pack_into("<IIQQQQQQ", result, table + 56 * index, *header)
    struct.pack_into("<Q", result, 0x28, 0)
    struct.pack_into("<HHHHH", result, 0x36, 56, len(headers), 64, 0, 0)
    return bytes(result)


def main():
    source, target = map(Path, sys.argv[1:])
    data = source.read_bytes()
    shorter = cut(data)
    if shorter is None:
        shutil.copy2(source, target)
    else:
        target.write_bytes(shorter)
        shutil.copystat(source, target)
    print(len(data) - len(shorter or data))


main()
