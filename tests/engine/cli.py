"""The program as people run it: a process of its own, a manifest, a cache root, and all that it leaves behind."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from builder.cli.main import main
from builder.engine.api import ContainerSpec, Mount
from builder.engine.client import Engine
from builder.host.deadlines import Deadline, poll
from builder.task import Shape

ROOT = Path(__file__).resolve().parents[2]
LABEL = "io.sglang.warm-cache."
SHAPE = str(Shape("GEMM_NT_F8F8BF16", 4096, 7168))
#: What stands before a container's own lines, on the console.
LOG_MARKS = ("  │", "  ┃")
#: Of the developer's shell, nothing may reach a builder under test.
FOREIGN = ("WARM_CACHE_", "GITHUB_", "HF_", "XDG_", "NO_COLOR")


@dataclass(frozen=True)
class Ended:
    """What a builder left: exit status, both streams, and how long it took, in seconds."""

    status: int
    out: str
    err: str
    seconds: float

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON document on stdout; anything else there fails."""
        document: dict[str, Any] = json.loads(self.out)
        assert document["exit"] == self.status
        return document

    def task(self, label: str) -> dict[str, Any]:
        (found,) = [task for task in self.document["tasks"] if task["label"] == label]
        return dict(found)

    @property
    def said(self) -> str:
        """Both streams without the lines of containers."""
        lines = (self.out + self.err).splitlines(keepends=True)
        return "".join(line for line in lines if not line.startswith(LOG_MARKS))


class Running:
    """A builder that has not ended. Its streams go to files, so that nothing has to be drained."""

    def __init__(self, argv: Sequence[str], place: Path, environ: Mapping[str, str], stdio: Mapping[str, int]) -> None:
        stem = place / f"streams-{time.monotonic_ns()}"
        self._files = stem.with_suffix(".out"), stem.with_suffix(".err")
        _heed_signals()
        self.started = time.time()
        self._begun = time.monotonic()
        with self._files[0].open("wb") as out, self._files[1].open("wb") as err:
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err, **stdio}
            self.process = subprocess.Popen(argv, cwd=place, env=dict(environ), **streams)

    @property
    def out(self) -> str:
        return self._files[0].read_text(encoding="utf-8", errors="replace")

    @property
    def err(self) -> str:
        return self._files[1].read_text(encoding="utf-8", errors="replace")

    def says(self, text: str, seconds: float = 30) -> None:
        """Waits until it has said this, on either stream."""
        wait_for(lambda: text in self.out + self.err or self.process.poll() is not None, seconds, f"the words {text!r}")
        assert text in self.out + self.err, f"it ended without saying {text!r}:\n{self.out}{self.err}"

    def send(self, signum: int) -> None:
        self.process.send_signal(signum)

    def end(self, seconds: float = 60) -> Ended:
        """Waits for its end; what does not end by itself is killed, and fails. No builder ever shows a traceback."""
        began = time.monotonic()
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {time.monotonic() - began:.0f} s:\n{self.out}{self.err}")
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
        ended = Ended(status, self.out, self.err, time.monotonic() - self._begun)
        assert "Traceback (most recent call last)" not in ended.said, ended.said
        return ended


#: What people type, with the interpreter that runs the tests.
PROGRAM = (sys.executable, "-m", "builder")


def request(engine: Engine, method: str, path: str, *names: str, **options: Any) -> Any:
    """Make a request that no method of `Engine` makes; its failures are the program's errors."""
    with engine._translated("cannot arrange the test"):
        return engine._request(method, path, *names, **options)


