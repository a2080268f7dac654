"""The verbs that only read, on cold, warm and damaged caches and on images that have changed."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import shutil
import signal
import socket
import struct
import sys
import tarfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from builder.engine.api import Mount
from builder.engine.client import Engine
from tests.engine.cli import ROOT, Cli, command, run_job, server, shapes

pytestmark = pytest.mark.engine

KERNEL = "from triton.cache import compile_kernel; compile_kernel('k', 'x'); print('KERNELS READY')"
LABELS = ("model-tp8", "shapes", "command")


def write(cli: Cli, **changes: Any) -> None:
    """The manifest of these tests; ``changes`` are of its server task."""
    cli.manifest(server("org/model", **changes), shapes(), command("command", KERNEL, families=["triton"]))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, docker_host: str, tiny_image: str) -> Iterator[Cli]:
    """A warmed root; tests damage copies of it."""
    cli = Cli(tmp_path_factory.mktemp("template"), docker_host, tiny_image)
    cli.model("org/model")
    write(cli)
    cli.warm()
    yield cli
    cli.close()


@pytest.fixture
def warmed(cli: Cli, template: Cli) -> Cli:
    """A user with a warm cache of their own."""
    cli.model("org/model")
    shutil.copytree(template.root, cli.root, symlinks=True)
    write(cli)
    return cli


def marker(cli: Cli, label: str) -> Path:
    (path,) = cli.root.glob(f"markers/{label}-*/*.json")
    return path


# --- cold ------------------------------------------------------------------------------------------------------------


def test_check_without_cache_is_cold_and_creates_none(cli: Cli) -> None:
    cli.model("org/model")
    write(cli)
    checked = cli.run("check", "--json")
    assert checked.status == 10
    assert {task["state"] for task in checked.document["tasks"]} == {"cold"}
    assert checked.task("shapes")["reason"] == f"no-marker: {cli.root} does not exist"
    explained = cli.run("explain")
    assert explained.status == 0
    assert f"shapes: cold, because no-marker: {cli.root} does not exist" in explained.out
    for verb in ("status", "verify", "prune"):
        missing = cli.run(verb)
        assert (missing.status, f"there is no cache at {cli.root}" in missing.err) == (12, True), missing.said
    warmed = cli.run("warm", environ={"WARM_CACHE_CREATE": "0"})
    assert warmed.status == 12
    assert "To make a new one there, pass --create." in warmed.err
    printed = cli.run("env")
    assert (printed.status, printed.out) == (10, "")
    assert "does not exist: nothing is warm there yet. Exit 10." in printed.err
    assert not cli.root.exists()


def test_check_empty_cache_is_cold(cli: Cli) -> None:
    cli.root.mkdir()
    cli.manifest(shapes())
    unprobed = cli.run("check", "--no-probe", "--json")
    assert unprobed.status == 10 and unprobed.task("shapes")["reason"].startswith("no-memo: the cache does not know")
    assert list(cli.root.iterdir()) == []
    checked = cli.run("check", "--json")
    assert (checked.status, checked.task("shapes")["reason"]) == (10, "no-marker")
    assert checked.document["error"]["message"] == (
        "1 of 1 task cold; warm-cache warm, with the same options, warms them"
    )


# --- damaged ---------------------------------------------------------------------------------------------------------


def an_entry(cli: Cli) -> Path:
    """One that the task `shapes` alone needs."""
    names = json.loads(marker(cli, "shapes").read_text())["entries"]["deep_gemm"]
    return next(path for path in cli.entries() if f"cache/{path.name}" in names and "transpose" not in path.name)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def mark(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0warm_cache_plan_only\0")


def replace_by_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("not a directory")


DAMAGES: dict[str, tuple[Callable[[Cli], object], str]] = {
    "entry removed": (lambda cli: shutil.rmtree(an_entry(cli)), "entries: 1 missing, 0 invalid (first: deep_gemm/"),
    "entry without .committed": (lambda cli: (an_entry(cli) / ".committed").unlink(), ": no .committed"),
    "cubin truncated": (lambda cli: cut(an_entry(cli) / "kernel.cubin", 100), "entries: 0 missing, 1 invalid"),
    "cubin empty": (lambda cli: cut(an_entry(cli) / "kernel.cubin", 0), "kernel.cubin is empty"),
    "cubin of the plan pass": (lambda cli: mark(an_entry(cli) / "kernel.cubin"), "is of the plan pass of a prebuild"),
    "meta.json garbage": (lambda cli: (an_entry(cli) / "meta.json").write_text("{"), "meta.json is not JSON"),
    "marker garbage": (lambda cli: marker(cli, "shapes").write_bytes(b"\xff{"), "marker-unreadable: markers/shapes-"),
    "marker empty": (lambda cli: marker(cli, "shapes").write_text(""), "marker-unreadable: markers/shapes-"),
    "marker of the future": (lambda cli: marker(cli, "shapes").write_text('{"schema": 99}'), "its schema is 99"),
    "marker gone": (lambda cli: marker(cli, "shapes").unlink(), "no-marker"),
    "its folder a file": (lambda cli: replace_by_file(marker(cli, "shapes").parent), "no-marker"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_check_names_damaged_entry(warmed: Cli, damage: str) -> None:
    act, reason = DAMAGES[damage]
    act(warmed)
    checked = warmed.run("check", "--json")
    assert checked.status == 10
    task = checked.task("shapes")
    assert task["state"] == "cold"
    assert reason in task["reason"]
    explained = warmed.run("explain", "--only", "shapes")
    assert explained.status == 0
    assert explained.out.startswith(f"shapes: cold, because {task['reason']}\n")


def test_shared_entry_damaged_all_tasks_cold_and_one_run_mends(warmed: Cli) -> None:
    entries = warmed.entries()
    shutil.rmtree(entries[0])
    cut(entries[1] / "kernel.cubin", 80)
    (entries[2] / ".committed").unlink()
    marker(warmed, "command").write_text("garbage")
    checked = warmed.run("check")
    assert checked.status == 10
    assert "3 cold in " in checked.out
    mended = warmed.warm()
    assert sum(task["entries_added"] for task in mended.document["tasks"]) == 3
    assert {task["state"] for task in mended.document["tasks"]} == {"warmed"}
    assert warmed.run("check").status == 0
    assert sorted(path.name for path in warmed.root.glob("aside/deep_gemm-*/*"))


def scatter(cli: Cli) -> None:
    """Foreign and malformed things of every kind, everywhere that the program looks."""
    (deep_gemm,) = (path for path in cli.root.glob("deep_gemm/*") if path.is_dir())
    folder = marker(cli, "shapes").parent
    places = [cli.root, cli.root / "images", cli.root / "markers", folder, cli.root / "locks"]
    places += [cli.root / "deep_gemm", deep_gemm, deep_gemm / "cache", deep_gemm / "tmp"]
    for number, place in enumerate(places):
        (place / "README.txt").write_text("somebody was here")
        (place / "a name with spaces").mkdir()
        (place / "dangling.json").symlink_to("/nowhere/at/all")
        (place / "loop.json").symlink_to("loop.json")
        (place / "folder.json").mkdir()
        (place / "garbage.json").write_bytes(b"\x00\xff\xfe{")
        (place / "null.json").write_text("null")
        (place / "deep.json").write_text("[" * 100_000)
        os.mkfifo(place / "fifo.json")
        Path(os.fsdecode(os.fsencode(place) + b"/\xff\xfe.json")).write_text("undecodable")
        Path(os.fsdecode(os.fsencode(place) + b"/\xff\xfe")).mkdir()
        with socket.socket(socket.AF_UNIX) as one:
            at = Path.cwd()
            os.chdir(place)  # a socket's path is short
            one.bind(f"socket{number}.json")
            os.chdir(at)
    (cli.root / "lost+found").mkdir()
    (cli.root / "vllm" / "0123456789abcdef").mkdir(parents=True)
    (cli.root / "triton" / "not-a-key").mkdir()


def test_foreign_files_in_cache_change_nothing(warmed: Cli) -> None:
    scatter(warmed)
    checked = warmed.run("check", "--json")
    assert checked.status == 0, checked.said
    assert {task["state"] for task in checked.document["tasks"]} == {"warm"}
    assert warmed.run("explain").status == 0
    for options in ((), ("--json",)):
        status = warmed.run("status", *options)
        assert status.status == 0, status.said
        assert "shapes " in status.out or '"label": "shapes"' in status.out
    assert warmed.run("env").status == 0
    assert warmed.run("doctor").status == 0
    forced = warmed.warm("--force", "--only", "shapes")
    assert (forced.task("shapes")["state"], forced.task("shapes")["entries_added"]) == ("warmed", 0)


@pytest.mark.parametrize(
    ("name", "become"),
    [
        ("markers", "file"),
        ("markers", "nowhere"),
        ("markers", "markers"),
        ("markers", ""),
        ("images", "file"),
        ("layout.json", "layout.json"),
        ("layout.json", ""),
        ("deep_gemm", "file"),
        ("deep_gemm", "deep_gemm"),
    ],
)
def test_layout_folder_of_wrong_type_is_no_defect(warmed: Cli, name: str, become: str) -> None:
    path = warmed.root / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if become == "file":
        path.write_text("something else")
    elif become:
        path.symlink_to(become)
    checked = warmed.run("check", "--only", "shapes", "--json")
    assert checked.status == (10 if name in ("markers", "deep_gemm") else 0), checked.said


def test_root_without_lock_is_preflight_error(warmed: Cli) -> None:
    shutil.rmtree(warmed.root / "locks")
    (warmed.root / "locks").write_text("something else")
    refused = warmed.run("warm", "--force", "--json")
    assert refused.status == 12
    (problem,) = refused.document["error"]["problems"]
    assert problem["place"] == "cache"
    assert "locks: Not a directory" in problem["text"]


# --- changed images --------------------------------------------------------------------------------------------------

SITE = "/usr/local/lib/python3.11/dist-packages"


def derived(engine: Engine, base: str, name: str, *lines: str) -> str:
    """The tag of an image made from this one by these lines of a Dockerfile; kept, so that it is made once."""
    tag = f"warm-cache-test-derived:{name}"
    text = "\n".join([f"FROM {base}", *lines]).encode()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        entry = tarfile.TarInfo("Dockerfile")
        entry.size = len(text)
        tar.addfile(entry, io.BytesIO(text))
    engine.build(buffer.getvalue(), tag=tag)
    return tag


def version(distribution: str, old: str, new: str) -> str:
    """A line that gives an installed distribution another version."""
    was, now = (f"{SITE}/{distribution}-{number}.dist-info" for number in (old, new))
    return f"RUN mv {was} {now} && sed -i 's/^Version: .*/Version: {new}/' {now}/METADATA"


def test_other_compiler_changes_keys_of_its_families(warmed: Cli, engine: Engine) -> None:
    line = "RUN sed -i 's/V13.0.88/V13.1.99/' /usr/local/cuda/bin/nvcc"
    image = derived(engine, warmed.image, "nvcc", line)
    checked = warmed.run("check", "--json", "--image", image)
    assert checked.status == 10
    reason = checked.task("shapes")["reason"]
    assert reason == "compile: deep_gemm is compiled anew (nvcc 13.0.88 → 13.1.99)"
    assert checked.task("command")["state"] == "warm"
    explained = warmed.run("explain", "--json", "--image", image)
    (row,) = [
        row
        for task in explained.document["explain"]
        if task["label"] == "shapes"
        for row in task["factors"]
        if row["factor"] == "deep_gemm deep_gemm_nvcc"
    ]
    assert "V13.0.88" in row["marker"]
    assert "V13.1.99" in row["now"]

    rewarmed = warmed.warm("--image", image, "--only", "shapes")
    assert rewarmed.task("shapes")["entries_added"] == 5
    assert warmed.run("check", "--image", image, "--only", "shapes").status == 0
    assert warmed.run("check").status == 0, "the old image lost its kernels"
    rows = [row for row in warmed.run("status", "--json").document["families"] if row["family"] == "deep_gemm"]
    assert [row["use"] for row in sorted(rows, key=lambda row: str(row["use"]))] == ["another toolchain", "this image"]


def test_other_deep_gemm_changes_its_key(warmed: Cli, engine: Engine) -> None:
    image = derived(engine, warmed.image, "deep-gemm", version("sgl_deep_gemm", "0.2.3.post2", "0.2.4"))
    checked = warmed.run("check", "--json", "--image", image)
    assert checked.status == 10
    assert checked.task("shapes")["reason"].startswith("compile: deep_gemm is compiled anew (sgl-deep-gemm ")
    assert "0.2.4" in checked.task("shapes")["reason"]
    assert checked.task("command")["state"] == "warm"


def test_other_sglang_keeps_every_kernel(warmed: Cli, engine: Engine) -> None:
    image = derived(engine, warmed.image, "sglang", version("sglang", "0.5.23", "0.5.24"))
    checked = warmed.run("check", "--json", "--image", image)
    assert checked.status == 10
    assert {task["reason"] for task in checked.document["tasks"]} == {"coverage: sglang was 0.5.23 is 0.5.24"}
    before = warmed.entries()
    rewarmed = warmed.warm("--image", image)
    assert [(task["state"], task["entries_added"]) for task in rewarmed.document["tasks"]] == [("warmed", 0)] * 3
    assert warmed.entries() == before
    assert warmed.run("check").status == 0


# --- changed tasks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"argv": ["--tp", "8", "--trust-remote-code"]}, "coverage: argv was --tp 8 is --tp 8 --trust-remote-code"),
        ({"env": {"SGLANG_X": "1"}}, "coverage: env SGLANG_X was absent is 1"),
        ({"argv": ["--tp=8"], "timeout": "3m", "silence": "1m"}, ""),
    ],
)
def test_other_argv_is_cold(warmed: Cli, changes: dict[str, Any], reason: str) -> None:
    write(warmed, **changes)
    checked = warmed.run("check", "--json")
    assert checked.task("model-tp8")["reason"] == reason
    assert checked.status == (10 if reason else 0)
    assert checked.task("shapes")["state"] == "warm"


def test_other_config_json_is_cold(warmed: Cli) -> None:
    (config,) = warmed.store.glob("hub/*/blobs/c0")
    config.write_text('{"num_hidden_layers": 62}')
    checked = warmed.run("check", "--json")
    assert checked.status == 10
    assert checked.task("model-tp8")["reason"].startswith("coverage: config.json was ")


def test_strict_without_second_pass_is_cold(cli: Cli) -> None:
    cli.manifest(shapes(verify="inventory"))
    warmed = cli.warm()
    assert (warmed.task("shapes")["proof"], warmed.task("shapes")["verified"]) == ("inventory", False)
    assert cli.run("check").status == 0
    strict = cli.run("check", "--strict", "--json")
    assert (strict.status, strict.task("shapes")["reason"]) == (10, "unverified")


# --- status, env, doctor ---------------------------------------------------------------------------------------------


def test_status_counts_entries_and_bytes(warmed: Cli) -> None:
    cut(warmed.entries()[0] / "kernel.cubin", 70)
    document = warmed.run("status", "--json").document
    rows = {row["family"]: row for row in document["families"]}
    assert (rows["deep_gemm"]["entries"], rows["deep_gemm"]["invalid"]) == (10, 1)
    assert rows["triton"]["entries"] == 1
    assert rows["deep_gemm"]["bytes"] > 1000
    assert {mark["task"].rpartition("-")[0] for mark in document["markers"]} == set(LABELS)
    assert {mark["proof"] for mark in document["markers"]} == {"verified"}


def test_status_shows_age_price_and_users(warmed: Cli) -> None:
    """On a terminal of 80 columns too. A job's command line is a stranger's text, and what it hides stays hidden."""
    path = marker(warmed, "shapes")
    document = json.loads(path.read_text())
    document["observed"].update(seconds=90.0, gpus=8)
    path.write_text(json.dumps(document))
    os.utime(path, (time.time() - 3 * 86400,) * 2)
    other = json.loads(marker(warmed, "command").read_text())
    other["observed"].update(seconds="\x1b[31m", gpus=True)
    other["keys"]["triton"] = "0" * 16
    marker(warmed, "command").write_text(json.dumps(other))
    code = "import time; print('AT IT', flush=True); time.sleep(60)"
    job = [sys.executable, "-c", code, "\x1b[31m\n::error::", "--webhook=https://x/SECRET"]
    holding = warmed.start("hold", "--", *job)
    try:
        holding.says("AT IT")
        status = warmed.run("status", "--json").document
        plain = warmed.run("status").out
        terminal = on_a_terminal(warmed, "status")
    finally:
        holding.send(signal.SIGTERM)
        holding.end()
    rows = {row["label"]: row for row in status["markers"]}
    assert (rows["shapes"]["seconds"], rows["shapes"]["gpu_minutes"]) == (90.0, 12.0)
    assert 3 * 86400 <= rows["shapes"]["age_seconds"] < 3 * 86400 + 600
    assert (rows["command"]["seconds"], rows["command"]["gpu_minutes"]) == (None, None)
    assert (rows["shapes"]["use"], rows["command"]["use"]) == ("this image", "another toolchain")
    (user,) = status["users"]
    assert user["who"].startswith(f"pid {holding.process.pid} (") and user["how"] == "holds the cache"
    assert re.search(r"^shapes +3 d +\S+ \S+ ago +1:30 +12\.0 +verified +this image$", plain, re.MULTILINE)
    for text in (plain, terminal):
        assert "holds the cache" in text and "SECRET" not in text
        assert "\x1b[31m" not in text and "::error" not in text
    lines = re.sub(r"\x1b\[[0-9;]*m", "", terminal).splitlines()
    assert max(len(line) for line in lines if not line.startswith("cache ")) <= 80
    assert "nothing uses it now" in warmed.run("status").out


def on_a_terminal(cli: Cli, *words: str) -> str:
    """What a verb shows on a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    shown: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):
            while data := os.read(ours, 4096):
                shown.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    ended = cli.start(*words, stdout=theirs, environ={"TERM": "xterm"}).end()
    os.close(theirs)
    reader.join(10)
    os.close(ours)
    assert ended.status == 0
    return b"".join(shown).decode()


