"""Images of an engine: find, pull, build, list and remove them, and build the warm-up image.

The warm-up image is the serving image plus the in-container program, one thin layer, built once per set of inputs. The
inputs are the serving image's id, the setup commands, the Dockerfile and the program's sources. Their digest is the
tag, so a second run finds the image and builds nothing, and an upgraded builder never runs an older program.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from builder.engine import answers
from builder.engine.api import Image, ListedImage
from builder.engine.connection import EngineConnection, add_build_credentials
from builder.engine.errors import NotFoundError
from builder.errors import DefectError, EngineRefusedError
from builder.text import readable

REPOSITORY = "sglang-warm-cache"
#: Names of serving images for engines that build on no id.
BASES = "sglang-warm-cache-base"
LABEL_SERVING = "io.sglang.warm-cache.serving-image"
PROGRAM_ROOT = "/opt/warm-cache"

_PACKAGE = Path(__file__).resolve().parents[1]
#: What the warm-up image holds of this package: the ground, the cache root on disk, and the in-container program.
AGENT_FILES = ("*.py", "cache/*.py", "agent/*.py", "agent/stub_driver/*.[ch]")

#: How many of the last lines of a build's output a failure shows again.
_TAIL = 20
#: A step of a build that comes after its base.
_AFTER_BASE = re.compile(r"step (?!0*[12]/)\d+/", re.IGNORECASE)
#: The tag that an engine reports for an image without one.
_NO_TAG = "<none>:<none>"


class Images(EngineConnection):
    """The part of `Engine` that concerns images. Everything raises EngineLostError or EngineRefusedError."""

    def image(self, ref: str) -> Image | None:
        """Return the engine's image of this name or id, or None."""

        def read() -> Image:
            data = self.plain(f"/images/{ref}/json") or answers.an_object(self._get("/images/{0}/json", ref).json())
            config = answers.inner(data, "Config")
            return Image(
                id=answers.required_text(data, "Id"),
                ref=ref,
                digests=answers.texts(data, "RepoDigests"),
                labels=answers.text_map(config, "Labels"),
                workdir=answers.text(config, "WorkingDir"),
                layers=answers.texts(answers.inner(data, "RootFS"), "Layers"),
                env=answers.texts(config, "Env"),
                user=answers.text(config, "User"),
            )

        try:
            return self._read(f"cannot look for the image {ref}", read)
        except NotFoundError:
            return None

    def images(self) -> list[ListedImage]:
        """Return all images of the engine, including untagged ones that others were built on."""

        def read() -> list[ListedImage]:
            return [
                ListedImage(
                    id=answers.required_text(entry, "Id"),
                    tags=tuple(tag for tag in answers.texts(entry, "RepoTags") if tag != _NO_TAG),
                    bytes=answers.number(entry, "Size"),
                    labels=answers.text_map(entry, "Labels"),
                )
                for entry in answers.objects(self._get("/images/json", params={"all": 1}).json())
            ]

        return self._read("cannot list images", read)

    def images_in_use(self) -> set[str]:
        """Return the ids of the images of all containers, in every state."""

        def read() -> set[str]:
            listing = answers.objects(self._get("/containers/json", params={"all": 1}).json())
            return {answers.text(entry, "ImageID") for entry in listing}

        return self._read("cannot list containers", read)

    def remove_image(self, name: str) -> None:
        """Remove a tag, or an image by its id. One that is missing counts as removed; one in use is refused."""
        with contextlib.suppress(NotFoundError), self._translated(f"cannot remove the image {name}"):
            self._request("DELETE", "/images/{0}", name)

    def tag_image(self, name: str, repository: str, tag: str) -> None:
        """Give an image another name."""
        with self._translated(f"cannot tag the image {name}"):
            self._request("POST", "/images/{0}/tag", name, params={"repo": repository, "tag": tag})

    def registry_digest(self, ref: str) -> str:
        """Return the digest that the registry has for this reference now, without pulling."""
        action = f"cannot ask the registry about {ref}"
        with self._translated(action):
            headers = self._registry_credentials(ref)
            answer = answers.an_object(self._request("GET", "/distribution/{0}/json", ref, headers=headers).json())
            digest = answers.text(answers.inner(answer, "Descriptor"), "digest")
        if not digest:
            raise EngineRefusedError(f"{action}: the engine gave no digest")
        return digest

    def pull(self, ref: str, on_progress: Callable[[str], None] = lambda text: None) -> Image:
        """Pull an image. on_progress: receives a line whenever the number of layers or of GiB has changed."""
        from docker.utils import parse_repository_tag

        action = f"cannot pull {ref}"
        with self._translated(action):
            name, tag = parse_repository_tag(ref)
            params = {"fromImage": name, "tag": tag or "latest"}
            headers = self._registry_credentials(name)
            response = self._request("POST", "/images/create", params=params, headers=headers, **self._long)
        progress = PullProgress(params["tag"])
        with contextlib.closing(response):
            for message in self._messages(response, action):
                if text := progress.text(message):
                    on_progress(f"{ref}: {text}")
        return self._made(ref, f"{action}: the engine pulled it and does not have it")

    def build(
        self,
        context: bytes | IO[bytes],
        *,
        tag: str,
        labels: Mapping[str, str] | None = None,
        on_line: Callable[[str], None] = lambda line: None,
    ) -> Image:
        """Build an image. Raises EngineRefusedError, with the last lines of the output as notes.

        context: a tar with a Dockerfile.
        on_line: receives each line of the output.
        """
        action = f"building {tag} failed"
        params = {"t": tag, "labels": json.dumps(dict(labels or {})), "rm": 1, "forcerm": 1}
        headers = {"Content-Type": "application/x-tar"}
        with self._translated(action):
            add_build_credentials(self._api, headers)
            response = self._request("POST", "/build", params=params, headers=headers, data=context, **self._long)
        tail: deque[str] = deque(maxlen=_TAIL)
        try:
            with contextlib.closing(response):
                for message in self._messages(response, action):
                    for line in str(message.get("stream", "")).splitlines():
                        if text := readable(line).rstrip():
                            tail.append(text)
                            on_line(text)
            return self._made(tag, f"{action}: the engine built it and does not have it")
        except EngineRefusedError as error:
            error.notes = tuple(tail)
            raise

    def _made(self, ref: str, missing: str) -> Image:
        """Return the image that was just made. missing: the error's message if the engine does not have it."""
        image = self.image(ref)
        if image is None:
            raise EngineRefusedError(missing, status=404)
        return image

    def _registry_credentials(self, name: str) -> Mapping[str, Any]:
        """Return this user's docker login at the registry of a repository, as headers."""
        from docker import auth

        registry, _ = auth.resolve_repository_name(name)
        header = auth.get_config_header(self._api, registry)
        return {"X-Registry-Auth": header} if header else {}


