"""Modes ``pack`` and ``restore``: layers of a cache image, for a root that only a container can read or write.

The request, and the layers, lie in a directory of the container's own (``transfer``); the result is an event.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from builder import events, files
from builder.agent.guard import Guard
from builder.agent.output import Output
from builder.cache import packing
from builder.cache import restore as restoring
from builder.cache.layer_tar import ChangedError
from builder.cache.packing import PackRequest
from builder.cache.restore import RefusedImageError, RestoreBusyError, RestoreRequest
from builder.events import FAILED, WARMED
from builder.job import Job
from builder.typed_json import from_object

#: Names in the directory: the request, and the folder of layers.
REQUEST, LAYERS = "request.json", "layers"
_LIMIT = 64 << 20


def pack(job: Job, output: Output, guard: Guard) -> int:
    """Mode ``pack``: write layers into the directory. Nothing below the root is changed."""
    place = Path(job.transfer)
    try:
        request = from_object(PackRequest, _request(place), "the request")
        (place / LAYERS).mkdir()
        packed = packing.pack(Path(job.mount), place / LAYERS, request, guard.check, _progress(output))
    except (ChangedError, OSError, ValueError) as error:
        return _failed(output, error)
    output.event(events.ImageResult(asdict(packed)))
    return WARMED


def restore(job: Job, output: Output, guard: Guard) -> int:
    """Mode ``restore``: put layers from the directory into the root."""
    place = Path(job.transfer)
    try:
        request = from_object(RestoreRequest, _request(place), "the request")
        result = restoring.restore(Path(job.mount), place / LAYERS, request, guard.check, _progress(output))
    except (RefusedImageError, RestoreBusyError, OSError, ValueError) as error:
        return _failed(output, error)
    output.event(events.ImageResult(asdict(result)))
    return WARMED


def _request(place: Path) -> dict[str, Any]:
    document = files.read_json(str(place / REQUEST), _LIMIT)
    if not isinstance(document, dict):
        raise ValueError("the request is no object")
    return document


def _progress(output: Output) -> packing.OnLayer:
    def on_layer(name: str, done: int, total: int) -> None:
        output.event(events.Phase(name))
        output.event(events.Progress(done, total, "layers"))

    return on_layer


def _failed(output: Output, error: Exception) -> int:
    where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
    why = where + files.why(error)
    output.event(events.ImageResult(refused=why, busy=isinstance(error, RestoreBusyError)))
    output.say(why)
    return FAILED
