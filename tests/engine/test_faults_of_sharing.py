"""Faults between a registry and a cache root, with a real registry: what is refused, what goes on, and what is left.

The program runs as `push --here` and `pull --here`: what a container does of it is in test_sharing.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from builder.registry import images
from tests.engine.faults import Aftermath
from tests.program import ROOT, assemble
from tests.registries import StandIn, stand_in
from tests.registry.front import Request, Rule, front
from tests.registry.sharing import TASKS, Machine

Machines = Callable[[str], Machine]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    with stand_in(tmp_path_factory.mktemp("registry")) as found:
        yield found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return assemble(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory, site: Path) -> Machine:
    """A warm machine; nobody changes it."""
    machine = Machine(tmp_path_factory.mktemp("warm"), site)
    machine.manifest(*TASKS)
    machine.warm()
    return machine


@pytest.fixture(scope="module")
def pushed(warm: Machine, registry: StandIn) -> dict[str, object]:
    """What was pushed to ``faults/cache``."""
    return warm.push(registry, "faults/cache")


@pytest.fixture
def machines(tmp_path: Path, site: Path) -> Machines:
    def made(name: str) -> Machine:
        (tmp_path / name).mkdir()
        machine = Machine(tmp_path / name, site)
        machine.manifest(*TASKS)
        machine.root.mkdir()
        return machine

    return made


@pytest.fixture
def aftermath(request: pytest.FixtureRequest) -> Aftermath:
    return Aftermath.of(request)


def layer(registry: StandIn, name: str, family: str) -> str:
    """The digest of a family's layer in the newest image of this repository."""
    with registry.client(name) as client:
        (tag,) = client.tags()
        return next(each.digest for each in images.find(client, tag).image.layers if each.family == family)


def behind(made: str, registry: StandIn) -> StandIn:
    """The registry at another address."""
    return dataclasses.replace(registry, host=made)


