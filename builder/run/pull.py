"""Restores a cache image: the newest one that fits this machine, as far as its signature, keys and content prove it.

A reference is resolved to a digest once, and everything after that is read by this digest: the signature, before any
layer; the description, which names the key of each family; then the layers of the families that fit, and no others.
What is restored is decided here; how, by `cache.restore`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from builder.cache import restored, toolchain
from builder.cache.cache_image import CacheImage, PackedFamily
from builder.cache.coverage import brief, differences
from builder.cache.families import FAMILY
from builder.cache.packing import blob_name
from builder.cache.restore import FamilyRestored, RefusedImageError, RestoreRequest, unpack_index
from builder.cache.restored import Restored
from builder.cache.toolchain import Record
from builder.errors import CANNOT_RUN, PreflightError, Problem, RegistryRefusedError
from builder.host.deadlines import Deadline
from builder.registry import images, signature
from builder.registry.client import RegistryClient
from builder.registry.images import StoredImage
from builder.registry.keys import VerificationKey
from builder.report.results import Section
from builder.run import image_places
from builder.run.image_places import LAYERS, ImagePlace
from builder.text import counted, printable, size

#: Images of other toolchains that are looked at for families that fit.
_LOOKED_AT = 8


@dataclass(frozen=True)
class PullSettings:
    """What to restore. keys: of which one has to have signed it; none: unsigned images are taken.

    fallback: how many older images may be tried where one is refused.
    """

    keys: tuple[VerificationKey, ...] = ()
    stream: str | None = None
    fallback: int = 0


@dataclass(frozen=True)
class FamilyLeft:
    """A family of the image that does not fit here, and the first factor that differs."""

    family: str
    key: str
    why: str
    factor: str = ""


@dataclass
class Pulled:
    """What a pull did, complete at every moment. The fields are keys of the JSON document.

    done: everything that fits is there. unchanged: it was there before, so that nothing was fetched. fetched: bytes.
    reason: why it was not done.
    """

    reference: str
    digest: str = ""
    tag: str | None = None
    signed_by: str | None = None
    done: bool = False
    unchanged: bool = False
    fetched: int = 0
    families: tuple[FamilyRestored, ...] = ()
    unfit: tuple[FamilyLeft, ...] = ()
    markers: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    refused: list[str] = field(default_factory=list)
    signature_refusals: int = 0
    reason: str = ""


@dataclass
class PullSection(Section):
    """The result of a pull."""

    pull: Pulled


class _UnfitError(PreflightError):
    """No family of an image fits here."""


def pull(place: ImagePlace, client: RegistryClient, settings: PullSettings, limit: Deadline) -> Pulled:
    """Restore the image that the client's reference names. limit: for all of it.

    Raises RegistryRefusedError for what is not believed, PreflightError where nothing fits, BusyError beside another
    builder, RegistryLostError. The root is whole after each of them.
    """
    context = place.executor.context
    pulled = Pulled(client.reference.name)
    context.report.add(PullSection(pulled))
    with image_places.scratch() as scratch:
        names, left, unfit = _names(client, settings), settings.fallback, None
        for name in names:
            try:
                stored = images.find(client, name)
                return _restore(place, client, settings, limit, stored, pulled, scratch)
            except _UnfitError as error:
                unfit = unfit or error
                if client.reference.tag or client.reference.digest:
                    raise
            except RegistryRefusedError as error:
                pulled.refused.append(error.message)
                if left <= 0:
                    raise
                left -= 1
                context.report.warnings.append(
                    f"{printable(name)} is refused, and an older image is tried: {error.message}"
                )
    if unfit is not None:
        raise unfit
    raise PreflightError(
        f"{CANNOT_RUN}: {client.reference.name} has no cache image"
        + (f" that is not refused: {pulled.refused[0]}" if pulled.refused else " for this GPU. Push one first")
    )


def _names(client: RegistryClient, settings: PullSettings) -> list[str]:
    """Return what to try, in this order: tags or digests."""
    named = client.reference.digest or client.reference.tag
    older = images.tags(client) if named is None or settings.fallback else []
    return [named, *(name for name in older if name != named)] if named else older


# --- one image -------------------------------------------------------------------------------------------------------


def _restore(
    place: ImagePlace,
    client: RegistryClient,
    settings: PullSettings,
    limit: Deadline,
    stored: StoredImage,
    pulled: Pulled,
    scratch: Path,
) -> Pulled:
    context, image = place.executor.context, stored.image
    pulled.digest, pulled.tag = stored.digest, stored.tag
    with place.reading() as root:
        history = restored.remembered(root) if root.is_dir() else []
    pulled.signed_by = _signed_by(client, settings, stored, history, pulled)
    blobs = scratch / LAYERS
    if any(each.digest == stored.digest for each in history):
        records = place.records(None)
        if _is_there(place, history, stored, _digest(records)):
            pulled.done = pulled.unchanged = True
            context.console.say(f"{client.reference.name}:{stored.shown} is there already: nothing is fetched")
            return pulled
    else:
        records = place.records(_memos(client, stored, scratch, pulled))
    images.check_config(client, stored)
    fits, unfit = fitting(image, records, place.mount)
    pulled.unfit = tuple(unfit)
    if not fits:
        raise _unfit(client, stored, unfit)
    for each in unfit:
        context.console.say(f"{each.family} does not fit here: {each.why}")
    _fetch(place, client, image, fits, blobs, pulled)
    request = RestoreRequest(
        digest=stored.digest,
        source=client.reference.name,
        image=image,
        families=tuple((family.family, family.key) for family in fits),
        keys=_digest(records),
        mount=place.mount,
    )
    place.prepare()
    with place.executor.run_lock():
        result = place.restore(blobs, request, limit, _ignored)
    pulled.families, pulled.markers, pulled.left = result.families, result.markers, result.left
    pulled.done = True
    context.report.warnings += [f"not restored: {text}" for text in result.left]
    context.console.say(_told(client, stored, pulled))
    return pulled


def _digest(records: Sequence[Record]) -> str:
    """Return the digest of all family keys of these environments."""
    return toolchain.digest({str(at): toolchain.digest(toolchain.family_keys(one)) for at, one in enumerate(records)})


def _memos(client: RegistryClient, stored: StoredImage, scratch: Path, pulled: Pulled) -> Path:
    """Fetch the layer of markers and memos, and return a directory that has them as a root has."""
    index, memos_root = stored.image.index, scratch / blob_name(stored.digest)
    pulled.fetched += images.fetch(client, index, scratch / LAYERS)
    memos_root.mkdir(exist_ok=True)
    try:
        unpack_index(scratch / LAYERS / blob_name(index.digest), index, memos_root)
    except RefusedImageError as error:
        raise RegistryRefusedError(f"{client.reference.name}@{stored.digest}: {error}") from None
    return memos_root


def _ignored(_name: str, _done: int, _total: int) -> None:
    """Show nothing of a step that is short against the download."""


def _signed_by(
    client: RegistryClient,
    settings: PullSettings,
    stored: StoredImage,
    history: Sequence[Restored],
    pulled: Pulled,
) -> str | None:
    """Return the key that signed the image; None where no key is asked for. Raises RegistryRefusedError."""
    if not settings.keys:
        return None
    try:
        return _vouched(client, settings, stored, history)
    except RegistryRefusedError as error:
        if not error.status:  # else it is the registry that refused, and no signature
            pulled.signature_refusals += 1
        raise


def _vouched(client: RegistryClient, settings: PullSettings, stored: StoredImage, history: Sequence[Restored]) -> str:
    vouched = signature.verify_signature(client, stored.digest, settings.keys, stream=settings.stream)
    own = [each.time for each in history if each.source == client.reference.name and each.digest != stored.digest]
    last = max(own, default=None) if not settings.fallback else None
    signature.require_current(vouched, stream=settings.stream, restored=last)
    return vouched.key.fingerprint


def fitting(image: CacheImage, records: Sequence[Record], mount: str) -> tuple[list[PackedFamily], list[FamilyLeft]]:
    """Return the families that fit one of these environments, and why others do not, the first factor first."""
    fits, unfit = [], []
    for each in image.description.families:
        if any(toolchain.family_key(record, each.family) == each.key for record in records):
            # Files of other families may name each other by their path, or are built again under another one.
            if FAMILY[each.family].timeless or image.description.mount == mount:
                fits.append(each)
            else:
                why = f"mount was {printable(image.description.mount)[:80]} is {printable(mount)[:80]}"
                unfit.append(FamilyLeft(each.family, each.key, why, "mount"))
        else:
            factor, why = _why(each, records)
            unfit.append(FamilyLeft(each.family, each.key, why, factor))
    return fits, unfit


def _why(family: PackedFamily, records: Sequence[Record]) -> tuple[str, str]:
    """Return the first factor that differs, and a sentence."""
    rows = min(
        (differences(family.factors, toolchain.family_factors(record, family.family)) for record in records), key=len
    )
    if not rows:
        return "table", "it was made by another version of this program"
    factor, was, now = rows[0]
    before, after = brief(was, now)
    more = f", and {len(rows) - 1} more" if len(rows) > 1 else ""
    return printable(factor)[:100], f"{factor[:100]} was {before} is {after}{more}"


def _unfit(client: RegistryClient, stored: StoredImage, unfit: Sequence[FamilyLeft]) -> _UnfitError:
    problems = [Problem(each.family, f"{each.why}.") for each in unfit]
    return _UnfitError(f"no family of {client.reference.name}:{stored.shown} fits here", problems)


def _is_there(place: ImagePlace, history: Sequence[Restored], stored: StoredImage, keys: str) -> bool:
    """Return whether this image was restored for these keys, and all of it is still there."""
    known = [each for each in history if (each.digest, each.keys) == (stored.digest, keys)]
    if not known:
        return False
    with place.reading({(family.family, family.key) for family in stored.image.description.families}) as root:
        return restored.holds(root, known[0], place.mount)


def _fetch(
    place: ImagePlace,
    client: RegistryClient,
    image: CacheImage,
    fits: Sequence[PackedFamily],
    blobs: Path,
    pulled: Pulled,
) -> None:
    """Fetch the layers of the families that fit."""
    context = place.executor.context
    wanted = [layer for family in fits for layer in image.of(family.family, family.key)] + [image.index]
    for number, layer in enumerate(wanted, 1):
        context.cancel.check()
        pulled.fetched += images.fetch(client, layer, blobs)
        context.console.say(f"[{number}/{len(wanted)}] {layer.name}: {size(layer.size)}")


def _told(client: RegistryClient, stored: StoredImage, pulled: Pulled) -> str:
    added = sum(each.added for each in pulled.families)
    kept = sum(each.kept for each in pulled.families)
    there = f", {kept} were there" if kept else ""
    by = f", signed by {pulled.signed_by}" if pulled.signed_by else ""
    return (
        f"{client.reference.name}:{stored.shown} restored{by}: {counted(added, 'entry')} added{there}, "
        f"{counted(len(pulled.markers), 'task')} warm, {size(pulled.fetched)} fetched"
    )
