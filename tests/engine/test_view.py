"""Views: whatever a job does to the cache that it was given, the warm root stays as it was, and the audit names it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import signal
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from builder.cache import layout
from builder.engine.api import ContainerSpec
from builder.engine.client import Engine
from builder.engine.errors import NotFoundError
from builder.manifest.load import load
from tests.engine.cli import (
    DEFAULT_CAPABILITIES,
    GATE,
    LABEL,
    READY,
    Cli,
    command,
    job_arguments,
    shapes,
    wait_for,
)

pytestmark = pytest.mark.engine

KERNELS = "from triton.cache import compile_kernel\nfor k in 'abcde': compile_kernel(k, 'x')\n"
#: A file that a program of the family `inductor`, which writes in place, leaves.
IN_PLACE = "import os, pathlib\npathlib.Path(os.environ['TORCHINDUCTOR_CACHE_DIR'], 'one.py').write_text('first')\n"
WARM = (
    shapes(),
    command("triton", KERNELS + IN_PLACE + READY, families=["triton"]),
)

#: What the shapes task warmed, asked for again: every kernel is hit.
HITS = (
    "import os; os.environ['SGLANG_IN_DEEPGEMM_PRECOMPILE_STAGE'] = '1'\n"
    "import types\n"
    "from sglang.srt.layers.deep_gemm_wrapper import compile_utils as cu\n"
    "cu.get_schedule = lambda: types.SimpleNamespace(chunked_prefill_size=8192)\n"
    "cu.get_device = lambda: types.SimpleNamespace(base_gpu_id=0)\n"
    "cu.update_deep_gemm_config(0)\n"
    "def ask(kernel, n, k, groups): cu._maybe_compile_deep_gemm_one_type_all("
    "cu.DeepGemmKernelType[kernel], n, k, groups)\n"
    "ask('GEMM_NT_F8F8BF16', 4096, 7168, 1)\n"
)
NEW_SHAPE = HITS + "ask('GROUPED_GEMM_NT_F8F8BF16_MASKED', 512, 7168, 8)\n"

#: Everything that a hostile job can do to the files that it reaches, by family and kind of harm.
HOSTILE = """
import os, pathlib, shutil, socket, stat
jit = pathlib.Path('/jit')
gemm = pathlib.Path(os.environ['SGLANG_DG_CACHE_DIR'])
triton = pathlib.Path(os.environ['TRITON_CACHE_DIR'])
one, two, three, four = sorted((gemm / 'cache').iterdir())[:4]
(one / 'kernel.cubin').write_bytes(b'poison, not even ELF')
data = bytearray((two / 'kernel.cubin').read_bytes())
times = (two / 'kernel.cubin').stat()
data[70] ^= 0xff                                            # of the same size, valid, and as old as it was
(two / 'kernel.cubin').write_bytes(data)
os.utime(two / 'kernel.cubin', ns=(times.st_atime_ns, times.st_mtime_ns))
shutil.rmtree(three)
(four / '.committed').unlink()
kernels = sorted(triton.iterdir())
shutil.rmtree(kernels[0]); kernels[0].mkdir(); (kernels[0] / 'mine').write_text('only mine')
shutil.rmtree(kernels[1]); kernels[1].symlink_to('/etc')
(kernels[2] / 'pipe').unlink(missing_ok=True); os.mkfifo(kernels[2] / 'pipe')
os.mknod(kernels[3] / 'device', stat.S_IFCHR | 0o666, os.makedev(1, 5))
for path in jit.glob('markers/*/*.json'): path.write_text('{"all": "warm"}')
for path in jit.glob('images/*.json'): path.unlink()
(jit / 'layout.json').write_text('{"schema": 99}')
shutil.rmtree(jit / 'locks')
(jit / 'mine').symlink_to('/')
(gemm / 'x').write_bytes(b'x')
(gemm / 'cache' / ('k' * 200 + '.0')).mkdir()
(gemm / 'cache' / 'esc\\x1b[31m\\n.1').mkdir(); (gemm / 'cache' / 'esc\\x1b[31m\\n.1' / 'kernel.cu').write_text('x')
for path in [*jit.rglob('*'), jit]:
    if not path.is_symlink():
        os.chmod(path, 0o777)
for path in jit.rglob('*.json'):
    if path.is_file() and not path.is_symlink():
        with path.open('ab') as file: file.write(b' ')
