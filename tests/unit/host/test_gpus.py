"""GPUs as the driver's files describe them, and the container that a process runs in by its control group."""

from __future__ import annotations

from pathlib import Path

import pytest

from builder.host.gpus import GpuSnapshot, GpuUsage, container_of, host_gpus

VERSION = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder@U22)\n"
    "GCC version: 12\n"
)


def driver_files(tmp_path: Path, count: int) -> Path:
    (tmp_path / "version").write_text(VERSION)
    for index in range(count):
        gpu = tmp_path / "gpus" / f"0000:{index:02x}:00.0"
        gpu.mkdir(parents=True)
        (gpu / "information").write_text(f"Model: \t\t NVIDIA H200\nIRQ:   \t\t 1{index}\nGPU UUID: \t GPU-{index}\n")
    return tmp_path


def test_host_gpus_eight_of_one_kind_are_listed(tmp_path: Path) -> None:
    found = host_gpus(driver_files(tmp_path, 8))
    assert found is not None
    assert found.names == ("NVIDIA H200",) * 8
    assert found.driver == "580.65.06"
    assert found.model == "NVIDIA H200"


def test_host_gpus_with_slices_are_partitioned(tmp_path: Path) -> None:
    root = driver_files(tmp_path, 3)
    for gpu, instance in (("gpu2", "gi1"), ("gpu2", "gi2"), ("gpu0", "gi7")):
        (root / "capabilities" / gpu / "mig" / instance).mkdir(parents=True)
    (root / "capabilities" / "gpu1" / "mig").mkdir(parents=True)
    found = host_gpus(root)
    assert found is not None and found.partitioned == (0, 2)


def test_host_gpus_driver_without_gpus_lists_none(tmp_path: Path) -> None:
    found = host_gpus(driver_files(tmp_path, 0))
    assert found is not None and found.names == () and found.driver == "580.65.06"


def test_host_gpus_without_driver_is_none(tmp_path: Path) -> None:
    assert host_gpus(tmp_path / "absent") is None


def test_host_gpus_unreadable_files_become_unknown(tmp_path: Path) -> None:
    root = driver_files(tmp_path, 1)
    (root / "version").write_bytes(b"\xff\xfe\x00")
    (root / "gpus" / "0000:00:00.0" / "information").write_bytes(b"\xff" * 100)
    found = host_gpus(root)
    assert found is not None and found.names == ("unknown",) and found.driver is None


ID, OUTER = "4" * 64, "7" * 64


@pytest.mark.parametrize(
    ("text", "container"),
    [
        (f"0::/docker/{ID}\n", ID),
        (f"0::/system.slice/docker-{ID}.scope\n", ID),
        (f"9:name=systemd:/docker/{OUTER}/docker/{ID}\n0::/docker/{OUTER}/docker/{ID}\n", ID),
        (f"0::/machine.slice/libpod-{ID}.scope/container\n", ID),
        (f"0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-{ID}.scope\n", ID),
        ("0::/user.slice/user-1000.slice/session-2.scope\n", None),
        ("0::/\n", None),
        ("", None),
    ],
)
def test_container_of_finds_innermost_id(tmp_path: Path, text: str, container: str | None) -> None:
    (tmp_path / "17").mkdir()
    (tmp_path / "17" / "cgroup").write_text(text)
    assert container_of(17, tmp_path) == container
    assert container_of(18, tmp_path) is None


def test_chosen_by_count_takes_first_by_devices_takes_named() -> None:
    machine = GpuSnapshot(tuple(GpuUsage(index, f"GPU-{index}", "NVIDIA H200", 0, 1, ()) for index in range(8)))
    assert [one.index for one in machine.chosen(None, 4).gpus] == [0, 1, 2, 3]
    assert [one.index for one in machine.chosen((5, 7), 2).gpus] == [5, 7]
