"""GPUs as the host's driver files describe them."""

from __future__ import annotations

from pathlib import Path

from builder.gpus import host_gpus

VERSION = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder@U22)\nGCC version: 12\n"


def driver(tmp_path: Path, count: int) -> Path:
    (tmp_path / "version").write_text(VERSION)
    for index in range(count):
        gpu = tmp_path / "gpus" / f"0000:{index:02x}:00.0"
        gpu.mkdir(parents=True)
        (gpu / "information").write_text(f"Model: \t\t NVIDIA H200\nIRQ:   \t\t 1{index}\nGPU UUID: \t GPU-{index}\n")
    return tmp_path


def test_eight_of_one_kind(tmp_path: Path) -> None:
    found = host_gpus(driver(tmp_path, 8))
    assert found is not None
    assert found.names == ("NVIDIA H200",) * 8
    assert found.driver == "580.65.06"
    assert found.model == "NVIDIA H200"


def test_a_driver_without_gpus(tmp_path: Path) -> None:
    found = host_gpus(driver(tmp_path, 0))
    assert found is not None and found.names == () and found.driver == "580.65.06"


def test_no_driver(tmp_path: Path) -> None:
    assert host_gpus(tmp_path / "absent") is None


def test_garbage_is_no_reason_to_crash(tmp_path: Path) -> None:
    root = driver(tmp_path, 1)
    (root / "version").write_bytes(b"\xff\xfe\x00")
    (root / "gpus" / "0000:00:00.0" / "information").write_bytes(b"\xff" * 100)
    found = host_gpus(root)
    assert found is not None and found.names == ("unknown",) and found.driver is None