class Cli:
    """One user of the program. place: a directory of the test's own, which the engine can see too. host: the engine
    that its builders are told of; engine: where it really is, if not at DOCKER_HOST.
    """

    def __init__(self, place: Path, host: str, image: str, engine: str | None = None) -> None:
        self.place, self.image, self.host = place, image, host
        self._engine = engine or os.environ["DOCKER_HOST"]
        self.path, self.root, self.logs = place / "manifest.toml", place / "cache", place / "logs"
        self.store = place / "models"
        self._running: list[Running] = []
        (place / "run").mkdir()

    @property
    def environ(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        own = {
            "DOCKER_HOST": self.host,
            "HOME": str(self.place),
            "XDG_RUNTIME_DIR": str(self.place / "run"),
            "PYTHONPATH": str(ROOT),
            "LC_ALL": "C.UTF-8",
            "WARM_CACHE_CREATE": "1",
        }
        return {**kept, **own}

    # --- what there is to do -----------------------------------------------------------------------------------------

    def manifest(self, *tasks: Mapping[str, Any], **sections: Mapping[str, Any]) -> None:
        """Writes the manifest; sections are laid over the ones that fit the tiny image."""
        usual: dict[str, dict[str, Any]] = {
            "image": {"ref": self.image},
            "cache": {"root": str(self.root)},
            "gpus": {"count": 0},
            "container": {"network": "none", "shm_size": "64m"},
            "run": {"grace": "1s"},
            "defaults": {"env": {"SGLANG_JIT_DEEPGEMM_FAST_WARMUP": "1"}},
        }
        if self.store.is_dir():
            usual["models"] = {"store": str(self.store)}
        for name, section in sections.items():
            usual[name] = {**usual.get(name, {}), **section}
        lines = ["schema = 1"]
        for name, section in usual.items():
            lines += [f"[{name}]", *(f"{key} = {toml(value)}" for key, value in section.items() if value is not None)]
        for task in tasks:
            lines += ["[[task]]", *(f"{key} = {toml(value)}" for key, value in task.items())]
        self.path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def model(self, name: str) -> str:
        """Puts a model into the store, as the hub keeps one."""
        home = self.store / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = home / "snapshots" / "0123abc"
        (home / "refs").mkdir(parents=True)
        (home / "blobs").mkdir()
        snapshot.mkdir(parents=True)
        (home / "refs" / "main").write_text("0123abc")
        (home / "blobs" / "c0").write_text('{"num_hidden_layers": 61}')
        (home / "blobs" / "w0").write_bytes(b"not really")
        (snapshot / "config.json").symlink_to("../../blobs/c0")
        (snapshot / "model.safetensors").symlink_to("../../blobs/w0")
        return name

    # --- running it --------------------------------------------------------------------------------------------------

    def argv(self, verb: str, *options: str) -> list[str]:
        logs = ["--log-dir", str(self.logs)] if verb in ("warm", "refresh") else []
        return [verb, "--manifest", str(self.path), *logs, *options]

    def start(
        self,
        verb: str,
        *options: str,
        environ: Mapping[str, str] | None = None,
        program: Sequence[str] = PROGRAM,
        **stdio: int,
    ) -> Running:
        """Starts a builder. program: what comes before its arguments; stdio: file descriptors, instead of files."""
        argv = [*program, *self.argv(verb, *options)]
        running = Running(argv, self.place, {**self.environ, **(environ or {})}, stdio)
        self._running.append(running)
        return running

    def run(self, verb: str, *options: str, environ: Mapping[str, str] | None = None, seconds: float = 90) -> Ended:
        """From start to end, and nothing of it left."""
        ended = self.start(verb, *options, environ=environ).end(seconds)
        self.left_nothing()
        return ended

    def here(self, verb: str, *options: str, environ: Mapping[str, str] | None = None) -> int:
        """In this very process, for tests that reach into it; its exit status."""
        return main(self.argv(verb, *options), environ={**self.environ, **(environ or {})})

    def warm(self, *options: str, **how: Any) -> Ended:
        """`warm` that succeeds, with its document."""
        ended = self.run("warm", "--json", *options, **how)
        assert ended.status == 0, ended.said
        return ended

    def close(self) -> None:
        """Ends what a failed test left running, and removes its containers."""
        for running in self._running:
            if running.process.poll() is None:
                running.process.kill()
                running.process.wait()
        with self.engine() as engine:
            for found in self.containers(engine):
                engine.remove(found, force=True)

    # --- what it leaves ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def engine(self) -> Iterator[Engine]:
        """The engine itself, whatever the builder under test is told."""
        engine = Engine(self._engine)
        try:
            yield engine.connect()
        finally:
            engine.close()

    def containers(self, engine: Engine) -> list[str]:
        """Ids of this user's containers in any state: their lease lies in this place, or they read for its builders."""
        readers = tuple(f"warm-cache-read-{running.process.pid}-" for running in self._running)
        return [
            found.id
            for found in engine.containers([f"{LABEL}run"])
            if f'"{self.place}/' in found.labels.get(f"{LABEL}lease", "") or found.name.startswith(readers or ("\0",))
        ]

    def left_nothing(self) -> None:
        """After a builder's end: no container in any state, no lease, the run lock free, every log whole."""
        with self.engine() as engine:
            assert self.containers(engine) == []
        assert list((self.place / "run").glob("*/*")) == []
        assert self.lock_is_free()
        for log in self.logs.glob("*.log"):
            assert log.read_bytes()[-1:] in (b"\n", b"")

    def lock_is_free(self) -> bool:
        path = self.root / "locks" / "run.lock"
        if not path.exists():
            return True
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    def markers(self) -> list[Path]:
        return sorted(self.root.glob("markers/*/*.json"))

    def log(self, label: str) -> str:
        return (self.logs / f"{label}.log").read_text(encoding="utf-8")

    def last_lines(self, label: str) -> str:
        """The last line of either stream of a task's log that says anything."""
        streams = {line[:4]: line for line in self.log(label).splitlines() if line[5:].strip()}
        return "\n".join(streams.values())

    def entries(self, family: str = "deep_gemm") -> list[Path]:
        """Entries of DeepGEMM, or whatever lies directly in another family's directories."""
        below = "cache/*" if family == "deep_gemm" else "*"
        return sorted(self.root.glob(f"{family}/*/{below}"))


# --- tasks -----------------------------------------------------------------------------------------------------------


def shapes(name: str = "shapes", play: str = "", **more: Any) -> dict[str, Any]:
    """The quickest task that really fills a family: one shape of DeepGEMM, no model."""
    return {"model": f"org/{name}", "recipe": "shapes", "shapes": [SHAPE], "env": _play(play), **more}


def command(name: str, code: str, **more: Any) -> dict[str, Any]:
    """This python code, which ends by printing KERNELS READY. It claims nothing unless more says so."""
    argv = ["python3", "-c", code]
    known = {"recipe": "command", "success": "KERNELS READY", "families": []}
    return {"model": f"org/{name}", "argv": argv, **known, **more}


def server(model: str, recipe: str = "compile-deep-gemm", play: str = "", **more: Any) -> dict[str, Any]:
    """A fake server of this model, which has to be in the store."""
    return {"model": model, "recipe": recipe, "argv": ["--tp", "8"], "env": _play(play), **more}


def _play(play: str) -> dict[str, str]:
    return {"TINY_PLAY": play} if play else {}


#: Python code that goes on once there is a file ``go`` in the cache root.
GATE = "import os, time\nwhile not os.path.exists('/jit/go'): time.sleep(0.02)\n"
READY = "print('KERNELS READY')\n"

# --- details ---------------------------------------------------------------------------------------------------------


#: What an engine leaves to a container by itself (moby's oci/caps/defaults.go).
DEFAULT_CAPABILITIES = (
    *("CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SETFCAP", "SETPCAP"),
    *("NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE"),
)


def job_arguments(printed: str) -> tuple[tuple[Mount, ...], dict[str, str]]:
    """Mounts and variables among the arguments of docker run that `env` or `view create` printed."""
    words = iter(shlex.split(printed))
    mounts, env, options = [], {}, []
    for flag, value in zip(words, words, strict=True):
        if flag == "-e":
            name, _, env[name] = value.partition("=")
        elif flag == "--mount":
            fields = dict(part.partition("=")[::2] for part in value.split(","))
            kind: Any = fields["type"]
            mounts.append(Mount(fields["src"], fields["dst"], kind, "readonly" in fields))
        else:
            options.append(f"{flag} {value}")
    assert options == ["--security-opt no-new-privileges", "--cap-drop MKNOD"]
    return tuple(mounts), env


def run_job(engine: Engine, image: str, printed: str, script: str, *mounts: Mount, **env: str) -> str:
    """What a shell says in a container with these arguments; its end has to be a good one."""
    printed_mounts, printed_env = job_arguments(printed)
    spec = ContainerSpec(
        image=image,
        name=f"warm-cache-test-job-{os.urandom(4).hex()}",
        command=["sh", "-ec", script],
        env={**printed_env, "SGLANG_JIT_DEEPGEMM_FAST_WARMUP": "1", **env},
        labels={f"{LABEL}test": "job"},
        mounts=(*printed_mounts, *mounts),
        network="none",
        capabilities=DEFAULT_CAPABILITIES,
    )
    container = engine.create(spec)
    try:
        engine.start(container)
        wait_for(lambda: engine.state(container).finished, 60, "the end of the job")
        log = b"".join(part for _, part in engine.log_frames(container, follow=False)).decode()
        assert engine.state(container).exit_code == 0, log
        return log
    finally:
        engine.remove(container, force=True)


def wait_for(predicate: Callable[[], object], seconds: float, what: str) -> None:
    if not poll(predicate, Deadline(seconds), every=0.02):
        pytest.fail(f"{what} did not come within {seconds:.0f} s")


def toml(value: object) -> str:
    """JSON, but for tables."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)


def _heed_signals() -> None:
    """Whatever ran the tests (nohup, a shell's background job) may ignore them, and a child would as well."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is signal.SIG_IGN:
            signal.signal(signum, signal.SIG_DFL)


@pytest.fixture(name="cli")
def a_cli(tmp_path: Path, docker_host: str, tiny_image: str) -> Iterator[Cli]:
    cli = Cli(tmp_path, docker_host, tiny_image)
    yield cli
    cli.close()
