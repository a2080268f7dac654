"""The verb `profiles`: the packaged manifests, as a list or one of them whole."""

from __future__ import annotations

from dataclasses import dataclass

from builder.cli.invocation import Invocation
from builder.cli.options import Args
from builder.manifest import load
from builder.manifest.fields import Overrides
from builder.report.results import Section
from builder.report.tables import table
from builder.text import counted


@dataclass(frozen=True, kw_only=True)
class ProfilesArgs(Args):
    """Arguments of `profiles`."""

    action: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class _Profile:
    """One profile. The fields are keys of the JSON document."""

    name: str
    tasks: int
    gpus: int
    gpu: str | None
    image: str


@dataclass
class ProfilesSection(Section):
    """All profiles."""

    profiles: list[_Profile]


def run(args: ProfilesArgs, invocation: Invocation) -> None:
    """Print the list, or the text of one. Raises UsageError for an unknown name."""
    report = invocation.report
    if args.action == "show":
        report.text = load.profile_text(args.name or "").rstrip("\n")
        return
    found = [_profile(name) for name in load.profiles()]
    report.add(ProfilesSection(found))
    rows = [
        [each.name, str(each.tasks), f"{each.gpus} × {each.gpu}" if each.gpus else "none", each.image] for each in found
    ]
    report.text = None if args.json else table(("profile", "tasks", "GPUs", "image"), rows)
    invocation.console.say(f"{counted(len(found), 'profile')}; to see one: warm-cache profiles show {found[0].name}")


def _profile(name: str) -> _Profile:
    manifest = load.load(profile=name, overrides=Overrides(needs_cache=False))
    gpus = manifest.gpus
    return _Profile(name, len(manifest.tasks), gpus.count, gpus.name, manifest.image.ref)
