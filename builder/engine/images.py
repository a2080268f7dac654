"""The warm-up image: the serving image plus the in-container program, one thin layer, built once per set of inputs.

Inputs are the serving image's id, the setup commands, the Dockerfile and the program's sources. Their digest is the
tag, so a second run finds the image and builds nothing, and an upgraded builder never runs yesterday's program.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

from builder.engine.client import Engine, Image
from builder.errors import DefectError

REPOSITORY = "sglang-warm-cache"
LABEL_SERVING = "io.sglang.warm-cache.serving-image"
PROGRAM_ROOT = "/opt/warm-cache"

_PACKAGE = Path(__file__).resolve().parents[1]
#: What the warm-up image holds of this package: the ground, the cache root on disk, and the in-container program.
AGENT_FILES = ("*.py", "cache/*.py", "agent/*.py", "agent/stub_driver/*.c")


def dockerfile() -> str:
    """The Dockerfile's text: from the wheel, or from the checkout that this package lies in."""
    for path in (_PACKAGE / "_docker" / "Dockerfile", _PACKAGE.parent / "docker" / "Dockerfile"):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise DefectError(f"the Dockerfile of the warm-up image is missing beside {_PACKAGE}: reinstall the package")


def identity(serving: Image, setup: Sequence[str]) -> str:
    """What image-bound caches belong to: the serving image's id, or what the setup commands make of it."""
    if not setup:
        return serving.id
    return "sha256:" + hashlib.sha256(json.dumps([serving.id, list(setup)]).encode()).hexdigest()


def warmup_image(engine: Engine, serving: Image, setup: Sequence[str], on_line: Callable[[str], None]) -> Image:
    """The warm-up image for this serving image; built if the engine does not have it yet.

    on_line is given the build's output. Raises EngineRefusedError, with the last lines as notes, when the build fails.
    """
    files = _program()
    text = _with_setup(dockerfile(), serving.id, setup)
    inputs = hashlib.sha256(text.encode())
    for name, content in files:
        inputs.update(b"\0" + name.encode() + b"\0" + content)
    tag = f"{REPOSITORY}:{inputs.hexdigest()[:16]}"
    found = engine.image(tag)
    if found is not None and found.labels.get(LABEL_SERVING) == serving.id:
        return found
    return engine.build(_context(text, files), tag=tag, labels={LABEL_SERVING: serving.id}, on_line=on_line)


def _program() -> list[tuple[str, bytes]]:
    """The in-container program's sources, sorted, as (path in the context, content)."""
    sources = sorted(path for pattern in AGENT_FILES for path in _PACKAGE.glob(pattern))
    return [(f"builder/{path.relative_to(_PACKAGE).as_posix()}", path.read_bytes()) for path in sources]


def _with_setup(text: str, serving_id: str, setup: Sequence[str]) -> str:
    """The Dockerfile with its base pinned to the image id, and the setup commands below the base.

    The program's layer stays last, so that a change of the program does not run the setup again.
    """
    lines = [f"ARG SERVING_IMAGE={serving_id}"]
    for line in text.splitlines():
        if line.startswith("ARG SERVING_IMAGE"):
            continue
        lines.append(line)
        if line.startswith("FROM "):
            lines += [f"RUN {command}" for command in setup]
    return "\n".join(lines) + "\n"


def _context(text: str, files: Sequence[tuple[str, bytes]]) -> bytes:
    """A build context that is the same bytes for the same input, so that the engine's own layer cache holds."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in [("Dockerfile", text.encode()), *files]:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode, entry.mtime = len(content), 0o644, 0
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()
