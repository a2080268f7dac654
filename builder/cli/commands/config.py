"""The verb `config`: the values that a run would work with, and where each comes from."""

from __future__ import annotations

from dataclasses import dataclass

from builder.cli.invocation import Invocation
from builder.cli.options import ManifestArgs
from builder.manifest import effective, policy
from builder.manifest.effective import Setting
from builder.manifest.load import select
from builder.manifest.values import toml
from builder.report.results import Section
from builder.report.tables import table
from builder.text import printable


@dataclass(frozen=True, kw_only=True)
class ConfigArgs(ManifestArgs):
    """Arguments of `config`."""

    only: tuple[str, ...] = ()
    budget: str | None = None
    timeout: str | None = None
    silence: str | None = None
    lock_timeout: str | None = None


@dataclass
class ConfigSection(Section):
    """All values. policy: the file that bounds them."""

    settings: list[Setting]
    policy: str | None


def run(args: ConfigArgs, invocation: Invocation) -> None:
    """Print every value with its origin. Raises UsageError with every problem of the manifest."""
    limits = {name: getattr(args, name) for name in ("budget", "timeout", "silence", "lock_timeout")}
    manifest, document = invocation.manifest_and_document(needs_cache=True, **limits)
    chosen = {f"task {task.label}" for task in select(manifest, args.only).tasks}

    def given(option: str) -> str | None:
        return args.location(option.replace("_", "-")) if getattr(args, option) is not None else None

    found = [
        each
        for each in effective.settings(manifest, document, given)
        if each.table in chosen or not each.table.startswith("task ")
    ]
    invocation.report.add(ConfigSection(found, str(policy.PATH) if policy.current() else None))
    shown = [each for each in found if each.origin != "default" or not each.table.startswith("task ")]
    rows = [[each.table, each.key, _shown(each), _source(each)] for each in shown]
    invocation.report.text = None if args.json else table(("table", "key", "value", "from"), rows)
    bounds = f"bounded by {policy.PATH}" if policy.current() else f"there is no policy ({policy.PATH})"
    invocation.console.say(f"{bounds}; keys of tasks that have their default are left out here, and not with --json")


def _shown(setting: Setting) -> str:
    return "not set" if setting.value is None else printable(toml(setting.value))


def _source(setting: Setting) -> str:
    return printable(setting.source) if setting.source else "default"