def test_env_every_format_is_printed(warmed: Cli) -> None:
    as_json = json.loads(warmed.run("env", "--format", "json").out)
    (key,) = (path.name for path in warmed.root.glob("deep_gemm/*") if path.is_dir())
    assert as_json["env"]["SGLANG_DG_CACHE_DIR"] == f"/jit/deep_gemm/{key}"
    assert as_json["toolchain"] == warmed.run("check", "--json").document["toolchain"]
    document = warmed.run("env", "--json", "--format", "docker").document
    assert document["env"] == warmed.run("env").out.rstrip("\n")
    for form in ("shell", "github"):
        refused = warmed.run("env", "--format", form)
        assert (refused.status, refused.out) == (2, "")
        assert "there is none here" in refused.err


#: What a job tries against everything that it may not change, by path, hard link, rename and lock.
ATTACKS = r"""
import fcntl, os, pathlib, shutil
jit, own = pathlib.Path("/jit"), pathlib.Path(os.environ["SGLANG_DG_CACHE_DIR"])
marker = next(jit.glob("markers/*/*.json"))
generation = next(jit.glob("generations/*/markers/*/*.json"))
memo = next(jit.glob("images/*.json"))
attacks = {
    "write": [lambda path=path: path.open("r+") for path in (marker, generation, memo, jit / "layout.json")],
    "make": [lambda path=path: (jit / path).open("x") for path in
        ("x", "markers/x", "images/x", "used/x", "aside/x", "generations/x", "locks/x", "views/x", "triton/x")],
    "remove": [marker.unlink, memo.unlink, lambda: shutil.rmtree(jit / "locks"), lambda: shutil.rmtree(generation)],
    "link": [lambda: os.link(marker, own / "m"), lambda: os.link(own / "k", marker.parent / "m"),
        lambda: os.link(generation, own / "m")],
    "rename": [lambda: own.rename(own.parent / "x"), lambda: (own / "k").rename(marker),
        lambda: marker.rename(own / "m"), lambda: own.rmdir()],
    "redirect": [lambda: (own.parent / "ffffffffffffffff").symlink_to("/"), lambda: (jit / "used").symlink_to("/")],
    "other keys": [lambda: next(jit.glob("deep_gemm/0*/x")).write_text("x")],
    "device": [lambda: os.mknod(own / "null", 0o20666, os.makedev(1, 3))] if os.environ.get("MKNOD") else [],
}
(own / "k").write_text("a kernel of the job's own")
for name, tries in attacks.items():
    for number, attack in enumerate(tries):
        try:
            attack()
        except OSError:
            continue
        raise SystemExit(f"{name} {number} was possible")
for kernel in own.glob("cache/*/kernel.cubin"):
    with kernel.open("r+b") as file: file.write(b"poison")
lock = open(jit / "locks" / "hold.lock")
fcntl.flock(lock, fcntl.LOCK_SH)
print("NOTHING WAS POSSIBLE")
"""


