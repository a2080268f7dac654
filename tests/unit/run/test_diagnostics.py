"""What `doctor` finds beyond preflight: each check on machines where it is well, ill, and cannot be known."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from builder.cache import environment
from builder.engine.volumes import may_mount
from builder.host.gpus import HostGpus
from builder.manifest.load import Manifest, load
from builder.run import diagnostics
from builder.run.diagnostics import OK, UNKNOWN, WARN, Facts

NOW = 1_800_000_000.0
GIB = 1 << 30
Write = Callable[..., Manifest]


def info(**more: Any) -> dict[str, Any]:
    told = datetime.fromtimestamp(NOW, tz=timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.123456789Z")
    usual = {"ServerVersion": "28.2.2", "CgroupDriver": "systemd", "CgroupVersion": "2", "MemTotal": 2048 * GIB}
    return {**usual, "SystemTime": told, "Runtimes": {"runc": {}, "nvidia": {}}, **more}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(gpus: int = 8, store: Path | None = None, cache: Path | None = None, shm: str = "32g") -> Manifest:
        path = tmp_path / "manifest.toml"
        models = f'[models]\nstore = "{store}"\n' if store else ""
        path.write_text(
            f'schema = 1\n[image]\nref = "a:1"\n[cache]\nroot = "{cache or tmp_path / "cache"}"\n{models}'
            f'[gpus]\ncount = {gpus}\n[container]\nshm_size = "{shm}"\n'
            '[[task]]\nmodel = "org/one"\n[[task]]\nmodel = "org/two"\n'
        )
        return load(path)

    return write


@pytest.fixture
def found(write: Write, tmp_path: Path) -> Callable[..., diagnostics.CheckResult]:
    """What one check finds on a machine that differs from a good one in what the test says."""

    def found(check: str, manifest: Manifest | None = None, **facts: Any) -> diagnostics.CheckResult:
        usual = {
            "manifest": manifest or write(),
            "info": info(),
            "local": True,
            "host": HostGpus(("NVIDIA H200",) * 8, "580.65.06"),
            "now": NOW,
            "dev": tmp_path,
        }
        finding = diagnostics.examine(Facts(**{**usual, **facts}))[check]
        assert bool(finding.remedy) == (finding.state == WARN), "a remedy for what is wrong, and for nothing else"
        return finding

    return found


def hub(store: Path, model: str, *, link: Path | None = None) -> None:
    """A model of the store, as the hub lays it out; its config.json may be a link to somewhere."""
    home = store / "hub" / f"models--{model.replace('/', '--')}"
    snapshot = home / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("a" * 40)
    if link is None:
        (snapshot / "config.json").write_text("{}")
    else:
        (snapshot / "config.json").symlink_to(link)
    (snapshot / "model.safetensors").write_text("")


def test_doctor_engine_restart_settings(found: Callable[..., diagnostics.CheckResult]) -> None:
    assert "ends a running warm-up" in found("engine").text
    assert "leaves a running warm-up alone" in found("engine", info=info(LiveRestoreEnabled=True)).text


def test_doctor_driver(found: Callable[..., diagnostics.CheckResult]) -> None:
    assert found("driver").text == "driver 580.65.06, 8 × NVIDIA H200"
    assert found("driver", host=None).state == UNKNOWN
    assert found("driver", local=False, host=None).state == UNKNOWN


def test_doctor_toolkit(found: Callable[..., diagnostics.CheckResult], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert found("toolkit").text == "found nvidia"
    missing = found("toolkit", info=info(Runtimes={"runc": {}}))
    assert missing.state == WARN and "nvidia-ctk" in missing.remedy
    devices = [{"Source": "cdi", "ID": "nvidia.com/gpu=0"}, {"Source": "cdi", "ID": "nvidia.com/gpu=1"}]
    assert found("toolkit", info=info(Runtimes=None, DiscoveredDevices=devices)).text == "found nvidia.com/gpu=0"


def test_doctor_toolkit_in_path(
    found: Callable[..., diagnostics.CheckResult], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hook = tmp_path / "nvidia-container-runtime-hook"
    hook.write_text("#!/bin/sh\n")
    hook.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert found("toolkit", info=info(Runtimes={"runc": {}})).state == OK
    assert found("toolkit", info=info(Runtimes={"runc": {}}), local=False).state == WARN, "that is another machine's"


def test_doctor_daemon_reload_risk(found: Callable[..., diagnostics.CheckResult], write: Write, tmp_path: Path) -> None:
    trap = found("daemon-reload")
    assert trap.state == WARN and "create-dev-char-symlinks" in trap.remedy
    assert found("daemon-reload", info=info(CgroupDriver="cgroupfs")).state == OK
    assert found("daemon-reload", write(gpus=0)).state == OK
    assert found("daemon-reload", local=False).state == UNKNOWN
    (tmp_path / "char").mkdir()
    (tmp_path / "char" / "195:0").symlink_to("../nvidia0")
    assert found("daemon-reload").state == OK


def test_doctor_shared_memory(found: Callable[..., diagnostics.CheckResult], write: Write) -> None:
    assert found("shared memory").state == OK
    assert found("shared memory", info=info(MemTotal=16 * GIB)).state == WARN


def test_doctor_cache_file_system(found: Callable[..., diagnostics.CheckResult], write: Write, tmp_path: Path) -> None:
    mounts = tmp_path / "proc" / "self" / "mounts"
    mounts.parent.mkdir(parents=True)
    cache = tmp_path / "a cache"
    cache.mkdir()

    def on(kind: str) -> diagnostics.CheckResult:
        octal = str(cache).replace(" ", "\\040")
        mounts.write_text(f"/dev/vda / ext4 rw 0 0\nserver:/x {octal} {kind} rw 0 0\nnonsense\n")
        return found("cache disk", write(cache=cache / "root"), proc=tmp_path / "proc")

    missing = on("xfs")
    assert (missing.state, missing.text) == (WARN, f"{cache / 'root'} does not exist")
    (cache / "root").mkdir()
    assert on("xfs").state == OK and "on xfs" in on("xfs").text
    assert on("nfs4").state == WARN and "locks" in on("nfs4").text
    assert on("tmpfs").state == WARN and "reboot" in on("tmpfs").text
    assert found("cache disk", local=False).state == UNKNOWN
    assert found("cache disk", proc=tmp_path / "none").state == UNKNOWN, "no file says where anything is mounted"


def test_doctor_engine_disk(
    found: Callable[..., diagnostics.CheckResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = info(DockerRootDir=str(tmp_path))
    usage = SimpleNamespace(free=100 * GIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    assert found("engine disk", info=there).state == OK
    usage.free = GIB
    assert found("engine disk", info=there).state == WARN, "one task's log alone may take 2 GiB"
    assert found("engine disk", info=info(DockerRootDir="/no/such")).state == UNKNOWN


def test_doctor_descriptors(found: Callable[..., diagnostics.CheckResult], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _what: (64, 4096))
    assert found("descriptors").state == WARN
    monkeypatch.setattr(resource, "getrlimit", lambda _what: (resource.RLIM_INFINITY,) * 2)
    assert found("descriptors").state == OK


@pytest.mark.parametrize(("apart", "state"), [(0, OK), (-4, OK), (7, WARN), (-3600, WARN)])
def test_doctor_clock_skew(found: Callable[..., diagnostics.CheckResult], apart: float, state: str) -> None:
    assert found("clock", now=NOW + apart).state == state


@pytest.mark.parametrize("said", [None, "", "yesterday", "2026-13-45T99:00:00Z", 7])
def test_doctor_clock_unknown(found: Callable[..., diagnostics.CheckResult], said: object) -> None:
    assert found("clock", info=info(SystemTime=said)).state == UNKNOWN


def test_doctor_clock_with_offset(found: Callable[..., diagnostics.CheckResult]) -> None:
    east = datetime.fromtimestamp(NOW + 7200, tz=timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.5+02:00")
    assert found("clock", info=info(SystemTime=east)).state == OK


def test_doctor_models_outside_store(
    found: Callable[..., diagnostics.CheckResult], write: Write, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    store.mkdir()
    hub(store, "org/one")
    one_missing = found("models", write(store=store))
    assert one_missing.state == WARN and one_missing.text.endswith(": org/two")
    outside = tmp_path / "config.json"
    outside.write_text("{}")
    hub(store, "org/two", link=outside)
    assert found("models", write(store=store)).text.endswith(": org/two"), "that link leads out of the mount"


def test_doctor_models_complete(found: Callable[..., diagnostics.CheckResult], write: Write, tmp_path: Path) -> None:
    hub(tmp_path / "store", "org/one")
    hub(tmp_path / "store", "org/two")
    assert found("models", write(store=tmp_path / "store")).state == OK
    assert found("models", write()).state == OK, "no store is asked for"
    assert found("models", write(store=tmp_path / "none")).state == UNKNOWN


def test_doctor_cache_unreadable(
    found: Callable[..., diagnostics.CheckResult], write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").mkdir()
    assert found("permissions").state == OK
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert found("permissions").state == WARN


@pytest.mark.parametrize(
    ("flags", "mode", "state", "said"),
    [
        (os.ST_NOSUID | os.ST_NODEV, 0o755, OK, "nosuid,nodev"),
        (os.ST_NODEV, 0o755, WARN, "lacks nosuid: "),
        (0, 0o755, WARN, "lacks nosuid,nodev: "),
        (0, 0o700, OK, "is closed to other users"),
    ],
)
def test_doctor_names_a_root_where_files_of_jobs_are_dangerous(
    found: Callable[..., diagnostics.CheckResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: int,
    mode: int,
    state: str,
    said: str,
) -> None:
    (tmp_path / "cache").mkdir(mode=mode)
    # The directories of tests are closed themselves.
    monkeypatch.setattr(Path, "parents", property(lambda path: []))
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=flags))
    assert said in found("files of jobs").text and found("files of jobs").state == state


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        ({"ServerVersion": "5.4.2"}, OK),
        ({"ServerVersion": "4.3.1"}, WARN),
        ({}, WARN),
    ],
)
def test_doctor_toolkit_of_podman(
    found: Callable[..., diagnostics.CheckResult], answer: dict[str, Any], state: str
) -> None:
    assert found("toolkit", info=info(BuildahVersion="1.40", **{"ServerVersion": "", **answer})).state == state


def test_doctor_toolkit_by_cdi(found: Callable[..., diagnostics.CheckResult]) -> None:
    devices = [{"Source": "cdi", "ID": "nvidia.com/gpu=all"}]
    result = found("toolkit", info=info(Runtimes={"runc": {}}, DiscoveredDevices=devices), local=False)
    assert result.state == OK and "nvidia.com/gpu=all" in result.text


@pytest.mark.parametrize(
    ("label", "state"),
    [("system_u:object_r:container_file_t:s0", OK), ("unconfined_u:object_r:user_home_t:s0", WARN), (None, WARN)],
)
def test_doctor_selinux_label_of_root(
    found: Callable[..., diagnostics.CheckResult],
    write: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    label: str | None,
    state: str,
) -> None:
    def getxattr(_path: Path, name: str) -> bytes:
        if label is None:
            raise OSError(errno.ENODATA, name)
        return label.encode() + b"\0"

    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(os, "getxattr", getxattr)
    result = found("isolation", info=info(SecurityOptions=["name=seccomp,profile=builtin", "name=selinux"]))
    assert result.state == state
    assert (f"chcon -Rt container_file_t {tmp_path / 'cache'}" in result.remedy) == (state == WARN)


@pytest.mark.parametrize(("mode", "state"), [(0o755, WARN), (0o777, OK)])
def test_doctor_user_namespace_names_owner(
    found: Callable[..., diagnostics.CheckResult], tmp_path: Path, mode: int, state: str
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(mode)
    remapped = info(SecurityOptions=["name=userns"], DockerRootDir="/var/lib/docker/231072.231072")
    result = found("isolation", info=remapped)
    assert result.state == state
    assert ("chown -R 231072:231072" in result.remedy) == (state == WARN)


def test_doctor_isolation_without_either(found: Callable[..., diagnostics.CheckResult], tmp_path: Path) -> None:
    for name in ("isolation", "files of jobs"):
        assert found(name).state == UNKNOWN, "there is no root yet"
    (tmp_path / "cache").mkdir()
    assert found("isolation").state == OK


def test_doctor_any_engine_answer_never_raises(write: Write) -> None:
    odd: list[Any] = [None, [], "x", 3, {"a": 1}]
    names = ("CgroupDriver", "Runtimes", "DiscoveredDevices", "MemTotal", "SystemTime", "DockerRootDir")
    for value in odd:
        told = info(**dict.fromkeys(names, value))
        findings = diagnostics.examine(Facts(write(), told, True, None, time.time()))
        assert set(findings) == set(diagnostics.CHECKS)


def test_job_container_with_sys_admin_is_named(found: Callable[..., diagnostics.CheckResult]) -> None:
    finding = found("job containers", powerful=("ci-h200-2",))
    assert finding.state == WARN and finding.text.startswith("ci-h200-2 mounts the cache with CAP_SYS_ADMIN")
    assert found("job containers").state == OK


@pytest.mark.parametrize(
    ("host", "may"),
    [
        ({}, False),
        ({"Privileged": True}, True),
        ({"CapAdd": ["SYS_ADMIN"]}, True),
        ({"CapAdd": ["cap_sys_admin"]}, True),
        ({"CapAdd": ["ALL"]}, True),
        ({"CapAdd": ["NET_ADMIN"], "Privileged": False}, False),
        ({"CapAdd": None}, False),
    ],
)
def test_container_that_may_mount_is_known(host: dict[str, Any], may: bool) -> None:
    assert may_mount({"HostConfig": host}) is may


@pytest.mark.parametrize(
    ("text", "may"),
    [("CapEff:\t000001ffffffffff\n", True), ("CapEff:\t00000000a80425fb\n", False), ("Name:\tx\n", False), ("", False)],
)
def test_process_that_may_mount_is_known(tmp_path: Path, text: str, may: bool) -> None:
    (tmp_path / "status").write_text(text)
    assert environment.may_mount(tmp_path / "status") is may