class PullProgress:
    """Condenses the engine's messages, several a second for each layer, into few enough lines to print them all."""

    _DONE = ("Pull complete", "Already exists")

    def __init__(self, tag: str) -> None:
        self._tag = tag
        self._layers: dict[str, tuple[str, int, int]] = {}
        self._last = ""

    def text(self, message: Mapping[str, Any]) -> str:
        """Return the progress after this message; empty if it reads as before."""
        name = message.get("id")
        if isinstance(name, str) and name and name != self._tag:
            try:
                detail = answers.inner(message, "progressDetail")
                sizes = answers.number(detail, "current"), answers.number(detail, "total")
            except answers.ForeignAnswerError:  # it is only shown
                sizes = 0, 0
            self._layers[name] = (str(message.get("status")), *sizes)
        text = self._text()
        if text == self._last:
            return ""
        self._last = text
        return text

    def _text(self) -> str:
        if not self._layers:
            return ""
        finished = sum(status in self._DONE for status, _, _ in self._layers.values())
        text = f"{finished} of {len(self._layers)} layers"
        loading = [(now, total) for status, now, total in self._layers.values() if status == "Downloading" and total]
        if loading:
            loaded, total = (sum(column) for column in zip(*loading, strict=True))
            text += f", {loaded >> 30} of {-(-total >> 30)} GiB of the next"
        return text


# --- the warm-up image -----------------------------------------------------------------------------------------------


def dockerfile() -> str:
    """Return the Dockerfile's text: from the wheel, or from the checkout that holds this package."""
    for path in (_PACKAGE / "_docker" / "Dockerfile", _PACKAGE.parent / "docker" / "Dockerfile"):
        if path.is_file():
            return _first_stage(path.read_text(encoding="utf-8"))
    raise DefectError(f"the Dockerfile of the warm-up image is missing near {_PACKAGE}: reinstall the package")


