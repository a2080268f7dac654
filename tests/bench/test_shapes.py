"""What several workers gain on one list of shapes: the same list, one worker and as many as there are cores, into empty
caches, on the real stand-in. What counts is the sweep alone, imports included: its own line says how long it took.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest

from builder.engine.client import Engine
from tests.bench.measuring import ROOT, Series, quietly, ratio, show, write_down

pytestmark = [pytest.mark.bench, pytest.mark.stand_in, pytest.mark.timeout(1800)]

#: The dense shapes of DeepSeek-V3 with tp 8.
SHAPES = [(2112, 7168), (3072, 1536), (4096, 512), (7168, 2048), (4608, 7168), (7168, 2304)]
M_VALUES = [16, 64, 128, 256, 1024]
CORES = len(os.sched_getaffinity(0))
AIM = 1.7


def sweep(place: Path, image: str, workers: int) -> tuple[float, set[str]]:
    """Seconds of one cold sweep, and the names of what it made."""
    place.mkdir()
    shapes = [f"GEMM_NT_F8F8BF16 N={n}, K={k}, num_groups=1" for n, k in SHAPES]
    (place / "manifest.toml").write_text(
        f'schema = 1\n[image]\nref = "{image}"\n[cache]\nroot = "{place}/cache"\n[gpus]\npretend = "H200"\n'
        '[container]\nnetwork = "none"\nshm_size = "1g"\n[[task]]\nmodel = "bench/shapes"\nrecipe = "shapes"\n'
        f'verify = "inventory"\nworkers = {workers}\nm_values = {M_VALUES}\nshapes = {json.dumps(shapes)}\n'
    )
    command = [sys.executable, "-m", "builder", "warm", "--manifest", str(place / "manifest.toml")]
    quietly([*command, "--log-dir", str(place / "logs")], cwd=ROOT)
    found = re.search(r"all \d+ shapes done in ([\d.]+) s by", (place / "logs" / "shapes.log").read_text())
    assert found
    return float(found[1]), {path.parent.name for path in place.glob("cache/deep_gemm/*/cache/*/.committed")}


def test_shapes_workers(tmp_path: Path, engine: Engine, stand_in_image: str) -> None:
    one, many = Series("1 worker"), Series(f"{CORES} workers")
    names = []
    for series, workers in ((one, 1), (many, CORES)):
        seconds, made = sweep(tmp_path / f"by-{workers}", stand_in_image, workers)
        series.seconds.append(seconds)
        series.remark = f"{len(made)} kernels, load {os.getloadavg()[0]:.1f}"
        names.append(made)
    assert names[0] == names[1]
    gain = ratio(one, many)
    rows = [[series.name, f"{series.median:.1f} s", series.remark] for series in (one, many)]
    show("shapes", [["", "seconds", ""], *rows, ["gain", f"{gain:.2f}", f"aim {AIM} on 2 cores"]])
    write_down("shapes", engine, [one, many], gain=gain, shapes=SHAPES, m_values=M_VALUES)
