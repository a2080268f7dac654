"""What a container of each mode gets, and what it does not."""

from __future__ import annotations

import typing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from builder.engine.api import Mount, Volume
from builder.engine.container import Deadlines
from builder.job import Job, Mode, PrebuildRequest
from builder.manifest.load import without_tasks
from builder.manifest.sections import CacheSpec, ContainerSpecs, GpusSpec, ModelsSpec
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


# --- least power -----------------------------------------------------------------------------------------------------


def of_mode(mode: Any, cache: CacheSpec, *, gpus: int = 0, local: bool = True, volume: Volume | None = None) -> Any:
    """The container of this mode, of a manifest that asks for all that a manifest can."""
    manifest = replace(
        without_tasks(),
        cache=cache,
        models=ModelsSpec(store=Path("/data/models"), writable=True),
        container=ContainerSpecs(network="host", secrets=("CI_DEPLOY_KEY",)),
        gpus=GpusSpec(count=gpus),
    )
    source, kind = (str(cache.root), "bind") if cache.root else (str(cache.volume), "volume")
    executor: Any = SimpleNamespace(
        warmup=SimpleNamespace(id="sha256:1"),
        lease=SimpleNamespace(labels=lambda label, lifetime: {}, nonce="n", target="/lease"),
        cache=SimpleNamespace(mount=lambda: Mount(source, "/jit", kind), exists=lambda: True),  # type: ignore[arg-type]
        engine=SimpleNamespace(local=local, volume=lambda name: volume),
        context=SimpleNamespace(
            run_id="r", manifest=manifest, options=SimpleNamespace(creates=True, environ={"CI_DEPLOY_KEY": "hunter2"})
        ),
    )
    job = Job(mode, "n", "/jit", secrets=("CI_DEPLOY_KEY",) if mode == "run" else ())
    return container_job._spec(executor, job, Task("t", "", "command"), LIMITS, NOTHING_ELSE)


@pytest.mark.parametrize("mode", [mode for mode in typing.get_args(Mode) if mode not in ("run", "plan", "prebuild")])
def test_only_a_run_gets_what_a_manifest_asks_for(mode: Any, tmp_path: Path) -> None:
    run, found = (of_mode(each, CacheSpec(root=tmp_path)) for each in ("run", mode))
    assert (run.network, run.pids, run.env["CI_DEPLOY_KEY"]) == ("host", 32768, "hunter2")
    assert Mount("/data/models", "/models") in run.mounts
    assert (found.network, found.pids, found.memory, found.read_only) == ("none", 512, 2 << 30, True)
    assert "hunter2" not in str(found) and "/data/models" not in str(found.mounts)
    assert set(found.capabilities) <= set(run.capabilities) == {"CHOWN", "DAC_OVERRIDE", "FOWNER"}


def test_probe_writes_the_folder_of_memos_alone(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    root = Mount(str(tmp_path), "/jit", read_only=True)
    memos = Mount(str(tmp_path / "images"), "/jit/images")
    assert of_mode("probe", CacheSpec(root=tmp_path)).mounts == (root, memos)
    volume = Volume("v", "local", str(tmp_path), {}, {})
    of_volume = of_mode("probe", CacheSpec(volume="v"), volume=volume)
    assert of_volume.mounts == (Mount("v", "/jit", "volume", read_only=True), memos)


@pytest.mark.attack(
    "the folder of memos is a link to a directory of the host, which the engine would follow",
    by="image",
    holds="a probe gets the root read-only, and nothing else of the host",
)
@pytest.mark.parametrize("case", ["link", "missing", "remote", "options"])
def test_probe_writes_nothing_where_no_folder_is_seen(tmp_path: Path, case: str) -> None:
    if case == "link":
        (tmp_path / "images").symlink_to("/etc")
    elif case != "missing":
        (tmp_path / "images").mkdir()
    volume = Volume("v", "local", str(tmp_path), {"type": "nfs"}, {})
    cache = CacheSpec(volume="v") if case == "options" else CacheSpec(root=tmp_path)
    (mount,) = of_mode("probe", cache, local=case != "remote", volume=volume).mounts
    assert mount.read_only


def test_probe_with_gpus_has_a_writable_root_file_system_for_nvidias_hook(tmp_path: Path) -> None:
    found = of_mode("probe", CacheSpec(root=tmp_path), gpus=8)
    assert (found.gpus, found.read_only, found.network) == (8, False, "none")
    assert "NVIDIA_VISIBLE_DEVICES" not in found.env
    assert of_mode("sweep", CacheSpec(root=tmp_path), gpus=8).env["NVIDIA_VISIBLE_DEVICES"] == "void"
