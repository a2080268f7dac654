"""The host's policy: what a manifest may ask of this machine, in a file that root alone can write.

A manifest may come from a pull request, and the engine's socket makes its reader root. Where there is a policy, every
value that has power over the host has to be on its lists, wherever the value is from: the manifest, an option or a
variable. Nothing but root names the file. Without one a manifest may ask for anything; builder/docs/security.md says
what that is.
"""

from __future__ import annotations

import fnmatch
import os
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from builder.errors import Problem, UsageError
from builder.manifest.document import Document, Table
from builder.manifest.values import a_string, count, list_of, matching

if TYPE_CHECKING:
    from builder.manifest.load import Manifest

#: Where the policy is. No option, variable or manifest names another place.
PATH = Path("/etc/warm-cache/policy.toml")
#: The user that has to own the file and the directories above it.
OWNER = 0
SCHEMA = 1

#: Before the name of a volume in the list of shared roots.
VOLUME = "volume:"

#: More bytes are no policy.
_LIMIT = 1 << 20
_REMEDY = "Nothing is done until root mends or removes it."
_entries = list_of(a_string, "texts")
_a_stream = matching(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}", "the name of a stream")


# --- how a value is compared -----------------------------------------------------------------------------------------


def _matches(value: str, allowed: str) -> bool:
    """Return whether a name is this one; ``*`` stands for any characters."""
    return fnmatch.fnmatchcase(value, allowed)


def _equals(value: str, allowed: str) -> bool:
    """Return whether a command line is this one, to the letter; ``*`` alone allows any."""
    return allowed in ("*", value)


def _inside(value: str, allowed: str) -> bool:
    """Return whether a path is this one or below it, after all links."""
    inner, outer = os.path.realpath(value), os.path.realpath(allowed)
    return os.path.commonpath([inner, outer]) == outer


@dataclass(frozen=True)
class PolicyRule:
    """One field of the manifest, and the list of the policy that its values have to be on."""

    section: str
    field: str
    list: str  # in the policy's section of the same name
    compare: Callable[[str, str], bool]

    def values(self, manifest: Manifest) -> tuple[str, ...]:
        """Return the values that this manifest has there."""
        if (self.section, self.field) == ("models", "writable"):
            return (str(manifest.models.store),) if manifest.models.writable and manifest.models.store else ()
        value = getattr(getattr(manifest, self.section), self.field)
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        return tuple(map(str, values))


RULES = (
    PolicyRule("image", "ref", "allowed", _matches),
    PolicyRule("image", "setup", "setup", _equals),
    PolicyRule("cache", "root", "roots", _inside),
    PolicyRule("cache", "volume", "volumes", _matches),
    PolicyRule("models", "store", "stores", _inside),
    PolicyRule("models", "writable", "writable", _inside),
    PolicyRule("container", "network", "networks", _matches),
    PolicyRule("container", "secrets", "secrets", _matches),
    PolicyRule("gpus", "acquire", "hooks", _equals),
    PolicyRule("gpus", "release", "hooks", _equals),
    PolicyRule("refresh", "metrics", "metrics", _inside),
)
SECTIONS = tuple(dict.fromkeys(rule.section for rule in RULES))
#: Lists that no field of a manifest is compared with: roots whose keys `env` hands out writable.
OTHERS = (("cache", "shared"),)
#: Of these the entries are paths.
PATHS = {*OTHERS, *((rule.section, rule.list) for rule in RULES if rule.compare is _inside)}
#: The option that replaces a field's value.
_OPTIONS = {
    ("image", "ref"): "image",
    ("cache", "root"): "cache",
    ("cache", "volume"): "cache",
    ("models", "store"): "models",
}


# --- the policy ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Allowed:
    """One list of the policy. location: ``FILE:LINE`` of it, or of what is nearest to where it would be."""

    entries: tuple[str, ...]
    location: str

    def says(self, section: str, name: str) -> str:
        """Return what the list allows, for people."""
        entries = ", ".join(map(repr, self.entries)) or "nothing"
        return f"{self.location} allows {entries} ([{section}] {name})"


