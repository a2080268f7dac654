"""What the launch recorder answers for the machine that tests ask about: GPUs, platform and build predicates.

Names are those of sglang 0.5.12 to 0.5.23 (``sglang.srt.utils``), of torch and of sglang's test utilities; a function
answers by its own name, whatever module it is imported from. Standard library only.
"""

from __future__ import annotations

import multiprocessing
import os
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from builder.agent.launch_unknown import MISSING, Unknown


@dataclass(frozen=True)
class CudaGpu:
    """A GPU as CUDA describes it. capability: major and minor; memory: MiB, as nvidia-smi prints it."""

    name: str
    capability: tuple[int, int]
    memory: int
    multiprocessors: int


#: Sources: NVIDIA's CUDA GPU table (capability), nvidia-smi of SXM boards (MiB), the architectures' white papers (SMs).
GPUS: Mapping[str, CudaGpu] = {
    "H100": CudaGpu("NVIDIA H100 80GB HBM3", (9, 0), 81559, 132),
    "H200": CudaGpu("NVIDIA H200", (9, 0), 143771, 132),
    "B200": CudaGpu("NVIDIA B200", (10, 0), 183359, 148),
}

#: Variables of the tests' jobs, as upstream's workflows set them (``_pr-test-stage.yml`` and its runners). The RDMA
#: devices are named so that no test looks for those of this machine.
CI_ENVIRONMENT = {
    "CI": "true",
    "GITHUB_ACTIONS": "true",
    "SGLANG_IS_IN_CI": "true",
    "SGLANG_CI_RDMA_ALL_DEVICES": ",".join(f"mlx5_roce{number}" for number in range(8)),
}


@dataclass(frozen=True)
class _Properties:
    """What ``torch.cuda.get_device_properties`` returns. total_memory: bytes."""

    name: str
    major: int
    minor: int
    total_memory: int
    multi_processor_count: int
    gcnArchName: str = ""  # noqa: N815 - torch's name
    warp_size: int = 32


def table(gpu: CudaGpu, count: int) -> dict[str, Any]:
    """Return what is known: qualified names first, then names that answer alike in any module."""
    major, minor = gpu.capability
    memory = gpu.memory << 20
    values: dict[str, Any] = {
        "is_cuda": True,
        "is_cuda_alike": True,
        "is_hopper": major == 9,
        "is_hopper_with_cuda_12_3": major == 9,
        "is_sm90_supported": major == 9,
        "is_ampere_with_cuda_12_3": major == 8,
        "is_blackwell": major in (10, 12),
        "is_blackwell_supported": major in (10, 12),
        "is_sm100_supported": major == 10,
        "is_sm100a_supported": major == 10,
        "is_sm100f_supported": major == 10,
        "is_sm103_supported": gpu.capability == (10, 3),
        "is_sm120_supported": major == 12,
        "is_fa3_supported": major in (8, 9),
        "is_arch_support_pdl": major >= 9,
        "is_flashinfer_available": True,
        "is_pin_memory_available": True,
        "is_host_cpu_x86": True,
        "is_host_cpu_arm64": False,
        "is_in_ci": True,
        "is_port_available": True,
        "cpu_has_amx_support": False,
        "get_device_sm": major * 10 + minor,
        "get_device_capability": gpu.capability,
        "get_device_name": gpu.name,
        "get_device": "cuda",
        "get_device_core_count": gpu.multiprocessors,
        "get_device_memory_capacity": gpu.memory,
        "get_nvgpu_memory_capacity": gpu.memory,
        "get_gpu_memory_mb": gpu.memory,
        "get_available_gpu_memory": gpu.memory / 1024,
        "get_device_properties": _Properties(gpu.name, major, minor, memory, gpu.multiprocessors),
        "get_device_count": count,
        "device_count": count,
        "get_gpu_count": count,
        "mem_get_info": (memory, memory),
        "kill_process_tree": None,
    }
    for other in ("hip", "npu", "xpu", "cpu", "musa", "hpu", "mps", "mlx", "hip_runtime", "gfx95_supported"):
        values[f"is_{other}"] = False
    names: dict[str, Any] = {name: _answering(value) for name, value in values.items()}
    names |= {f"_{name}": value for name, value in values.items() if name.startswith("is_")}
    names |= {
        "retry": _retry,
        "get_bool_env_var": lambda name, default="false": os.environ.get(name, str(default)).lower() in ("true", "1"),
        "get_int_env_var": _int_env_var,
        "torch.cuda.is_available": _answering(True),
        "torch.version.hip": None,
        "torch.version.xpu": None,
        "torch.version.musa": None,
        "torch.version.cuda": "12.9",
        "torch.cuda.get_arch_list": lambda: [f"sm_{major}{minor}"],
        "torch.multiprocessing": _torch_multiprocessing(),
        "sglang.utils.is_in_ci": _answering(True),
    }
    for module in ("xpu", "npu", "mps", "hpu", "musa", "mtia", "backends.mps"):
        names[f"torch.{module}.is_available"] = _answering(False)
    return names


def lookup(names: Mapping[str, Any]) -> Callable[[str], Any]:
    """Return the function that finds a qualified name in `table`'s result, else its last part."""

    def find(name: str) -> Any:
        if name in names:
            return names[name]
        # A method of an unknown object, such as `mode.is_cuda()`, asks about that object, not about the machine.
        owner, _, last = name.rpartition(".")
        return names.get(last, MISSING) if "(" not in owner and "[" not in owner else MISSING

    return find


def _answering(value: object) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: value


def _retry(function: Callable[[], Any], *_args: Any, **_kwargs: Any) -> Any:
    """Call once: sglang's own `retry` repeats what failed, and here it would fail alike."""
    return function()


def _int_env_var(name: str, default: int = 0) -> int:
    try:
        return int(os.environ.get(name, "") or default)
    except ValueError:
        return default


def _torch_multiprocessing() -> types.ModuleType:
    """Return multiprocessing under torch's name, with its `spawn`: rank 0 alone is run."""
    module = types.ModuleType("torch.multiprocessing")

    def spawn(function: Callable[..., Any], args: tuple[Any, ...] = (), *_rest: Any, **_kwargs: Any) -> None:
        function(0, *args)

    vars(module).update(spawn=spawn, __getattr__=lambda name: getattr(multiprocessing, name, Unknown(f"mp.{name}")))
    return module
