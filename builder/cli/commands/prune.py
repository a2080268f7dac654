"""The verb `prune`: remove what no kept toolchain needs, so that the cache stays within its limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from builder.cli.invocation import Invocation
from builder.cli.options import PolicyArgs
from builder.errors import Problem, UsageError
from builder.manifest.load import CacheSpec
from builder.manifest.values import a_string, positive_seconds, size
from builder.run import prune
from builder.run.prune import Limits


@dataclass(frozen=True, kw_only=True)
class PruneArgs(PolicyArgs):
    """Arguments of `prune`."""

    dry_run: bool = False
    lock_timeout: str | None = None


def run(args: PruneArgs, invocation: Invocation) -> None:
    """Remove what the limits do not keep, or show what would be removed."""
    manifest = invocation.manifest(lock_timeout=args.lock_timeout)
    wanted = limits(args, manifest.cache)
    with invocation.containers(invocation.context(manifest)) as executor:
        prune.prune(executor, wanted, dry_run=args.dry_run)


def limits(args: PolicyArgs, cache: CacheSpec) -> Limits:
    """Return the limits that the options give, else the manifest's. Raises UsageError with every problem."""
    problems: list[Problem] = []
    found = Limits(
        keep=args.converted("keep", args.keep, _count, cache.keep, problems),
        older_than=args.converted("older-than", args.older_than, positive_seconds, cache.older_than, problems),
        max_size=args.converted("max-size", args.max_size, size, cache.max_size, problems),
        images=args.images,
    )
    if problems:
        raise UsageError("options cannot be used as they are", problems)
    return found


def _count(value: Any) -> int:
    text = a_string(value).strip()
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) < 1 << 31:
        raise ValueError(f"a number of at least 1 is wanted, found {text!r}")
    return int(text)