@dataclass(frozen=True)
class RegistryPolicy:
    """Whose cache images this host takes, whatever an option says. location: ``FILE:LINE`` of the section's keys.

    keys: files of public keys, of which one has to have signed; none: options say. stream: None for any.
    """

    keys: tuple[Path, ...] = ()
    stream: str | None = None
    location: str = str(PATH)


NO_REGISTRY = RegistryPolicy()


@dataclass(frozen=True)
class Policy:
    """What this host allows: section and list → entries. A list that is missing allows nothing."""

    lists: Mapping[tuple[str, str], Allowed]
    registry: RegistryPolicy = NO_REGISTRY

    def allows(self, rule: PolicyRule, value: str) -> bool:
        """Return whether one of the entries of the rule's list matches this value."""
        return any(rule.compare(value, entry) for entry in self.lists[rule.section, rule.list].entries)

    def shares(self, root: Path | None, volume: str | None = None) -> bool:
        """Return whether jobs may write keys of this root (a directory, or a volume), which others use."""
        entries = self.lists["cache", "shared"].entries
        if root is None:
            return any(_matches(f"{VOLUME}{volume}", entry) for entry in entries)
        return any(_inside(str(root), entry) for entry in entries if not entry.startswith(VOLUME))

    def bounded(
        self,
        manifest: Manifest,
        document: Document,
        given: Callable[[str], bool],
        sections: Collection[str] = SECTIONS,
    ) -> Manifest:
        """Return the manifest without default secrets that are not allowed; add a problem for each refused value.

        given: whether this option replaced the value. sections: those that were read.
        """
        table = document.data.get("container")
        if not (isinstance(table, dict) and "secrets" in table):
            rule = next(rule for rule in RULES if rule.field == "secrets")
            kept = tuple(name for name in manifest.container.secrets if self.allows(rule, name))
            manifest = replace(manifest, container=replace(manifest.container, secrets=kept))
        for rule in (rule for rule in RULES if rule.section in sections):
            option = _OPTIONS.get((rule.section, rule.field), "")
            for value in rule.values(manifest):
                if not self.allows(rule, value):
                    location = (
                        f"--{option}" if option and given(option) else document.location((rule.section, rule.field))
                    )
                    document.problems.append(Problem(location, *self._refusal(rule, value)))
        return manifest

    def problem(self, section: str, field: str, value: str, location: str) -> Problem | None:
        """Return why this value, which an option gives to the field, is refused; None for one that is allowed."""
        rule = next(rule for rule in RULES if (rule.section, rule.field) == (section, field))
        return None if self.allows(rule, value) else Problem(location, *self._refusal(rule, value))

    def _refusal(self, rule: PolicyRule, value: str) -> tuple[str, str]:
        allowed = self.lists[rule.section, rule.list]
        return (
            f"[{rule.section}] {rule.field} is {value!r}, which this host does not allow:",
            f"{allowed.says(rule.section, rule.list)}.",
        )


def refused_metrics(path: Path, location: str) -> Problem | None:
    """Return why this host's policy refuses a file of metrics; None for one that is allowed, or without a policy."""
    rules = current()
    return rules.problem("refresh", "metrics", str(path), location) if rules is not None else None


