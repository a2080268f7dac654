"""Makes the stubs that let torch's CUDA build and DeepGEMM's extension load on a machine without NVIDIA's libraries.

    mkstubs.py SITE_PACKAGES OUT        needs gcc, binutils, and cuda.h below $CUDA_HOME/include

Every library that they name gets a stub with the symbols that they need from it (returning 0); libcuda.so.1 and the
preloaded runtime are those of builder/agent/stub_driver, with several devices. Run it before elfcut.py, which drops the
tables that `nm` reads.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "src"
DRIVER = SOURCES / "stub_driver"  # put there by build.sh
H200 = {
    "GPU_MAJOR": 9,
    "GPU_MINOR": 0,
    "GPU_SMS": 132,
    "GPU_MEMORY": f"{141 << 30}ull",
    "GPU_SHARED": 232448,
    "GPU_L2": 62914560,
}
#: Libraries whose symbols carry no version: told by their names.
UNVERSIONED = {
    "libnccl.so.2": "p?nccl",
    "libcufile.so.0": "cuFile",
    "libcusparseLt.so.0": "cusparseLt",
    "libcupti.so.13": "cupti",
}


def output(*argv):
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def compile_shared(*argv):
    subprocess.run(["gcc", "-shared", "-fPIC", "-w", "-fno-builtin", *map(str, argv)], check=True)


def wanted(site):
    """Needed NVIDIA libraries; versioned symbols with their version; symbols without one."""
    needed, versioned, plain = set(), {}, set()
    for binary in [*site.glob("torch/lib/*.so"), *site.glob("deep_gemm/_C.so"), *site.glob("torchvision/*.so")]:
        needed |= set(re.findall(r"NEEDED.*\[(lib(?:cu|nv|nccl)[^\]]*)\]", output("readelf", "-d", binary)))
        for line in output("nm", "-D", "--undefined-only", binary).splitlines():
            name, _, version = line.split()[-1].partition("@")
            if version:
                versioned[name] = version.lstrip("@")
            else:
                plain.add(name)
    return needed, versioned, plain


def make_library(name, versioned, plain, out):
    version = "NVSHMEM" if "nvshmem" in name else name
    symbols = [symbol for symbol, its in versioned.items() if its == version]
    script = []
    if symbols:
        (out / "map").write_text(version + " { global: *; };\n")
        script = [f"-Wl,--version-script={out / 'map'}"]
    elif name in UNVERSIONED:
        symbols = [symbol for symbol in plain if re.match(UNVERSIONED[name], symbol)]
    (out / "stub.c").write_text("".join(f"int {symbol}() {{ return 0; }}\n" for symbol in sorted(symbols)))
    compile_shared(out / "stub.c", "-o", out / name, f"-Wl,-soname,{name}", *script)


def make_driver(include, out):
    """libcuda.so.1: what driver.c defines, and every other function that cuda.h declares, old names included."""
    source = (DRIVER / "driver.c").read_text()
    names = set()
    for mode in ([], ["-D__CUDA_API_VERSION_INTERNAL"]):
        text = output("gcc", "-E", "-P", *mode, f"-I{include}", str(include / "cuda.h"))
        names |= set(re.findall(r"\b(cu[A-Z]\w*)\s*\(", text))
    rest = sorted(name for name in names if not re.search(rf"\b{name}\s*\(", source))
    (out / "stub.c").write_text("".join(f"int {name}() {{ return 0; }}\n" for name in rest))
    sources = [DRIVER / "driver.c", out / "stub.c"]
    flags = describe("NVIDIA H200 (stand-in)", include)
    compile_shared(*flags, *sources, "-o", out / "libcuda.so.1", "-Wl,-soname,libcuda.so.1")


def describe(name, include):
    """Compiler flags for GPUs of this name."""
    numbers = {**H200, "GPU_NAME": f'"{name}"'}
    return [f"-I{SOURCES}", f"-I{include}", *(f"-D{key}={value}" for key, value in numbers.items())]


def main():
    site, out = map(Path, sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    include = Path(os.environ["CUDA_HOME"]) / "include"
    needed, versioned, plain = wanted(site)
    own = {path.name for path in site.glob("torch/lib/*")}
    for name in sorted(needed - own - {"libcuda.so.1"}):
        make_library(name, versioned, plain, out)
    make_driver(include, out)
    compile_shared(*describe("NVIDIA H200", include), DRIVER / "runtime.c", "-o", out / "fakert.so", "-ldl")
    for scratch in ("stub.c", "map"):
        (out / scratch).unlink(missing_ok=True)


main()
