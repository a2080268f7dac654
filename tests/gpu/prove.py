"""prove.py DIR [--rehearse GPU] [--quick]: see prove.sh. Standard library only, and builder's ground, cache and agent.

| check | what it shows |
| --- | --- |
| names | a run on the GPU with an empty cache makes entries of exactly the names that the prebuild makes |
| loads | the driver loads each prebuilt cubin |
| hits | a task after the prebuild compiles nothing |
| second_pass | nor does its second pass |
| released | the GPU's memory is as free afterwards as it was before (NVML) |
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from builder import events
from builder.job import JOB_VARIABLE, Job, PlannedShape, PrebuildRequest, RunOrigin
from builder.task import GPUS, PRETEND_VARIABLE, Gpu, Shape, Task

NONCE = "0123456789abcdef"
SCHEMA = 1

#: One shape of each kind that servers ask for, of DeepSeek-V3 with tp 8.
SHAPES = (
    Shape("GEMM_NT_F8F8BF16", 4096, 7168),
    Shape("GROUPED_GEMM_NT_F8F8BF16_CONTIG", 4096, 7168, 32),
    Shape("GROUPED_GEMM_NT_F8F8BF16_MASKED", 4096, 7168, 32),
)
QUICK = (64, 128)
#: Seconds that the GPU may take to be free again, and the bytes that other services may come to use meanwhile.
RELEASE, SLACK = 60.0, 64 << 20

#: In a process of its own: it prints the name of each cubin that the driver does not load, and its status.
LOAD = """
import ctypes, pathlib, sys
driver = ctypes.CDLL("libcuda.so.1")
device, context = ctypes.c_int(), ctypes.c_void_p()
assert driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), 0) == 0
assert driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0 and driver.cuCtxSetCurrent(context) == 0
for path in sys.argv[1:]:
    module = ctypes.c_void_p()
    status = driver.cuModuleLoadData(ctypes.byref(module), pathlib.Path(path).read_bytes())
    if status:
        print(path, status)
    else:
        driver.cuModuleUnload(module)
