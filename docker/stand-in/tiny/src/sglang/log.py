"""sglang's ways of writing: prints on stdout, a logger and progress bars on stderr."""

import sys
import time


def info(text: str) -> None:
    """A logger line with sglang's prefix."""
    sys.stderr.write(f"[{time.strftime('%Y-%m-%d %H:%M:%S')} TP0] {text}\n")
    sys.stderr.flush()


def bar(label: str, done: int, total: int) -> None:
    """One state of a tqdm bar: begins with a carriage return, ends with nothing."""
    percent = 100 * done // max(1, total)
    sys.stderr.write(
        f"\r{label}: {percent:3d}%|{'█' * (percent // 10):<10}| {done}/{total} [00:00<00:00, 20345.11it/s]"
    )
    if done == total:
        sys.stderr.write("\n")
    sys.stderr.flush()
