"""`refresh` with a real registry: what is pulled, warmed, kept and removed night after night, and who is told."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from builder.engine.client import Engine
from builder.errors import EngineRefusedError
from builder.flock import open_lock, try_lock
from tests.engine.cli import Cli, Ended, command, request, shapes, wait_for
from tests.engine.door import Door
from tests.engine.test_engine import context
from tests.engine.test_prune import forget

pytestmark = pytest.mark.engine

NO_JOBS = {"job_max": "0s"}


class Registry:
    """Debian's docker-registry, in the network namespace of the engine: its loopback is not always ours."""

    def __init__(self, place: Path, engine: Engine, program: str) -> None:
        self._engine, self.port = engine, 5000 + os.getpid() % 20000
        self.names: list[str] = []
        config = place / "registry.yml"
        config.write_text(
            f"version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {place}/registry}}}}\n"
            f"http: {{addr: '127.0.0.1:{self.port}'}}\n"
        )
        self._log = place / "registry.log"
        with self._log.open("wb") as log:
            enter = _namespace_of(engine)
            self.process = subprocess.Popen(
                [*enter, program, "serve", str(config)], stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    def ref(self, name: str) -> str:
        return f"127.0.0.1:{self.port}/{name}:nightly"

    def publish(self, name: str, text: str) -> str:
        """Pushes an image of this text; the engine keeps what it had under the name. The new image's id."""
        ref = self.ref(name)
        before = self._engine.image(ref)
        image = self._engine.build(context(text), tag=ref)
        wait_for(lambda: self._push(ref), 30, "the registry")
        self._ask("DELETE", "/images/{0}", ref)
        with contextlib.suppress(EngineRefusedError):
            self._ask("DELETE", "/images/{0}", image.id, params={"force": 1})
        if before is not None:
            self._ask("POST", "/images/{0}/tag", before.id, params={"repo": ref.rpartition(":")[0], "tag": "nightly"})
        self.names.append(image.id)
        return image.id

    def _ask(self, method: str, path: str, name: str, **options: Any) -> None:
        request(self._engine, method, path, name, **options)

    def _push(self, ref: str) -> bool:
        name, tag = ref.rsplit(":", 1)
        with self._engine._translated("cannot push"):
            answer = self._engine._request(
                "POST", "/images/{0}/push", name, params={"tag": tag}, headers={"X-Registry-Auth": "e30="}, stream=True
            )
            said = [json.loads(line) for line in answer.iter_lines() if line]
        return not any("error" in line for line in said)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def _namespace_of(engine: Engine) -> list[str]:
    """What enters the engine's network, where that is another one than ours."""
    socket = engine.url.removeprefix("unix://")
    for pid in (path.name for path in Path("/proc").iterdir() if path.name.isdigit()):
        with contextlib.suppress(OSError):
            words = Path("/proc", pid, "cmdline").read_bytes().split(b"\0")
            if words[0].endswith(b"dockerd") and any(socket.encode() in word for word in words):
                return ["nsenter", "--net", "--target", pid]
    return []


def _program(place: Path) -> str:
    """Installed, or unpacked from Debian's package, which needs no root and leaves nothing behind."""
    found = shutil.which("docker-registry")
    if found is not None:
        return found
    download = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", "docker-registry"]
    try:
        subprocess.run(download, cwd=place, check=True, capture_output=True, timeout=120)
        (package,) = place.glob("docker-registry_*.deb")
        subprocess.run(["dpkg-deb", "-x", package, place / "unpacked"], check=True, capture_output=True, timeout=120)
    except (OSError, subprocess.SubprocessError, ValueError):
        pytest.skip("there is no docker-registry here (Debian and Ubuntu: apt-get install docker-registry)")
    return str(place / "unpacked" / "usr" / "bin" / "docker-registry")


@pytest.fixture
def registry(tmp_path: Path, engine: Engine) -> Iterator[Registry]:
    made = Registry(tmp_path, engine, _program(tmp_path))
    yield made
    made.close()
    forget(engine, made.names)


class Nights:
    """The image that a registry has under one name, night after night. Each has a DeepGEMM of its own, so that the
    toolchain is new.
    """

    def __init__(self, cli: Cli, registry: Registry) -> None:
        self.cli, self.registry = cli, registry
        self.name = f"night-{os.urandom(4).hex()}"
        self.metrics = cli.place / "metrics.prom"

    def publish(self, night: int) -> str:
        text = f"FROM {self.cli.image}\nRUN {_other_deep_gemm(night)}\n"
        return self.registry.publish(self.name, text)

    def manifest(self, *tasks: dict[str, Any], **sections: Any) -> None:
        cache = {**NO_JOBS, **sections.pop("cache", {})}
        sections = {"image": {"ref": self.registry.ref(self.name)}, "cache": cache, **sections}
        self.cli.manifest(*(tasks or (shapes("mine"),)), **sections)

    def refresh(self, *options: str, **how: Any) -> Ended:
        return self.cli.run("refresh", "--json", "--metrics", str(self.metrics), *options, **how)


def _other_deep_gemm(night: int) -> str:
    """Changes what the image's package metadata says of DeepGEMM."""
    code = (
        "import importlib.metadata as m, pathlib; d = m.distribution('sgl-deep-gemm'); "
        "p = pathlib.Path(d._path) / 'METADATA'; "
        f"p.write_text(p.read_text().replace('Version: ', 'Version: 9{night}.'))"
    )
    return f'python3 -c "{code}"'


@pytest.fixture
def nights(cli: Cli, registry: Registry) -> Nights:
    return Nights(cli, registry)


def test_refresh_without_change_pulls_and_starts_nothing(nights: Nights, tmp_path: Path) -> None:
    image = nights.publish(1)
    nights.manifest()
    first = nights.refresh()
    assert first.status == 0, first.said
    assert first.document["refresh"]["pulled"] is True
    assert first.document["image"]["id"] == image
    assert [task["state"] for task in first.document["tasks"]] == ["warmed"]
    door = Door(nights.cli.host, tmp_path / "door.sock")
    try:
        nights.cli.host, direct = door.url, nights.cli.host
        again = nights.refresh()
        nights.cli.host = direct
    finally:
        door.close()
    assert again.status == 0, again.said
    assert again.document["refresh"]["pulled"] is False
    assert "has not moved" in again.err
    assert [path for path in door.asked("POST") if "create" in path or "start" in path] == []
    assert [path for path in door.asked("GET") if path.startswith("/distribution/")] != []
    assert again.document["seconds"] < 2  # 0.14 where nothing else runs; what it does not do is asserted above


def test_refresh_new_image_keeps_old_until_prune(nights: Nights) -> None:
    cli, old = nights.cli, nights.publish(1)
    nights.manifest()
    assert nights.refresh().status == 0
    new = nights.publish(2)
    assert cli.run("check").status == 0  # nothing has changed for test jobs
    second = nights.refresh()
    assert second.status == 0, second.said
    document = second.document
    assert (document["refresh"]["image_before"], document["image"]["id"]) == (old, new)
    assert [task["state"] for task in document["tasks"]] == ["warmed"]
    assert len([path for path in cli.root.glob("deep_gemm/*") if path.is_dir()]) == 2
    assert len(cli.markers()) == 2
    assert cli.run("check").status == 0
    assert cli.run("check", "--image", old).status == 0  # side by side
    third = nights.publish(3)
    nights.manifest(cache={"keep": 1})
    last = nights.refresh()
    assert last.status == 0, last.said
    assert last.document["image"]["id"] == third
    assert len([path for path in cli.root.glob("deep_gemm/*") if path.is_dir()]) == 1
    with cli.engine() as engine:
        assert [engine.image(one) is not None for one in (old, new, third)] == [False, False, True]
    assert last.document["refresh"]["freed"] > 0
    samples = parsed(nights.metrics)
    assert samples["warm_cache_refresh_pruned_bytes"][0][1] > 0
    assert cli.run("check").status == 0


def test_refresh_without_room_is_refused_before_work(nights: Nights) -> None:
    nights.publish(1)
    nights.manifest()
    assert nights.refresh().status == 0
    nights.publish(2)
    nights.manifest(cache={"max_size": "1k"})
    refused = nights.refresh()
    assert refused.status == 12, refused.said
    (problem,) = refused.document["error"]["problems"]
    assert problem["place"] == "disk"
    assert "that [cache] max_size allows, and what this warm-up will add took" in problem["text"]
    assert [task["state"] for task in refused.document["tasks"]] == ["cold"]
    assert nights.cli.entries() != []  # nothing goes where that would not do either
    assert len(nights.cli.markers()) == 1
    nights.manifest()
    assert nights.refresh().status == 0


def test_refresh_registry_unreachable_with_local_image_is_warning(nights: Nights) -> None:
    nights.publish(1)
    nights.manifest()
    assert nights.refresh().status == 0
    nights.registry.close()
    again = nights.refresh()
    assert again.status == 0, again.said
    assert "cannot ask the registry about" in " ".join(again.document["warnings"])


def test_refresh_metrics_after_failure_keep_last_success(nights: Nights) -> None:
    nights.publish(1)
    nights.manifest()
    assert nights.refresh().status == 0
    good = parsed(nights.metrics)
    assert value(good, "warm_cache_refresh_exit_code") == 0
    assert value(good, "warm_cache_refresh_tasks", state="warmed") == 1
    assert value(good, "warm_cache_entries", family="deep_gemm") > 0
    assert value(good, "warm_cache_entries_size_bytes", family="deep_gemm") > 0
    assert value(good, "warm_cache_size_bytes") > 0
    assert value(good, "warm_cache_filesystem_free_bytes") > 0
    assert value(good, "warm_cache_filesystem_size_bytes") > value(good, "warm_cache_filesystem_free_bytes")
    assert value(good, "warm_cache_image_behind_since_timestamp_seconds") == 0
    assert value(good, "warm_cache_refresh_task_state", task="mine", state="warmed") == 1
    assert value(good, "warm_cache_refresh_task_seconds", task="mine") > 0
    assert nights.cli.run("check", "--metrics", str(nights.metrics)).status == 0
    shared = parsed(nights.metrics)
    assert value(shared, "warm_cache_check_tasks_by_build", build="same") == 1
    assert value(shared, "warm_cache_refresh_tasks", state="warmed") == 1
    success = value(good, "warm_cache_refresh_last_success_timestamp_seconds")
    nights.manifest(shapes("mine"), command("other", "raise SystemExit(3)"))
    bad = nights.refresh()
    assert bad.status == 11
    found = parsed(nights.metrics)
    assert value(found, "warm_cache_refresh_exit_code") == 11
    assert value(found, "warm_cache_refresh_tasks", state="failed") == 1
    assert value(found, "warm_cache_refresh_last_success_timestamp_seconds") == success
    assert value(found, "warm_cache_refresh_last_run_timestamp_seconds") > success
    # An engine that is not there is an outcome too; and a manifest is the same from wherever it is named.
    there = {"DOCKER_HOST": f"unix://{nights.cli.place}/nothing.sock"}
    gone = nights.refresh("--manifest", nights.cli.path.name, environ=there)
    assert gone.status == 12
    lost = parsed(nights.metrics)
    assert value(lost, "warm_cache_refresh_exit_code") == 12
    assert value(lost, "warm_cache_refresh_last_success_timestamp_seconds") == success
    assert value(lost, "warm_cache_entries", family="deep_gemm") > 0
    assert list(nights.cli.place.glob(".metrics.prom*")) == []


def test_refresh_second_at_once_is_busy(cli: Cli) -> None:
    cli.manifest(shapes("mine"), cache=NO_JOBS)
    cli.warm()
    descriptor = open_lock(cli.root / "locks" / "run.lock")
    try:
        assert try_lock(descriptor)
        second = cli.start("refresh").end(20)
    finally:
        os.close(descriptor)
    assert second.status == 15
    assert "this refresh is skipped" in second.err
    assert second.seconds < 10


class Hook(http.server.BaseHTTPRequestHandler):
    """Takes what is posted, and answers what it was told to."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.taken.append((self.path, json.loads(body)))  # type: ignore[attr-defined]
        self.send_response(self.server.status)  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture
def hook() -> Iterator[Any]:
    server: Any = http.server.HTTPServer(("127.0.0.1", 0), Hook)
    server.taken, server.status = [], 200
    server.url = f"http://127.0.0.1:{server.server_address[1]}/services/SECRET-OF-THE-URL"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_refresh_webhook_failure_never_changes_outcome(cli: Cli, hook: Any) -> None:
    cli.manifest(shapes("mine"), cache=NO_JOBS)
    environ = {"WARM_CACHE_WEBHOOK": hook.url}
    done = cli.run("refresh", "--json", environ=environ)
    assert done.status == 0, done.said
    path, told = hook.taken[0]
    assert path == "/services/SECRET-OF-THE-URL"
    assert (told["verb"], told["exit"], told["tasks"]) == ("refresh", 0, {"warmed": 1})
    assert "exit 0, 1 warmed" in told["text"]
    hook.status = 500
    angry = cli.run("refresh", "--json", environ=environ)
    assert angry.status == 0
    assert "the webhook was not delivered: 127.0.0.1 answered 500" in angry.document["warnings"]
    nobody = cli.run("refresh", "--json", environ={"WARM_CACHE_WEBHOOK": "http://127.0.0.1:9/SECRET-OF-THE-URL"})
    assert nobody.status == 0
    wrong = cli.run("refresh", "--json", environ={"WARM_CACHE_WEBHOOK": "SECRET-OF-THE-URL"})
    assert wrong.status == 2
    assert "WARM_CACHE_WEBHOOK" in wrong.document["error"]["message"]
    for ended in (done, angry, nobody, wrong):
        assert "SECRET-OF-THE-URL" not in ended.out + ended.err


def parsed(path: Path) -> dict[str, list[tuple[dict[str, str], float]]]:
    """As Prometheus' own parser reads it."""
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(path.read_text(encoding="utf-8")):
        assert family.type == "gauge"
        assert family.documentation
        for sample in family.samples:
            found.setdefault(sample.name, []).append((dict(sample.labels), sample.value))
    return found


def value(samples: dict[str, list[tuple[dict[str, str], float]]], name: str, **labels: str) -> float:
    (found,) = [number for have, number in samples[name] if labels.items() <= have.items()]
    return found
