"""The toolchain record: what is in it, what moves a key, what does not, and the memo that keeps it."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builder.agent import compilers, gpu_probe, packages
from builder.cache import toolchain
from builder.cache.families import FAMILIES, FAMILY
from builder.cache.toolchain import Record
from builder.job import ServingImage

IMAGE = "sha256:" + "a" * 64
SOON = time.monotonic() + 3600
H200 = {
    "index": 0,
    "uuid": "GPU-0",
    "name": "NVIDIA H200",
    "compute_capability": "9.0",
    "sm_count": 132,
    "memory_bytes": 150754820096,
}


def record(**factors: str | None) -> Record:
    names = {factor for family in FAMILIES for factor in family.factors}
    return {
        "schema": 1,
        "factors": {**{name: f"{name} 1" for name in names}, "mount": "/jit", **factors},
        "gpus": [dict(H200), {**H200, "index": 1, "uuid": "GPU-1"}],
        "sglang": {"version": "0.5.23", "commit": None},
        "observed": {"driver": "570.1", "python": "3.12.3", "problems": []},
    }


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


def identity(site: Path, name: str = "thing", build: str | None = "image x") -> str | None:
    return packages.identity([name], build, [str(site)])


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


def test_pip_and_uv_installs_of_one_wheel_are_the_same(tmp_path: Path) -> None:
    install(tmp_path / "pip", "thing", "1.0", PIP)
    install(tmp_path / "uv", "thing", "1.0", UV)
    assert identity(tmp_path / "pip") == identity(tmp_path / "uv")
    assert (identity(tmp_path / "pip") or "").startswith("1.0 ")


@pytest.mark.parametrize("change", [("sha256=bb", "sha256=bc"), ("thing/__init__", "thing/__main__"), ("1.0", "1.1")])
def test_other_content_or_version_is_another_package(tmp_path: Path, change: tuple[str, str]) -> None:
    install(tmp_path / "a", "thing", "1.0", PIP)
    install(tmp_path / "b", "thing", "1.1" if change[0] == "1.0" else "1.0", PIP.replace(*change))
    assert identity(tmp_path / "a") != identity(tmp_path / "b")


def test_absent_is_null_not_a_guess(tmp_path: Path) -> None:
    assert identity(tmp_path) is None
    assert packages.identity(["a", "b"], None, [str(tmp_path / "nowhere")]) is None


@pytest.mark.parametrize(
    ("rows", "direct_url"),
    [
        ("thing/__init__.py,sha256=aa,1\n", {"url": "file:///src", "dir_info": {"editable": True}}),
        ("__editable__.thing-1.0.pth,sha256=aa,1\n__editable___thing_1_0_finder.py,sha256=bb,1\n", None),
        ("_thing_editable.py,sha256=aa,1\n_thing_editable.pth,sha256=bb,1\n", None),
        ("_editable_impl_thing.pth,sha256=aa,1\n", None),
    ],
)
def test_an_editable_install_is_its_build(tmp_path: Path, rows: str, direct_url: Any) -> None:
    install(tmp_path, "thing", "1.0", rows, direct_url=direct_url)
    assert identity(tmp_path, build="commit abc") == "1.0 editable, commit abc"
    assert identity(tmp_path, build=None) == "1.0 editable, build unknown"


def test_without_a_record_the_build_is_all_there_is(tmp_path: Path) -> None:
    install(tmp_path, "thing", "1.0")
    assert identity(tmp_path, build="image x") == "1.0 without RECORD, image x"


def test_a_pth_of_a_wheel_is_no_editable_install(tmp_path: Path) -> None:
    # nvidia-cutlass-dsl 4.8.0 holds nothing but such a file; its compiler is in the libs.
    install(tmp_path, "nvidia-cutlass-dsl", "4.8.0", "nvidia_cutlass_dsl_packages.pth,sha256=zH,116\n")
    install(tmp_path, "nvidia-cutlass-dsl-libs-base", "4.8.0", "nvidia_cutlass_dsl/a.so,sha256=aa,1\n")
    names = ["nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-base", "nvidia-cutlass-dsl-libs-cu13"]
    one = packages.identity(names, None, [str(tmp_path)]) or ""
    assert "editable" not in one
    assert "nvidia-cutlass-dsl-libs-base 4.8.0 " in one
    install(tmp_path, "nvidia-cutlass-dsl-libs-cu13", "4.8.0", "nvidia_cutlass_dsl/b.so,sha256=aa,1\n")
    assert packages.identity(names, None, [str(tmp_path)]) != one


@pytest.mark.parametrize(
    "garbage", ['"', "\0\0", "a", ",,,\n,,", "é\udcff".encode("utf-8", "surrogateescape").decode("latin-1")]
)
def test_a_garbage_record_is_no_crash(tmp_path: Path, garbage: str) -> None:
    install(tmp_path, "thing", "1.0", garbage, direct_url="[[not json")
    assert (identity(tmp_path) or "").startswith("1.0 ")


def test_a_distribution_without_metadata_is_absent(tmp_path: Path) -> None:
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
def test_deep_gemm_and_its_format(tmp_path: Path, name: str, version: str, rows: str, form: str) -> None:
    install(tmp_path, name, version, rows)
    found = packages.deep_gemm(None, [str(tmp_path)])
    assert found["deep_gemm_format"] == form
    assert version in (found["deep_gemm"] or "")
    # The old format has its install path in every key.
    assert found["deep_gemm_path"] == (f"{tmp_path}/deep_gemm" if form == "jit" else None)


def test_a_kernel_package_without_deep_gemm_is_not_deep_gemm(tmp_path: Path) -> None:
    install(tmp_path, "sgl-kernel", "0.4.0", "sgl_kernel/__init__.py,sha256=aa,1\n")
    assert set(packages.deep_gemm(None, [str(tmp_path)]).values()) == {None}


def test_the_own_wheel_wins(tmp_path: Path) -> None:
    install(tmp_path, "sgl-kernel", "0.3.9", OLD)
    install(tmp_path, "sgl-deep-gemm", "0.2.5", NEW)
    assert (packages.deep_gemm(None, [str(tmp_path)])["deep_gemm"] or "").startswith("0.2.5 ")


def test_the_commit_of_a_vcs_install(tmp_path: Path) -> None:
    install(
        tmp_path, "sglang", "0.5.24", OLD, direct_url={"url": "x", "vcs_info": {"vcs": "git", "commit_id": "c0ffee"}}
    )
    assert packages.commit("sglang", [str(tmp_path)]) == "c0ffee"
    assert packages.commit("other", [str(tmp_path)]) is None


# Compilers


def tool(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def nvcc_of(environ: dict[str, str], site: str | None = None) -> dict[str, str | None]:
    problems: list[str] = []
    running = compilers.start_all(environ, site)
    return {name: compilers.finish(process, SOON, name, problems) for name, process in running.items()}


def test_nvcc_is_found_in_the_order_of_its_users(tmp_path: Path) -> None:
    tool(tmp_path / "home/bin/nvcc", "echo home; echo second line")
    tool(tmp_path / "path/nvcc", "echo path")
    tool(tmp_path / "cudapath/bin/nvcc", "echo cudapath")
    own = tool(tmp_path / "own", "echo own")
    path, home = str(tmp_path / "path"), str(tmp_path / "home")
    assert nvcc_of({"PATH": path, "CUDA_HOME": home})["nvcc"] == "home\nsecond line"
    assert nvcc_of({"PATH": path, "CUDA_PATH": str(tmp_path / "cudapath")})["nvcc"] == "cudapath"
    assert nvcc_of({"PATH": path})["nvcc"] == "path"
    both = nvcc_of({"PATH": path, "CUDA_HOME": home, "DG_JIT_NVCC_COMPILER": own})
    # Only DeepGEMM listens to that variable.
    assert (both["nvcc"], both["deep_gemm_nvcc"]) == ("home\nsecond line", "own")


def test_ptxas_is_tritons_own_unless_named(tmp_path: Path) -> None:
    bin_ = tmp_path / "site/triton/backends/nvidia/bin"
    tool(bin_ / "ptxas", "echo wheel")
    tool(bin_ / "ptxas-blackwell", "echo blackwell")
    site, path = str(tmp_path / "site"), str(tmp_path)
    found = nvcc_of({"PATH": path}, site)
    assert (found["ptxas"], found["ptxas-blackwell"]) == ("wheel", "blackwell")
    named = tool(tmp_path / "mine", "echo mine")
    assert nvcc_of({"PATH": path, "TRITON_PTXAS_PATH": named}, site)["ptxas"] == "mine"
    assert nvcc_of({"PATH": path, "TRITON_PTXAS_PATH": "/nowhere"}, site)["ptxas"] == "wheel"
    assert nvcc_of({"PATH": path, "TRITON_PTXAS_BLACKWELL_PATH": named}, site)["ptxas-blackwell"] == "mine"


def test_compilers_that_fail_hang_or_mumble_are_absent(tmp_path: Path) -> None:
    problems: list[str] = []
    environ = {"PATH": os.environ["PATH"]}
    broken = compilers.start([tool(tmp_path / "broken", "exit 3")], environ)
    assert compilers.finish(broken, SOON, "broken", problems) is None
    # It starts a child that holds the pipe open: both must end.
    hung = compilers.start([tool(tmp_path / "hung", "sleep 1000 & wait")], environ)
    assert compilers.finish(hung, 0.0, "hung", problems) is None
    assert compilers.finish(compilers.start(["/nowhere/nvcc"], environ), SOON, "gone", problems) is None
    odd = compilers.start([tool(tmp_path / "odd", "printf '\\377\\n'")], environ)
    assert compilers.finish(odd, SOON, "odd", problems) == "\ufffd"
    assert [problem.split(":")[0] for problem in problems] == ["broken", "hung", "gone"]


# GPUs


class FakeCuda:
    """libcuda with two devices; functions that are not named are not there, as in an old driver."""

    def __init__(self, *, init: int = 0, count: int = 2, without: tuple[str, ...] = ()) -> None:
        self.init, self.count, self.without = init, count, without

    def __getattr__(self, name: str) -> Callable[..., Any]:
        found: dict[str, Callable[..., Any]] = {
            "cuInit": lambda flags: self.init,
            "cuDeviceGetCount": lambda count: self._set(count, self.count),
            "cuDeviceGet": self._set,
            "cuDeviceGetAttribute": lambda value, which, device: self._set(value, {16: 132, 75: 9, 76: 0}[which]),
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


def test_gpu_facts_from_libcuda(monkeypatch: pytest.MonkeyPatch) -> None:
    found = gpus(monkeypatch, FakeCuda())
    assert [gpu["index"] for gpu in found["gpus"]] == [0, 1]
    assert found["gpus"][0] == {
        "index": 0,
        "uuid": "GPU-11111111-1111-1111-1111-111111111111",
        "name": "NVIDIA H200",
        "compute_capability": "9.0",
        "sm_count": 132,
        "memory_bytes": 1 << 37,
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
def test_no_gpu_in_all_its_forms(
    monkeypatch: pytest.MonkeyPatch, library: FakeCuda | None, count: int, problem: str | None
) -> None:
    found = gpus(monkeypatch, library)
    assert len(found["gpus"]) == count
    assert found["problems"] == ([] if problem is None else [problem])


def test_a_stub_that_answers_nothing_is_absent_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = FakeCuda(
        count=1, without=("cuDeviceGetName", "cuDeviceGetUuid", "cuDeviceTotalMem_v2", "cuDeviceGetAttribute")
    )
    (gpu,) = gpus(monkeypatch, stub)["gpus"]
    assert {name: value for name, value in gpu.items() if name != "index"} == dict.fromkeys(
        ("uuid", "name", "compute_capability", "sm_count", "memory_bytes")
    )


def test_the_driver_from_the_kernel_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    published = tmp_path / "version"
    published.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.133.20  Release Build\nGCC version: gcc 12.2.0\n"
    )
    monkeypatch.setattr(gpu_probe, "_library", lambda name: None)
    monkeypatch.setattr(gpu_probe, "_DRIVER_FILES", (str(tmp_path / "gone"), str(published)))
    assert gpu_probe.facts()["driver"] == "570.133.20"


# Probe


def test_probe_names_every_factor_and_imports_nothing_heavy(tmp_path: Path) -> None:
    nvcc = tool(tmp_path / "cuda/bin/nvcc", "echo nvcc: NVIDIA; echo release 13.0")
    cxx = tool(tmp_path / "bin/clang", 'echo "clang 18 $2"; echo Target')
    environ = {"PATH": os.environ["PATH"], "CUDA_HOME": str(tmp_path / "cuda"), "CXX": f"{cxx} -flag"}
    made = toolchain.probe(environ=environ, mount="/jit/", image=ServingImage(IMAGE, {"ai.sglang.build.commit": "abc"}))
    assert toolchain.sound(json.loads(json.dumps(made)))
    assert {factor for family in FAMILIES for factor in family.factors} <= set(made["factors"])
    factors = made["factors"]
    assert factors["nvcc"] == factors["deep_gemm_nvcc"] == "nvcc: NVIDIA\nrelease 13.0"
    assert factors["host_compiler"] == "clang 18 --version"
    assert (factors["mount"], factors["image"], made["sglang"]["commit"]) == ("/jit", IMAGE, "abc")
    assert factors["machine"] == os.uname().machine
    assert not {"torch", "sglang", "triton"} & set(sys.modules)
    assert nvcc


def test_unknown_is_no_commit() -> None:
    environ = {"PATH": "/nowhere", "SGLANG_BUILD_COMMIT": "unknown"}
    made = toolchain.probe(environ=environ, mount="/jit", image=ServingImage())
    assert made["sglang"]["commit"] is None
    assert made["factors"]["image"] is None
    assert made["factors"]["nvcc"] is None or Path("/usr/local/cuda/bin/nvcc").exists()


def test_devices_are_asked_in_a_process_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    # A driver that crashes its process is a problem noted and no facts.
    monkeypatch.setattr(toolchain, "_DEVICES", "import os; os.kill(os.getpid(), 11)")
    made = toolchain.probe(environ={"PATH": "/nowhere"}, mount="/jit", image=ServingImage())
    assert made["gpus"] == []
    assert made["observed"]["problems"] == ["GPU facts: status -11"]


def test_the_program_needs_the_standard_library_alone() -> None:
    code = (
        "import sys; import builder.cache.markers; "
        "print([m for m in sys.modules if m.split('.')[0] not in {*sys.stdlib_module_names, 'builder', '__main__'}])"
    )
    root = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {root!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


# Keys


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: str(family.name))
def test_a_factor_moves_exactly_the_families_that_name_it(family: Any) -> None:
    before = toolchain.family_keys(record())
    for factor in family.factors:
        for other in (f"{factor} 2", None):
            after = toolchain.family_keys(record(**{factor: other}))
            moved = {name for name in before if before[name] != after[name]}
            assert moved == {item.name for item in FAMILIES if factor in item.factors}


def test_an_sglang_bump_alone_moves_nothing() -> None:
    bumped = record()
    bumped["sglang"] = {"version": "0.6.0", "commit": "fff"}
    bumped["observed"]["driver"] = "999"
    assert toolchain.family_keys(bumped) == toolchain.family_keys(record())


def test_another_image_keeps_every_shared_family() -> None:
    before, after = toolchain.family_keys(record()), toolchain.family_keys(record(image="sha256:b"))
    assert {name for name in before if before[name] == after[name]} == {item.name for item in FAMILIES if item.shared}


def test_keys_are_hex_and_survive_json_and_order() -> None:
    made = record()
    again = json.loads(json.dumps({**made, "factors": dict(reversed(made["factors"].items()))}))
    assert toolchain.family_keys(again) == toolchain.family_keys(made)
    for key in toolchain.family_keys(made).values():
        assert len(key) == 16
        assert int(key, 16) >= 0
    keys = toolchain.family_keys(made)
    assert toolchain.digest(keys) == toolchain.digest(dict(reversed(keys.items())))


def test_the_key_separates_families_with_equal_factors() -> None:
    assert FAMILY["tvm_ffi"].factors == FAMILY["torch_extensions"].factors
    keys = toolchain.family_keys(record())
    assert keys["tvm_ffi"] != keys["torch_extensions"]


# Memo


def remembered(root: Path, **seen: Any) -> Record | None:
    wanted: dict[str, Any] = {"mount": "/jit", "gpus": "NVIDIA H200", "driver": "570.1", "env": {}, **seen}
    return toolchain.read_memo(root, wanted.pop("image", IMAGE), **wanted)


def test_a_memo_is_the_record_again(tmp_path: Path) -> None:
    assert remembered(tmp_path) is None
    toolchain.write_memo(tmp_path, IMAGE, record(), env={"HF_HUB_OFFLINE": "1"})
    assert remembered(tmp_path) == record()
    assert remembered(tmp_path, env={"HF_HUB_OFFLINE": "0", "UNRELATED": "x"}) == record()
    assert toolchain.memo_path(tmp_path, IMAGE).parent == tmp_path / "images"
    assert list((tmp_path / "images").iterdir()) == [toolchain.memo_path(tmp_path, IMAGE)]


@pytest.mark.parametrize(
    "seen",
    [
        {"mount": "/other"},
        {"gpus": "NVIDIA H100"},
        {"gpus": ""},
        {"driver": "580.2"},
        {"env": {"LD_PRELOAD": "/x.so"}},
        {"image": "sha256:other"},
    ],
)
def test_a_memo_holds_only_where_all_is_the_same(tmp_path: Path, seen: dict[str, Any]) -> None:
    toolchain.write_memo(tmp_path, IMAGE, record(), env={})
    assert remembered(tmp_path, **seen) is None


def test_what_cannot_be_seen_is_not_compared(tmp_path: Path) -> None:
    toolchain.write_memo(tmp_path, IMAGE, record(), env={})
    assert remembered(tmp_path, gpus=None, driver=None, mount="/jit/") == record()
    blind = record()
    blind["observed"]["driver"] = None
    blind["gpus"] = [{**H200, "name": None}]
    toolchain.write_memo(tmp_path, "sha256:blind", blind, env={})
    assert remembered(tmp_path, image="sha256:blind", driver="1", gpus="NVIDIA H200") == blind


def test_memos_for_several_environments_live_side_by_side(tmp_path: Path) -> None:
    preload = {"LD_PRELOAD": "/x.so"}
    toolchain.write_memo(tmp_path, IMAGE, record(nvcc="a"), env={})
    toolchain.write_memo(tmp_path, IMAGE, record(nvcc="b"), env=preload)
    toolchain.write_memo(tmp_path, IMAGE, record(nvcc="c"), env={})
    assert remembered(tmp_path) == record(nvcc="c")
    assert remembered(tmp_path, env=preload) == record(nvcc="b")
    for number in range(40):
        toolchain.write_memo(tmp_path, IMAGE, record(), env={"PATH": str(number)})
    assert len(json.loads(toolchain.memo_path(tmp_path, IMAGE).read_text())["memos"]) == 16


@pytest.mark.parametrize(
    "spoil",
    [
        lambda memo: "",
        lambda memo: "\0" * 100,
        lambda memo: "[" * 100_000,
        lambda memo: json.dumps([memo]),
        lambda memo: json.dumps({**memo, "schema": 2}),
        lambda memo: json.dumps({**memo, "memos": {"a": 1}}),
        lambda memo: json.dumps({**memo, "memos": [{**memo["memos"][0], "table": 99}]}),
        lambda memo: json.dumps({**memo, "memos": [{**memo["memos"][0], "record": {"schema": 1}}]}),
        lambda memo: json.dumps(
            {**memo, "memos": [None, 3, {**memo["memos"][0], "record": {**record(), "gpus": [3]}}]}
        ),
        lambda memo: json.dumps({**memo, "memos": [{**memo["memos"][0], "record": {**record(), "factors": {"a": 1}}}]}),
    ],
)
def test_a_spoilt_memo_is_no_memo(tmp_path: Path, spoil: Callable[[Any], str]) -> None:
    toolchain.write_memo(tmp_path, IMAGE, record(), env={})
    path = toolchain.memo_path(tmp_path, IMAGE)
    path.write_text(spoil(json.loads(path.read_text())))
    assert remembered(tmp_path) is None
    toolchain.write_memo(tmp_path, IMAGE, record(), env={})
    assert remembered(tmp_path) == record()


@pytest.mark.parametrize("image", ["../../evil", "", ".", "a/b:c", "\0", "sha256:é"])
def test_an_image_id_never_leaves_its_folder(tmp_path: Path, image: str) -> None:
    assert toolchain.memo_path(tmp_path, image).parent == tmp_path / "images"
    assert not toolchain.memo_path(tmp_path, image).name.startswith(".")
    assert toolchain.read_memo(tmp_path, image, mount="/jit", gpus=None, driver=None, env={}) is None


def test_a_fifo_where_the_memo_should_be_does_not_block(tmp_path: Path) -> None:
    path = toolchain.memo_path(tmp_path, IMAGE)
    path.parent.mkdir()
    os.mkfifo(path)
    assert remembered(tmp_path) is None
