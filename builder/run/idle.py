"""Waiting for idle GPUs: nobody computes on them, and no other builder has them.

Where the driver's library can be asked, its word counts, and every process on a GPU is somebody. Where it cannot, a
container of this engine that was given GPUs is: it may be between two jobs, so that is the careful answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from builder.errors import DeferredError
from builder.host import gpu_locks
from builder.host.deadlines import Deadline, poll
from builder.run import preflight
from builder.run.container_executor import ContainerExecutor
from builder.run.plan import Item
from builder.text import duration

#: Seconds between two looks.
_EVERY = 1.0


def wait(executor: ContainerExecutor, seconds: float, items: Sequence[Item] = ()) -> float:
    """Until the GPUs of this manifest are idle; the seconds that it took. Raises DeferredError when they are not."""
    context = executor.context
    if not context.manifest.gpus.count:
        return 0.0
    limit, said = Deadline(seconds), ""
    reason: list[str] = []

    def settled() -> bool:
        nonlocal said
        context.cancel.check()
        reason[:] = [next(busy(executor, items), "")]
        if reason[0] and reason[0] != said:
            said = reason[0]
            context.console.say(f"waiting until this machine is idle, at most {duration(limit.left())}: {said}")
        return not reason[0] or context.cancel.is_set

    idle = poll(settled, limit, every=_EVERY)
    context.cancel.check()
    if not idle:
        raise DeferredError(
            f"deferred: this machine was not idle within {duration(seconds)} ({reason[0]}). Nothing was pulled or "
            "warmed; the next refresh tries again"
        )
    return seconds - limit.left()


def busy(executor: ContainerExecutor, items: Sequence[Item] = ()) -> Iterator[str]:
    """Who has GPUs that this manifest wants, one sentence each."""
    look = executor.look()
    if look.absent is None:
        for problem in preflight.busy(look, executor.container_names):
            yield problem.text.rstrip(".")
    else:
        for name in gpu_containers(executor):
            yield f"container {name} has GPUs, and who computes on them cannot be asked ({look.absent})"
    names = {gpu.uuid: f"GPU {gpu.index}" for gpu in look.gpus}
    for item in items:
        names.update({str(gpu["uuid"]): f"GPU {gpu.get('index')}" for gpu in item.record["gpus"] if gpu.get("uuid")})
    for lock, what in {gpu_locks.SERVICE: "this machine", **names}.items():
        with gpu_locks.at_once(lock) as free:
            if not free:
                yield f"another builder has {what}"


def gpu_containers(executor: ContainerExecutor) -> Iterator[str]:
    """Names of the running containers of this engine that were given GPUs."""
    ask = executor.engine.ask
    for entry in ask("cannot list containers", "GET", "/containers/json") or ():
        doing = f"cannot look at {entry['Id'][:12]}"
        host = (ask(doing, "GET", "/containers/{0}/json", entry["Id"]) or {}).get("HostConfig") or {}
        if host.get("DeviceRequests") or host.get("Runtime") == "nvidia":
            yield (entry.get("Names") or ["/?"])[0].lstrip("/")
