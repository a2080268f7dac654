"""Preflight: every problem of a machine at once, each with its remedy, and none where there is none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from builder.cache.toolchain import Record
from builder.engine.api import Image
from builder.engine.client import Engine
from builder.engine.errors import MissingSourceError, refusal
from builder.errors import Problem
from builder.host import gpus
from builder.host.gpus import GpuProcess, GpuSnapshot, GpuUsage, HostGpus
from builder.manifest.load import Manifest, load
from builder.run import preflight

H200 = HostGpus(("NVIDIA H200",) * 8, "580.65.06")


class Here:
    """An engine that has the image or not, on this machine or another one."""

    def __init__(self, *, image: bool = True, local: bool = True, user: str = "") -> None:
        self.local = local
        self._image = Image(id="sha256:1", ref="tiny", user=user) if image else None
        self.info: dict[str, Any] = {}

    def image(self, _ref: str) -> Image | None:
        return self._image


Write = Callable[..., Manifest]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(*, cache: Path | None = None, gpus: str = "count = 0", models: Path | None = None) -> Manifest:
        store = f'[models]\nstore = "{models}"\n' if models else ""
        path = tmp_path / "manifest.toml"
        path.write_text(
            f'schema = 1\n[image]\nref = "tiny:1"\n[cache]\nroot = "{cache or tmp_path / "cache"}"\n{store}'
            f'[gpus]\n{gpus}\n[[task]]\nmodel = "a"\nrecipe = "command"\nargv = ["true"]\nsuccess = "x"\n'
        )
        return load(path)

    return write


def found(manifest: Manifest, engine: Here | None = None) -> list[Problem]:
    return list(preflight.problems(manifest, cast(Engine, engine or Here())))


def host(monkeypatch: pytest.MonkeyPatch, known: HostGpus | None) -> None:
    monkeypatch.setattr(gpus, "host_gpus", lambda: known)


def test_preflight_healthy_machine_is_clean(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host(monkeypatch, H200)
    (tmp_path / "models").mkdir()
    assert found(write(gpus='count = 8\nname = "H200"', models=tmp_path / "models")) == []
    assert found(write()) == []


def test_preflight_lists_everything_at_once(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host(monkeypatch, None)
    manifest = write(cache=tmp_path / "no" / "cache", gpus='count = 8\nname = "H200"', models=tmp_path / "no-models")
    problems = found(manifest, Here(image=False))
    assert [problem.location for problem in problems] == ["image", "GPUs", "cache", "models"]
    assert all(problem.remedy for problem in problems)
    assert problems[0].remedy == "Run: docker pull tiny:1, or: warm-cache warm --pull."
    assert problems[1].text == "8 × H200 wanted, none found: no NVIDIA driver is loaded on this machine."
    assert problems[2].remedy == f"Run: mkdir -p {tmp_path}/no/cache, or set [cache] root."


def test_preflight_counts_and_names_gpus(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    host(monkeypatch, HostGpus(("NVIDIA H100", "NVIDIA H200"), "580"))
    few, other = found(write(gpus='count = 8\nname = "H200"'))
    assert few.text == "8 × H200 wanted, 2 found (NVIDIA H100, NVIDIA H200)."
    assert other.text == "every GPU's name must contain 'H200', found NVIDIA H100."
    host(monkeypatch, HostGpus((), "580"))
    (none,) = found(write(gpus="count = 1"), Here(image=False))[1:]
    assert none.text == "1 × GPU wanted, none found: the driver sees no GPU."


def test_preflight_probe_decides_about_gpus(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    host(monkeypatch, None)
    manifest = write(gpus='count = 2\nname = "H200"')
    assert found(manifest) == [], "an engine may have GPUs that this process cannot see"

    def record(*names: str) -> Record:
        return {
            "schema": 2,
            "factors": {},
            "gpus": [{"name": name} for name in names],
            "sglang": {"version": None, "commit": None, "sources": None},
            "variables": {},
            "observed": {},
        }

    (problem,) = preflight.gpu_problems(manifest, None, record("NVIDIA H200"))
    assert problem.text == "2 × H200 wanted, 1 found (NVIDIA H200)."
    assert list(preflight.gpu_problems(manifest, None, record("NVIDIA H200", "NVIDIA H200"))) == []
    assert list(preflight.gpu_problems(write(), None, record())) == []


@pytest.mark.parametrize(
    ("status", "named", "remedy"),
    [
        (802, "NVSwitch", "systemctl start nvidia-fabricmanager"),
        (803, "different versions", "restart the machine"),
        (804, "forward compatibility", "/usr/local/cuda/compat"),
    ],
)
def test_driver_failure_in_container_is_named_with_remedy(write: Write, status: int, named: str, remedy: str) -> None:
    record = cast(Record, {"gpus": [], "observed": {"cuda_status": status}})
    (problem,) = preflight.gpu_problems(write(gpus="count = 8"), None, record)
    assert problem.location == "driver"
    assert str(status) in problem.text and named in problem.text
    assert remedy in problem.remedy


def test_unknown_driver_failure_is_a_missing_gpu(write: Write) -> None:
    record = cast(Record, {"gpus": [], "observed": {"cuda_status": 100}})
    (problem,) = preflight.gpu_problems(write(gpus="count = 8"), None, record)
    assert problem.text == "8 × GPU wanted, 0 found."


@pytest.mark.parametrize("podman", [False, True])
def test_gpu_slice_is_refused_by_name(write: Write, podman: bool) -> None:
    name = "NVIDIA H100 80GB HBM3 MIG 1g.10gb"
    record = cast(Record, {"gpus": [{"name": name}], "observed": {"cuda_status": 0}})
    (problem,) = preflight.gpu_problems(write(gpus="count = 1"), None, record, podman=podman)
    assert name in problem.text and "MIG" in problem.text
    assert "nvidia-smi" in problem.remedy


def test_host_gpu_in_mig_mode_is_refused_before_any_start(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    host(monkeypatch, HostGpus(("NVIDIA H200",) * 8, "580.65.06", partitioned=(2, 5)))
    (problem,) = found(write(gpus="count = 8"))
    assert problem.text.startswith("GPU 2 and GPU 5 in MIG mode: ")


def test_old_podman_without_gpus_is_named(write: Write) -> None:
    record = cast(Record, {"gpus": [], "observed": {}})
    (problem,) = preflight.gpu_problems(write(gpus="count = 8"), None, record, podman=True)
    assert "Podman before 5.4" in problem.text


def test_preflight_remote_engine_checks_image_only(write: Write, tmp_path: Path) -> None:
    manifest = write(cache=tmp_path / "no" / "cache", gpus="count = 8", models=tmp_path / "no-models")
    assert found(manifest, Here(local=False)) == []
    (problem,) = found(manifest, Here(local=False, image=False))
    assert problem.location == "image"


@pytest.mark.parametrize(
    ("user", "mode", "owner", "refused"),
    [
        ("1234", 0o755, 0, True),
        ("01234:5", 0o755, 0, True),
        ("1234", 0o555, 1234, True),
        ("1234", 0o755, 1234, False),
        ("1234", 0o757, 0, False),
        ("1234", 0o775, 0, False),  # its groups are in the image
        ("0", 0o755, 0, False),
        ("0:7", 0o755, 0, False),
        ("", 0o755, 0, False),
        ("ubuntu", 0o755, 0, False),  # its number is in the image
    ],
)
def test_preflight_user_of_image_that_cannot_write_the_root(
    write: Write, tmp_path: Path, user: str, mode: int, owner: int, refused: bool
) -> None:
    root = tmp_path / "cache"
    root.mkdir()
    os.chown(root, owner, 0)
    root.chmod(mode)
    engine = Here(user=user)
    problems = found(write(cache=root), engine)
    assert [problem.location for problem in problems] == ["image"] * refused
    if refused:
        (problem,) = problems
        assert f"user 1234 (USER of tiny:1), which cannot write {root}: it belongs to user {owner}" in problem.text
        assert problem.remedy == f"Run: sudo chown -R 1234 {root}"
    engine.info = {"SecurityOptions": ["name=seccomp,profile=default", "name=userns"]}
    assert not found(write(cache=root), engine)


def test_preflight_root_not_a_directory(write: Write, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    (problem,) = found(write())
    assert problem.text == f"{tmp_path}/cache is not a directory."


def test_preflight_root_cannot_be_created(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    (problem,) = found(write())
    assert problem.text == f"{tmp_path}/cache does not exist, and {tmp_path} is not writable."


def test_preflight_full_disk(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**8))
    (problem,) = found(write())
    assert (problem.location, problem.text) == (
        "disk",
        f"{tmp_path}/cache has 0.1 GB free, at least 0.5 GB are needed.",
    )


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ('could not select device driver "" with capabilities: [[gpu]]', "the engine knows no"),
        ("OCI runtime create failed: nvidia-container-cli: initialization error", "but the container toolkit failed"),
        ("CDI device injection failed: unresolvable CDI devices", "but the container toolkit failed"),
    ],
)
def test_preflight_gpu_refusal_is_a_gpu_problem(write: Write, message: str, text: str) -> None:
    problem = preflight.no_driver(write(gpus='count = 8\nname = "H200"'), refusal("cannot start it", 500, message))
    assert problem is not None
    assert problem.location == "GPUs"
    assert problem.text.startswith("8 × H200 wanted")
    assert text in problem.text


def test_preflight_mount_refusal_names_its_setting(write: Write, tmp_path: Path) -> None:
    manifest = write(models=tmp_path / "models")
    for place, path in (("cache", tmp_path / "cache"), ("models", tmp_path / "models")):
        problem = preflight.no_source(manifest, MissingSourceError("cannot create it", str(path)))
        assert problem == Problem(place, f"the engine's host has no {path}.", f"Run there: mkdir -p {path}")
    assert preflight.no_source(manifest, MissingSourceError("cannot create it", "/elsewhere")) is None
    assert preflight.no_driver(manifest, refusal("x", 500, "no space left on device")) is None


# --- GPUs in use ---

GB = 10**9
ID, OUTER = "4" * 64, "7" * 64


def usage(index: int, *processes: GpuProcess, used: int = 0, unknown: bool = False) -> GpuUsage:
    return GpuUsage(index, f"GPU-{index}", "NVIDIA H200", used, 150 * GB, None if unknown else processes)


def test_busy_names_every_process_on_the_gpus() -> None:
    scheduler = GpuProcess(48121, 71 * GB, "sglang::scheduler_TP3", 5.0, ID)
    stranger = GpuProcess(9, 2 * GB, "python3", 6.0, OUTER)
    its_other = GpuProcess(48121, 5, "sglang::scheduler_TP3", 5.0, ID)
    found = GpuSnapshot((usage(3, scheduler, used=71 * GB), usage(4, its_other, stranger)))
    texts = [(str(problem)) for problem in preflight.busy(found, lambda: {ID: "ci-h200-2"})]
    remedy = "Stop it, set [gpus] acquire, or pass --allow-busy."
    assert texts == [
        f"GPUs: GPUs 3, 4 are held by pid 48121 (sglang::scheduler_TP3, container ci-h200-2). {remedy}",
        f"GPUs: GPU 4 is held by pid 9 (python3, container {OUTER[:12]} of another engine). {remedy}",
    ]


@pytest.mark.parametrize("unknown", [False, True])
def test_busy_memory_without_process_is_a_problem(unknown: bool) -> None:
    found = GpuSnapshot((usage(0, used=900 << 20, unknown=unknown), usage(1, used=71 * GB, unknown=unknown)))
    (problem,) = preflight.busy(found, dict)
    assert problem.text == "GPU 1 has 71.0 GB in use by a process that cannot be seen from here."


def test_busy_idle_gpus_need_no_container_names() -> None:
    assert list(preflight.busy(GpuSnapshot((usage(0), usage(1, used=4 << 20))), lambda: pytest.fail("asked"))) == []