def current() -> Policy | None:
    """Return this host's policy; None where it has none. Raises UsageError for one that cannot be trusted or read."""
    try:
        descriptor = os.open(PATH, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        # Whoever could have removed it from its directory has not done away with it.
        if os.path.lexists(PATH.parent):
            _trust(PATH.parent)
        return None
    except OSError as error:
        raise _broken(f"cannot be read ({error.strerror})") from None
    try:
        why = _distrust(os.fstat(descriptor), directory=False)
        if why:
            raise _broken(why)
        _trust(*PATH.parents)
        raw = os.read(descriptor, _LIMIT + 1)
    except OSError as error:
        raise _broken(f"cannot be read ({error.strerror})") from None
    finally:
        os.close(descriptor)
    if len(raw) > _LIMIT:
        raise _broken(f"has more than {_LIMIT} bytes")
    return parse(str(PATH), raw)


def parse(name: str, raw: bytes) -> Policy:
    """Return the policy of this text. Raises UsageError with one sentence."""
    try:
        document = Document.parse(name, raw)
    except UsageError as error:
        first = error.problems[0] if error.problems else error.message
        raise _broken(f"is broken: {first}", name) from None
    root = document.root()
    schema = root.require("schema", count, SCHEMA)
    if schema != SCHEMA:
        root.add_problem("schema", f"schema {schema} is not known to this builder;", f"it reads schema {SCHEMA}.")
    lists = dict(_lists(document, root))
    registry = _registry(document, root.table("registry"))
    root.finish()
    if document.problems:
        raise _broken("is broken: " + "; ".join(map(str, document.in_order())), name)
    return Policy(lists, registry)


def _lists(document: Document, root: Table) -> Iterator[tuple[tuple[str, str], Allowed]]:
    known = list(dict.fromkeys([*((rule.section, rule.list) for rule in RULES), *OTHERS]))
    for section in dict.fromkeys(section for section, _ in known):
        table = root.table(section)
        for name in (name for each, name in known if each == section):
            entries = table.read(name, _entries, ())
            for entry in entries if (section, name) in PATHS else ():
                if not entry.startswith(("/", VOLUME) if (section, name) == ("cache", "shared") else "/"):
                    table.add_problem(name, f"{name}: expected absolute paths, found {entry!r}.")
            yield (section, name), Allowed(entries, document.location((section, name)))
        table.finish()


def _registry(document: Document, table: Table) -> RegistryPolicy:
    keys = table.read("keys", _entries, ())
    for entry in keys:
        if not entry.startswith("/"):
            table.add_problem("keys", f"keys: expected absolute paths of public keys, found {entry!r}.")
    stream = table.read("stream", _a_stream, None)
    if stream is not None and not keys:
        table.add_problem("stream", "stream: only a signature says of which stream an image is:", "name keys, too.")
    table.finish()
    return RegistryPolicy(tuple(map(Path, keys)), stream, document.location(("registry", "keys")))


def require_trusted(paths: Collection[Path]) -> None:
    """Raise UsageError for the first of these files that others than root could have written, or replaced."""
    for path in paths:
        try:
            why = _distrust(path.lstat(), directory=False)
            above = why or next(filter(None, (_distrust(each.lstat(), directory=True) for each in path.parents)), "")
        except OSError as error:
            raise _broken(f"names the key {path}, which cannot be read ({error.strerror})") from None
        if above:
            place = "it" if why else "a directory above"
            raise _broken(f"names the key {path}, which cannot be trusted: {place} {above}")


def _trust(*folders: Path) -> None:
    """Raise UsageError for the first of these directories that others than root could have written to."""
    for folder in folders:
        if why := _distrust(folder.lstat(), directory=True):
            raise _broken(f"cannot be trusted: {folder} {why}")


def _distrust(status: os.stat_result, *, directory: bool) -> str:
    """Return why others than root could have written this; "" if none could."""
    if directory != stat.S_ISDIR(status.st_mode) or not (directory or stat.S_ISREG(status.st_mode)):
        return f"is no {'directory' if directory else 'regular file'}"
    if status.st_uid not in (0, OWNER):
        return f"belongs to uid {status.st_uid}, not to root"
    # In a directory with the sticky bit, what belongs to root can be replaced by root alone.
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not (directory and status.st_mode & stat.S_ISVTX):
        return f"can be written by others than root (mode {stat.S_IMODE(status.st_mode):04o})"
    return ""


def _broken(why: str, name: str = "") -> UsageError:
    return UsageError(f"the policy of this host, {name or PATH}, {why}. {_REMEDY}")
