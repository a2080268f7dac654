"""What a prebuild takes from whoever uses the machine meanwhile, with the limits that it keeps beside running jobs.

The load: one thread that counts as fast as it can, and reads a file of the page cache again and again. It is measured
alone, and while a prebuild compiles as it does where GPUs are in use (`when = "always"`: least shares, half the cores,
nice 19), in turn. On a machine that others use as well the ratio shows their work too.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from builder import events
from builder.engine.client import Engine
from builder.host import machine
from builder.job import JOB_VARIABLE, Job, PlannedShape, PrebuildRequest
from builder.run.container_job import LEAST_SHARES
from builder.task import GPUS, Shape, Task
from tests.bench.measuring import CLI, ROOT, Series, quietly, show, write_down

pytestmark = [pytest.mark.bench, pytest.mark.stand_in, pytest.mark.timeout(1800)]

AIM, ROUNDS, SECONDS = 1.05, 3, 8.0
NONCE = "bench"
SHAPES = (Shape("GEMM_NT_F8F8BF16", 2112, 7168), Shape("GEMM_NT_F8F8BF16", 3072, 1536))
M_VALUES = (16, 64, 128, 256, 512, 1024, 2048, 4096)
LOAD = """
import json, os, sys, time
work, reads = [], []
fd = os.open(sys.argv[1], os.O_RDONLY)
end = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    begun = time.perf_counter()
    sum(range(1_000_000))
    work.append(time.perf_counter() - begun)
    os.lseek(fd, 0, 0)
    begun = time.perf_counter()
    while os.read(fd, 1 << 20):
        pass
    reads.append(time.perf_counter() - begun)
print(json.dumps([work, reads]))
"""


def load(file: Path) -> list[float]:
    """The median seconds of a piece of work, and of reading the file."""
    both = json.loads(quietly([sys.executable, "-c", LOAD, str(file), str(SECONDS)]))
    return [statistics.median(seconds) for seconds in both]


def command(image: str, cache: Path, name: str, request: PrebuildRequest, mode: str) -> list[str]:
    task = Task(label=mode, model="", recipe="command", env={})
    job = Job(mode="plan" if mode == "plan" else "prebuild", nonce=NONCE, mount="/cache", task=task, prebuild=request)
    options = ["--rm", "--init", "--name", name, "--network", "none", "--tmpfs", "/tmp:exec,mode=1777"]
    options += ["--cpu-shares", str(LEAST_SHARES), "--cpuset-cpus", ",".join(map(str, request.cpus))]
    options += ["-v", f"{cache}:/cache", "-v", f"{ROOT}:/program:ro", "-w", "/program", "--entrypoint", "python3"]
    options += ["-e", f"{JOB_VARIABLE}={job.to_json()}", "-e", "PYTHONDONTWRITEBYTECODE=1"]
    return [CLI, "run", *options, image, "-m", "builder.agent"]


@contextmanager
def compiling(argv: Sequence[str], name: str) -> Iterator[None]:
    """Compile from now, when the first kernel is begun, until the context ends."""
    at_work = threading.Event()
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None

        def watch() -> None:
            for line in process.stdout or ():
                event = events.decode(line.encode(), NONCE)
                if isinstance(event, events.Phase) and event.phase.endswith("kernels"):
                    at_work.set()

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            assert at_work.wait(300), "no kernel was begun"
            yield
            assert process.poll() is None, "it ended before the measurement did"
        finally:
            subprocess.run([CLI, "rm", "-f", name], capture_output=True, check=False)
            thread.join()


def test_load_beside_a_prebuild(tmp_path: Path, engine: Engine, stand_in_image: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(1 << 20) * 64)
    name = f"warm-cache-bench-{os.getpid()}"
    shapes = tuple(PlannedShape(shape, M_VALUES) for shape in SHAPES)
    request = PrebuildRequest(gpu=GPUS["H200"], shapes=shapes, cpus=machine.half_of_cores(), gentle=True)
    out = quietly(command(stand_in_image, tmp_path / "none", name, request, "plan"))
    planned = [event for line in out.splitlines() if (event := events.decode(line.encode(), NONCE))]
    kernels = [event for event in planned if isinstance(event, events.KernelsPlanned)]
    named = tuple(PlannedShape(Shape.parse(each.shape), kernels=each.kernels) for each in kernels)
    request = PrebuildRequest(gpu=GPUS["H200"], shapes=named, cpus=request.cpus, gentle=True)

    load(file)
    found: dict[str, list[list[float]]] = {"alone": [], "beside": []}
    loads = []
    for number in range(ROUNDS):
        found["alone"].append(load(file))
        cache = tmp_path / f"cache-{number}"
        with compiling(command(stand_in_image, cache, name, request, "prebuild"), name):
            found["beside"].append(load(file))
        loads.append(os.getloadavg()[0])
    rows, series, ratios = [["", "alone", "beside a prebuild", ""]], [], {}
    for kind, what in enumerate(("a piece of work on one thread", "64 MiB of the page cache, read again")):
        alone, beside = (Series(f"{what}, {each}", [one[kind] for one in found[each]]) for each in found)
        ratios[what] = beside.median / alone.median
        rows.append([what, *(f"{each.median * 1e3:.1f} ms" for each in (alone, beside)), f"{ratios[what]:.3f} ×"])
        series += [alone, beside]
    show(f"beside a prebuild (aim: at most {AIM}; load {min(loads):.1f} to {max(loads):.1f})", rows)
    write_down("beside", engine, series, ratios=ratios, aims=dict.fromkeys(ratios, f"at most {AIM}"))
