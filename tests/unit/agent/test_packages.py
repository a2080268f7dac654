"""Identity of installed packages, and facts about GPUs."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from builder.agent import gpu_probe, packages


def install(
    site: Path, name: str, version: str, rows: str = "", *, direct_url: Any = None, metadata: bool = True
) -> None:
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    if metadata:
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if rows:
        (info / "RECORD").write_text(rows)
    if direct_url is not None:
        (info / "direct_url.json").write_text(direct_url if isinstance(direct_url, str) else json.dumps(direct_url))


def identity(site: Path, name: str = "thing") -> str | None:
    return packages.identity([name], [str(site)])


# Packages


PIP = """../../../bin/thing,sha256:AAAA,200
thing-1.0.dist-info/INSTALLER,sha256=zuu,4
thing-1.0.dist-info/METADATA,sha256=mm,10
thing-1.0.dist-info/RECORD,,
thing/__init__.py,sha256=aa,10
thing/__pycache__/__init__.cpython-312.pyc,,
"thing/with,comma.py",sha256=bb,11
"""
UV = """thing/__init__.py,sha256=aa,10
"thing/with,comma.py",sha256=bb,11
thing-1.0.dist-info/METADATA,sha256=mm,10
thing-1.0.dist-info/INSTALLER,sha256=uuu,2
thing-1.0.dist-info/REQUESTED,sha256=e3b0,0
thing-1.0.dist-info/uv_cache.json,sha256=cc,3
../../../bin/thing,sha256=BBBB,210
thing-1.0.dist-info/RECORD,,
"""


def test_package_of_pip_and_uv_is_equal(tmp_path: Path) -> None:
    install(tmp_path / "pip", "thing", "1.0", PIP)
    install(tmp_path / "uv", "thing", "1.0", UV)
    assert identity(tmp_path / "pip") == identity(tmp_path / "uv")
    assert (identity(tmp_path / "pip") or "").startswith("1.0 ")


@pytest.mark.parametrize("change", [("sha256=bb", "sha256=bc"), ("thing/__init__", "thing/__main__"), ("1.0", "1.1")])
def test_package_of_other_content_or_version_differs(tmp_path: Path, change: tuple[str, str]) -> None:
    install(tmp_path / "a", "thing", "1.0", PIP)
    install(tmp_path / "b", "thing", "1.1" if change[0] == "1.0" else "1.0", PIP.replace(*change))
    assert identity(tmp_path / "a") != identity(tmp_path / "b")


def test_package_absent_is_none(tmp_path: Path) -> None:
    assert identity(tmp_path) is None
    assert packages.identity(["a", "b"], [str(tmp_path / "nowhere")]) is None


@pytest.mark.parametrize("below", ["", "python", "src"])
def test_package_editable_is_identified_by_contents(tmp_path: Path, below: str) -> None:
    tree = tmp_path / "tree with blanks"
    code = tree / below / "thing" / "csrc" / "a.cuh"
    code.parent.mkdir(parents=True)
    code.write_text("one")
    url = {"url": (tree).as_uri(), "dir_info": {"editable": True}}
    install(tmp_path, "thing", "1.0", "thing/__init__.py,sha256=aa,1\n", direct_url=url)
    before = identity(tmp_path) or ""
    assert before.startswith("1.0 editable ")
    (code.parent / "__pycache__").mkdir()
    (code.parent / "__pycache__" / "a.pyc").touch()
    assert identity(tmp_path) == before
    code.write_text("two")
    assert identity(tmp_path) != before


@pytest.mark.parametrize(
    "rows",
    [
        "__editable__.thing-1.0.pth,sha256=aa,1\n__editable___thing_1_0_finder.py,sha256=bb,1\n",
        "_thing_editable.py,sha256=aa,1\n_thing_editable.pth,sha256=bb,1\n",
        "_editable_impl_thing.pth,sha256=aa,1\n",
    ],
)
def test_package_editable_in_other_places_is_searched_by_import(tmp_path: Path, rows: str) -> None:
    install(tmp_path, "thing", "1.0", rows)
    assert identity(tmp_path) == "1.0 editable its files were not found"


def test_package_without_record_is_identified_by_contents(tmp_path: Path) -> None:
    install(tmp_path, "thing", "1.0")
    (tmp_path / "thing").mkdir()
    (tmp_path / "thing" / "a.py").write_text("one")
    before = identity(tmp_path) or ""
    assert before.startswith("1.0 without RECORD ")
    (tmp_path / "thing" / "a.py").write_text("two")
    assert identity(tmp_path) != before


def test_package_with_pth_in_wheel_is_not_editable(tmp_path: Path) -> None:
    # nvidia-cutlass-dsl 4.8.0 holds nothing but such a file; its compiler is in the libs.
    install(tmp_path, "nvidia-cutlass-dsl", "4.8.0", "nvidia_cutlass_dsl_packages.pth,sha256=zH,116\n")
    install(tmp_path, "nvidia-cutlass-dsl-libs-base", "4.8.0", "nvidia_cutlass_dsl/a.so,sha256=aa,1\n")
    names = ["nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-base", "nvidia-cutlass-dsl-libs-cu13"]
    one = packages.identity(names, [str(tmp_path)]) or ""
    assert "editable" not in one
    assert "nvidia-cutlass-dsl-libs-base 4.8.0 " in one
    install(tmp_path, "nvidia-cutlass-dsl-libs-cu13", "4.8.0", "nvidia_cutlass_dsl/b.so,sha256=aa,1\n")
    assert packages.identity(names, [str(tmp_path)]) != one


@pytest.mark.parametrize(
    "garbage", ['"', "\0\0", "a", ",,,\n,,", "é\udcff".encode("utf-8", "surrogateescape").decode("latin-1")]
)
def test_package_with_garbage_record_never_raises(tmp_path: Path, garbage: str) -> None:
    install(tmp_path, "thing", "1.0", garbage, direct_url="[[not json")
    assert (identity(tmp_path) or "").startswith("1.0 ")


def test_package_without_metadata_is_absent(tmp_path: Path) -> None:
    install(tmp_path, "thing", "1.0", PIP, metadata=False)
    assert identity(tmp_path) is None


NEW = "deep_gemm/__init__.py,sha256=aa,1\ndeep_gemm/include/deep_jit/jit.hpp,sha256=bb,1\n"
OLD = "deep_gemm/__init__.py,sha256=aa,1\n"


@pytest.mark.parametrize(
    ("name", "version", "rows", "form"),
    [
        ("sgl-deep-gemm", "0.2.0", OLD, "deep_jit"),
        ("sgl-deep-gemm", "0.2.3.post2", NEW, "deep_jit"),
        ("sgl-deep-gemm", "0.10.0", NEW, "deep_jit"),
        ("sgl-deep-gemm", "0.1.7", OLD, "jit"),
        ("deep-gemm", "2.1.1+abc", OLD, "jit"),
        ("deep-gemm", "3.0", NEW, "deep_jit"),
        ("sgl-kernel", "0.3.9", OLD, "jit"),
    ],
)
def test_deep_gemm_package_and_format(tmp_path: Path, name: str, version: str, rows: str, form: str) -> None:
    install(tmp_path, name, version, rows)
    found = packages.deep_gemm([str(tmp_path)])
    assert found["deep_gemm_format"] == form
    assert version in (found["deep_gemm"] or "")
    # The old format has its install path in every key.
    assert found["deep_gemm_path"] == (f"{tmp_path}/deep_gemm" if form == "jit" else None)


def test_deep_gemm_absent_in_kernel_package(tmp_path: Path) -> None:
    install(tmp_path, "sgl-kernel", "0.4.0", "sgl_kernel/__init__.py,sha256=aa,1\n")
    assert set(packages.deep_gemm([str(tmp_path)]).values()) == {None}


def test_deep_gemm_own_wheel_wins(tmp_path: Path) -> None:
    install(tmp_path, "sgl-kernel", "0.3.9", OLD)
    install(tmp_path, "sgl-deep-gemm", "0.2.5", NEW)
    assert (packages.deep_gemm([str(tmp_path)])["deep_gemm"] or "").startswith("0.2.5 ")


def test_commit_of_vcs_install_is_read(tmp_path: Path) -> None:
    install(
        tmp_path, "sglang", "0.5.24", OLD, direct_url={"url": "x", "vcs_info": {"vcs": "git", "commit_id": "c0ffee"}}
    )
    assert packages.commit("sglang", [str(tmp_path)]) == "c0ffee"
    assert packages.commit("other", [str(tmp_path)]) is None


# GPUs


class FakeCuda:
    """libcuda with two devices; functions that are not named are not there, as in an old driver."""

    ATTRIBUTES: ClassVar = {16: 132, 38: 62914560, 75: 9, 76: 0, 97: 232448}

    def __init__(self, *, init: int = 0, count: int = 2, without: tuple[str, ...] = ()) -> None:
        self.init, self.count, self.without = init, count, without

    def __getattr__(self, name: str) -> Callable[..., Any]:
        found: dict[str, Callable[..., Any]] = {
            "cuInit": lambda flags: self.init,
            "cuDeviceGetCount": lambda count: self._set(count, self.count),
            "cuDeviceGet": self._set,
            "cuDeviceGetAttribute": lambda value, which, device: self._set(value, self.ATTRIBUTES[which]),
            "cuDeviceGetName": self._name,
            "cuDeviceTotalMem_v2": lambda memory, device: self._set(memory, 1 << 37),
            "cuDeviceGetUuid": lambda raw, device: ctypes.memset(raw, 0x11, 16) and 0,
        }
        if name not in found or name in self.without:
            raise AttributeError(name)
        return found[name]

    @staticmethod
    def _set(reference: Any, value: int) -> int:
        reference._obj.value = value
        return 0

    @staticmethod
    def _name(buffer: Any, size: int, device: Any) -> int:
        buffer.value = b"NVIDIA H200"
        return 0


def gpus(monkeypatch: pytest.MonkeyPatch, library: FakeCuda | None) -> dict[str, Any]:
    monkeypatch.setattr(gpu_probe, "_library", lambda name: library if name == "libcuda.so.1" else None)
    monkeypatch.setattr(gpu_probe, "_DRIVER_FILES", ())
    return gpu_probe.facts()


def test_gpu_facts_are_read_from_libcuda(monkeypatch: pytest.MonkeyPatch) -> None:
    found = gpus(monkeypatch, FakeCuda())
    assert [gpu["index"] for gpu in found["gpus"]] == [0, 1]
    assert found["gpus"][0] == {
        "index": 0,
        "uuid": "GPU-11111111-1111-1111-1111-111111111111",
        "name": "NVIDIA H200",
        "compute_capability": "9.0",
        "sm_count": 132,
        "memory_bytes": 1 << 37,
        "shared_bytes": 232448,
        "l2_bytes": 62914560,
    }
    assert found["problems"] == []


@pytest.mark.parametrize(
    ("library", "count", "problem"),
    [
        (None, 0, None),
        (FakeCuda(init=100), 0, None),
        (FakeCuda(init=802), 0, "cuInit: status 802"),
        (FakeCuda(without=("cuInit",)), 0, "cuInit: status None"),
        (FakeCuda(count=-5), 0, None),
        (FakeCuda(without=("cuDeviceGetCount",)), 0, "cuDeviceGetCount: status None"),
    ],
)
def test_gpu_absent_in_every_form(
    monkeypatch: pytest.MonkeyPatch, library: FakeCuda | None, count: int, problem: str | None
) -> None:
    found = gpus(monkeypatch, library)
    assert len(found["gpus"]) == count
    assert found["problems"] == ([] if problem is None else [problem])


def test_gpu_stub_without_answers_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = FakeCuda(
        count=1, without=("cuDeviceGetName", "cuDeviceGetUuid", "cuDeviceTotalMem_v2", "cuDeviceGetAttribute")
    )
    (gpu,) = gpus(monkeypatch, stub)["gpus"]
    assert {name: value for name, value in gpu.items() if name != "index"} == dict.fromkeys(
        ("uuid", "name", "compute_capability", "sm_count", "memory_bytes", "shared_bytes", "l2_bytes")
    )


def test_driver_version_is_read_from_kernel_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    published = tmp_path / "version"
    published.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.133.20  Release Build\nGCC version: gcc 12.2.0\n"
    )
    monkeypatch.setattr(gpu_probe, "_library", lambda name: None)
    monkeypatch.setattr(gpu_probe, "_DRIVER_FILES", (str(tmp_path / "gone"), str(published)))
    assert gpu_probe.facts()["driver"] == "570.133.20"
