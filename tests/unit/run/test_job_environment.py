"""What a job gets: mounts that let it change nothing but its own kernels, and variables that make it hit."""

from __future__ import annotations

import csv
import json
import os
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kubernetes_validate
import pytest

from builder.cache import layout, toolchain
from builder.cache.families import FAMILY
from builder.errors import PreflightError, UsageError
from builder.manifest import policy
from builder.manifest.sections import CacheSpec
from builder.run import job_environment
from builder.run.job_environment import OPTIONS, JobEnvironment
from builder.task import Task
from tests.generations import record

KEYS = {"deep_gemm": "0123456789abcdef", "triton": "fedcba9876543210"}


def task(label: str, **env: str) -> Task:
    return Task(label=label, model=label, recipe="command", env=env)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "jit"
    layout.prepare(root)
    for family, key in KEYS.items():
        layout.describe_family(root, family, key, {})
    return root


def closed(monkeypatch: pytest.MonkeyPatch, *parts: str) -> None:
    """Directories that cannot be written: the tests may run as root, for whom a mode closes nothing."""
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith(parts) and access(path, mode))


def test_places_here_are_those_of_the_root(root: Path) -> None:
    found, private, _ = job_environment.places_here(root, KEYS, 3600.0)
    assert private == {}
    assert found["TRITON_CACHE_DIR"] == f"{root}/triton/{KEYS['triton']}"
    assert found["SGLANG_DG_CACHE_DIR"] == found["DG_JIT_CACHE_DIR"] == f"{root}/deep_gemm/{KEYS['deep_gemm']}"


