"""Cache images of one repository: find the newest ones, read what they say, store and fetch their blobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from builder.cache import cache_image
from builder.cache.cache_image import MANIFEST_TYPE, CacheImage, Layer, NotACacheImageError
from builder.cache.packing import blob_name
from builder.errors import CANNOT_RUN, PreflightError, Problem, RegistryRefusedError
from builder.registry.client import RegistryClient
from builder.registry.documents import digest_of
from builder.text import printable, size

#: Bytes of a config; it has a digest for each layer.
_CONFIG_LIMIT = 8 << 20
_CHUNK = 1 << 20
#: Tags that one time can have: several pushes within a second.
_SAME_TIME = 20


@dataclass(frozen=True)
class StoredImage:
    """A cache image in a registry. tag: by which it was found, None for a digest. signature and blobs are not read."""

    digest: str
    image: CacheImage
    config_digest: str
    config_size: int
    tag: str | None = None

    @property
    def shown(self) -> str:
        """The image for people."""
        return f"{self.tag or ''}@{self.digest[:19]}…".lstrip("@")


@dataclass(frozen=True)
class LayerSent:
    """What became of one blob in a push. sent: bytes; 0 where the registry had it, or in a dry run."""

    name: str
    digest: str
    size: int
    sent: int
    there: bool  # the registry had it


#: Receives a line for people.
Say = Callable[[str], None]


def find(client: RegistryClient, reference: str) -> StoredImage:
    """Return the cache image of a tag or digest. Raises RegistryRefusedError for anything else."""
    stored = client.get_manifest(reference)
    try:
        image = cache_image.parsed(stored.raw)
    except NotACacheImageError as error:
        what = (
            f"{client.reference.name}:{reference}" if ":" not in reference else f"{client.reference.name}@{reference}"
        )
        raise RegistryRefusedError(f"{printable(what)}: {error}") from None
    tag = None if reference.startswith("sha256:") else reference
    return StoredImage(stored.digest, image, stored.config.digest, stored.config.size, tag)


def tags(client: RegistryClient, gpu: str | None = None, toolchain: str | None = None) -> list[str]:
    """Return the tags of cache images, the newest first; none for a repository that does not exist.

    gpu: only of this GPU model. toolchain: those of it come first.
    """
    try:
        names = client.tags(f"{cache_image.slug(gpu)}-" if gpu is not None else "")
    except RegistryRefusedError as error:
        if error.status != 404:
            raise
        return []
    found = [(name, parts) for name in names if (parts := cache_image.tag_parts(name)) is not None]
    if gpu is not None:
        found = [(name, parts) for name, parts in found if parts.gpu == cache_image.slug(gpu)]
    found.sort(key=lambda pair: (pair[1].toolchain == toolchain, pair[1].time, len(pair[0]), pair[0]), reverse=True)
    return [name for name, _ in found]


def newest(client: RegistryClient, gpu: str, toolchain: str) -> StoredImage | None:
    """Return the newest image of a GPU and a toolchain; None where there is none that can be read."""
    for name in tags(client, gpu, toolchain)[:1]:
        parts = cache_image.tag_parts(name)
        if parts is not None and parts.toolchain == toolchain:
            try:
                return find(client, name)
            except RegistryRefusedError:
                return None
    return None


def same_layers(image: CacheImage, before: CacheImage) -> CacheImage:
    """Return the image with the blobs of an earlier one where the content is the same: gzip differs by its version."""
    known = {(layer.family, layer.key, layer.part, layer.diff_id): layer for layer in before.layers}
    layers = [known.get((each.family, each.key, each.part, each.diff_id), each) for each in image.layers]
    return replace(image, layers=tuple(layers))


def is_same(image: CacheImage, before: CacheImage) -> bool:
    """Return whether two images differ in nothing but their time."""
    same = [layer.diff_id for layer in image.layers] == [layer.diff_id for layer in before.layers]
    return same and image.at(0).description == before.at(0).description


def send(client: RegistryClient, image: CacheImage, blobs: Path, say: Say, *, dry_run: bool) -> Iterator[LayerSent]:
    """Send the layers that the registry lacks, and yield what became of each. blobs: the directory that has them."""
    for number, layer in enumerate(image.layers, 1):
        path = blobs / blob_name(layer.digest)
        if dry_run or not path.exists():
            there = client.has_blob(layer.digest) is not None
            if not there and not dry_run:
                raise RegistryRefusedError(
                    f"{client.reference.name} has an image with the layer {layer.name} ({layer.digest[:19]}…), and has "
                    "lost the layer itself: remove that image"
                )
            yield LayerSent(layer.name, layer.digest, layer.size, 0, there)
            continue
        sent = client.put_blob(layer.digest, layer.size, lambda path=path: _pieces(path))  # type: ignore[misc]
        if sent:
            say(f"[{number}/{len(image.layers)}] {layer.name}: {size(sent)} sent")
        yield LayerSent(layer.name, layer.digest, layer.size, sent, not sent)


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while data := file.read(_CHUNK):
            yield data


def store(client: RegistryClient, image: CacheImage, wanted: str) -> tuple[str, str]:
    """Store config and manifest under a tag that names nothing yet; return the tag and the digest."""
    config = cache_image.config_of(image)
    config_digest = digest_of(config)
    client.put_blob(config_digest, len(config), lambda: [config])
    manifest = cache_image.manifest_of(image, config_digest, len(config))
    digest = digest_of(manifest)
    for number in range(1, _SAME_TIME):
        tag = wanted if number == 1 else f"{wanted}-{number}"
        there = client.find_manifest(tag)
        if there is None:
            client.put_manifest(manifest, MANIFEST_TYPE, tag)
        if there is None or there.digest == digest:
            return tag, digest
    raise RegistryRefusedError(f"{client.reference.name} has {_SAME_TIME} images of {wanted} already")


def move(client: RegistryClient, digest: str, tag: str) -> None:
    """Let a tag name an image that the registry has."""
    stored = client.get_manifest(digest)
    client.put_manifest(stored.raw, MANIFEST_TYPE, tag)


def check_config(client: RegistryClient, stored: StoredImage) -> None:
    """Raise RegistryRefusedError unless config and manifest agree about the layers."""
    config = client.read_small_blob(stored.config_digest, stored.config_size, _CONFIG_LIMIT)
    if not cache_image.config_matches(config, stored.image):
        raise RegistryRefusedError(f"{client.reference.name}: {stored.shown}: its config names other layers")


def fetch(client: RegistryClient, layer: Layer, blobs: Path) -> int:
    """Read a layer into the directory, proven by its digest, unless it is there; return the bytes that were read.

    Raises PreflightError where the directory has no room.
    """
    path = blobs / blob_name(layer.digest)
    if path.exists():
        return 0
    temporary = path.with_suffix(".part")
    try:
        with temporary.open("wb") as file:
            for data in client.read_blob(layer.digest, layer.size):
                file.write(data)
        temporary.rename(path)
    except OSError as error:
        problem = Problem(
            "disk", f"{layer.name} cannot be kept in {blobs}: {error.strerror}.", "Free space, or set TMPDIR."
        )
        raise PreflightError(CANNOT_RUN, [problem]) from error
    return layer.size
