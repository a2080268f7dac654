"""What `fleet slurm` prints, run by a real Slurm of three nodes, with a real engine: ends, requeues and lost nodes.

The nodes share a kernel, an engine and a file system, and so the cache root: as on a shared file system, and harder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.engine.cli import GATE, LABEL, READY, ROOT, Cli, command

pytestmark = pytest.mark.engine

SCRIPT = ROOT / "docker" / "stand-in" / "slurm" / "slurm.sh"
#: The program of this checkout, as nodes find it.
PROGRAM = Path(sys.executable).parent / "warm-cache"

Until = Callable[..., None]


class Slurm:
    """Three nodes. place: its folder; the Prolog of its nodes is `fleet prolog`'s, whose registry does not answer."""

    def __init__(self, place: Path) -> None:
        self.place = place
        where = ["--profile", "stand-in", "--cache", str(place / "root"), "--program", str(PROGRAM)]
        words = [str(PROGRAM), "fleet", "prolog", "127.0.0.1:1/jit", *where]
        prolog = place / "prolog"
        prolog.write_bytes(subprocess.run(words, check=True, stdout=subprocess.PIPE, timeout=60).stdout)
        prolog.chmod(0o755)
        done = subprocess.run(
            [SCRIPT, "up", place / "slurm", "--prolog", prolog], capture_output=True, text=True, timeout=300
        )
        if done.returncode:
            reason = f"no Slurm: {done.stderr.strip()[-300:]}"
            if os.environ.get("WARM_CACHE_TESTS_COMPLETE") == "1":
                pytest.fail(f"{reason}, and WARM_CACHE_TESTS_COMPLETE=1 says that every test must run", pytrace=False)
            pytest.skip(reason)
        self.conf = dict(line.split("=", 1) for line in done.stdout.splitlines())["SLURM_CONF"]

    def __call__(self, *words: str, **environ: str) -> str:
        done = subprocess.run(
            words, env={**os.environ, "SLURM_CONF": self.conf, **environ}, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, user: User, *options: str) -> str:
        """Submit the printed script; returns the job's id."""
        return self("sbatch", "--parsable", *options, str(user.script), **user.environ).strip()

    def job(self, number: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self("scontrol", "show", "job", number)))

    def state(self, number: str) -> str:
        return self.job(number)["JobState"]

    def node(self, name: str) -> str:
        return self("sinfo", "-h", "-n", name, "-o", "%T").strip()

    def end(self) -> None:
        subprocess.run([SCRIPT, "down", self.place / "slurm"], check=True, timeout=60)


class User:
    """One user's manifest and printed script. logs: where reports are."""

    def __init__(self, cli: Cli, *tasks: str) -> None:
        cli.manifest(*(command(f"task{at}", code) for at, code in enumerate(tasks)), run={"budget": "10m"})
        self.cli, self.logs = cli, cli.place / "reports"
        self.logs.mkdir()
        self.script = cli.place / "warm.sbatch"
        self.environ = {name: cli.environ[name] for name in ("DOCKER_HOST", "XDG_RUNTIME_DIR", "HOME")}
        words = ["fleet", "slurm", "--manifest", str(cli.path), "--logs", str(self.logs), "--program", str(PROGRAM)]
        words += [word for name in self.environ for word in ("--pass-variable", name)]
        self.script.write_bytes(subprocess.run([PROGRAM, *words], check=True, stdout=subprocess.PIPE).stdout)

    def report(self, number: str) -> Path:
        (found,) = self.logs.glob(f"warm-cache-h*-{number}.json")
        return found

    def exit(self, number: str) -> int:
        return int(json.loads(self.report(number).read_text())["exit"])

    def runs(self) -> bool:
        """Whether a task has its container."""
        with self.cli.engine() as engine:
            found = [each for each in engine.containers([f"{LABEL}mode=run"]) if each.id in self.cli.containers(engine)]
            return bool(found)

    def summary(self) -> subprocess.CompletedProcess[str]:
        reports = sorted(map(str, self.logs.glob("*.json")))
        return subprocess.run([PROGRAM, "fleet", "summary", *reports], capture_output=True, text=True, timeout=60)


@pytest.fixture(autouse=True)
def root(known_image: Path, tmp_path: Path) -> None:
    shutil.copytree(known_image, tmp_path / "cache")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    found = Slurm(tmp_path_factory.mktemp("slurm"))
    yield found
    found.end()


