"""The warm-up image: built once per set of inputs, and never yesterday's."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, cast

import pytest

from builder.engine import images
from builder.engine.api import Image
from builder.engine.client import Engine
from builder.errors import EngineRefusedError
from tests.fakes import http, listening

SERVING = Image(id="sha256:" + "5" * 64, ref="lmsysorg/sglang:v0.5.23")


class Builds:
    """An engine that keeps what it builds."""

    def __init__(self) -> None:
        self.built: dict[str, tuple[bytes, Mapping[str, str]]] = {}
        self.tagged: dict[str, str] = {}
        self.refuses: Callable[[str], tuple[str, ...] | None] = lambda dockerfile: None

    def image(self, ref: str) -> Image | None:
        if ref not in self.built:
            return None
        return Image(id=f"sha256:{ref}", ref=ref, labels=self.built[ref][1])

    def build(self, context: bytes, *, tag: str, labels: Mapping[str, str], on_line: Callable[[str], None]) -> Image:
        on_line("Step 1/4")
        with tarfile.open(fileobj=io.BytesIO(context)) as tar:
            text = cast(IO[bytes], tar.extractfile("Dockerfile")).read().decode()
        if (notes := self.refuses(text)) is not None:
            raise EngineRefusedError("building failed: pull access denied for sha256", notes=notes)
        self.built[tag] = context, labels
        return Image(id=f"sha256:{tag}", ref=tag, labels=labels)

    def tag_image(self, name: str, repository: str, tag: str) -> None:
        self.tagged[f"{repository}:{tag}"] = name

    def warm(self, serving: Image = SERVING, setup: tuple[str, ...] = ()) -> str:
        return images.warmup_image(cast(Engine, self), serving, setup, lambda line: None).ref

    def files(self, tag: str) -> dict[str, str]:
        with tarfile.open(fileobj=io.BytesIO(self.built[tag][0])) as tar:
            return {
                member.name: content.read().decode()
                for member in tar
                if (content := tar.extractfile(member)) is not None
            }


@pytest.fixture
def engine() -> Builds:
    return Builds()


def test_warmup_image_known_is_not_built(engine: Builds) -> None:
    tag = engine.warm()
    made = engine.built[tag]
    assert engine.warm() == tag
    assert engine.built == {tag: made}
    assert engine.built[tag][0] is made[0]


def test_warmup_image_differs_with_every_input(engine: Builds, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.warm()
    engine.warm(Image(id="sha256:" + "6" * 64, ref="lmsysorg/sglang:v0.5.23"))
    engine.warm(setup=("pip install -e .",))
    monkeypatch.setattr(images, "_program", lambda: [("builder/__init__.py", b"")])
    engine.warm()
    monkeypatch.setattr(images, "dockerfile", lambda: "ARG SERVING_IMAGE\nFROM ${SERVING_IMAGE}\nLABEL a=b\n")
    engine.warm()
    assert len(engine.built) == 5


def test_warmup_image_of_other_tag_is_equal(engine: Builds) -> None:
    assert engine.warm() == engine.warm(Image(id=SERVING.id, ref="mirror/sglang:latest"))


def test_warmup_image_with_foreign_tag_is_rebuilt(engine: Builds) -> None:
    tag = engine.warm()
    engine.built[tag] = b"", {}
    engine.warm()
    assert engine.built[tag][1] == {images.LABEL_SERVING: SERVING.id}


def test_build_context_has_agent_pinned_base_and_setup(engine: Builds) -> None:
    files = engine.files(engine.warm(setup=("first", "second")))
    lines = [line for line in files["Dockerfile"].splitlines() if line and not line.startswith("#")]
    assert lines[:4] == [
        f"ARG SERVING_IMAGE={SERVING.id}",
        "FROM ${SERVING_IMAGE} AS warm-up",
        "RUN first",
        "RUN second",
    ]
    assert sum(line.startswith("ARG") for line in lines) == 1
    assert [line.split()[0] for line in lines[-2:]] == ["COPY", "COPY"]
    assert {"builder/__init__.py", "builder/agent/__main__.py", "builder/cache/families.py"} <= files.keys()
    assert all(name == "Dockerfile" or name.startswith("builder/") for name in files)
    folders = {name.split("/")[1] for name in files if name.count("/") > 1}
    assert folders == {"agent", "cache"}, "the host's packages stay on the host"


def test_build_context_is_deterministic() -> None:
    first, second = Builds(), Builds()
    assert first.built.get(first.warm()) == second.built.get(second.warm())


def test_warmup_image_of_engine_that_builds_on_no_id(engine: Builds) -> None:
    """A stub of one that takes an id for a repository, as BuildKit does. The name is of this id alone."""
    engine.refuses = lambda text: ("Step 1/6 : ARG", "Step 2/6 : FROM") if f"={SERVING.id}\n" in text else None
    tag = engine.warm(setup=("first",))
    assert engine.tagged == {"sglang-warm-cache-base:" + "5" * 16: SERVING.id}
    lines = engine.files(tag)["Dockerfile"].splitlines()
    assert lines[0] == "ARG SERVING_IMAGE=sglang-warm-cache-base:" + "5" * 16 and "RUN first" in lines
    assert engine.warm(setup=("first",)) == tag and len(engine.built) == 1, "the next run finds it"
    assert engine.built[tag][1] == {images.LABEL_SERVING: SERVING.id}


def test_warmup_image_whose_setup_fails_is_built_once(engine: Builds) -> None:
    engine.refuses = lambda text: ("Step 1/6 : ARG", "Step 2/6 : FROM", "Step 3/6 : RUN false", "no")
    with pytest.raises(EngineRefusedError) as refused:
        engine.warm(setup=("false",))
    assert refused.value.notes[-1] == "no" and not engine.tagged


def test_identity_changes_with_setup() -> None:
    assert images.identity(SERVING.id, ()) == SERVING.id
    one, other = images.identity(SERVING.id, ("a", "b")), images.identity(SERVING.id, ("a b",))
    assert one.startswith("sha256:")
    assert len({SERVING.id, one, other}) == 3


# --- pulls -----------------------------------------------------------------------------------------------------------


def pulled(*messages: dict[str, object], found: bool = True) -> Callable[[bytes], bytes]:
    """An engine whose pull sends these messages."""

    def answer(request: bytes) -> bytes:
        path = request.split(b" ", 2)[1]
        if b"/images/create" in path:
            return http(b"\r\n".join(json.dumps(message).encode() for message in messages) + b"\r\n")
        if b"/images/" in path:
            none = http({"message": "No such image"}, "404 Not Found")
            return http({"Id": "sha256:x", "Config": None}) if found else none
        return http({"ApiVersion": "1.41", "MinAPIVersion": "1.12"})

    return answer


def layer(name: str, status: str, current: int = 0, total: int = 0) -> dict[str, object]:
    return {"id": name, "status": status, "progressDetail": {"current": current, "total": total} if total else {}}


def test_pull_progress_repeats_nothing(tmp_path: Path) -> None:
    messages: list[dict[str, object]] = [
        {"id": "v1", "status": "Pulling from sglang"},
        layer("a", "Already exists"),
        layer("b", "Pulling fs layer"),
        *(layer("b", "Downloading", at << 20, 4 << 30) for at in range(0, 4096, 64)),
        layer("b", "Extracting", 1, 2),
        layer("b", "Pull complete"),
        {"status": "Status: Downloaded newer image"},
    ]
    said: list[str] = []
    with listening(tmp_path / "s", pulled(*messages)) as url, contextlib.closing(Engine(url, timeout=2)) as engine:
        assert engine.pull("sglang:v1", said.append).id == "sha256:x"
    assert said == [
        "sglang:v1: 1 of 1 layers",
        "sglang:v1: 1 of 2 layers",
        "sglang:v1: 1 of 2 layers, 0 of 4 GiB of the next",
        "sglang:v1: 1 of 2 layers, 1 of 4 GiB of the next",
        "sglang:v1: 1 of 2 layers, 2 of 4 GiB of the next",
        "sglang:v1: 1 of 2 layers, 3 of 4 GiB of the next",
        "sglang:v1: 1 of 2 layers",
        "sglang:v1: 2 of 2 layers",
    ]


@pytest.mark.parametrize(
    ("engine", "told"),
    [
        (pulled(layer("a", "Downloading", 1, 2), {"error": "manifest unknown\x1b[1m"}), "manifest unknown"),
        (pulled(found=False), "does not have it"),
    ],
)
def test_pull_failure_names_reason(tmp_path: Path, engine: Callable[[bytes], bytes], told: str) -> None:
    with (
        listening(tmp_path / "s", engine) as url,
        contextlib.closing(Engine(url, timeout=2)) as client,
        pytest.raises(EngineRefusedError, match=told) as refused,
    ):
        client.pull("sglang:v1")
    assert refused.value.message.startswith("cannot pull sglang:v1: ")
    assert "\x1b" not in refused.value.message
