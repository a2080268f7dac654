"""What one job of the prebuild gets: limits for its workers, and as many shapes as fit into its document."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

from builder.errors import BuilderError
from builder.host import machine
from builder.job import MAX_JOB, PlannedShape, PrebuildRequest
from builder.manifest.sections import PrebuildSpec
from builder.task import GPUS
from builder.text import size

#: Bytes that importing sglang and one compiler take, with room: 0.5 GB each were measured.
LEAST_MEMORY = 2 << 30
#: Bytes of the plan in one job, the rest of which is small.
_PLAN_BYTES = MAX_JOB - 16384


def limits(spec: PrebuildSpec, busy: bool, shares_machine: bool) -> PrebuildRequest:
    """Return the limits of workers by the manifest and this machine. Raises BuilderError where memory does not suffice.

    busy: other processes use its GPUs. shares_machine: the containers run on this machine, so that its numbers count.
    """
    of_machine = _of_machine(busy, shares_machine)
    memory = spec.memory or of_machine.memory
    if memory is not None and memory < LEAST_MEMORY:
        raise BuilderError(f"{size(memory)} of memory are free for it, and it needs at least {size(LEAST_MEMORY)}")
    return replace(of_machine, workers=spec.workers or 0, memory=memory)


def _of_machine(busy: bool, shares_machine: bool) -> PrebuildRequest:
    """Return the limits by this machine: while others use it half the cores, and memory that nothing uses."""
    request = PrebuildRequest(gpu=GPUS["H200"], gentle=busy)
    memory = machine.memory() if shares_machine else None
    if memory is None:
        return request
    if busy:
        return replace(request, cpus=machine.half_of_cores(), memory=memory.free)
    return replace(request, memory=memory.available * 9 // 10)


def without(shape: PlannedShape, seen: set[str]) -> PlannedShape:
    """Return the shape with those kernels alone that no shape before it makes."""
    kernels = [(m, tuple(name for name in names if name not in seen)) for m, names in shape.kernels]
    return replace(shape, kernels=tuple((m, names) for m, names in kernels if names))


def batches(shapes: Sequence[PlannedShape]) -> Iterator[list[PlannedShape]]:
    """Yield the shapes in as few lists as fit into one job each."""
    batch: list[PlannedShape] = []
    length = 0
    for shape in shapes:
        for part in _parts(shape):
            bytes_ = len(repr(asdict(part)))
            if batch and length + bytes_ > _PLAN_BYTES:
                yield batch
                batch, length = [], 0
            batch.append(part)
            length += bytes_
    if batch:
        yield batch


def _parts(shape: PlannedShape, kernels: int = 500) -> Iterator[PlannedShape]:
    for at in range(0, len(shape.kernels), kernels):
        yield replace(shape, m_values=(), kernels=shape.kernels[at : at + kernels])