"""


class Failed(Exception):
    """A step gave no result. The message is the reason."""


@dataclass
class Done:
    """What one run of the agent reported."""

    status: int
    events: list[events.Event]
    seconds: float

    def last(self, kind: type[Any]) -> Any:
        found = [event for event in self.events if isinstance(event, kind)]
        return found[-1] if found else None


@dataclass
class Proof:
    """Rows of the table, and the record."""

    rows: list[tuple[str, str, float | None]] = field(default_factory=list)
    checks: dict[str, bool | None] = field(default_factory=dict)

    def add(self, name: str, holds: bool | None, text: str, seconds: float | None = None) -> None:
        self.checks[name] = holds
        mark = {True: "yes", False: "NO", None: "not known"}[holds]
        self.rows.append((name, f"{mark}: {text}", seconds))


def main() -> int:
    parser = argparse.ArgumentParser(prog="prove.sh")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rehearse", metavar="GPU", choices=sorted(GPUS))
    parser.add_argument("--quick", action="store_true", help="few Ms")
    args = parser.parse_args()
    place = args.directory.resolve()
    work = place / f"run-{int(time.time())}"
    work.mkdir(parents=True)
    try:
        proof, record = prove(work, GPUS[args.rehearse] if args.rehearse else None, QUICK if args.quick else ())
    except Failed as why:
        print(f"error: {why}", file=sys.stderr)
        return 1
    (place / "proof.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    width = max(len(name) for name, _, _ in proof.rows)
    for name, text, seconds in proof.rows:
        print(f"{name:<{width}}  {text}" + (f" ({seconds:.1f} s)" if seconds is not None else ""))
    if record["simulated"]:
        print("a rehearsal on a simulated GPU: it proves nothing")
    print(f"written: {place / 'proof.json'}")
    return 0 if all(holds is not False for holds in proof.checks.values()) else 1


def prove(work: Path, simulated: Gpu | None, m_values: tuple[int, ...]) -> tuple[Proof, dict[str, Any]]:
    """Make all checks. simulated: the GPU to take in the place of a real one."""
    proof = Proof()
    began = time.monotonic()
    env = {"SGLANG_JIT_DEEPGEMM_FAST_WARMUP": "1"}
    pretended = {} if simulated is None else {PRETEND_VARIABLE: next(n for n, gpu in GPUS.items() if gpu is simulated)}
    task = Task(
        label="proof",
        model="proof/shapes",
        recipe="shapes",
        shapes=SHAPES,
        m_values=m_values,
        gpus=0 if simulated else 1,
        env={**env, **pretended},
        workers=1,
    )
    used = memory_in_use()
    probed = agent(work, "toolchain", replace(task, env=env), simulate=simulated).last(events.ToolchainProbed)
    gpus = probed.record["gpus"] if probed else []
    if not gpus:
        raise Failed("there is no GPU here that CUDA finds; --rehearse H200 simulates one")
    gpu = described(gpus[0])
    proof.rows.append(("GPU", f"{gpu.name}, {gpu.sms} SMs{', simulated' if simulated else ''}", None))

    prebuilt, empty = work / "prebuilt", work / "empty"
    shapes = tuple(PlannedShape(shape, m_values) for shape in SHAPES)
    request = PrebuildRequest(gpu=gpu, shapes=shapes)
    plain = replace(task, env=env)
    planned = agent(work, "plan", plain, prebuild=request)
    plans = [event for event in planned.events if isinstance(event, events.KernelsPlanned)]
    named = tuple(PlannedShape(Shape.parse(event.shape), event.m_values, None, event.kernels) for event in plans)
    proof.rows.append(
        (
            "plan",
            f"{len({name for each in named for _, names in each.kernels for name in names})} kernels",
            planned.seconds,
        )
    )
    built = agent(work, "prebuild", plain, root=prebuilt, prebuild=replace(request, shapes=named))
    summary = built.last(events.KernelsPrebuilt)
    if summary is None or summary.missing:
        raise Failed(f"the prebuild is not complete: {built.last(events.PrebuildProblem)}")
    proof.rows.append(("prebuild", f"{summary.made} kernels by {summary.workers} workers", built.seconds))

    alone = agent(work, "run", task, root=empty)
    verdict(alone)
    theirs, ours = entries(empty), entries(prebuilt)
    different = sorted(theirs.keys() ^ ours.keys())
    text = f"{len(theirs)} made on the GPU, {len(ours)} prebuilt"
    proof.add("names", not different, f"{text}; first difference: {different[0]}" if different else text, alone.seconds)

    refused = load(ours, work, simulated)
    proof.add("loads", not refused, f"{len(ours)} cubins" + (f"; first refused: {refused[0]}" if refused else ""))

    after = agent(work, "run", task, root=prebuilt)
    end = verdict(after)
    added = len(entries(prebuilt)) - len(ours)
    proof.add("hits", not added, f"{added} kernels compiled after the prebuild", after.seconds)
    proof.add("second_pass", end.second_pass_added == 0, f"{end.second_pass_added} added")

    released = None if used is None else freed(used)
    proof.add("released", released, "NVML is not here" if used is None else f"{used >> 20} MiB in use before")
    proof.rows.append(("all", "", time.monotonic() - began))
    versions = {name: version(name) for name in ("sglang", "sgl-deep-gemm", "torch", "triton")}
    return proof, {
        "schema": SCHEMA,
        "simulated": simulated is not None,
        "gpu": gpus[0]["name"],
        "compute_capability": gpus[0]["compute_capability"],
        "sm_count": gpus[0]["sm_count"],
        "driver": probed.record["observed"].get("driver"),
        "kernels": len(ours),
        "checks": proof.checks,
        "seconds": {name: round(seconds, 1) for name, _, seconds in proof.rows if seconds is not None},
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "sglang": versions["sglang"],
        "deep_gemm": versions["sgl-deep-gemm"],
        "torch": versions["torch"],
        "triton": versions["triton"],
        "nvcc": probed.record["factors"].get("nvcc"),
        "complete": not m_values,
    }


def described(gpu: dict[str, Any]) -> Gpu:
    major, minor = str(gpu["compute_capability"]).split(".")
    return Gpu(
        name=gpu["name"],
        capability=(int(major), int(minor)),
        sms=gpu["sm_count"],
        memory=gpu["memory_bytes"],
        shared=gpu.get("shared_bytes") or 232448,
        l2=gpu.get("l2_bytes") or 62914560,
    )


def agent(work: Path, mode: Any, task: Task, *, root: Path | None = None, **job: Any) -> Done:
    """Run the in-container program right here."""
    origin = RunOrigin("", "proof", "this environment", "proof")
    document = Job(
        mode=mode, nonce=NONCE, mount=str(root or work / "none"), task=task, workdir="/", observed=origin, **job
    )
    began = time.monotonic()
    with (work / f"{mode}-{task.label}-{int(began)}.log").open("wb") as log:
        done = subprocess.run(
            [sys.executable, "-m", "builder.agent"],
            env={**os.environ, JOB_VARIABLE: document.to_json()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            check=False,
        )
        log.write(done.stdout)
    found = [event for line in done.stdout.split(b"\n") if (event := events.decode(line, NONCE))]
    return Done(done.returncode, found, time.monotonic() - began)


def verdict(done: Done) -> Any:
    found = done.last(events.Verdict)
    if done.status or found is None or found.state != "warmed":
        raise Failed(f"a task was not warmed: {found.reason if found else f'status {done.status}'}")
    return found


def entries(root: Path) -> dict[str, Path]:
    return {path.parent.name: path.parent for path in root.glob("deep_gemm/*/cache/*/.committed")}


def load(kernels: dict[str, Path], work: Path, simulated: Gpu | None) -> list[str]:
    """Return what the driver refuses to load."""
    environ = dict(os.environ)
    if simulated is not None:
        from builder.agent import simulated_gpu

        environ = simulated_gpu.environment(environ, str(work), simulated)
    cubins = [str(path / "kernel.cubin") for path in kernels.values()]
    command = [sys.executable, "-c", LOAD, *cubins]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"the driver cannot be used: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout.splitlines()


def memory_in_use() -> int | None:
    """Return the bytes in use on GPU 0 by NVML; None where it is not here."""

    class Memory(ctypes.Structure):
        _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))

    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    device, memory = ctypes.c_void_p(), Memory()
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)):
        return None
    status = nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory))
    nvml.nvmlShutdown()
    return None if status else int(memory.used)


def freed(before: int) -> bool:
    until = time.monotonic() + RELEASE
    while (now := memory_in_use()) is not None and now > before + SLACK:
        if time.monotonic() > until:
            return False
        time.sleep(0.5)  # noqa: TID251 - the machine of a proof has no tenacity
    return True


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