@pytest.mark.attack(
    "markers, memos, generations, layout, locks and the kernels of other keys are written, removed, linked, renamed "
    "and redirected",
    by="env",
    holds="all of it is refused: the root is read-only, and each writable directory a mount of its own; a kernel that "
    "is changed in place changes no generation",
)
def test_env_job_hits_every_kernel_and_changes_nothing_else(warmed: Cli, engine: Engine) -> None:
    """Its own kernels it may change, and no view is above those."""
    made = warmed.run("view", "create", "other")
    assert made.status == 0, made.said
    (warmed.root / "deep_gemm" / ("0" * 16)).mkdir()
    (warmed.root / "deep_gemm" / ("0" * 16) / "x").write_text("of another key")
    try:
        printed = warmed.run("env", "--format", "docker").out
        before = sorted(warmed.root.rglob("*"))
        job = (
            'python3 -m sglang.compile_deep_gemm --model-path org/model --tp 8 && python3 -c "$KERNEL" '
            "&& ! touch /jit/markers/mine && ! touch /jit/images/mine"
        )
        log = run_job(engine, warmed.image, printed, job, KERNEL=KERNEL)
        assert "finished successfully." in log
        assert sorted(warmed.root.rglob("*")) == before, "everything was hit, and nothing else made"
        own = re.search(r"SGLANG_DG_CACHE_DIR=/jit/(\S+)", printed)[1]  # type: ignore[index]
        kept = {path: path.read_bytes() for path in before if path.is_file() and own not in str(path)}
        kept |= {path: path.read_bytes() for path in before if path.is_file() and "/generations/" in str(path)}
        said = run_job(engine, warmed.image, printed, 'python3 -c "$ATTACKS"', ATTACKS=ATTACKS)
        assert "NOTHING WAS POSSIBLE" in said
        assert {path: path.read_bytes() for path in kept} == kept
    finally:
        warmed.run("view", "drop", "other")


