"""A model on paper of a cold run: minutes and GPU-minutes by the number of cores, beside one kernel after the other.

``python3 -m tests.bench.model`` prints it for the packaged profile ``h200``; `test_prebuild.py` compares what it
measured, by one worker and by all cores, with `Stage`. Everything is counted or measured on the stand-in but what
`PROFILE` calls assumed: the config.json of those models was not at hand. Nothing was measured on a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Kernels of a shape, counted by plan passes over sglang's fast list of Ms (chunk 8192): DeepSeek-V3-0324's six dense
#: shapes have 110, one with 32 groups has 12 (contiguous) and 3 (masked).
DENSE, CONTIGUOUS, MASKED = 110 / 6, 12, 3
#: Seconds of nvcc for a kernel (1.9 to 3.2 were seen).
KERNEL = 3.0
#: Seconds of an import of sglang, of a container with its stub driver, of walking a model, of planning a shape.
IMPORT, CONTAINER, WALK, SWEEP = 4.0, 3.0, 4.0, 0.5
#: Bytes of a worker with its compiler, as measured, and what the pool adds.
WORKER = 488_000_000 * 1.25
#: Seconds of a GPU task whose kernels are there, without its weights: its server, and the import of its second pass.
HITS = 2 * (IMPORT + CONTAINER)
#: Seconds to load the weights of a large model, once for a launch, as the scripts and the tasks do.
WEIGHTS = (45.0, 170.0)


@dataclass(frozen=True)
class Launch:
    """A server with DeepGEMM: its shapes, the GPUs it takes, and the group of environments that it belongs to."""

    name: str
    dense: int
    grouped: int = 0  # pairs of contiguous and masked
    gpus: int = 8
    env: str = ""
    source: str = "assumed"
    same: str = ""  # another launch with the same shapes

    @property
    def kernels(self) -> float:
        return self.dense * DENSE + self.grouped * (CONTIGUOUS + MASKED)


#: The launches of ``h200`` whose checkpoints are FP8 in blocks. walked: shapes counted by sglang's own code.
PROFILE = (
    Launch("DeepSeek-V4-Flash-FP8, prefill", 8, 2, 4, "v4-fp8"),
    Launch("DeepSeek-V4-Flash-FP8, decode", 8, 2, 4, "v4-fp8", same="DeepSeek-V4-Flash-FP8, prefill"),
    Launch("DeepSeek-V3-0324", 6, source="walked"),
    Launch("DeepSeek-V4-Flash", 8, env="v4"),
    Launch("GLM-5.2-FP8, dp 8", 7, source="walked as GLM-5"),
    Launch("GLM-5.2-FP8", 7, source="walked as GLM-5"),
    Launch("MiMo-V2.5", 4, env="mimo-2.5"),
    Launch("MiMo-V2-Flash", 4, gpus=4, env="mimo-flash", source="walked"),
    Launch("MiniMax-M2.5", 4),
)


@dataclass(frozen=True)
class Stage:
    """The prebuild of some kernels. cpu: seconds of their compilers. containers: of both kinds, one after the other."""

    kernels: float
    cpu: float
    shapes: int
    models: int = 0
    containers: int = 2
    import_seconds: float = IMPORT

    def seconds(self, cores: int, memory: float = math.inf) -> float:
        """Return its wall time: imports and walks, and the longest worker's share of the kernels."""
        workers = max(1, min(cores, int(memory // WORKER))) if math.isfinite(memory) else cores
        each = self.cpu / self.kernels
        compiling = math.ceil(self.kernels / workers) * each
        planning = math.ceil(self.models / cores) * WALK + math.ceil(self.shapes / cores) * SWEEP
        return self.containers * (CONTAINER + self.import_seconds) + planning + compiling


def profile() -> tuple[Stage, float, int]:
    """Return the stage of the profile, the seconds of one kernel after the other, and how many launches it has."""
    own = [launch for launch in PROFILE if not launch.same]
    kernels = sum(launch.kernels for launch in own)
    environments = len({launch.env for launch in own})
    shapes = sum(launch.dense + 2 * launch.grouped for launch in own)
    # A plan for each environment, one container for all kernels, and one for modules of sglang's own JIT.
    stage = Stage(kernels, kernels * KERNEL, shapes, len(PROFILE), environments + 2)
    return stage, kernels * KERNEL, len(PROFILE)


def table() -> list[list[str]]:
    """Return rows for people: by cores, the stage and the whole run in minutes, and what GPUs are held for."""
    stage, serial, launches = profile()
    rows = [["", "stage", "run", "GPU-minutes of compiling"]]
    low, high = (serial + launches * (CONTAINER + IMPORT + weights) for weights in WEIGHTS)
    rows.append(["one after the other", "–", f"{low / 60:.0f} to {high / 60:.0f} min", f"{serial * 8 / 60:.0f}"])
    for cores in (8, 32, 96, 192):
        seconds = stage.seconds(cores)
        least, most = (seconds + launches * (HITS + weights) for weights in WEIGHTS)
        rows.append([f"{cores} cores", f"{seconds / 60:.1f} min", f"{least / 60:.0f} to {most / 60:.0f} min", "0"])
    return rows


if __name__ == "__main__":
    found, _, _ = profile()
    print(f"{found.kernels:.0f} kernels of {found.shapes} shapes, {found.cpu / 60:.0f} min of nvcc")
    for row in table():
        print("  ".join(cell.ljust(22) for cell in row))
