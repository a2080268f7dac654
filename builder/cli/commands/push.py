"""The verb `push`: publish what is warm as a cache image."""

from __future__ import annotations

from dataclasses import dataclass

from builder.cli import registry
from builder.cli.invocation import Invocation
from builder.cli.options import ManifestArgs, RegistryArgs
from builder.errors import UsageError
from builder.registry.reference import Reference, parse
from builder.run import push
from builder.run.image_places import ContainerPlace, ImagePlace, LocalPlace
from builder.run.push import PushSettings


@dataclass(frozen=True, kw_only=True)
class PushArgs(ManifestArgs, RegistryArgs):
    """Arguments of `push`."""

    ref: str
    only: tuple[str, ...] = ()
    tag: str | None = None
    dry_run: bool = False
    lock_timeout: str | None = None
    here: bool = False


def run(args: PushArgs, invocation: Invocation) -> None:
    """Push what is warm, and print its digest."""
    reference = parse(args.ref)
    if reference.tag or reference.digest:
        raise UsageError(
            f"REF {reference}: a push makes a tag of its own. Name the repository, {reference.name}, and a tag that is "
            "to name the image too by --tag"
        )
    if args.tag is not None:
        reference.with_tag(args.tag)
    manifest = invocation.manifest(only=args.only, lock_timeout=args.lock_timeout)
    settings = PushSettings(args.tag, named=bool(args.only), dry_run=args.dry_run)
    if args.here:
        with invocation.signals.handled():
            _push(args, invocation, reference, LocalPlace(invocation.local(manifest), args.image), settings)
        return
    with invocation.containers(invocation.context(manifest)) as executor:
        _push(args, invocation, reference, ContainerPlace(executor), settings)


def _push(
    args: PushArgs, invocation: Invocation, reference: Reference, place: ImagePlace, settings: PushSettings
) -> None:
    with registry.client(args, invocation, reference) as client:
        push.push(place, client, settings)
