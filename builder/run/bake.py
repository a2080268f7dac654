"""Bakes a warm cache into the serving image: at its mount, with the variables that find it, built by the engine.

What markers of warm tasks claim is packed and restored beside the root, as a push and a pull would do it, so that the
image holds a whole root and nothing that is this machine's alone. Layers of images keep whole seconds: times are
rounded down, so that no file is newer than what a build compares it with.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from builder.cache import families
from builder.cache.cache_image import LABEL, PREFIX, CacheImage, labels
from builder.cache.environment import IMAGE_VARIABLE
from builder.cache.restore import RestoreRequest, restore
from builder.engine.api import Image
from builder.engine.images import serving_base
from builder.errors import CANNOT_RUN, PreflightError, Problem, UsageError
from builder.host import temporary
from builder.report.results import Section
from builder.run import job_environment, push
from builder.run.image_places import LAYERS, ContainerPlace, called
from builder.run.plan import Item
from builder.run.push import PushSettings
from builder.text import counted, size

#: Names in the build's context.
_ROOT, _DOCKERFILE = "cache.tar", "Dockerfile"
_REMEDY = "a container that needs it sets it itself (docker run -e)"
#: What a restore leaves in a root for itself, and no image needs.
_NOT_BAKED = frozenset({"staging", "locks", "aside"})


@dataclass(frozen=True)
class Baked:
    """What was baked. The fields are keys of the JSON document. bytes: of the families."""

    image: str
    id: str
    base: str
    tasks: tuple[str, ...]
    omitted: tuple[str, ...]
    bytes: int
    env: Mapping[str, str]


@dataclass
class BakeSection(Section):
    """The result of a bake."""

    bake: Baked


def bake(place: ContainerPlace, tag: str) -> Baked:
    """Build the image. Raises ColdError where nothing is warm, EngineRefusedError where the build fails."""
    executor = place.executor
    context, manifest = executor.context, executor.context.manifest
    place.require_root()
    with temporary.room("bake") as scratch:
        blobs, root = scratch / LAYERS, scratch / "root"
        blobs.mkdir()
        with executor.run_lock():
            # A local image shows nothing to others: no task is left out for what they would see.
            items, omitted = push.warm_items(place, PushSettings(named=True))
            packed = place.pack(blobs, push.pack_request(place, items), lambda name, _done, _total: None)
        image = CacheImage(push.description_of(place, packed, items), packed.layers)
        pairs = tuple((each.family, each.key) for each in packed.families)
        request = RestoreRequest("sha256:" + "0" * 64, "bake", image, pairs, "", place.mount)
        context.console.say(f"baking {counted(len(items), 'task')}, {size(image.description.bytes)}, into {tag}")
        called(lambda: restore(root, blobs, request, context.cancel.check))
        variables, missed = environment(executor.identity, place.mount, items)
        context.report.warnings += missed
        base = serving_base(executor.engine, executor.serving) if not manifest.image.setup else executor.warmup.ref
        with _context(scratch, root, _dockerfile(base, place.mount, variables)) as archive:
            built = executor.engine.build(
                archive, tag=tag, labels=_labels(image, executor.serving), on_line=executor.show_build
            )
    omitted += packed.omitted
    context.report.warnings += [f"not baked: {text}" for text in omitted]
    done = Baked(
        image=tag,
        id=built.id,
        base=executor.serving.id,
        tasks=tuple(item.task.label for item in items),
        omitted=tuple(omitted),
        bytes=image.description.bytes,
        env=variables,
    )
    context.report.add(BakeSection(done))
    context.console.say(f"{tag} is {built.id[:19]}…, warm without a volume for {', '.join(done.tasks)}")
    return done


def environment(identity: str, mount: str, items: list[Item]) -> tuple[dict[str, str], list[str]]:
    """Return the variables with which a container of the image hits the cache, and a warning for each that is not set.

    Some tasks may have variables, and so directories, that others have not.
    """
    tasks, records = [item.task for item in items], [(item.task.label, item.record) for item in items]
    keys, others = job_environment.common_keys(records, remedy=_REMEDY)
    found = {
        **job_environment.common_env(tasks),
        **families.environment(mount, keys),
        **job_environment.toolkit(records),
        IMAGE_VARIABLE: identity,
    }
    return found, [*job_environment.missed(tasks, remedy=_REMEDY), *others]


def _dockerfile(base: str, mount: str, variables: Mapping[str, str]) -> str:
    """Return the Dockerfile. Raises UsageError for a variable that it cannot set."""
    lines = [f"FROM {base}", f"ADD {_ROOT} {mount}/"]
    for name, value in sorted(variables.items()):
        if "\n" in value or "\r" in value:
            raise UsageError(f"{name} has more than one line, which an image's environment cannot have")
        quoted = value.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$")
        lines.append(f'ENV {name}="{quoted}"')
    return "\n".join(lines) + "\n"


def _labels(image: CacheImage, serving: Image) -> dict[str, str]:
    """Return the labels: what the cache in it is for. The whole description would be another image's."""
    told = {name: text for name, text in labels(image.description).items() if name.startswith(f"{PREFIX}.")}
    told.pop(LABEL)
    return {**told, f"{PREFIX}.baked-from": serving.id}


@contextmanager
def _context(scratch: Path, root: Path, dockerfile: str) -> Iterator[io.BufferedReader]:
    """Yield the build's context, a tar with the root as a tar in it: only such a one keeps its times everywhere."""
    inner, outer = scratch / _ROOT, scratch / "context.tar"
    try:
        with tarfile.open(inner, "w", format=tarfile.GNU_FORMAT) as tar:
            for name in sorted(path.name for path in root.iterdir()):
                if name not in _NOT_BAKED:
                    tar.add(root / name, arcname=name, filter=_plain)
        with tarfile.open(outer, "w", format=tarfile.GNU_FORMAT) as tar:
            entry = tarfile.TarInfo(_DOCKERFILE)
            entry.size = len(dockerfile.encode())
            tar.addfile(entry, io.BytesIO(dockerfile.encode()))
            tar.add(inner, arcname=_ROOT, filter=_plain)
        inner.unlink()
        file = outer.open("rb")
    except OSError as error:
        problem = Problem("disk", f"{error.filename or scratch}: {error.strerror}.", "Free space there, or set TMPDIR.")
        raise PreflightError(CANNOT_RUN, [problem]) from error
    with file:
        yield file


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Return an entry that is root's, readable for everyone, and dated in whole seconds, rounded down."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o755 if entry.isdir() or entry.mode & 0o111 else 0o644
    entry.mtime = int(entry.mtime)
    return entry