(jit / 'rootme').write_bytes(b'x'); os.chmod(jit / 'rootme', 0o4755)
os.mknod(jit / 'disk', stat.S_IFCHR | 0o666, os.makedev(1, 5))
try:
    os.open(jit / 'disk', os.O_RDONLY)
except PermissionError:
    print('NO DEVICE')
print([line.split()[3] for line in open('/proc/mounts') if line.split()[1] == '/jit'], 'DONE')
"""


class Job:
    """One container of a test job, with what `view create` printed."""

    def __init__(self, engine: Engine, image: str, printed: str, *command: str) -> None:
        mounts, env = job_arguments(printed)
        assert any(mount.kind == "volume" and mount.target == "/jit" for mount in mounts)
        assert not any(mount.target.startswith("/jit/") for mount in mounts)
        self.engine = engine
        self.name = f"warm-cache-test-job-{os.urandom(4).hex()}"
        spec = ContainerSpec(
            image=image,
            name=self.name,
            command=command,
            env={"SGLANG_JIT_DEEPGEMM_FAST_WARMUP": "1", **env},
            labels={f"{LABEL}test": "job"},
            mounts=mounts,
            network="none",
            capabilities=DEFAULT_CAPABILITIES,
        )
        self.id = engine.create(spec)

    def run(self) -> str:
        """To its end, which is a good one; what it said."""
        self.engine.start(self.id)
        wait_for(lambda: self.engine.state(self.id).finished, 60, "the end of the job")
        log = b"".join(part for _, part in self.engine.log_frames(self.id, follow=False)).decode()
        assert self.engine.state(self.id).exit_code == 0, log
        return log

    def remove(self) -> None:
        self.engine.remove(self.id, force=True)


class Views(Cli):
    """A user whose views, and whose jobs, go with the test."""

    def __init__(self, place: Path, host: str, image: str) -> None:
        super().__init__(place, host, image)
        self.jobs: list[Job] = []
        self._own = Engine(host)

    def create(self, name: str, *options: str) -> str:
        ended = self.run("view", "create", name, *options)
        assert ended.status == 0, ended.said
        return ended.out

    def job(self, printed: str, *code: str) -> str:
        """Runs python code with what was printed, and removes the container."""
        job = self.keep(printed, "python3", "-c", *code)
        said = job.run()
        job.remove()
        return said

    def keep(self, printed: str, *command: str) -> Job:
        job = Job(self._own.connect(), self.image, printed, *command)
        self.jobs.append(job)
        return job

    def audit(self, name: str, *options: str) -> dict[str, Any]:
        ended = self.run("view", "audit", name, "--json", *options)
        assert ended.status == (10 if options else 0), ended.said
        found: dict[str, Any] = ended.document["audit"]
        return found

    def volumes(self) -> list[str]:
        with self.engine() as engine:
            found = engine.volumes(f"{LABEL}view")
        return [volume.name for volume in found if str(self.place) in volume.labels.get(f"{LABEL}view-of", "")]

    def close(self) -> None:
        super().close()
        for job in self.jobs:
            job.remove()
        for volume in self.volumes():
            with contextlib.suppress(Exception):
                self._own.remove_volume(volume)
        self._own.close()


@pytest.fixture(name="user")
def a_user(tmp_path: Path, docker_host: str, tiny_image: str) -> Iterator[Views]:
    user = Views(tmp_path, docker_host, tiny_image)
    yield user
    user.close()


@pytest.fixture
def warm(user: Views) -> Views:
    user.manifest(*WARM)
    user.warm()
    return user


def digests(root: Path) -> dict[str, str]:
    """Every file of a root but what views add to it: bytes, mode and times of its content."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if name.partition("/")[0] in ("views", "locks"):
            continue
        status = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[name] = f"{status.st_mode:o} {status.st_mtime_ns if path.is_file() else 0} {content}"
    return found


def told(audit: dict[str, Any]) -> dict[tuple[str, str], set[str]]:
    """(kind, family) → paths."""
    found: dict[tuple[str, str], set[str]] = {}
    for row in audit["findings"]:
        found.setdefault((row["kind"], row["family"]), set()).add(row["path"])
    return found


