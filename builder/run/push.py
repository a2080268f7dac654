"""Publishes what is warm as a cache image: packed under the run lock, and only what the registry lacks is sent."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Sequence
from dataclasses import dataclass

from builder.cache import cache_image, memos, toolchain, variables
from builder.cache.cache_image import CacheImage, Description
from builder.cache.families import TABLE_VERSION
from builder.cache.model_store import is_directory
from builder.cache.packing import Packed, PackRequest
from builder.errors import ColdError
from builder.registry import images
from builder.registry.client import RegistryClient
from builder.registry.images import LayerSent, StoredImage
from builder.report.results import Section
from builder.run import image_places
from builder.run.image_places import LAYERS, ImagePlace
from builder.run.plan import Item
from builder.text import counted, printable, size


@dataclass(frozen=True)
class PushSettings:
    """How to push. tag: a moving one, besides the image's own. named: the user named the tasks."""

    tag: str | None = None
    named: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class Pushed:
    """What a push did. The fields are keys of the JSON document. sent: bytes of blobs. bytes: not compressed.

    unchanged: the registry had an image with the same content, and its tag and digest are these.
    """

    reference: str
    digest: str
    tag: str
    moved: str | None
    unchanged: bool
    dry_run: bool
    sent: int
    size: int
    bytes: int
    layers: tuple[LayerSent, ...]
    tasks: tuple[str, ...]
    omitted: tuple[str, ...]


@dataclass
class PushSection(Section):
    """The result of a push."""

    push: Pushed


def push(place: ImagePlace, client: RegistryClient, settings: PushSettings) -> Pushed:
    """Pack what valid markers claim, and store it. Raises ColdError where nothing is warm, BusyError beside a run."""
    executor = place.executor
    context = executor.context
    say = context.console.say
    place.require_root()
    with image_places.scratch() as scratch:
        blobs = scratch / LAYERS
        with executor.run_lock():
            items, omitted = warm_items(place, settings)
            packed = place.pack(
                blobs, pack_request(place, items), lambda name, done, total: _show(place, name, done, total)
            )
        omitted += packed.omitted
        context.report.warnings += [f"not pushed: {text}" for text in omitted]
        image = CacheImage(description_of(place, packed, items), packed.layers)
        before = images.newest(client, image.description.gpu, image.description.toolchain)
        same = before is not None and images.is_same(image, before.image)
        if before is not None:
            image = before.image if same else images.same_layers(image, before.image)
        layers = tuple(images.send(client, image, blobs, say, dry_run=settings.dry_run))
    tag, digest = _stored(client, image, before if same else None, settings)
    moved = _moved(client, digest, settings)
    done = Pushed(
        reference=f"{client.reference.name}@{digest}" if digest else client.reference.name,
        digest=digest,
        tag=tag,
        moved=moved,
        unchanged=same,
        dry_run=settings.dry_run,
        sent=sum(layer.sent for layer in layers),
        size=image.size,
        bytes=image.description.bytes,
        layers=layers,
        tasks=tuple(task.label for task in image.description.tasks),
        omitted=tuple(omitted),
    )
    context.report.add(PushSection(done))
    say(_told(client, done))
    return done


def _show(place: ImagePlace, name: str, done: int, total: int) -> None:
    place.executor.context.console.say(f"[{done + 1}/{total}] packing {name}")


# --- what is pushed --------------------------------------------------------------------------------------------------


def warm_items(place: ImagePlace, settings: PushSettings) -> tuple[list[Item], list[str]]:
    """Return the warm tasks that may be pushed, and why others are not, one sentence each."""
    executor = place.executor
    plan = executor.plan(executor.context.manifest.tasks)
    executor.context.report.set_tasks(plan.results())
    found, omitted = [], []
    for item in plan.items:
        label = printable(item.task.label)
        if not item.warm:
            omitted.append(f"{label} is cold")
        elif item.judgement.marker is None or not item.judgement.marker.claims:
            omitted.append(f"{label} claims no family, so that there is nothing of it to push")
        elif (reason := _private(item)) and not settings.named:
            omitted.append(f"{label}: {reason}, which others would see; to push it all the same, name it by --only")
        else:
            found.append(item)
    if not found:
        why = f": {omitted[0]}" if omitted else ""
        raise ColdError(f"there is nothing warm to pack{why}")
    return found, omitted


def _private(item: Item) -> str:
    """Return what of a task is its machine's alone, or ""."""
    if is_directory(item.task.model):
        return "its model is a local path"
    for name in item.task.env:
        known = any(fnmatch.fnmatchcase(name, pattern) for pattern in toolchain.SWITCHES)
        if not (known or variables.factor_of(name) or variables.is_inert(name) or name in toolchain.PROBE_ENV):
            return f"it sets {printable(name)[:60]}, which is no switch of a compiler"
    return ""


def pack_request(place: ImagePlace, items: Sequence[Item]) -> PackRequest:
    image = place.image()
    envs: list[dict[str, str]] = []
    for item in items:
        if (env := memos.probe_env(item.task.env)) not in envs:
            envs.append(env)
    names = (image.id, image.content, *image.names)
    return PackRequest(
        markers=tuple(dict.fromkeys(item.judgement.path for item in items if item.judgement.path)),
        mount=place.mount,
        images=tuple(name for name in names if name),
        envs=tuple(envs),
    )


def description_of(place: ImagePlace, packed: Packed, items: Sequence[Item]) -> Description:
    record = items[0].record
    return Description(
        gpu=toolchain.distinct(record["gpus"], "name") or "",
        toolchain=toolchain.digest(toolchain.family_keys(record)),
        release=toolchain.release(record["sglang"]["version"]) or "",
        mount=place.mount,
        table=TABLE_VERSION,
        time=int(time.time()),
        families=packed.families,
        tasks=packed.tasks,
    )


# --- the image -------------------------------------------------------------------------------------------------------


def _stored(
    client: RegistryClient, image: CacheImage, same: StoredImage | None, settings: PushSettings
) -> tuple[str, str]:
    """Return tag and digest of the image, which is stored unless it is there; "" for the digest in a dry run."""
    if same is not None:
        return same.tag or "", same.digest
    description = image.description
    moment = time.strftime("%Y%m%d-%H%M%S", time.gmtime(description.time))
    wanted = cache_image.tag(description.gpu, description.toolchain, moment)
    return (wanted, "") if settings.dry_run else images.store(client, image, wanted)


def _moved(client: RegistryClient, digest: str, settings: PushSettings) -> str | None:
    """Let the moving tag name the image; return it if it was moved."""
    if settings.tag is None or settings.dry_run:
        return None
    there = client.find_manifest(settings.tag)
    if there is not None and there.digest == digest:
        return None
    images.move(client, digest, settings.tag)
    return settings.tag


def _told(client: RegistryClient, done: Pushed) -> str:
    name, total = client.reference.name, f"{counted(len(done.tasks), 'task')}, {size(done.size)}"
    if done.dry_run:
        missing = sum(layer.size for layer in done.layers if not layer.there)
        return f"{name}:{done.tag}: {total}; would send {size(missing)}, and nothing was sent"
    if done.unchanged:
        return f"{name}:{done.tag} is unchanged ({total}): {done.digest}"
    moved = f", and {done.moved} names it" if done.moved else ""
    return f"{name}:{done.tag} pushed{moved}: {total}, {size(done.sent)} sent: {done.digest}"
