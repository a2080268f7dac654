"""The border to docker-py on a real engine: what it asks, streams and reads, beyond the life of a container."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import socket
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.engine.api import ContainerSpec, Mount
from builder.engine.client import Engine
from builder.engine.errors import NotFoundError
from builder.errors import EngineLostError, EngineRefusedError, EngineTimeoutError
from tests.engine.workshop import Proxy, Workshop, check
from tests.scripts import LABEL, leave, out

pytestmark = pytest.mark.engine


def context(dockerfile: str, **files: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in {"Dockerfile": dockerfile.encode(), **files}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def content(chunks: Iterator[bytes]) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(b"".join(chunks)), mode="r:") as tar:  # never compressed
        return {member.name: tar.extractfile(member).read() for member in tar if member.isreg()}  # type: ignore[union-attr]


@pytest.fixture
def tag(engine: Engine) -> Iterator[str]:
    name = f"warm-cache-test:{os.urandom(6).hex()}"
    yield name
    with contextlib.suppress(NotFoundError), engine._translated("cannot tidy up"):
        engine._request("DELETE", "/images/{0}", name)


@pytest.fixture
def volume(engine: Engine) -> Iterator[str]:
    name = f"warm-cache-test-{os.urandom(6).hex()}"
    yield name
    with contextlib.suppress(NotFoundError), engine._translated("cannot tidy up"):
        engine._request("DELETE", "/volumes/{0}", name)


def test_engine_connects_and_reports_version(engine: Engine) -> None:
    assert engine.info["OSType"] == "linux"
    major, minor = map(int, engine.api_version.split("."))
    assert (major, minor) >= (1, 40)


def test_engine_local_means_same_machine_and_kernel(engine: Engine, docker_host: str) -> None:
    here = os.uname()
    same = (engine.info["Name"], engine.info["KernelVersion"]) == (here.nodename, here.release)
    assert engine.local == (docker_host.startswith("unix://") and same)


def test_engine_finds_images_by_name_and_id(engine: Engine, tiny_image: str) -> None:
    image = engine.image(tiny_image)
    assert image is not None
    assert image.id.startswith("sha256:")
    by_id = engine.image(image.id)
    assert by_id is not None
    assert by_id.id == image.id
    assert engine.image("warm-cache-test:no-such-image") is None


def test_build_streams_lines_and_returns_image(engine: Engine, tiny_image: str, tag: str) -> None:
    lines: list[str] = []
    text = f"FROM {tiny_image}\nWORKDIR /w\nCOPY file /f\nRUN cat /f\n"
    image = engine.build(context(text, file=b"hello from within\n"), tag=tag, labels={"l": "v"}, on_line=lines.append)
    assert "hello from within" in lines
    assert (image.labels["l"], image.workdir, image.ref) == ("v", "/w", tag)
    again = engine.build(context(text, file=b"hello from within\n"), tag=tag, labels={"l": "v"})
    assert again.id == image.id


def test_build_failed_carries_last_lines(engine: Engine, tiny_image: str, tag: str) -> None:
    text = f"FROM {tiny_image}\nRUN python3 -c \"print('the reason'); raise SystemExit(7)\"\n"
    with pytest.raises(EngineRefusedError, match="returned a non-zero code: 7") as refused:
        engine.build(context(text), tag=tag)
    assert "the reason" in refused.value.notes
    assert engine.image(tag) is None


@pytest.mark.parametrize("text", ["NONSENSE\n", "FROM no-such-image-anywhere:1\n", ""])
def test_build_that_cannot_begin_is_refused(engine: Engine, tag: str, text: str) -> None:
    with pytest.raises(EngineRefusedError, match=f"building {tag} failed"):
        engine.build(context(text), tag=tag)


def test_callback_error_is_not_engine_error(engine: Engine, tiny_image: str, tag: str) -> None:
    def fail(line: str) -> None:
        raise BrokenPipeError("the terminal went away")

    with pytest.raises(BrokenPipeError):
        engine.build(context(f"FROM {tiny_image}\n"), tag=tag, on_line=fail)


def test_pull_from_unreachable_registry_is_one_sentence(engine: Engine) -> None:
    with pytest.raises(EngineLostError, match=r"cannot pull localhost:1/nothing:tag: "):
        engine.pull("localhost:1/nothing:tag")


def test_archive_of_created_container_is_read(workshop: Workshop, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "file").write_bytes(b"content")
    (root / "link").symlink_to("sub/file")
    container = workshop.engine.create(workshop.spec(leave(0), mounts=(Mount(str(root), "/data", read_only=True),)))
    assert content(workshop.engine.archive(container, "/data/sub")) == {"sub/file": b"content"}
    assert workshop.engine.link_target(container, "/data/link") == "sub/file"
    assert workshop.engine.link_target(container, "/data/sub/file") == ""
    assert workshop.engine.link_target(container, "/data/missing") is None
    with pytest.raises(NotFoundError):
        workshop.engine.archive(container, "/data/missing")
    workshop.engine.remove(container)


def test_volumes_are_created_listed_and_removed(workshop: Workshop, volume: str) -> None:
    engine = workshop.engine
    assert not engine.has_volume(volume)
    engine._api.create_volume(volume, labels={LABEL: workshop.mark})
    assert engine.has_volume(volume)
    # The image has files there: they must not appear in the volume.
    outcome = workshop.run(
        source='print(os.listdir("/etc"))\nopen("/etc/mine", "w").write("x")',
        mounts=(Mount(volume, "/etc", kind="volume"),),
    )
    check(outcome, "exited", 0)
    assert "passwd" not in outcome.tail[0]


@pytest.mark.parametrize("gpus", [8, -1, ("2", "5")], ids=["number", "all", "names"])
def test_gpus_are_device_requests(workshop: Workshop, gpus: int | tuple[str, ...]) -> None:
    spec = workshop.spec(leave(0), gpus=gpus)
    container = workshop.engine.create(spec)
    data = workshop.engine._get("/containers/{0}/json", container).json()
    workshop.engine.remove(container)
    (request,) = data["HostConfig"]["DeviceRequests"]
    assert request["Capabilities"] == [["gpu"]]
    assert (request["Count"] or tuple(request["DeviceIDs"])) == gpus


def test_attachments_are_independent(workshop: Workshop) -> None:
    engine = workshop.engine
    container = engine.create(workshop.spec(out("x\n"), leave(0), stdin=True))
    first, second = engine.attach_output(container), engine.attach_output(container)
    stdin = engine.attach_stdin(container)
    second.close()
    engine.start(container)
    buffer = memoryview(bytearray(100))
    assert bytes(buffer[: first.readinto(buffer)])[8:] == b"x\n"
    first.close()
    stdin.close()
    stdin.close()
    engine.remove(container, force=True)


def test_attachment_close_releases_reading_thread(workshop: Workshop) -> None:
    container = workshop.engine.create(workshop.spec(leave(0)))
    attachment = workshop.engine.attach_output(container)
    sizes: list[int] = []
    reader = threading.Thread(target=lambda: sizes.append(attachment.readinto(memoryview(bytearray(9)))), daemon=True)
    reader.start()
    attachment.close()
    reader.join(5)
    assert not reader.is_alive()
    workshop.engine.remove(container)


def test_read_request_is_retried_after_broken_connection(workshop: Workshop, tiny_image: str, tmp_path: Path) -> None:
    with contextlib.closing(Engine(workshop.engine.url).connect()) as engine:
        broken = iter([ConnectionResetError("once"), ConnectionResetError("twice")])
        request = engine._request

        def sometimes(*arguments: object, **options: object) -> object:
            if error := next(broken, None):
                raise error
            return request(*arguments, **options)  # type: ignore[arg-type]

        engine._request = sometimes  # type: ignore[method-assign]
        assert engine.image(tiny_image) is not None
        broken = iter([ConnectionResetError("once")])
        with pytest.raises(EngineLostError):
            engine.create(ContainerSpec(image=tiny_image, name="never"))


def test_engine_over_tcp_works(workshop: Workshop, docker_host: str) -> None:
    if not docker_host.startswith("unix://"):
        pytest.skip("the engine is behind TCP anyway")
    with tcp_to(docker_host.removeprefix("unix://")) as url, contextlib.closing(Engine(url).connect()) as engine:
        assert not engine.local
        check(workshop.run(out("over tcp\n"), leave(3), engine=engine), "exited", 3)
    assert workshop.log()["out"] == b"over tcp\n"


@contextlib.contextmanager
def tcp_to(path: str) -> Iterator[str]:
    """A TCP port that leads to a unix socket."""
    listener = socket.create_server(("127.0.0.1", 0))
    open_ends: list[socket.socket] = []

    def copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                engine = socket.socket(socket.AF_UNIX)
                engine.connect(path)
                open_ends.extend((client, engine))
                for ends in ((client, engine), (engine, client)):
                    threading.Thread(target=copy, args=ends, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for end in open_ends:
            end.close()


#: Stands for ssh: checks what it was asked, and does on this machine what the other one would have done.
SSH = """#!{python}
import os, socket, sys, threading
if "{broken}":
    sys.exit("ssh: connect to host nowhere: No route to host")
