"""Images that a prune removes from the engine: unreferenced serving images, and the warm-up images built on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from builder.engine.api import ListedImage
from builder.engine.images import BASES, Images, identity, serving_id
from builder.errors import EngineRefusedError


@dataclass(frozen=True)
class ImageRemoval:
    """An image that was removed, or would be. stays: why it is not removed."""

    image: ListedImage
    why: str
    stays: str = ""


def repository(ref: str) -> str:
    """Return the reference without tag and digest."""
    name = ref.partition("@")[0]
    return name.rpartition(":")[0] if ":" in name.rpartition("/")[2] else name


def superseded(
    engine: Images, *, dropped: AbstractSet[str], kept: AbstractSet[str], setup: Sequence[str], ref: str, tagged: bool
) -> list[ImageRemoval]:
    """Return the images that a prune removes, each with what keeps it if anything does.

    These are serving images that only removed markers and memos name, and the warm-up images of these. Other images of
    the engine are never touched. A serving image with a tag belongs to its user: it is removed only if that is wanted
    (`tagged`) and all its tags are of the manifest's own repository. An image that a container uses always stays.

    dropped, kept: identities of serving images.
    setup: the setup commands that turn an image id into an identity.
    ref: the manifest's image.
    """

    def among(image_id: str, identities: AbstractSet[str]) -> bool:
        return not {image_id, identity(image_id, setup)}.isdisjoint(identities)

    images, used = engine.images(), engine.images_in_use()
    bases = {serving_id(image) for image in images if image.id in used}
    removals = []
    for image in images:
        base = serving_id(image)
        origin = base or image.id
        if not among(origin, dropped) or among(origin, kept):
            continue
        stays = "a container uses it" if image.id in used else ""
        if base is not None:
            removals.append(ImageRemoval(image, "warm-up image of a dropped toolchain", stays))
            continue
        stays = stays or ("a warm-up image of it is in use" if image.id in bases else "")
        tags = [tag for tag in image.tags if repository(tag) != BASES]
        others = [tag for tag in tags if repository(tag) != repository(ref)]
        if others:
            stays = stays or f"it is tagged {', '.join(others)}"
        elif tags and not tagged:
            stays = stays or "it is tagged; --images removes it too"
        removals.append(ImageRemoval(image, "serving image of a dropped toolchain", stays))
    return sorted(removals, key=lambda removal: serving_id(removal.image) is None)  # an image goes after its children


def remove(engine: Images, removals: Sequence[ImageRemoval]) -> Iterator[ImageRemoval]:
    """Remove these images; yield each with what kept it. The engine refuses an image that a container uses by now."""
    for removal in removals:
        if not removal.stays:
            try:
                for name in removal.image.tags or (removal.image.id,):
                    engine.remove_image(name)
            except EngineRefusedError as error:
                yield ImageRemoval(removal.image, removal.why, error.message)
                continue
        yield removal
