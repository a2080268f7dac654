"""What a container of the prebuild gets, and what it does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from builder.engine.api import Mount
from builder.engine.container import Deadlines
from builder.job import Job, PrebuildRequest
from builder.manifest.load import without_tasks
from builder.manifest.sections import ModelsSpec
from builder.run import container_job
from builder.run.container_job import NOTHING_ELSE
from builder.task import GPUS, Task

ROOT = Mount("/data/jit", "/jit")
REQUEST = PrebuildRequest(gpu=GPUS["H200"], memory=8 << 30, cpus=(1, 3))
LIMITS = Deadlines(task=60.0, silence=60.0, start=60.0, grace=8.0)


def spec(mode: Any, request: PrebuildRequest) -> Any:
    manifest = replace(without_tasks(), models=ModelsSpec(store=Path("/data/models")))
    executor: Any = SimpleNamespace(
        warmup=SimpleNamespace(id="sha256:1"),
        lease=SimpleNamespace(labels=lambda label, lifetime: {}, nonce="n", target="/lease"),
        cache=SimpleNamespace(mount=lambda: ROOT, exists=lambda: True),
        context=SimpleNamespace(
            run_id="r", manifest=manifest, options=SimpleNamespace(creates=True, environ={"HF_TOKEN": "hunter2"})
        ),
    )
    job = Job(mode, "n", "/jit", prebuild=request)
    return container_job._spec(executor, job, Task("t", "", "command"), LIMITS, NOTHING_ELSE)


def test_plan_pass_gets_no_cache_root() -> None:
    found = spec("plan", REQUEST)
    assert [mount.target for mount in found.mounts] == ["/models"]
    assert all(mount.read_only for mount in found.mounts)


def test_compiling_gets_the_root_and_no_models() -> None:
    assert spec("prebuild", REQUEST).mounts == (ROOT,)


def test_neither_gets_gpus_network_or_secrets() -> None:
    for mode in ("plan", "prebuild"):
        found = spec(mode, REQUEST)
        assert (found.gpus, found.network, found.env["NVIDIA_VISIBLE_DEVICES"]) == (0, "none", "void")
        assert "hunter2" not in str(found.env)
        assert "exec" in found.tmpfs["/tmp"], "what is compiled there is loaded"


def test_limits_are_hard_beside_running_jobs() -> None:
    found = spec("prebuild", replace(REQUEST, gentle=True))
    assert (found.memory, found.cpus, found.cpu_shares) == (8 << 30, "1,3", 2)
    alone = spec("prebuild", replace(REQUEST, cpus=()))
    assert (alone.memory, alone.cpus, alone.cpu_shares) == (None, "", None)