def _first_stage(text: str) -> str:
    """Return a Dockerfile's text up to its second stage, without the comment above that."""
    lines, stages = [], 0
    for line in text.splitlines():
        stages += line.startswith("FROM ")
        if stages > 1:
            break
        if not line.startswith("ARG BUILDER_"):
            lines.append(line)
    while stages > 1 and (not lines[-1].strip() or lines[-1].startswith("#")):
        lines.pop()
    return "\n".join(lines) + "\n"


def identity(serving_id: str, setup: Sequence[str]) -> str:
    """Return the identity of image-bound caches: the serving image's id, or a digest of it with the setup commands."""
    if not setup:
        return serving_id
    return "sha256:" + hashlib.sha256(json.dumps([serving_id, list(setup)]).encode()).hexdigest()


def content(image: Image, setup: Sequence[str]) -> str | None:
    """Return the identity of an image's content, the same in every engine; None where the engine shows no layers.

    The id is a digest of the config in one image store, and of the manifest in another.
    """
    if not image.layers:
        return None
    text = json.dumps([list(image.layers), sorted(image.env), list(setup)])
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def names(image: Image, setup: Sequence[str]) -> tuple[str, ...]:
    """Return the identities by which other engines and registries know the image: manifest digests."""
    return tuple(sorted({identity(each.rpartition("@")[2], setup) for each in image.digests}))


def serving_id(image: ListedImage) -> str | None:
    """Return the id of the serving image that a warm-up image was built on; None for any other image."""
    is_warmup = any(tag.startswith(f"{REPOSITORY}:") for tag in image.tags)
    return image.labels.get(LABEL_SERVING) or None if is_warmup else None


def warmup_image(engine: Images, serving: Image, setup: Sequence[str], on_line: Callable[[str], None]) -> Image:
    """Return the warm-up image for this serving image, built if the engine does not have it yet.

    Raises EngineRefusedError, with the last lines as notes, if the build fails.

    on_line: receives each line of the build's output.
    """
    files = _program()
    text = _with_setup(dockerfile(), serving.id, setup)
    inputs = hashlib.sha256(text.encode())
    for name, content in files:
        inputs.update(b"\0" + name.encode() + b"\0" + content)
    tag = f"{REPOSITORY}:{inputs.hexdigest()[:16]}"
    image = engine.image(tag)
    if image is not None and image.labels.get(LABEL_SERVING) == serving.id:
        return image
    labels = {LABEL_SERVING: serving.id}
    try:
        return engine.build(_context(text, files), tag=tag, labels=labels, on_line=on_line)
    except EngineRefusedError as error:
        if any(_AFTER_BASE.match(line) for line in error.notes):
            raise
    text = _with_setup(dockerfile(), serving_base(engine, serving), setup)
    return engine.build(_context(text, files), tag=tag, labels=labels, on_line=on_line)


def serving_base(engine: Images, serving: Image) -> str:
    """Return a name of the serving image on which every engine builds, made where it is missing.

    Some build on no id: BuildKit takes it for a repository (moby #39769), and the classic builder on containerd's
    image store has missed images by their digest (for-mac #7607). The name is of this id alone.
    """
    name = serving.id.rpartition(":")[2][:16]
    engine.tag_image(serving.id, BASES, name)
    return f"{BASES}:{name}"


def _program() -> list[tuple[str, bytes]]:
    """Return the in-container program's sources, sorted, as (path in the context, content)."""
    sources = sorted(path for pattern in AGENT_FILES for path in _PACKAGE.glob(pattern))
    return [(f"builder/{path.relative_to(_PACKAGE).as_posix()}", path.read_bytes()) for path in sources]


def _with_setup(text: str, base: str, setup: Iterable[str]) -> str:
    """Return the Dockerfile with its base pinned to the image id, and the setup commands right after the base.

    base: the id, or a name of it.

    The program's layer stays last, so that a change of the program does not run the setup again.
    """
    lines = [f"ARG SERVING_IMAGE={base}"]
    for line in text.splitlines():
        if line.startswith("ARG SERVING_IMAGE"):
            continue
        lines.append(line)
        if line.startswith("FROM "):
            lines += [f"RUN {command}" for command in setup]
    return "\n".join(lines) + "\n"


def _context(text: str, files: Sequence[tuple[str, bytes]]) -> bytes:
    """Return a build context with the same bytes for the same input, so that the engine's layer cache applies."""
    import tarfile  # only a build needs it

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in [("Dockerfile", text.encode()), *files]:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode, entry.mtime = len(content), 0o644, 0
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()
