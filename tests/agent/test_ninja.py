"""What is read out of ninja's files, against ninja: it says by itself whether it would build anything."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from builder.beneath import Tree
from builder.cache import loadable
from builder.cache.families import FAMILY

NINJA = shutil.which("ninja")
pytestmark = pytest.mark.skipif(NINJA is None, reason="needs ninja (apt-get install ninja-build), to compare with it")

#: As FlashInfer writes it, which starts ninja in the folder above; a path with a blank, a header, an order-only input.
BUILD = """ninja_required_version = 1.3
name = op
src = {src}
rule compile
  command = sed 1q $in > $out && printf '%s: {header}\\n' $out > $out.d
  depfile = $out.d
  deps = gcc
rule link
  command = cat $in > $out

build $name/a.o: compile $src/a$ b.cu || {src}/late
build $name/b.o: compile ${{src}}/b.cpp | $
    {src}/implicit.h
build $name/$name.so: link $name/a.o $name/b.o
default $name/$name.so
"""
ENTRIES = ["op/a.o", "op/b.o", "op/op.so"]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A family's directory that ninja has built, from sources in ``src`` beside it."""
    src, cache = tmp_path / "src", tmp_path / "cache"
    src.mkdir()
    (cache / "op").mkdir(parents=True)
    for name in ("a b.cu", "b.cpp", "implicit.h", "system.h", "late"):
        (src / name).write_text(name)
        os.utime(src / name, (1000, 1000))
    (cache / "op" / "build.ninja").write_text(BUILD.format(src=src, header=src / "system.h"))
    assert "no work to do" not in ninja(cache)
    return cache


def ninja(cache: Path, *more: str) -> str:
    assert NINJA is not None
    command = [NINJA, "-C", str(cache), "-f", "op/build.ninja", *more]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def now(path: Path) -> None:
    os.utime(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda cache: None, ""),
        (lambda cache: now(cache.parent / "src" / "late"), ""),
        (lambda cache: now(cache.parent / "src" / "a b.cu"), "src/a b.cu ("),
        (lambda cache: now(cache.parent / "src" / "implicit.h"), "src/implicit.h ("),
        (lambda cache: now(cache.parent / "src" / "system.h"), "src/system.h ("),
        (lambda cache: (cache.parent / "src" / "system.h").unlink(), "src/system.h is gone"),
        (lambda cache: now(cache / "op" / "a.o"), "a.o was copied without its time"),
        (lambda cache: os.utime(cache / "op" / "op.so", (500, 500)), ".o ("),
    ],
)
def test_stale_exactly_where_ninja_would_build(made: Path, change: Callable[[Path], object], said: str) -> None:
    change(made)
    told = loadable.stale(FAMILY["flashinfer"], Tree(made), ENTRIES, {}, mounted=True, inside=True)
    assert (told == "") == ("no work to do" in ninja(made, "-n"))
    assert said in told


def test_stale_names_the_newest_time_where_ninja_noted_nothing(made: Path) -> None:
    """A copy without ninja's files: what a probe found newest decides."""
    for path in (made / "op" / "build.ninja", made / ".ninja_deps", made / ".ninja_log"):
        path.unlink()
    for newest, stale in ((1, False), (1 << 62, True)):
        told = loadable.stale(FAMILY["flashinfer"], Tree(made), ENTRIES, {"nvcc": newest}, mounted=True, inside=True)
        assert told.startswith("nvcc's headers (2116-02-20) are newer") == stale