@pytest.mark.fault(
    "a byte of a blob in the registry's data is flipped",
    how="a byte of the layer's file, which the registry serves as it is",
    holds="12: the layer is named; the cache root is untouched",
)
def test_flipped_byte_is_refused(warm: Machine, machines: Machines, registry: StandIn, aftermath: Aftermath) -> None:
    warm.push(registry, "faults/flipped")
    path = registry.blob(layer(registry, "faults/flipped", "quack"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    other = machines("other")
    aftermath.begins()
    refused = other.pull(registry, "faults/flipped", status=12)
    aftermath.clean()
    assert path.parent.name[:10] in refused["error"]["message"] and other.is_untouched()
    # What is pushed again next is a new layer beside it: a damaged one has to be removed from the registry.
    path.unlink()


@pytest.mark.fault(
    "registry killed in the middle of a push",
    how="SIGTERM to the registry after 1 MB of a layer of 3 MB, and a new one later",
    holds="16; the next push sends what is missing, and no layer that arrived",
)
def test_registry_killed_during_push(warm: Machine, registry: StandIn, aftermath: Aftermath) -> None:
    killed = threading.Event()

    def rule(request: Request) -> int | bool | None:
        if killed.is_set():
            return request.answer(503)
        if request.method == "PUT" and int(request.headers.get("Content-Length", 0)) > 1 << 20:
            killed.set()
            registry.kill()
            return 1 << 20
        return None

    with front(registry.host, rule) as made:
        aftermath.begins()
        lost = warm.push(behind(made.host, registry), "faults/killed", status=16)
        aftermath.clean()
    registry.comes_back()
    assert "push" not in lost
    again = warm.push(registry, "faults/killed")
    sent = {row["name"].partition("/")[0]: row["sent"] for row in again["layers"]}
    assert sent["quack"] > 0 and sent["deep_gemm"] == 0 and not again["unchanged"]


@pytest.mark.fault(
    "registry killed in the middle of a pull",
    how="SIGTERM to the registry after 1 MB of a layer of 3 MB, and a new one later",
    holds="16; the cache root is untouched, and the next pull restores all of it",
)
def test_registry_killed_during_pull(
    pushed: dict[str, object], machines: Machines, registry: StandIn, aftermath: Aftermath
) -> None:
    big, killed = layer(registry, "faults/cache", "quack"), threading.Event()

    def rule(request: Request) -> int | bool | None:
        if killed.is_set():
            return request.answer(503)
        if request.method == "GET" and request.path.endswith(big):
            killed.set()
            return 1 << 20
        return None

    other = machines("other")
    with front(registry.host, rule) as made:
        aftermath.begins()
        process = other.begin("pull", f"{made.host}/faults/cache")
        assert killed.wait(60)
        registry.kill()
        out, err = process.communicate(timeout=120)
        aftermath.clean()
    registry.comes_back()
    assert process.returncode == 16, out + err
    assert other.is_untouched()
    other.pull(registry, "faults/cache")
    assert other.warm_tasks() == {"dense", "big"}


@pytest.mark.fault(
    "tag moved between resolve and pull",
    how="another image is stored under the tag right after its manifest was read",
    holds="0: what was resolved is restored, by its digest",
)
def test_tag_moved_after_resolve(warm: Machine, machines: Machines, registry: StandIn, aftermath: Aftermath) -> None:
    first = warm.push(registry, "faults/moving", "--tag", "stable")
    second = warm.push(registry, "faults/moving2", "--only", "org/dense")
    assert first["digest"] != second["digest"]
    moved = threading.Event()

    def rule(request: Request) -> int | bool | None:
        # The second request of any kind: the first one has read the tag.
        if moved.is_set() and request.path.endswith("/manifests/stable"):
            pytest.fail("the tag was read twice")
        if request.path.endswith("/manifests/stable"):
            moved.set()
        return None

    with front(registry.host, rule) as made:
        other = machines("other")
        aftermath.begins()
        pulled = other.pull(behind(made.host, registry), "faults/moving:stable")
        aftermath.clean()
    assert moved.is_set() and pulled["digest"] == first["digest"]
    assert other.warm_tasks() == {"dense", "big"}


@pytest.mark.fault(
    "another nvcc on the machine that restores",
    how="a compiler with another version",
    holds="0: the family that depends on it is named with the factor and is not fetched, the others are restored; 12 "
    "where nothing fits, with the root untouched",
)
def test_other_compiler_takes_what_fits(
    warm: Machine, pushed: dict[str, object], machines: Machines, registry: StandIn, aftermath: Aftermath
) -> None:
    other = machines("other")
    other.nvcc("13.0", "12.9")
    aftermath.begins()
    pulled = other.pull(registry, "faults/cache")
    aftermath.clean()
    assert [(row["family"], row["why"].partition(" ")[0]) for row in pulled["unfit"]] == [
        ("deep_gemm", "deep_gemm_nvcc")
    ]
    assert other.warm_tasks() == {"big"} and not (other.root / "deep_gemm").exists()
    warm.push(registry, "faults/dense", "--only", "org/dense")
    third = machines("third")
    third.nvcc("13.0", "12.9")
    refused = third.pull(registry, "faults/dense", status=12)
    assert [each["place"] for each in refused["error"]["problems"]] == ["deep_gemm"] and third.is_untouched()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            "size=1m",
            id="bytes",
            marks=pytest.mark.fault(
                "no room for a cache image",
                how="a tmpfs of 1 MB as the cache root, and an image of 3 MB",
                holds="12: what it takes and what is free; nothing is unpacked",
            ),
        ),
        pytest.param(
            "size=200m,nr_inodes=22",
            id="files",
            marks=pytest.mark.fault(
                "disk full while a cache image is unpacked",
                how="a tmpfs with room for 22 files as the cache root",
                holds="12: the reason names the disk; what was unpacked is removed",
            ),
        ),
    ],
)
def test_disk_full(
    options: str, pushed: dict[str, object], machines: Machines, registry: StandIn, aftermath: Aftermath
) -> None:
    other = machines("other")
    script = (
        f'mount -t tmpfs -o {options} tmpfs "$1" && shift; "$@"; status=$?; '
        f"find {other.root}/staging {other.root}/deep_gemm {other.root}/markers -mindepth 1 >&2; exit $status"
    )
    words = ["pull", f"{registry.host}/faults/cache", "--here", "--json", "--manifest", str(other.path)]
    aftermath.begins()
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", other.root, sys.executable, "-m", "builder", *words],
        cwd=other.place,
        env={**other.environ, "PYTHONPATH": f"{ROOT}:{other.environ['PYTHONPATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    aftermath.clean()
    assert done.returncode == 12, done.stdout + done.stderr
    left = [line for line in done.stderr.splitlines() if line.startswith(str(other.root))]
    assert left == [] and "Traceback" not in done.stderr
    (found,) = json.loads(done.stdout)["error"]["problems"]
    assert found["place"] == "disk" and ("are free" in found["text"] or "space left" in found["text"].lower())


@pytest.mark.fault(
    "two pulls at once, a hold, and a warm-up that works in the cache",
    how="two of the same image started together; the run lock and the hold taken by the test",
    holds="0 and 0: one restores, the other waits for it; beside a hold 0, since nothing is removed; beside a warm-up "
    "15, and the root is untouched",
)
def test_pull_beside_others(
    pushed: dict[str, object], machines: Machines, registry: StandIn, aftermath: Aftermath
) -> None:
    other, busy = machines("other"), machines("busy")
    aftermath.begins()
    both = [other.begin("pull", f"{registry.host}/faults/cache") for _ in range(2)]
    ended = [(process.communicate(timeout=120), process.returncode) for process in both]
    aftermath.clean()
    assert [status for _, status in ended] == [0, 0], ended
    added = [sum(row["added"] for row in json.loads(out)["pull"]["families"]) for (out, _), _ in ended]
    assert min(added) == 0 and other.warm_tasks() == {"dense", "big"}
    busy.pull(registry, "faults/dense-none", "--fail-open")
    (busy.root / "locks").mkdir(exist_ok=True)
    held = [(busy.root / "locks" / name).open("w") for name in ("run.lock", "hold.lock")]
    fcntl.flock(held[0], fcntl.LOCK_EX)
    fcntl.flock(held[1], fcntl.LOCK_SH)
    busy.pull(registry, "faults/cache", "--lock-timeout", "1s", status=15)
    assert busy.is_untouched()
    held[0].close()
    busy.pull(registry, "faults/cache")
    assert busy.warm_tasks() == {"dense", "big"}
    held[1].close()


def always(status: int, **headers: str) -> Rule:
    return lambda request: request.answer(status, b'{"errors":[{"code":"DENIED","message":"no"}]}', **headers)


def once_limited() -> Rule:
    seen: list[str] = []

    def rule(request: Request) -> bool | None:
        seen.append(request.path)
        return request.answer(429, Retry_After="1") if len(seen) in (2, 5) else None

    return rule


@pytest.mark.fault(
    "registry answers 401, 403, 404, 429 or 503",
    how="a front before the registry that answers in its place",
    holds="12 for 401, 403 and 404, at once and each with its own sentence; 0 after 429, which is waited for; 16 for "
    "503 that stays; the root is untouched where it failed",
)
@pytest.mark.parametrize(
    ("rule", "status", "said"),
    [
        (always(401, WWW_Authenticate='Basic realm="x"'), 12, "docker login"),
        (always(403), 12, "DENIED"),
        (always(404), 12, "no cache image"),
        (once_limited(), 0, ""),
        (always(503), 16, "503"),
    ],
    ids=["401", "403", "404", "429", "503"],
)
def test_registry_refuses(
    rule: Rule,
    status: int,
    said: str,
    pushed: dict[str, object],
    machines: Machines,
    registry: StandIn,
    aftermath: Aftermath,
) -> None:
    other = machines("other")
    with front(registry.host, rule) as made:
        aftermath.begins()
        found = other.pull(behind(made.host, registry), "faults/cache", status=status)
        aftermath.clean()
    if status:
        assert said in found["error"]["message"], found["error"]["message"]
        assert other.is_untouched()
    else:
        assert other.warm_tasks() == {"dense", "big"}


@pytest.mark.fault(
    "builder killed in the middle of a push, of a pull",
    how="SIGKILL while a layer of 3 MB is on its way",
    holds="nothing of it is in the registry by a tag, or in the root; the next push and the next pull do all of it",
)
def test_builder_killed(warm: Machine, machines: Machines, registry: StandIn, aftermath: Aftermath) -> None:
    reached, go = threading.Event(), threading.Event()

    def rule(request: Request) -> int | None:
        large = request.method == "PUT" and int(request.headers.get("Content-Length", 0)) > 1 << 20
        if large or (request.method == "GET" and "/blobs/" in request.path and reads):
            reached.set()
            go.wait(30)
        return None

    reads: list[bool] = []
    with front(registry.host, rule) as made:
        process = warm.begin("push", f"{made.host}/faults/kill", "--image", "x")
        assert reached.wait(60)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
        go.set()
        with registry.client("faults/kill") as client:
            assert not images.tags(client)
        warm.push(behind(made.host, registry), "faults/kill")
        other = machines("other")
        reads.append(True)
        reached.clear()
        go.clear()
        process = other.begin("pull", f"{made.host}/faults/kill")
        assert reached.wait(60)
        aftermath.begins()
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
        go.set()
        assert other.is_untouched()
        aftermath.clean()
        other.pull(behind(made.host, registry), "faults/kill")
    assert other.warm_tasks() == {"dense", "big"}


@pytest.mark.fault(
    "registry hangs in the Prolog of a node",
    how="a registry that takes requests and never answers; --fail-open --deadline 2s",
    holds="0 within 5 s of the deadline, with the reason in the JSON document; the root is untouched",
)
def test_fail_open_never_blocks_a_node(
    pushed: dict[str, object], machines: Machines, registry: StandIn, aftermath: Aftermath
) -> None:
    stuck = threading.Event()

    def rule(request: Request) -> bool:
        stuck.wait(60)
        return True

    other = machines("other")
    with front(registry.host, rule) as made:
        aftermath.begins()
        began = time.monotonic()
        pulled = other.pull(
            behind(made.host, registry), "faults/cache", "--fail-open", "--deadline", "2s", "--jitter", "1s"
        )
        aftermath.clean()
        took = time.monotonic() - began
        stuck.set()
    assert pulled["reason"] and not pulled["done"] and other.is_untouched()
    assert took < 15, "a loaded machine may need some of it for the start of Python"
    # And where the registry is right, the same options restore.
    assert other.pull(registry, "faults/cache", "--fail-open", "--deadline", "60s")["done"]
