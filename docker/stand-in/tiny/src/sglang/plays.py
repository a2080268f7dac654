"""What can go wrong, to be asked for by TINY_PLAY.

| play | what happens |
| --- | --- |
| crash-exit-0 | a crash line at load, exit status 0 |
| crash-hang | a crash line at load, then silence without end, SIGTERM ignored |
| silent-hang | a few lines, then silence without end |
| exit-N | a few lines, then exit status N |
| refuses-sigterm | silence without end, SIGTERM ignored |
| grandchildren | two generations that call setsid, ignore SIGTERM and hold the streams open; success |
| flood | TINY_LINES lines (1 000 000); success |
| reducing | the server has too little memory for all Ms, a sweep has enough; success |
| reducing-always | the sweep has too little as well |
| dies-in-second-pass | crash as soon as everything asked for is there already |
| dies-at-contig | a contiguous kind kills its process, as the kernel does when memory runs out |
| grows-in-second-pass | every pass makes one entry that no other asks for |
| no-kernels | the success line, and nothing compiled |
| nvcc-fails | the compiler fails for every kernel of a tile above the first |
| disk-full | no kernel but the first can be written |
| module-fails | the module `broken` of sglang's own JIT cannot be built |
| worker-dies-once | the process that compiles a kernel of the second tile is killed, the first time |
| worker-dies | the process that compiles a kernel of the second tile is killed |
| oom | takes memory until something gives |
| binary | invalid UTF-8, megabyte lines, NUL bytes, no final newline; success |
| leak-secret | prints HF_TOKEN, whole and in two writes; success |
| all-families | a request leaves something in the cache of every family, and a P2P probe; success |
| NAME@dummy | the play of this name where the weights are dummies, none elsewhere |
"""

import errno
import os
import signal
import sys
import threading

from sglang import log

CRASH = (
    "Scheduler hit an exception: Traceback (most recent call last):\n"
    '  File "/sgl-workspace/sglang/python/sglang/srt/managers/scheduler.py", line 3801, in run_scheduler_process\n'
    "    scheduler.event_loop_overlap()\n"
    "RuntimeError: a test double plays a crash\n"
)


DUMMIES = False  # set by a server whose weights are


def play() -> str:
    """The play that was asked for; empty for none."""
    name, _, only = os.environ.get("TINY_PLAY", "").partition("@")
    return "" if only == "dummy" and not DUMMIES else name


def at_kernel(tile: int) -> None:
    """What befalls a process that is about to compile a kernel. A plan pass, which compiles nothing, is spared."""
    name = play()
    if tile < 2 or "DG_JIT_NVCC_COMPILER" in os.environ:
        return
    if name == "nvcc-fails":
        raise RuntimeError("NVCC compilation failed: a test double plays a crash of its compiler")
    if name == "disk-full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if name in ("worker-dies", "worker-dies-once") and tile == 2:
        mark = os.path.join(os.environ["DG_JIT_CACHE_DIR"], "tmp", "died")
        if name == "worker-dies-once" and os.path.exists(mark):
            return
        os.makedirs(os.path.dirname(mark), exist_ok=True)
        open(mark, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)


def at_load() -> None:
    """What befalls a server while it loads its weights."""
    name = play()
    if name in ("crash-exit-0", "crash-hang"):
        if name == "crash-hang":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        crash()
        if name == "crash-hang":
            _hang()
        os._exit(0)
    if name == "refuses-sigterm":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        log.info("SIGTERM is refused from here on")
    if name in ("silent-hang", "refuses-sigterm"):
        _hang()
    if name.startswith("exit-"):
        sys.exit(int(name[5:]))
    if name == "oom":
        _take_memory()
    acts = {"grandchildren": _grandchildren, "flood": _flood, "binary": _binary, "leak-secret": _leak}
    acts.get(name, lambda: None)()


def crash() -> None:
    """The lines of a scheduler that died."""
    log.info(CRASH)
    log.info("Received sigquit from a child process. It usually means the child failed.")


def _hang() -> None:
    while True:
        threading.Event().wait(3600)


def _grandchildren() -> None:
    for _ in range(2):
        if os.fork() == 0:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if os.fork() == 0:
                os.setsid()
            _hang()
    log.info("grandchildren are there")


def _flood() -> None:
    total = int(os.environ.get("TINY_LINES", "1000000"))
    step = 10_000
    for first in range(0, total, step):
        block = "".join(f"flood {line:07d} of {total} {'.' * 70}\n" for line in range(first, min(first + step, total)))
        sys.stdout.write(block)
    sys.stdout.flush()


def _binary() -> None:
    out = sys.stdout.buffer
    out.write(b"\xff\xfe not UTF-8 \x00 NUL \xe2\x82\n" + b"x" * (1 << 20) + b"\n" + bytes(range(256)) * 4096 + b"\n")
    out.flush()
    sys.stderr.buffer.write(b"\xc3(" * 1000)
    sys.stderr.buffer.flush()


def _leak() -> None:
    token = os.environ.get("HF_TOKEN", "no token was passed")
    print(f"the token is {token}, and again: {token}", flush=True)
    half = len(token) // 2
    for part in (f"in two writes: {token[:half]}", f"{token[half:]}\n"):
        sys.stderr.write(part)
        sys.stderr.flush()
        threading.Event().wait(0.5)


def _take_memory() -> None:
    held = []
    while True:
        held.append(bytearray(os.urandom(1 << 20)) * 64)