def test_env_here_in_container_of_before_a_refresh_is_slower_not_broken(warmed: Cli, engine: Engine) -> None:
    """The job installs another sgl-deep-gemm: the cache has that key since the refresh, and this container not."""
    before = sorted(warmed.root.rglob("*"))
    printed = warmed.run("env", "--format", "docker").out
    shutil.copytree(ROOT / "builder", warmed.place / "copied" / "builder")
    shutil.copy(warmed.path, warmed.place / "copied" / "manifest.toml")
    job = """
    site=$(python3 -c 'import sglang, os; print(os.path.dirname(os.path.dirname(sglang.__file__)))')
    sed -i 's/^Version: .*/Version: 9.9.9/' $site/sgl_deep_gemm-*.dist-info/METADATA
    here="python3 -m builder env --here --manifest /copied/manifest.toml --cache /jit"
    PYTHONPATH=/copied:$PYTHONPATH $here --format json > /tmp/env.json || echo COLD $?
    eval "$(PYTHONPATH=/copied:$PYTHONPATH $here)" || true
    python3 -m sglang.compile_deep_gemm --model-path org/model --tp 8
    echo LOOKS $SGLANG_DG_CACHE_DIR $TRITON_CACHE_DIR
    ls $SGLANG_DG_CACHE_DIR/cache | wc -l
    cat /tmp/env.json
    """
    copied = Mount(str(warmed.place / "copied"), "/copied", read_only=True)
    said = run_job(engine, warmed.image, printed, job, copied, PYTHONDONTWRITEBYTECODE="1")
    assert "finished successfully." in said and "COLD 10" in said
    assert re.search(r"LOOKS /tmp/warm-cache-cold-\w+/deep_gemm/\w+ /jit/triton/", said), said
    assert '"cold": {\n    "deep_gemm": "it has no directory here"\n  }' in said, said
    assert "warning: cold: deep_gemm (compiled anew" in said
    assert sorted(warmed.root.rglob("*")) == before
    assert warmed.run("check").status == 0


