"""sglang's own JIT: modules by the arguments of `load_jit`, in its cache directory."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sglang import plays


def load_jit(*args, **options):
    """Builds a module where it is missing, in a directory of its own that appears by a rename."""
    key = hashlib.sha256(repr((args, sorted(options.items()))).encode()).hexdigest()[:16]
    leaf = Path(os.environ["SGLANG_JIT_CACHE_DIR"]) / "sm90a" / "_".join(args) / f"build-{key}" / f"deps-{key}"
    if leaf.exists():
        return
    if os.environ.get("SGLANG_CRASH_ON_JIT_COMPILE") == "1":
        raise RuntimeError(f"JIT module '{args[0]}' has no usable cached build")
    if plays.play() == "module-fails" and args[0] == "broken":
        raise RuntimeError("ninja: build stopped: subcommand failed")
    staging = leaf.with_name(f".staging-{key}")
    staging.mkdir(parents=True)
    (staging / f"{args[0]}.so").write_bytes(b"module")
    staging.rename(leaf)


def parallel_compile(builders, max_workers=None):
    """As the original: every builder runs to its end, then the first exception is raised."""
    with ThreadPoolExecutor(max_workers=max_workers) as executor:
        futures = [executor.submit(build) for build in builders]
    return [future.result() for future in futures]
