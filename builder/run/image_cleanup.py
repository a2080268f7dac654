"""Images beyond the one that is warmed: what a registry has under its name now, which are in use, and their removal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from builder.engine.api import Image
from builder.engine.client import Engine, NotFoundError
from builder.engine.images import LABEL_SERVING, REPOSITORY, identity
from builder.errors import EngineRefusedError

#: What an engine writes for an image without a tag.
_NO_TAG = "<none>:<none>"


@dataclass(frozen=True)
class Listed:
    """An image of the engine. serving: id of the serving image that it was built on, if it is a warm-up image."""

    id: str
    tags: tuple[str, ...]
    bytes: int
    serving: str | None

    @property
    def name(self) -> str:
        return ", ".join(self.tags) or self.id[:19]


@dataclass(frozen=True)
class Gone:
    """An image that went, or would. stays: why it does not."""

    image: Listed
    why: str
    stays: str = ""


def registry_digest(engine: Engine, ref: str) -> str:
    """The digest that the registry has for this reference now; nothing is pulled. Raises EngineLostError."""
    answer = engine.ask(
        f"cannot ask the registry about {ref}",
        "GET",
        "/distribution/{0}/json",
        ref,
        headers=engine.credentials(ref),
    )
    digest = (answer.get("Descriptor") or {}).get("digest") if isinstance(answer, dict) else None
    if not isinstance(digest, str) or not digest:
        raise EngineRefusedError(f"cannot ask the registry about {ref}: the engine gave no digest")
    return digest


def has_digest(image: Image, digest: str) -> bool:
    """Whether this image is what a registry has under this digest."""
    return any(known.rpartition("@")[2] == digest for known in image.digests)


def listed(engine: Engine) -> list[Listed]:
    """Every image of the engine: also those without a tag that others were built on."""
    found = engine.ask("cannot list images", "GET", "/images/json", params={"all": 1}) or ()
    return [
        Listed(
            id=entry["Id"],
            tags=tuple(tag for tag in entry.get("RepoTags") or () if tag != _NO_TAG),
            bytes=entry.get("Size") or 0,
            serving=_serving(entry),
        )
        for entry in found
    ]


def _serving(entry: Mapping[str, object]) -> str | None:
    labels, tags = entry.get("Labels"), entry.get("RepoTags")
    ours = isinstance(tags, list) and any(str(tag).startswith(f"{REPOSITORY}:") for tag in tags)
    found = labels.get(LABEL_SERVING) if isinstance(labels, dict) else None
    return str(found) if ours and found else None


def in_use(engine: Engine) -> set[str]:
    """Ids of the images of all containers, whatever state they are in."""
    found = engine.ask("cannot list containers", "GET", "/containers/json", params={"all": 1}) or ()
    return {entry.get("ImageID") or "" for entry in found}


def repository(ref: str) -> str:
    """Without tag and digest."""
    name = ref.partition("@")[0]
    return name.rpartition(":")[0] if ":" in name.rpartition("/")[2] else name


def superseded(
    engine: Engine, *, dropped: AbstractSet[str], kept: AbstractSet[str], setup: Sequence[str], ref: str, tagged: bool
) -> list[Gone]:
    """Images that a prune lets go, with what keeps them: serving images that a marker or memo which goes was the last
    to name, and the warm-up images of these. Whatever else is on the engine is no matter of this cache.

    dropped, kept: identities; setup: what makes identities of ids; ref: what the manifest calls its image.

    A serving image that still has a tag belongs to whoever tagged it: it goes only if that was asked for (``tagged``),
    and all its tags are of the manifest's own repository. What a container uses stays in any case.
    """

    def among(image_id: str, identities: AbstractSet[str]) -> bool:
        return not {image_id, identity(Image(id=image_id, ref=""), setup)}.isdisjoint(identities)

    images, used = listed(engine), in_use(engine)
    bases = {image.serving for image in images if image.serving and image.id in used}
    gone = [
        Gone(image, "warm-up image of a dropped toolchain", _user(image, used))
        for image in images
        if image.serving is not None and among(image.serving, dropped) and not among(image.serving, kept)
    ]
    for image in images:
        if image.serving is None and among(image.id, dropped) and not among(image.id, kept):
            others = [tag for tag in image.tags if repository(tag) != repository(ref)]
            stays = _user(image, used) or ("a warm-up image of it is in use" if image.id in bases else "")
            if others:
                stays = stays or f"it is tagged {', '.join(others)}"
            elif image.tags and not tagged:
                stays = stays or "it is tagged; --images removes it too"
            gone.append(Gone(image, "serving image of a dropped toolchain", stays))
    return gone


def _user(image: Listed, used: set[str]) -> str:
    return "a container uses it" if image.id in used else ""


def remove(engine: Engine, gone: list[Gone]) -> Iterator[Gone]:
    """Each as it came out. The engine refuses what somebody has begun to use meanwhile."""
    for one in gone:
        if one.stays:
            yield one
            continue
        try:
            for name in one.image.tags or (one.image.id,):
                engine.ask(f"cannot remove the image {name}", "DELETE", "/images/{0}", name)
        except NotFoundError:
            pass  # without a tag, it went with the last image that was built on it
        except EngineRefusedError as error:
            yield Gone(one.image, one.why, error.message)
            continue
        yield one
