"""What a verb is called with when it needs no engine: what was said, the environment, and where to say things."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from builder.manifest.load import CacheSpec, Manifest
from builder.report.console import Console
from builder.report.results import Report

if TYPE_CHECKING:
    from builder.host.cancel import Cancel
    from builder.run.container_executor import ContainerExecutor


@dataclass(frozen=True)
class Call:
    """One verb's invocation. The callables raise UsageError, with the place where a value was said.

    manifest: reads the manifest that was named; cache: reads ``--cache``; connect: the manifest's executor on an engine
    that answers within so many seconds; signals: the program's own handling of signals, for as long as it is entered.
    """

    said: Namespace
    environ: Mapping[str, str]
    report: Report
    console: Console
    cancel: Cancel
    manifest: Callable[[], Manifest]
    cache: Callable[[], CacheSpec]
    connect: Callable[[Manifest, float], AbstractContextManager[ContainerExecutor]]
    signals: Callable[[], AbstractContextManager[None]]

    @property
    def names_a_manifest(self) -> bool:
        """Whether a manifest or a profile was said."""
        return bool(self.said.manifest or self.said.profile)