@pytest.mark.attack(
    "a file with root's set-user-ID bit, and a device node, are left in a view",
    by="view",
    holds="the view is mounted nosuid,nodev: the device cannot be opened; on the host `views` is closed to other users",
)
@pytest.mark.attack(
    "kernels, markers, memos, locks and layout replaced, removed, linked elsewhere, or made devices and pipes",
    by="view",
    holds="not one byte of the root changes; the audit names what was done, and opens no device and no pipe",
)
def test_view_job_poisoning_everything_changes_nothing_shared(warm: Views) -> None:
    victim = warm.create("victim")
    before = digests(warm.root)
    assert any(name.startswith("generations/") for name in before)
    gemm = [f"cache/{path.name}" for path in warm.entries()]
    triton = [path.name for path in sorted(warm.root.glob("triton/*/*")) if path.is_dir()]
    said = warm.job(victim, HOSTILE)
    assert "DONE" in said and "NO DEVICE" in said and "nosuid,nodev" in said
    # What has root's set-user-ID bit there is behind folders that other users of the host cannot enter.
    assert stat.S_IMODE((warm.root / "views" / "victim" / "upper" / "rootme").stat().st_mode) == 0o4755
    assert {stat.S_IMODE((warm.root / name).stat().st_mode) for name in ("views", "generations")} == {0o700}

    assert digests(warm.root) == before
    assert warm.run("check", "--strict").status == 0
    assert warm.run("verify").status == 0

    audit = warm.audit("victim")
    found = told(audit)
    assert found["damaged", "deep_gemm"] == {gemm[0], gemm[3]}
    assert found["rewritten", "deep_gemm"] >= {gemm[1]}
    assert found["deleted", "deep_gemm"] == {gemm[2]}
    assert {triton[0], triton[1], triton[2], triton[3]} <= found["damaged", "triton"] | found["foreign", "triton"]
    assert ("foreign", "deep_gemm") in found and "x" in found["foreign", "deep_gemm"]
    assert any(path.startswith("cache/esc\\x1b[31m\\n.1") for path in found["foreign", "deep_gemm"])
    assert {"mine", "layout.json"} <= found["foreign", ""]
    assert any(path.startswith("markers/") for path in found["foreign", ""])
    assert any(path.startswith("images/") for path in found["deleted", ""])
    shown = warm.run("view", "audit", "victim")
    assert shown.status == 0 and "\x1b" not in shown.out
    assert f"deleted: deep_gemm/{warm.entries()[0].parent.parent.name}/{gemm[2]}" in shown.out

    # The next one has what was warmed, and hits it.
    hits = warm.job(warm.create("second"), HITS)
    assert "Try DeepGEMM JIT Compiling" in hits
    audit = warm.audit("second")
    assert (audit["jit"], audit["used"], audit["findings"]) == (0, len(gemm), [])
    assert audit["asked"] == ["GEMM_NT_F8F8BF16 N=4096, K=7168, num_groups=1"]
    assert digests(warm.root) == before

    for name in ("victim", "second"):
        assert warm.run("view", "drop", name).status == 0
    assert list((warm.root / "views").iterdir()) == []
    assert warm.volumes() == []


def test_view_audit_with_thousands_of_entries_hides_nothing(warm: Views) -> None:
    gemm = [f"cache/{path.name}" for path in warm.entries()]
    flood = (
        "import os, pathlib, shutil\n"
        "gemm = pathlib.Path(os.environ['SGLANG_DG_CACHE_DIR'], 'cache')\n"
        "first, second = sorted(gemm.iterdir())[:2]\n"
        "shutil.rmtree(first); (second / 'kernel.cubin').write_bytes(b'poison')\n"
        "triton = pathlib.Path(os.environ['TRITON_CACHE_DIR'])\n"
        "for number in range(2500):\n"
        "    entry = triton / f'K{number:051d}'; entry.mkdir(); (entry / 'k.json').write_text('{}')\n"
    )
    warm.job(warm.create("flood"), flood)
    audit = warm.audit("flood")
    found = told(audit)
    assert found["deleted", "deep_gemm"] == {gemm[0]} and found["damaged", "deep_gemm"] == {gemm[1]}
    assert (audit["jit"], audit["counts"]["compiled"], audit["counts"]["damaged"]) == (2500, 2500, 1)
    shown = warm.run("view", "audit", "flood")
    assert shown.out.startswith("the job flood compiled 2500 entries in spite of the cache")
    assert "compiled in spite of the cache: 2460 more; --json lists 1998 of them" in shown.out
    assert warm.run("view", "drop", "flood").status == 0