@pytest.mark.parametrize("harm", ["missing", "closed", "link", "file"])
def test_family_without_a_usable_directory_gets_a_private_one(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    place = root / "triton" / KEYS["triton"]
    if harm == "closed":
        closed(monkeypatch, KEYS["triton"])
    else:
        place.rmdir()
    if harm == "link":
        place.symlink_to(tmp_path)
    if harm == "file":
        place.write_text("")
    found, private, new = job_environment.places_here(root, KEYS, 3600.0)
    assert set(private) == {"triton"}
    assert found["DG_JIT_CACHE_DIR"].startswith(f"{root}/")
    own = Path(found["TRITON_CACHE_DIR"])
    assert own.is_dir() and own.is_relative_to(tmp_path) and not own.is_relative_to(root)
    assert (tmp_path / own.relative_to(tmp_path).parts[0]).stat().st_mode & 0o777 == 0o700
    again, _, _ = job_environment.places_here(root, KEYS, 3600.0)
    assert again["TRITON_CACHE_DIR"] != str(own), "no earlier job can have left anything in it"
    (warning,) = job_environment.told(private, new, 3600.0)
    assert warning.startswith(f"cold: triton (compiled anew by each job, in a private directory, {new}, which ")


def test_private_directories_of_jobs_that_are_over_are_removed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    closed(monkeypatch, KEYS["triton"])
    (_, _, over), (_, _, used) = (job_environment.places_here(root, KEYS, 3600.0) for _ in range(2))
    (tmp_path / "warm-cache-cold-link").symlink_to(root)
    others = tmp_path / "warm-cache-coldest"
    others.mkdir()
    for place in (over, used, others):
        for folder in (Path(str(place)), *Path(str(place)).rglob("*")):
            os.utime(folder, (0, 0))
    (Path(str(used)) / "triton" / KEYS["triton"] / "new").mkdir()
    _, _, mine = job_environment.places_here(root, KEYS, 3600.0)
    left = {str(path) for path in tmp_path.iterdir()} - {str(root)}
    assert left == {used, mine, str(others), str(tmp_path / "warm-cache-cold-link")}


def test_no_room_for_a_private_directory_fails_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed(monkeypatch, KEYS["triton"])
    monkeypatch.setattr("tempfile.tempdir", str(root / "nowhere"))
    found, private, _ = job_environment.places_here(root, KEYS, 3600.0)
    assert "TRITON_CACHE_DIR" not in found and "there is no private one" in private["triton"]


def test_variables_of_some_tasks_are_named() -> None:
    tasks = (task("a", X="1", Y="1"), task("b", X="1", Y="2"), task("c", X="1", Z="1"))
    assert job_environment.common_env(tasks) == {"X": "1"}
    first, second = job_environment.missed(tasks)
    assert first.startswith("Y is not set here, because only a, b have it")
    assert second.startswith("Z is not set here, because only c has it")
    assert job_environment.missed(tasks[:1]) == []
    assert all(text.endswith("warm-cache env --only TASK prints what one task needs") for text in (first, second))


def test_tasks_with_directories_of_their_own_are_named() -> None:
    own = toolchain.of_task(record(1), {"NVCC_APPEND_FLAGS": "-G"})
    keys, warnings = job_environment.common_keys([("a", record(1)), ("b", own)])
    assert keys == toolchain.family_keys(record(1))
    assert any(warning.startswith("b has a directory of deep_gemm of their own") for warning in warnings)
    assert job_environment.common_keys([("a", record(1)), ("b", record(1))])[1] == []


@pytest.mark.parametrize(
    ("named", "found", "printed"),
    [
        (None, "/usr/local/cuda", "/usr/local/cuda"),
        ("/opt/cuda", "/opt/cuda", "/opt/cuda"),
        (None, "/opt/on-path", None),  # as a variable it would be another key
    ],
)
def test_toolkit_of_the_warm_up_is_printed(named: str | None, found: str, printed: str | None) -> None:
    probed = record(1)
    probed["variables"] = toolchain.factor_variables({}, named)
    probed["observed"] = {**probed["observed"], "cuda_home": found}
    assert job_environment.toolkit([("a", probed)]) == ({"CUDA_HOME": printed} if printed else {})
    assert toolchain.family_keys(toolchain.of_task(probed, {"CUDA_HOME": printed or ""})) == toolchain.family_keys(
        probed
    )


def test_variables_on_no_list_are_named() -> None:
    probed = record(1)
    probed["variables"] = {"TRITON_UNHEARD_OF": "1", "TRITON_ALWAYS_COMPILE": "1"}
    (warning,) = job_environment.unlisted([("a", probed)])
    assert warning.startswith("TRITON_UNHEARD_OF: on no list")
    assert job_environment.unlisted([("a", record(1))]) == []


def executor(**cache: Any) -> Any:
    api = cache.pop("api", "1.47")
    spec = SimpleNamespace(**{"root": None, "volume": None, "mount": "/jit", **cache})
    manifest = SimpleNamespace(cache=spec, models=SimpleNamespace(store=None))
    return SimpleNamespace(
        context=SimpleNamespace(manifest=manifest), engine=SimpleNamespace(podman=False, api_version=api)
    )


def test_root_is_read_only_but_for_directories_of_kernels() -> None:
    assert job_environment._root(executor(root="/data"), sorted(KEYS.items())) == [
        "type=bind,src=/data,dst=/jit,readonly",
        f"type=bind,src=/data/deep_gemm/{KEYS['deep_gemm']},dst=/jit/deep_gemm/{KEYS['deep_gemm']}",
        f"type=bind,src=/data/triton/{KEYS['triton']},dst=/jit/triton/{KEYS['triton']}",
    ]


@pytest.mark.attack(
    "a job with the flags of `env` writes kernels into a root that the host's policy does not list as shared",
    by="env",
    holds="the root and all of its keys are read-only for it; its own kernels go to a private directory",
)
def test_keys_are_writable_only_where_the_policy_shares_the_root() -> None:
    rules = policy.parse("policy.toml", b'schema = 1\n[cache]\nroots = ["/data"]\nshared = ["/data/jit"]\n')
    root, other, volume = (
        CacheSpec(root=Path("/data/jit")),
        CacheSpec(root=Path("/data/release")),
        CacheSpec(volume="v"),
    )
    assert [job_environment.is_shared(each, rules) for each in (root, other, volume)] == [True, False, False]
    assert job_environment.is_shared(other, None)


def test_parts_of_a_volume_are_mounted_where_the_engine_can() -> None:
    mounts = job_environment._root(executor(volume="v"), sorted(KEYS.items()))
    assert mounts[0] == "type=volume,src=v,dst=/jit,readonly,volume-nocopy"
    part = f"triton/{KEYS['triton']}"
    assert mounts[2] == f"type=volume,src=v,dst=/jit/{part},volume-nocopy,volume-subpath={part}"
    with pytest.raises(PreflightError) as refused:
        job_environment._root(executor(volume="v", api="1.44"), sorted(KEYS.items()))
    (problem,) = refused.value.problems
    assert "warm-cache view create" in problem.remedy


def test_docker_arguments_end_with_least_privilege() -> None:
    job = JobEnvironment(variables={"B": "2", "A": "1"}, mounts=["type=bind,src=/a,dst=/jit,readonly"])
    assert job.text("docker", None) == " ".join(["--mount type=bind,src=/a,dst=/jit,readonly -e A=1 -e B=2", *OPTIONS])
    assert shlex.split(job.text("docker", None))[-2:] == ["--cap-drop", "MKNOD"]
    document = json.loads(job.text("json", "0123456789abcdef"))
    assert document["options"] == list(OPTIONS) and document["cold"] == {}
    with pytest.raises(UsageError, match="would not get"):
        JobEnvironment(variables={"A": "a b"}, mounts=["m"]).text("docker", None)


def test_pod_gets_the_root_read_only_and_keys_below_it() -> None:
    mounts = [
        'type=bind,"src=/data/a,b",dst=/jit,readonly',
        'type=bind,"src=/data/a,b/triton/0123",dst=/jit/triton/0123',
        "type=bind,src=/hf,dst=/models,readonly",
    ]
    job = JobEnvironment(variables={"B": "2", "A": "1"}, mounts=mounts)
    spec = json.loads(job.text("kubernetes", None))
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "tests"}, "spec": spec}
    spec["containers"][0]["image"] = "tiny:1"
    kubernetes_validate.validate(pod, "1.29", strict=True)
    assert spec["containers"][0]["env"] == [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]
    assert [volume["hostPath"]["path"] for volume in spec["volumes"]] == ["/data/a,b", "/hf"]
    assert spec["containers"][0]["volumeMounts"] == [
        {"name": "warm-cache", "mountPath": "/jit", "readOnly": True},
        {"name": "warm-cache", "mountPath": "/jit/triton/0123", "subPath": "triton/0123"},
        {"name": "models", "mountPath": "/models", "readOnly": True},
    ]
    with pytest.raises(UsageError, match="cannot have the engine's volume jit: use a directory"):
        JobEnvironment(variables={}, mounts=["type=volume,src=jit,dst=/jit,readonly"]).text("kubernetes", None)