def test_preflight_lists_all_problems_at_once(cli: Cli) -> None:
    cli.manifest(
        server("org/model"),
        image={"ref": "no-such/image:tag"},
        cache={"root": str(cli.place / "no" / "cache")},
        models={"store": str(cli.place / "no-models")},
        gpus={"count": 8, "name": "H200"},
    )
    for verb in ("doctor", "warm"):
        refused = cli.run(verb, "--json")
        assert refused.status == 12
        problems = refused.document["error"]["problems"]
        assert [problem["place"] for problem in problems] == ["image", "GPUs", "cache", "models"]
        assert all(problem["remedy"] for problem in problems)
        assert "(4 problems):" in refused.err
        assert "make demo. Exit 12." in refused.err
    assert list(cli.place.glob("no*")) == []


def test_check_of_missing_image_is_preflight_error(warmed: Cli) -> None:
    refused = warmed.run("check", "--image", "no-such/image:tag")
    assert refused.status == 12
    assert "docker pull no-such/image:tag" in refused.err


def test_doctor_on_healthy_machine_finds_nothing(warmed: Cli) -> None:
    well = warmed.run("doctor")
    assert well.status == 0
    *rows, last = well.out.splitlines()
    assert last.startswith(f"this machine can run 3 tasks of {warmed.image}")
    shown = {row.split("  ")[0]: row for row in rows[1:]}
    assert "restart ends a running warm-up" in shown["engine"], "this engine has no live-restore"
    assert "free" in shown["cache disk"] and "agree" in shown["clock"]
    told = {check["check"]: check["state"] for check in warmed.run("doctor", "--json").document["checks"]}
    assert set(told) == set(shown) and told["clock"] == "ok"


def test_preflight_without_engine_lists_all_problems(cli: Cli) -> None:
    cli.manifest(shapes())
    lost = cli.run("check", "--json", environ={"DOCKER_HOST": f"unix://{cli.place}/no.sock"})
    assert lost.status == 12
    (problem,) = lost.document["error"]["problems"]
    assert problem["place"] == "engine"
    assert "no.sock" in problem["text"]
