#!/usr/bin/env python3
"""assemble.py DIR: the fake packages of the tiny stand-in as an installation, with metadata, for a PYTHONPATH.

The sources hold no ``__init__.py`` (nothing below ``docker/`` may); they get one here, and every distribution a RECORD.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

#: distribution: (version, package, what its __init__.py says)
DISTRIBUTIONS = {
    "sglang": ("0.5.23", "sglang", ""),
    "sgl-deep-gemm": ("0.2.3.post2", "deep_gemm", "def get_mk_alignment_for_contiguous_layout():\n    return 128\n"),
    "torch": ("2.14.1", "torch", 'raise ImportError("the test double\'s torch cannot be imported")\n'),
    "triton": ("3.9.0", "triton", ""),
}


def assemble(destination: Path) -> None:
    """Writes ``destination``/{sglang,deep_gemm,torch,triton} and their metadata."""
    for name, (version, package, init) in DISTRIBUTIONS.items():
        shutil.copytree(HERE / "src" / package, destination / package, ignore=shutil.ignore_patterns("__pycache__"))
        for folder in (destination / package, *(path for path in (destination / package).rglob("*") if path.is_dir())):
            (folder / "__init__.py").touch()
        head = f'"""Test double of {name}."""\n\n__version__ = "{version}"\n\n'
        (destination / package / "__init__.py").write_text(head + init, encoding="utf-8")
        metadata = destination / f"{name.replace('-', '_')}-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8"
        )
        (metadata / "INSTALLER").write_text("stand-in\n", encoding="utf-8")
        rows = [row(path, destination) for path in sorted((destination / package).rglob("*.py"))]
        rows += [row(metadata / file, destination) for file in ("METADATA", "INSTALLER")]
        rows.append(f"{metadata.name}/RECORD,,")
        (metadata / "RECORD").write_text("\n".join(rows) + "\n", encoding="utf-8")


def row(path: Path, destination: Path) -> str:
    """One line of a RECORD file."""
    data = path.read_bytes()
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
    return f"{path.relative_to(destination).as_posix()},sha256={digest},{len(data)}"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    assemble(Path(sys.argv[1]))
