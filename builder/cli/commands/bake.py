"""The verb `bake`: the serving image with the warm cache in it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from builder.cli.invocation import Invocation
from builder.cli.options import ManifestArgs
from builder.errors import UsageError
from builder.run import bake
from builder.run.image_places import ContainerPlace

#: A name of an image on an engine, with or without a tag.
_NAME = re.compile(
    r"(?:[A-Za-z0-9][A-Za-z0-9.-]*(?::[0-9]{1,5})?/)?[a-z0-9][a-z0-9._/-]*(?::\w[\w.-]{0,127})?", re.ASCII
)


@dataclass(frozen=True, kw_only=True)
class BakeArgs(ManifestArgs):
    """Arguments of `bake`."""

    name: str
    only: tuple[str, ...] = ()
    lock_timeout: str | None = None


def run(args: BakeArgs, invocation: Invocation) -> None:
    """Build the image, and print what it is called."""
    if not _NAME.fullmatch(args.name):
        raise UsageError(f"TAG is {args.name!r}: the name of an image is wanted, as sglang-warm:v0.5.23")
    manifest = invocation.manifest(only=args.only, lock_timeout=args.lock_timeout)
    with invocation.containers(invocation.context(manifest)) as executor:
        bake.bake(ContainerPlace(executor), args.name)
