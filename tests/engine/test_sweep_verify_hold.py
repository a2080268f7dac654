"""A cache root between warm-ups: what killed builders leave goes, damage is found and repaired, and jobs are safe."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from builder.cache import layout
from builder.cache.families import FAMILIES
from builder.engine.client import Engine
from tests.engine.cli import GATE, READY, Cli, Running, command, server, shapes, wait_for

pytestmark = pytest.mark.engine

#: A build that never ends, as nvcc leaves one, and a Triton write cut short.
HALF = (
    "import os, pathlib\n"
    "build = pathlib.Path(os.environ['DG_JIT_CACHE_DIR'], 'tmp', '4711-dead')\n"
    "build.mkdir(parents=True)\n"
    "(build / 'kernel.cu').write_text('half')\n"
    "cut = pathlib.Path(os.environ['TRITON_CACHE_DIR'], 'A' * 52, 'tmp.pid_7_k')\n"
    "cut.mkdir(parents=True)\n"
    "(cut / 'k.cubin').write_text('half')\n"
    "print('at it', flush=True)\n"
)
KERNELS = "from triton.cache import compile_kernel\nfor k in 'abcde': compile_kernel(k, 'x')\n"
NO_JOBS = {"job_max": "0s"}
#: What one toolchain has in a root: a task prepares every family that it may vouch for.
DIRECTORIES = sum(family.claimable for family in FAMILIES)


def aged(path: Path) -> None:
    """As if nobody had written to it for an hour."""
    for below in (*path.rglob("*"), path) if path.is_dir() else (path,):
        os.utime(below, (time.time() - 3600.0,) * 2)


def lines(cli: Cli, verb: str, *options: str) -> list[str]:
    ended = cli.run(verb, *options)
    assert ended.status == 0, ended.said
    return ended.said.splitlines()


def aside(cli: Cli) -> list[Path]:
    return sorted(cli.root.glob("aside/*/*"))


@pytest.fixture
def other(cli: Cli, tmp_path_factory: pytest.TempPathFactory, docker_host: str, tiny_image: str) -> Iterator[Cli]:
    """Somebody else on this machine, with another state directory and the same cache root."""
    another = Cli(tmp_path_factory.mktemp("other"), docker_host, tiny_image)
    another.root = cli.root
    yield another
    another.close()


# --- sweep -----------------------------------------------------------------------------------------------------------


def killed(cli: Cli) -> None:
    """A builder that got SIGKILL in the middle of a compile."""
    cli.manifest(command("half", HALF + GATE))
    builder = cli.start("warm")
    builder.says("at it")
    builder.send(signal.SIGKILL)
    builder.process.wait()
    aged(next(cli.root.glob("deep_gemm/*/tmp/4711-dead")))
    aged(next(cli.root.glob("triton/*/*/tmp.pid_7_k")))


@pytest.mark.alone
def test_sweep_removes_leftovers_of_killed_builder(cli: Cli) -> None:
    killed(cli)
    with cli.engine() as engine:
        assert len(cli.containers(engine)) == 1
    ended = cli.run("sweep", "--json")
    document = ended.document
    assert ended.status == 0
    assert [(found["task"], found["removed"]) for found in document["containers"] if "-half" in found["name"]] == [
        ("half", True)
    ]
    assert {(found["family"], found["path"].rpartition("/")[2]) for found in document["swept"]} == {
        ("deep_gemm", "4711-dead"),
        ("triton", "tmp.pid_7_k"),
    }
    assert "build abandoned by a process that was killed" in ended.err
    assert len(aside(cli)) == 2
    assert not list(cli.root.glob("deep_gemm/*/tmp/*"))
    assert lines(cli, "sweep")[-1] == f"{cli.root}: 0 quarantined, 0 removed"


def test_sweep_keeps_entries_in_progress(cli: Cli) -> None:
    killed(cli)
    build = next(cli.root.glob("deep_gemm/*/tmp/4711-dead"))
    (build / "kernel.cu").write_text("written just now")
    assert [found["family"] for found in cli.run("sweep", "--json").document["swept"]] == ["triton"]
    assert build.is_dir()


def test_sweep_keeps_container_of_living_builder(cli: Cli, other: Cli) -> None:
    cli.manifest(command("one", HALF + GATE + READY))
    other.manifest(command("one", READY), run={"lock_timeout": "1s"})
    builder = cli.start("warm")
    builder.says("at it")
    with cli.engine() as engine:
        (alive,) = cli.containers(engine)
        for sweeper in (cli, other):
            ended = sweeper.start("sweep", "--json", "--lock-timeout", "1s").end()
            assert ended.status == 15
            assert f"pid {builder.process.pid}" in ended.document["error"]["message"]
            assert cli.containers(engine) == [alive]
            assert engine.state(alive).status == "running"
        assert not aside(cli)
    (cli.root / "go").touch()
    assert builder.end().status == 0
    cli.left_nothing()


def test_two_sweeps_at_once_both_succeed(cli: Cli, other: Cli) -> None:
    killed(cli)
    other.manifest(command("half", READY))
    # Both see the same dead builder's lease file, each from its own state directory.
    running = [one.start("sweep", "--json") for one in (cli, other)]
    ended = [one.end() for one in running]
    assert [one.status for one in ended] == [0, 0], [one.said for one in ended]
    swept = [found["path"] for one in ended for found in one.document["swept"]]
    assert len(swept) == len(set(swept)) == 2
    assert len(aside(cli)) == 2
    cli.left_nothing()


def test_sweep_removes_quarantine_after_job_max_unless_held(cli: Cli) -> None:
    killed(cli)
    lines(cli, "sweep")
    assert len(aside(cli)) == 2
    lines(cli, "sweep")
    assert len(aside(cli)) == 2  # no job has had the time to end
    cli.manifest(command("half", READY), cache=NO_JOBS)
    job = cli.start("hold", "--", "sh", "-c", "echo job; exec sleep 60")
    job.says("job\n")
    held = lines(cli, "sweep")
    assert len([line for line in held if line.endswith(": a test job holds the cache")]) == 2
    assert len(aside(cli)) == 2
    job.send(signal.SIGTERM)
    assert job.end(10).status == 128 + signal.SIGTERM
    assert lines(cli, "sweep")[-1] == f"{cli.root}: 0 quarantined, 2 removed"
    assert not aside(cli)


def test_sweep_and_verify_without_cache_create_nothing(cli: Cli, volume: str) -> None:
    for cache in ({}, {"root": None, "volume": volume}):
        cli.manifest(shapes(), cache=cache)
        assert "there is no cache at " in lines(cli, "sweep")[-1]
        for options in ((), ("--repair",)):
            ended = cli.run("verify", *options)
            assert (ended.status, "error: there is no " in ended.err) == (12, True), ended.said
    cli.root.mkdir()
    cli.manifest(shapes())
    assert "there is no cache at " in lines(cli, "sweep")[-1]
    for verb in ("status", "verify", "prune"):
        ended = cli.run(verb)
        assert (ended.status, f"there is no cache in {cli.root}" in ended.err) == (12, True), ended.said
    assert not list(cli.root.iterdir())
    with cli.engine() as engine:
        assert not engine.has_volume(volume)


def test_newer_layout_is_refused_and_unchanged(cli: Cli) -> None:
    layout.prepare(cli.root)
    (cli.root / "layout.json").write_text('{"schema": 2, "id": "theirs"}')
    cli.manifest(shapes())
    for verb in (["sweep"], ["verify", "--repair"]):
        ended = cli.run(*verb, "--json")
        assert ended.status == 12
        assert "has schema 2, this program knows 1" in ended.document["error"]["problems"][0]["text"]


@pytest.mark.parametrize("verb", ["sweep", "verify"])
def test_sweep_without_engine_is_preflight_error(cli: Cli, verb: str) -> None:
    cli.manifest(shapes())
    assert cli.run(verb, environ={"DOCKER_HOST": f"unix://{cli.place}/nothing.sock"}).status == 12


# --- verify ----------------------------------------------------------------------------------------------------------


def files_family(cli: Cli) -> Path:
    """A directory of a family of plain files, which the tiny image knows and does not fill."""
    return next(path for path in cli.root.glob("inductor/*") if path.is_dir())


def damage(cli: Cli) -> dict[tuple[str, str], str]:
    """One of each kind: (family, entry) → a part of its problem."""
    gemm = cli.entries()
    triton = sorted(path for path in cli.root.glob("triton/*/*") if path.is_dir())
    inductor = files_family(cli)
    for name in ("good.so", "cut.so", "empty.py"):
        (inductor / "ab").mkdir(exist_ok=True)
        (inductor / "ab" / name).write_bytes((gemm[0] / "kernel.cubin").read_bytes())
    (gemm[0] / ".committed").unlink()
    _cut(gemm[1] / "kernel.cubin")
    (gemm[2] / "kernel.cubin").unlink()
    (gemm[3] / "meta.json").write_text("{")
    (gemm[4] / "kernel.cu").write_text("")
    with (gemm[5] / "kernel.cubin").open("ab") as file:
        file.write(b"\0warm_cache_plan_only\0")
    _cut(next(triton[0].glob("__grp__*")))
    next(triton[1].glob("*.ptx")).unlink()
    _cut(next(triton[2].glob("*.cubin")))
    next(triton[3].glob("__grp__*")).unlink()
    _cut(inductor / "ab" / "cut.so")
    (inductor / "ab" / "empty.py").write_text("")
    for path in (triton[3], inductor):
        aged(path)
    problems = ["no .committed", "kernel.cubin is cut", "kernel.cubin is missing", "meta.json is not JSON", "is empty"]
    problems.append("kernel.cubin is of the plan pass of a prebuild, and no kernel")
    found = {("deep_gemm", f"cache/{path.name}"): text for path, text in zip(gemm, problems)}  # noqa: B905
    problems = ["is not JSON", ".ptx is missing", ".cubin is cut", "no __grp__ file"]
    found |= {("triton", path.name): text for path, text in zip(triton, problems)}  # noqa: B905
    return found | {("inductor", "ab/cut.so"): "cut.so is cut", ("inductor", "ab/empty.py"): "empty.py is empty"}


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def test_verify_repair_quarantines_damage_and_warm_recompiles(cli: Cli) -> None:
    cli.manifest(server(cli.model("org/m")), command("triton", KERNELS + READY, families=["triton"]))
    first = cli.warm()
    count = {label: first.task(label)["entries_added"] for label in ("m-tp8", "triton")}
    assert count == {"m-tp8": 11, "triton": 5}
    assert cli.run("verify").said == f"{cli.root}: 16 entries in {DIRECTORIES} family directories, all valid\n"

    expected = damage(cli)
    foreign = [cli.root / "notes.txt", cli.root / "deep_gemm" / "mine" / "cache" / "k.0", cli.root / "theirs"]
    foreign[0].write_text("not a cache")
    foreign[1].mkdir(parents=True)
    foreign[2].mkdir()
    markers = {path: path.read_bytes() for path in cli.markers()}

    ended = cli.run("verify", "--json")
    assert ended.status == 10
    bad = {(found["family"], found["entry"]): found["problem"] for found in ended.document["bad"]}
    assert bad.keys() == expected.keys()
    assert [(key, bad[key]) for key in bad if expected[key] not in bad[key]] == []
    assert ended.document["error"]["message"].startswith(
        f"12 bad of 19 entries in {DIRECTORIES} family directories; run "
    )
    shown = cli.run("verify")
    for _, entry in expected:
        assert entry in shown.out
    assert not aside(cli)

    ended = cli.run("verify", "--repair", "--json")
    assert (ended.status, ended.document["bad"]) == (0, []), ended.said
    assert {(found["family"], found["path"]) for found in ended.document["repaired"]} == expected.keys()
    assert len(aside(cli)) == len(expected)
    assert {path: path.read_bytes() for path in cli.markers()} == markers
    assert (files_family(cli) / "ab" / "good.so").exists()

    cold = cli.run("check", "--json")
    assert cold.status == 10
    assert cold.task("m-tp8")["reason"].startswith("entries: 6 missing, 0 invalid")
    assert cold.task("triton")["reason"].startswith("entries: 4 missing, 0 invalid")
    again = cli.warm()
    assert {label: again.task(label)["entries_added"] for label in count} == {"m-tp8": 6, "triton": 4}
    assert "quarantined" not in again.err
    assert cli.run("verify").status == 0
    assert all(os.path.lexists(path) for path in foreign)
    assert foreign[0].read_text() == "not a cache"


def test_verify_names_entries_in_progress_and_keeps_them(cli: Cli) -> None:
    cli.manifest(shapes())
    cli.warm()
    (files_family(cli) / "young.so").touch()
    ended = cli.run("verify", "--repair", "--json")
    assert ended.status == 10
    assert [found["problem"] for found in ended.document["bad"]] == [
        "young.so is empty (it was written to just now, and may be in progress)"
    ]
    aged(files_family(cli))
    assert cli.run("verify", "--repair").status == 0


def test_verify_repair_waits_for_run_lock_and_reading_does_not(cli: Cli) -> None:
    cli.manifest(shapes())
    cli.warm()
    with layout.run_lock(cli.root).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert cli.start("verify", "--repair", "--lock-timeout", "1s").end().status == 15
        assert cli.start("sweep", "--lock-timeout", "1s").end().status == 15
        assert cli.start("verify").end().status == 0


# --- where the builder cannot open the root's files ------------------------------------------------------------------


def test_volume_sweep_verify_hold_run_in_containers(cli: Cli, volume: str) -> None:
    tasks: list[dict[str, Any]] = [
        shapes(),
        command(
            "break",
            "import pathlib, os\n"
            "for path in sorted(pathlib.Path(os.environ['DG_JIT_CACHE_DIR'], 'cache').iterdir())[:2]:\n"
            "    (path / 'kernel.cubin').unlink()\n" + READY,
        ),
    ]
    place = {"root": None, "volume": volume}
    cli.manifest(*tasks, cache=place)
    missing = cli.run("hold", "--", "echo", "ran")
    assert (missing.status, missing.out) == (0, "ran\n")
    assert f"there is no volume {volume} yet" in missing.err
    assert cli.run("warm").status == 11  # the second task breaks what the first one warmed, and the run says so

    ended = cli.run("verify", "--json")
    assert ended.status == 10
    assert [found["problem"] for found in ended.document["bad"]] == ["kernel.cubin is missing"] * 2
    repaired = cli.run("verify", "--repair", "--json")
    assert (repaired.status, len(repaired.document["repaired"])) == (0, 2), repaired.said

    cli.manifest(*tasks, cache={**place, **NO_JOBS})
    job = cli.start("hold", "--", "sh", "-c", "echo job; exec sleep 60")
    job.says("job\n", 60)
    with cli.engine() as engine:
        assert _labels(engine, cli) == ["hold"]
    swept = cli.start("sweep", "--json").end()
    assert (swept.status, swept.document["removed"]) == (0, [])
    assert {found["why"] for found in swept.document["kept"]} == {"a test job holds the cache"}
    job.send(signal.SIGTERM)
    assert job.end(20).status == 128 + signal.SIGTERM
    cli.left_nothing()
    assert len(cli.run("sweep", "--json").document["removed"]) == 2
    assert cli.run("warm", "--only", "shapes", "--json").task("shapes")["entries_added"] == 2


def _labels(engine: Engine, cli: Cli) -> list[str]:
    mine = cli.containers(engine)
    found = engine.containers(["io.sglang.warm-cache.lease"])
    return [one.labels["io.sglang.warm-cache.task"] for one in found if one.id in mine]


@pytest.fixture
def held(cli: Cli, volume: str) -> Running:
    """A job on a volume, at work until there is a file ``go``."""
    cli.manifest(shapes(), cache={"root": None, "volume": volume})
    cli.warm()
    job = cli.start("hold", "--", "sh", "-c", "echo job; while [ ! -e go ]; do sleep 0.05; done; exit 3")
    job.says("job\n", 60)
    return job


def test_hold_container_killed_is_a_warning(cli: Cli, held: Running) -> None:
    with cli.engine() as engine:
        (container,) = cli.containers(engine)
        engine.stop(container, 0)
        wait_for(lambda: cli.containers(engine) == [], 20, "the holder's end")
    (cli.place / "go").touch()
    ended = held.end(20)
    assert (ended.status, ended.out) == (3, "job\n")
    # The engine sends SIGTERM and at once SIGKILL: the container ends by whichever comes first.
    assert "warning: the hold was lost on the way: the container that holds the hold was ended by SIG" in ended.err
    cli.left_nothing()


@pytest.mark.alone
def test_hold_killed_removes_its_container(cli: Cli, held: Running) -> None:
    with cli.engine() as engine:
        (container,) = cli.containers(engine)
        held.send(signal.SIGKILL)
        held.process.wait()
        wait_for(lambda: engine.state(container).finished, 5, "the holder's end")
        assert engine.state(container).exit_code == 70
    (cli.place / "go").touch()
    lines(cli, "sweep")


def test_hold_of_unreadable_lock_file_uses_container(cli: Cli) -> None:
    layout.prepare(cli.root)
    layout.hold_lock(cli.root).unlink()  # as an older builder left it
    cli.manifest(shapes())
    job = cli.start("hold", "--", "sh", "-c", "echo job; while [ ! -e go ]; do sleep 0.05; done")
    job.says("job\n", 60)
    with layout.hold_lock(cli.root).open() as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    (cli.place / "go").touch()
    ended = job.end(20)
    assert (ended.status, ended.out, ended.err) == (0, "job\n", "")
    cli.left_nothing()


def test_hold_without_image_runs_the_command(cli: Cli, volume: str) -> None:
    with cli.engine() as engine:
        engine._api.create_volume(volume)
    cli.manifest(shapes(), cache={"root": None, "volume": volume}, image={"ref": "nobody/has:this"})
    ended = cli.run("hold", "--", "sh", "-c", "echo ran; exit 4")
    assert (ended.status, ended.out) == (4, "ran\n")
    assert "warning: the cache is not held: nobody/has:this is not on this engine" in ended.err