def test_view_audit_names_shapes_and_promote_covers_them(warm: Views) -> None:
    printed = warm.create("pr-1")
    warm.job(printed, NEW_SHAPE + "from triton.cache import compile_kernel\ncompile_kernel('new', 'y')\n")
    audit = warm.audit("pr-1", "--fail-on-jit")
    compiled = {row["path"]: row for row in audit["findings"]}
    gemm = {path: row for path, row in compiled.items() if row["family"] == "deep_gemm"}
    assert {row["kind"] for row in compiled.values()} == {"compiled"}
    assert {row["shape"] for row in gemm.values()} == {"GROUPED_GEMM_NT_F8F8BF16_MASKED N=512, K=7168, num_groups=8"}
    assert [row["family"] for row in compiled.values() if row not in gemm.values()] == ["triton"]
    assert audit["jit"] == len(compiled) and len(audit["asked"]) == 2

    promoted = warm.run("view", "promote", "pr-1")
    assert promoted.status == 0
    assert "# 1 triton entries that pr-1 compiled" in promoted.out
    warm.path.write_text(warm.path.read_text() + promoted.out)
    proposed = load(str(warm.path)).tasks[-1]
    assert list(map(str, proposed.shapes)) == ["GROUPED_GEMM_NT_F8F8BF16_MASKED N=512, K=7168, num_groups=8"]
    warm.warm("--only", "views/pr-1")
    again = warm.create("pr-2")
    warm.job(again, NEW_SHAPE)
    assert warm.audit("pr-2")["jit"] == 0
    made = {path.name for path in warm.entries()}
    assert {path.removeprefix("cache/") for path in gemm} <= made, "the same kernels, made by the builder"


def test_refresh_leaves_mounted_view_and_next_view_is_new(warm: Views) -> None:
    listing = "import os\nfor a, d, f in sorted(os.walk('/jit')): print(a, sorted(d), sorted(f))\n"
    reader = warm.keep(warm.create("old"), "sleep", "60")
    reader.engine.start(reader.id)
    other = warm.create("other")
    first = warm.job(other, listing)

    # While a warm-up runs: it holds the run lock and works in a family that is written in place.
    grown = command("more", KERNELS.replace("abcde", "fghij") + IN_PLACE.replace("first", "other") + GATE + READY)
    warm.manifest(*WARM, grown)
    running = warm.start("warm")
    wait_for(lambda: len([path for path in warm.root.glob("triton/*/*") if path.is_dir()]) == 10, 30, "the new kernels")
    between = warm.start("view", "create", "between").end(60)
    assert between.status == 0, between.said
    (warm.root / "go").touch()
    assert running.end(60).status == 0
    (warm.root / "go").unlink()

    assert warm.job(other, listing) == first
    read = "import os\nprint(open(os.environ['TORCHINDUCTOR_CACHE_DIR'] + '/one.py').read())"
    new = warm.job(warm.create("new"), f"{listing}\n{read}")
    assert new.endswith("other\n") and new.count("__grp__") == 10
    assert warm.job(other, read) == "first\n"
    assert warm.job(between.out, read) == "first\n", "what was being written to was taken from the generation before"

    # Nothing new: no new generation. What nobody has any more goes; what somebody has stays.
    generations = {path.name for path in (warm.root / "generations").iterdir()}
    warm.create("newer")
    assert {path.name for path in (warm.root / "generations").iterdir()} == generations
    for name in ("other", "between"):
        assert warm.run("view", "drop", name).status == 0
    used = warm.run("view", "drop", "old")
    assert used.status == 15 and reader.name in used.err
    swept = warm.run("sweep", "--json")
    gone = {row["path"] for row in swept.document["removed"]}
    assert len(generations) - len(gone) == 2 == len(list((warm.root / "generations").iterdir()))
    assert reader.engine.state(reader.id).status == "running"