def test_families_that_no_task_claims_are_not_named_cold() -> None:
    assert not FAMILY["cuda"].claimable
    assert job_environment.told({"cuda": "it has no directory yet"}) == []


@pytest.mark.parametrize("root", ["/data/é", "/data/a~1", "/data/a#b", "/data/x+y@z%"])
def test_docker_arguments_take_what_shells_leave_alone(root: str) -> None:
    mount = f"type=bind,src={root},dst=/jit"
    assert job_environment._docker_arguments([mount], {"A": "b"}).startswith(f"--mount {mount} -e A=b")


@pytest.mark.parametrize("path", ["/a b", "/a,b", "/a'b", '/a"b', "/a$b", "/a;b", "/a*b", "/a\\b", "/a\nb"])
def test_docker_arguments_refuse_what_shells_or_docker_split(path: str) -> None:
    with pytest.raises(UsageError, match="Use --format json"):
        job_environment._docker_arguments([job_environment._bind(Path(path), "/jit")], {})


@pytest.mark.attack(
    "a cache root or model store holds more fields of docker's --mount: `/data/x,dst=/a,src=/etc` is below /data for a "
    "policy",
    by="manifest",
    holds="2 as docker arguments; in JSON and for a pod it is one path, whatever it holds",
)
def test_path_adds_no_field_to_a_mount() -> None:
    path = Path("/data/x,dst=/a,src=/etc")
    mount = job_environment._bind(path, "/jit", "readonly")
    assert next(csv.reader([mount])) == ["type=bind", f"src={path}", "dst=/jit", "readonly"]
    with pytest.raises(UsageError, match="docker splits at commas"):
        job_environment._docker_arguments([mount], {})
    assert job_environment._pod([mount], {})["volumes"] == [
        {"name": "warm-cache", "hostPath": {"path": str(path), "type": "Directory"}}
    ]