assert sys.argv[-4:] == ["host.example", "docker", "system", "dial-stdio"], sys.argv
assert sys.argv[sys.argv.index("-l") + 1] == "me" and sys.argv[sys.argv.index("-p") + 1] == "2222", sys.argv
assert "BatchMode=yes" in sys.argv
engine = socket.socket(socket.AF_UNIX)
engine.connect("{engine}")
def up():
    while data := os.read(0, 65536):
        engine.sendall(data)
    engine.shutdown(socket.SHUT_WR)
threading.Thread(target=up, daemon=True).start()
while data := engine.recv(65536):
    os.write(1, data)
"""


def fake_ssh(directory: Path, engine: str, monkeypatch: pytest.MonkeyPatch, *, broken: str = "") -> None:
    directory.mkdir()
    script = directory / "ssh"
    python = shutil.which("python3")
    script.write_text(SSH.format(python=python, engine=engine.removeprefix("unix://"), broken=broken))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(directory), prepend=os.pathsep)


def test_engine_over_ssh_works(
    workshop: Workshop, docker_host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not docker_host.startswith("unix://"):
        pytest.skip("only an engine behind a unix socket can be put behind an ssh of our own")
    fake_ssh(tmp_path / "bin", docker_host, monkeypatch)
    with contextlib.closing(Engine("ssh://me@host.example:2222").connect()) as engine:
        assert not engine.local
        check(workshop.run(out("over ssh\n"), leave(3), engine=engine), "exited", 3)
    assert workshop.log()["out"] == b"over ssh\n"


def test_ssh_error_is_in_the_message(docker_host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ssh(tmp_path / "bin", docker_host, monkeypatch, broken="yes")
    with pytest.raises(EngineLostError, match="No route to host"):
        Engine("ssh://me@host.example:2222").connect()


def test_engine_hanging_mid_answer_times_out(workshop: Workshop, proxy: Proxy) -> None:
    with contextlib.closing(Engine(proxy.url, timeout=1).connect()) as engine:
        proxy.hang = True
        with pytest.raises(EngineTimeoutError):
            engine.state("0" * 64)
        with pytest.raises(EngineTimeoutError):
            engine.create(workshop.spec(leave(0)))
