"""A cache root of several toolchains as runs would have left it, without any run: markers, memos, entries, times."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Sequence
from pathlib import Path

from builder.cache import layout, marker_files, marker_writing, memos, toolchain, usage
from builder.cache.families import FAMILIES, directory
from builder.cache.marker_format import Observed
from builder.cache.toolchain import Record
from builder.task import ServingImage, Task

DAY = 86400.0
#: A 32-bit ELF header and a table of one section, which is the table itself: the smallest file that is whole.
CUBIN = struct.pack("<4s12sHHIIIIIHHHHHH", b"\x7fELF", bytes([1, 1, 1]), 2, 190, 1, 0, 0, 52, 0, 52, 0, 0, 40, 1, 0)
CUBIN += struct.pack("<IIIIIIIIII", 0, 1, 0, 0, 52, 40, 0, 0, 0, 0)


def record(number: int, **factors: str) -> Record:
    """The environment of the image of this number: every family is its own, but for what factors say."""
    names = {factor for family in FAMILIES for factor in family.factors}
    made = {**{name: f"{name} {number}" for name in names}, "mount": "/jit", "image": image(number), **factors}
    gpu = {"name": made["gpu_name"], "compute_capability": made["compute_capability"], "sm_count": made["sm_count"]}
    return {
        "schema": 2,
        "factors": dict(made),
        "gpus": [gpu],
        "sglang": {"version": f"0.5.{number}", "commit": "abc", "sources": None},
        "observed": {"driver": made["driver"], "python": "3.12.3", "problems": []},
    }


def image(number: int) -> str:
    return f"sha256:{number:064x}"


def task(name: str) -> Task:
    return Task(label=name, model=f"org/{name}", recipe="shapes", gpus=8)


class Generations:
    """Builds the root up, and puts every time that it writes so many days back."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.made: dict[int, Record] = {}
        layout.prepare(root)

    def warmed(
        self, number: int, tasks: Sequence[str], *, days: float, entries: int = 2, size: int = 0, **factors: str
    ) -> Record:
        """The image of this number warmed these tasks so many days ago. Each lists so many entries of its own, and one
        that all of them have. size: bytes of padding in each entry.
        """
        made = self.made.setdefault(number, record(number, **factors))
        memos.write_memo(self.root, ServingImage(image(number)), made, env={})
        keys = toolchain.family_keys(made)
        for family, key in keys.items():
            layout.describe_family(self.root, family, key, toolchain.family_factors(made, family))
        for name in tasks:
            names = [f"cache/{name}.{at:032x}" for at in range(entries)] + ["cache/shared.0"]
            for one in names:
                self.entry(keys["deep_gemm"], one, size=size)
            self.file("inductor", keys["inductor"], f"{name}.py")
            marker = marker_writing.build(
                task(name),
                record=made,
                config_digest=None,
                claims=["deep_gemm"],
                entries={"deep_gemm": names},
                proof="verified",
                second_pass_added=0,
                shapes=[],
                observed=Observed(image=image(number), bytes={"deep_gemm": (entries + 1) * (size + 1000)}),
            )
            path = marker_writing.publish(self.root, marker)
            self.age(self.root / path, days)
            self.age(self.root / usage.stamp_name(path), days)
        for family, key in keys.items():
            self.age(Path(directory(str(self.root), family, key)), days)
        self.age(memos.memo_path(self.root, image(number)), days)
        return made

    def entry(self, key: str, name: str, *, size: int = 0, days: float | None = None) -> Path:
        place = Path(directory(str(self.root), "deep_gemm", key)) / name
        if not place.exists():
            place.mkdir(parents=True)
            (place / "kernel.cu").write_text("//" + "x" * size)
            (place / "meta.json").write_text("{}")
            (place / "kernel.cubin").write_bytes(CUBIN)
            (place / ".committed").touch()
        if days is not None:
            self.age(place, days)
        return place

    def file(self, family: str, key: str, name: str) -> None:
        place = Path(directory(str(self.root), family, key))
        place.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("code")

    def age(self, path: Path, days: float) -> None:
        """As if nobody had read or written it, or anything in it, for so long."""
        when = time.time() - days * DAY
        for below in (*path.rglob("*"), path) if path.is_dir() else (path,):
            os.utime(below, (when, when))

    def key(self, number: int, family: str = "deep_gemm") -> str:
        return toolchain.family_key(self.made[number], family)

    def place(self, number: int, family: str = "deep_gemm") -> Path:
        return Path(directory(str(self.root), family, self.key(number, family)))

    def markers(self) -> list[str]:
        """``task@image`` of every marker that is there."""
        found = []
        for folder, _, names in os.walk(self.root / "markers"):  # skips a folder that a prune removes meanwhile
            for path in (Path(folder, name) for name in names if name.endswith(".json")):
                marker = marker_files.read(path)
                assert marker is not None or not path.exists()
                if marker is not None:
                    found.append(f"{marker.label}@{int((marker.observed.image or '')[7:], 16)}")
        return sorted(found)


def unvouched(root: Path) -> list[str]:
    """What a marker lists and the disk has not: must be nothing at any moment."""
    lost = []
    for path in root.glob("markers/*/*.json"):
        marker = marker_files.read(path)
        assert marker is not None
        for family, claim in marker.claims.items():
            place = Path(directory(str(root), family, claim.key))
            lost += [f"{family}/{name}" for name in claim.entries if not (place / name).exists()]
    return lost
