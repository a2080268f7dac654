"""What a job pays to hear "warm": a check of seven models, against the two things that it would do without it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from builder.engine.client import Engine
from tests.bench.measuring import CLI, Way, environment, in_turn, milliseconds, quietly, ratio, show, write_down

pytestmark = [pytest.mark.bench, pytest.mark.engine, pytest.mark.timeout(900)]

ROUNDS = 15
MODELS = (
    "deepseek-ai/DeepSeek-V3-0324",
    "deepseek-ai/DeepSeek-V3.2",
    "zai-org/GLM-5-FP8",
    "zai-org/GLM-5.2-FP8",
    "XiaomiMiMo/MiMo-V2-Flash",
    "XiaomiMiMo/MiMo-V2.5",
    "moonshotai/Kimi-K2-Instruct",
)
ENTRIES = 500

#: The version key of the script that this program replaces, byte for byte.
VERSION_KEY = (
    "import hashlib, sys, torch, triton; "
    'print(hashlib.sha256(f"{sys.version}|{triton.__version__}|{torch.__version__}".encode()).hexdigest()[:12])'
)
#: Runs it as a process of its own, and prints its seconds.
IN_CONTAINER = """
import subprocess, sys, time
begun = time.perf_counter()
subprocess.run([sys.executable, "-c", sys.argv[1]], check=True, stdout=subprocess.DEVNULL)
print(time.perf_counter() - begun)
"""


def manifest(place: Path, image: str) -> Path:
    """Seven models in a store as the hub lays one out, and a task for each."""
    text = [
        "schema = 1",
        f'[image]\nref = "{image}"',
        f'[cache]\nroot = "{place}/cache"',
        f'[models]\nstore = "{place}/store"',
        "[gpus]\ncount = 0",
        '[container]\nnetwork = "none"\nshm_size = "64m"',
        '[defaults]\nrecipe = "compile-deep-gemm"',
    ]
    for number, model in enumerate(MODELS):
        home = place / "store" / "hub" / f"models--{model.replace('/', '--')}"
        snapshot = home / "snapshots" / "0123456789abcdef"
        snapshot.mkdir(parents=True)
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text(snapshot.name)
        (snapshot / "config.json").write_text(json.dumps({"num_hidden_layers": 61 + number}))
        (snapshot / "model.safetensors").write_bytes(b"weights")
        argv = ["--tp", "8", "--trust-remote-code", "--mem-fraction-static", "0.7", "--speculative-algorithm", "EAGLE"]
        text.append(f'[[task]]\nmodel = "{model}"\nargv = {json.dumps(argv)}')
    path = place / "manifest.toml"
    path.write_text("\n".join(text) + "\n")
    return path


def grow(cache: Path) -> int:
    """Fills every marker up to ENTRIES entries of its own, of the size and shape of real ones; how many there are."""
    total = 0
    for path in sorted(cache.glob("markers/*/*.json")):
        marker = json.loads(path.read_text())
        place = cache / "deep_gemm" / marker["keys"]["deep_gemm"] / "cache"
        names = list(marker["entries"]["deep_gemm"])
        for number in range(ENTRIES - len(names)):
            digest = hashlib.sha256(f"{path} {number}".encode()).hexdigest()[:32]
            names.append(f"cache/sm90_fp8_gemm_1d2d.{digest}")
            entry(place / f"sm90_fp8_gemm_1d2d.{digest}")
        marker["entries"]["deep_gemm"] = sorted(names)
        path.write_text(json.dumps(marker, indent=1))
        total += len(names)
    return total


def entry(place: Path) -> None:
    """An entry as sgl-deep-gemm 0.2.3 leaves one: sizes, sections and segments are those of a real sm_90a kernel."""
    sections, segments, table = 20, 6, 32896
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01" + bytes(9),
        *(2, 190, 1, 0, table + sections * 64, table, 0x6005A04, 64, 56, segments, 64, sections, 1),
    )
    rows = [struct.pack("<IIQQQQIIQQ", *[0] * 10)]
    rows += [struct.pack("<IIQQQQIIQQ", 1, 1, 6, 0, 64 + row * 1600, 1600, 0, 0, 1, 0) for row in range(1, sections)]
    rows += [struct.pack("<IIQQQQQQ", 1, 5, 64 + row * 5000, 0, 0, 5000, 5000, 8) for row in range(segments)]
    place.mkdir()
    (place / "kernel.cu").write_text(f"// {'x' * 450}")
    (place / "meta.json").write_text(
        json.dumps({"command": "nvcc " + "x" * 1500, "compiler_info": {"version": "13.0"}})
    )
    with (place / "kernel.cubin").open("wb") as file:
        file.write(header)
        file.seek(table)
        file.write(b"".join(rows))
    (place / ".committed").touch()


@contextlib.contextmanager
def version_key(image: str) -> Iterator[Callable[[], float]]:
    """The ancestor's way, inside a container that runs already: neither its start nor `docker exec` is counted."""
    idle = ["--init", "--network", "none", "--entrypoint", "sleep", image, "3600"]
    container = quietly([CLI, "run", "--detach", *idle]).strip()
    try:
        yield lambda: float(quietly([CLI, "exec", container, "python", "-c", IN_CONTAINER, VERSION_KEY]))
    finally:
        quietly([CLI, "rm", "-f", container])


def _run(command: list[str], env: dict[str, str]) -> None:
    quietly(command, env)


@pytest.mark.stand_in
def test_check_warm(tmp_path: Path, engine: Engine, tiny_image: str, stand_in_image: str) -> None:
    env = environment(tmp_path)
    builder = [sys.executable, "-m", "builder"]
    chosen = ["--manifest", str(manifest(tmp_path, tiny_image))]
    quietly([*builder, "warm", *chosen, "--log-dir", str(tmp_path / "logs")], env)
    total = grow(tmp_path / "cache")
    document = json.loads(quietly([*builder, "check", *chosen, "--json"], env))
    assert [task["state"] for task in document["tasks"]] == ["warm"] * len(MODELS)

    bare = f"import docker; client = docker.from_env(); client.images.get({tiny_image!r})"
    ways = {
        f"check: {len(MODELS)} tasks, {total} entries": [*builder, "check", *chosen],
        f"check: 1 task, {ENTRIES} entries": [*builder, "check", *chosen, "--only", MODELS[0]],
        "docker-py: from_env, images.get": [sys.executable, "-c", bare],
        "docker image inspect": [CLI, "image", "inspect", tiny_image],
        "python -c pass": [sys.executable, "-c", "pass"],
    }

    timed: dict[str, Way] = {name: functools.partial(_run, command, env) for name, command in ways.items()}
    with version_key(stand_in_image) as key:
        series = list(in_turn(ROUNDS, {**timed, "import torch, triton for a version key": key}).values())
    whole, single, client, *_, ancestor = series
    ancestor.remark = "in the real image, without the container's start"
    for one in (whole, single):
        one.remark = (
            f"{ratio(one, client):.2f} × docker-py, {ratio(ancestor, one):.1f} times as fast as importing torch"
        )
    show("A warm check", [["", "median", "least", ""], *map(milliseconds, series)])
    write_down(
        "check",
        engine,
        series,
        ratios={"of docker-py": ratio(whole, client), "torch import to it": ratio(ancestor, whole)},
        aims={"of docker-py": "at most 2", "torch import to it": "at least 5"},
    )