@pytest.mark.parametrize("step", ["view-create", "volume", "prove"])
def test_view_create_killed_leaves_no_usable_view(user: Views, step: str) -> None:
    user.manifest(*WARM)
    user.warm()
    if step == "view-create":
        # Held up in the container: another one makes a generation.
        with layout.generations_lock(user.root).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            killed = user.start("view", "create", "job")
            wait_for(lambda: _running(user), 30, "the container")
            killed.send(signal.SIGKILL)
            killed.process.wait()
            wait_for(lambda: not _running(user), 10, "its end")
    else:
        hook = {"volume": "create_volume", "prove": "prove"}[step]
        where = {"volume": "builder.engine.volumes:Volumes", "prove": "builder.run.cache_root:CacheRoot"}[step]
        module, _, name = where.partition(":")
        code = (
            "import os, signal, sys\n"
            f"from {module} import {name} as owner\n"
            f"setattr(owner, {hook!r}, lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL))\n"
            "from builder.cli.main import main\n"
            "sys.exit(main())\n"
        )
        killed = user.start("view", "create", "job", program=(sys.executable, "-c", code))
        killed.process.wait(60)
    assert killed.process.returncode == -signal.SIGKILL
    listed = user.start("view", "list", "--json").end(60).document["views"]
    assert [row["note"] for row in listed] == {
        "view-create": [],
        "volume": ["unfinished: it has no volume here"],
        "prove": [""],
    }[step]
    made = user.start("view", "create", "job").end(60)
    assert made.status == 0, made.said
    assert user.run("sweep").status == 0  # ends what is left of the killed one, and leaves the view
    user.job(made.out, HITS)
    assert user.audit("job")["jit"] == 0
    assert [path.name for path in (user.root / "views").iterdir()] == ["job"]
    assert [path.name for path in (user.root / "generations").iterdir() if path.name.startswith(".")] == []


def _running(user: Views) -> bool:
    with user.engine() as engine:
        for container in user.containers(engine):
            with contextlib.suppress(NotFoundError):  # one to read through, gone since it was listed
                if engine.state(container).status == "running":
                    return True
    return False


def test_view_with_impossible_arguments_is_refused(user: Views) -> None:
    user.manifest(*WARM)
    cold = user.run("view", "create", "job")
    assert cold.status == 10 and "nothing is warm there yet" in cold.err
    assert not user.root.exists()
    for words, said in (
        (["create", "../x"], "2 to 63 letters"),
        (["create"], "needs a JOB"),
        (["list", "job"], "takes no JOB, found 'job'"),
        (["audit", "nobody"], "there is no view 'nobody'"),
    ):
        ended = user.run("view", *words)
        assert ended.status == 2 and said in ended.err, ended.said
    gone = user.run("view", "drop", "nobody")
    assert gone.status == 0 and "there is no view nobody of" in gone.err
    user.warm("--only", "shapes")
    first = user.run("view", "create", "job")
    assert first.status == 0 and "cold, so that a job compiles it in its view: triton" in first.err
    assert user.run("view", "create", "job").out == first.out, "a view that nobody has written to is as good as none"
    user.job(first.out, HITS)
    used = user.run("view", "create", "job")
    assert used.status == 2 and "pass --replace" in used.err
    assert user.run("view", "create", "job", "--replace").status == 0
    assert user.audit("job")["used"] == 0
    close = user.run("view", "audit", "jib")
    assert close.status == 2 and "did you mean 'job'?" in close.err
    torn = user.place / "a,b"
    user.root.rename(torn)
    user.manifest(*WARM, cache={"root": str(torn)})
    assert "a,b" in user.run("view", "create", "other").err


def test_view_of_named_volume_works(user: Views) -> None:
    volume = f"warm-cache-test-{os.urandom(6).hex()}"
    user.manifest(*WARM, cache={"root": None, "volume": volume})
    try:
        user.warm()
        user.job(user.create("job"), HITS)
        audit = user.audit("job")
        assert (audit["jit"], audit["findings"]) == (0, []) and audit["used"] > 0
        assert "job" in user.run("view", "list").out
        assert user.run("view", "drop", "job").status == 0
    finally:
        with user.engine() as engine:
            engine.remove_volume(volume)


def test_view_unused_for_job_max_is_swept(warm: Views) -> None:
    warm.job(warm.create("left"), HITS)
    kept = warm.keep(warm.create("kept"), "true")
    assert warm.run("sweep").status == 0
    assert len(warm.volumes()) == 2
    warm.manifest(*WARM, cache={"job_max": "0s"})
    swept = warm.run("sweep", "--json")
    assert [row["path"] for row in swept.document["removed"]] == ["views/left"]
    assert [path.name for path in (warm.root / "views").iterdir()] == ["kept"]
    kept.remove()
    warm.run("sweep")
    assert warm.volumes() == [] == list((warm.root / "views").iterdir())
