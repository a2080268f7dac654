"""DeepGEMM's on-disk cache (format of sgl-deep-gemm 0.2), with placeholders for kernels."""

import hashlib
import json
import os
import shutil
import struct
import subprocess
import threading
import uuid
from pathlib import Path

LOADED: set[tuple[str, str]] = set()
VERSION_TEXT = "nvcc: NVIDIA (R) Cuda compiler driver, release 13.0, V13.0.88 (test double)"


def compile_kernel(name: str, key: str) -> bool:
    """True when an entry was made, False for a hit, whose stamp is touched as DeepGEMM does.

    As in the original, a process that has loaded a kernel does not look at the disk again.
    """
    if (name, key) in LOADED:
        return False
    LOADED.add((name, key))
    root = Path(os.environ["DG_JIT_CACHE_DIR"])
    digest = hashlib.sha256(f"{name} {key}".encode()).hexdigest()[:32]
    entry = root / "cache" / f"{name}.{digest}"
    if (entry / ".committed").exists():
        os.utime(entry / ".committed")
        return False
    threading.Event().wait(float(os.environ.get("TINY_COMPILE_SECONDS", "0")))
    build = root / "tmp" / uuid.uuid4().hex
    build.mkdir(parents=True)
    (build / "kernel.cu").write_text(f"// {name} {key}\n")
    if compiler := os.environ.get("DG_JIT_NVCC_COMPILER"):  # in the original always, by default CUDA_HOME's
        command = [compiler, str(build / "kernel.cu"), "--cubin", "--output-file", str(build / "kernel.cubin")]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"NVCC compilation failed: {done.stderr}")
    else:
        (build / "kernel.cubin").write_bytes(cubin(key.encode()))
    command = f"nvcc {build}/kernel.cu --cubin --gpu-architecture=sm_90a"
    (build / "meta.json").write_text(json.dumps({"command": command, "compiler_info": {"version": VERSION_TEXT}}))
    (build / ".committed").touch()
    entry.parent.mkdir(parents=True, exist_ok=True)
    try:
        build.rename(entry)
    except OSError:  # another process was first; the original's loser discards its build as well
        shutil.rmtree(build)
    return True


def cubin(payload: bytes) -> bytes:
    """A small ELF file for the machine CUDA: one section with the payload, and the table of sections."""
    names = b"\0.text\0.shstrtab\0"
    text_at = 64
    names_at = text_at + len(payload)
    table_at = (names_at + len(names) + 7) // 8 * 8
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01" + bytes(9), 2, 190, 1, 0, 0, table_at, 0, 64, 56, 0, 64, 3, 2
    )
    sections = struct.pack("<IIQQQQIIQQ", *[0] * 10)
    sections += struct.pack("<IIQQQQIIQQ", 1, 1, 6, 0, text_at, len(payload), 0, 0, 1, 0)
    sections += struct.pack("<IIQQQQIIQQ", 7, 3, 0, 0, names_at, len(names), 0, 0, 1, 0)
    return (header + payload + names).ljust(table_at, b"\0") + sections