def test_every_node_has_its_job_and_one_of_them_warms(slurm: Slurm, cli: Cli, until: Until) -> None:
    user = User(cli, READY, READY)
    jobs = [slurm.submit(user, "-w", node) for node in ("h1", "h2", "h3")]
    until(lambda: {slurm.state(job) for job in jobs} == {"COMPLETED"}, seconds=60, what="the end of three jobs")
    assert [slurm.job(job)["ExitCode"] for job in jobs] == ["0:0"] * 3
    states = [{task["state"] for task in json.loads(user.report(job).read_text())["tasks"]} for job in jobs]
    assert sorted(states, key=str) == [{"warm"}, {"warm"}, {"warmed"}], "the others waited for its lock"
    summary = user.summary()
    assert summary.returncode == 0 and summary.stdout.endswith("3 reports, exit 0\n")
    assert {slurm.node(node) for node in ("h1", "h2", "h3")} == {"idle"}, "the Prolog failed, and drained no node"
    cli.left_nothing()


def test_job_that_is_cancelled_ends_its_container_and_reports(slurm: Slurm, cli: Cli, until: Until) -> None:
    user = User(cli, GATE + READY)
    job = slurm.submit(user)
    until(user.runs, seconds=30, what="the container of the job")
    slurm("scancel", job)
    until(lambda: slurm.state(job) == "CANCELLED", what="the end of the job")
    until(lambda: not user.runs(), seconds=5, what="the end of its container")
    assert user.exit(job) == 143
    assert user.summary().returncode == 143
    cli.left_nothing()


def test_job_that_is_requeued_goes_on(slurm: Slurm, cli: Cli, until: Until) -> None:
    user = User(cli, READY, GATE + READY)
    job = slurm.submit(user)
    until(lambda: len(cli.markers()) == 1 and user.runs(), seconds=30, what="the first task of the job")
    slurm("scontrol", "requeue", job)
    until(lambda: slurm.state(job) == "PENDING", what="the requeue")
    assert not user.runs() and user.exit(job) == 143
    (cli.root / "go").touch()
    slurm("scontrol", "update", f"jobid={job}", "StartTime=now")  # two minutes later by itself
    until(lambda: slurm.state(job) == "COMPLETED", seconds=30, what="the second start")
    assert slurm.job(job)["Restarts"] == "1"
    document = json.loads(user.report(job).read_text())
    assert [task["state"] for task in document["tasks"]] == ["warm", "warmed"]
    cli.left_nothing()


def test_node_that_is_drained_ends_its_job_and_gets_no_other(slurm: Slurm, cli: Cli, until: Until) -> None:
    user = User(cli, GATE + READY)
    first = slurm.submit(user, "-w", "h2")
    until(user.runs, seconds=30, what="the container of the job")
    slurm("scontrol", "update", "nodename=h2", "state=drain", "reason=test")
    second = slurm.submit(user, "-w", "h2")
    (cli.root / "go").touch()
    until(lambda: slurm.state(first) == "COMPLETED", seconds=30, what="the end of the job on the drained node")
    assert slurm.state(second) == "PENDING"
    slurm("scontrol", "update", "nodename=h2", "state=resume")
    until(lambda: slurm.state(second) == "COMPLETED", seconds=30, what="the job after the drain")
    assert (user.exit(first), user.exit(second)) == (0, 0)


def test_program_of_a_lost_node_and_the_one_that_replaces_it_keep_apart(slurm: Slurm, cli: Cli, until: Until) -> None:
    user = User(cli, GATE + READY)
    job = slurm.submit(user, "--exclude=h1,h2")
    until(user.runs, seconds=30, what="the container of the job")
    subprocess.run([SCRIPT, "lose", slurm.place / "slurm", "h3"], check=True, timeout=30)
    # What slurmctld does after SlurmdTimeout, at once.
    slurm("scontrol", "update", "nodename=h3", "state=down", "reason=test")
    until(lambda: slurm.state(job) == "PENDING", what="the requeue of the lost job")
    assert user.runs(), "no slurmd is there to end it"
    slurm("scontrol", "update", f"jobid={job}", "ExcNodeList=", "StartTime=now")
    until(lambda: len(list(user.logs.glob("*.json"))) == 2, seconds=30, what="the start on another node")
    (cli.root / "go").touch()
    until(lambda: slurm.state(job) == "COMPLETED", seconds=30, what="the end on another node")
    reports = [json.loads(path.read_text()) for path in user.logs.glob("*.json") if path.stat().st_size]
    assert {task["state"] for report in reports for task in report["tasks"]} <= {"warm", "warmed"}
    assert len(cli.markers()) == 1 and user.summary().returncode == 0
    subprocess.run([SCRIPT, "return", slurm.place / "slurm", "h3"], check=True, timeout=30)
    until(lambda: slurm.node("h3") == "idle", what="the return of the node")
    cli.left_nothing()
