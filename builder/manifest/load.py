"""Loads a manifest: from a file or a packaged profile, with the overrides of the command line, as frozen values.

Every problem is reported at once, with its line and, for an unknown name, the known one that is closest.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from builder import files
from builder.errors import Problem, UsageError
from builder.manifest import policy
from builder.manifest.document import Document, Table
from builder.manifest.fields import OverrideReader, Overrides, read
from builder.manifest.sections import (
    CacheSpec,
    ContainerSpecs,
    GpusSpec,
    ImageSpec,
    ModelsSpec,
    PrebuildSpec,
    RefreshSpec,
    RunSpec,
    read_cache,
    read_gpus,
    read_image,
)
from builder.manifest.tasks import read_tasks
from builder.manifest.values import count
from builder.task import Task
from builder.text import did_you_mean, printable

__all__ = [
    "CacheSpec", "ContainerSpecs", "GpusSpec", "ImageSpec", "Manifest", "ModelsSpec", "Overrides",
    "PrebuildSpec", "RefreshSpec", "RunSpec",
    "cache_of", "image_alone", "load", "profile_text", "profiles", "read_manifest", "select",
]  # fmt: skip

SCHEMA = 1
_PROFILES = Path(__file__).resolve().parents[1] / "profiles"
#: Bytes of a manifest.
_LARGEST = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A manifest as the program uses it. path: its name in messages."""

    path: str
    image: ImageSpec
    cache: CacheSpec
    models: ModelsSpec
    container: ContainerSpecs
    gpus: GpusSpec
    run: RunSpec
    prebuild: PrebuildSpec
    refresh: RefreshSpec
    tasks: tuple[Task, ...]


def load(
    path: str | Path | None = None,
    *,
    profile: str | None = None,
    overrides: Overrides = Overrides(),
    only: Sequence[str] = (),
    pipes: bool = True,
) -> Manifest:
    """Return the manifest of this file, or the packaged profile of this name.

    only: selects tasks, as `select` does. pipes: the file may be a pipe, which is waited for. Raises UsageError with
    every problem.
    """
    if not pipes:
        _require_regular(str(path))
    manifest, _ = read_manifest(path, profile=profile, overrides=overrides)
    return select(manifest, only)


def read_manifest(
    path: str | Path | None = None, *, profile: str | None = None, overrides: Overrides = Overrides()
) -> tuple[Manifest, Document]:
    """Return a manifest and the document that it was read from. Raises UsageError with every problem."""
    name, raw = _read_profile(profile) if profile is not None else _read_file(Path(path or ""))
    document = Document.parse(name, raw)
    manifest = _manifest(document, overrides)
    if document.problems:
        raise UsageError(f"{name} cannot be used as it is", document.in_order())
    return manifest, document


def profile_text(name: str) -> str:
    """Return the text of a packaged profile. Raises UsageError where there is none of this name."""
    return _read_profile(name)[1].decode("utf-8")


def cache_of(location: str) -> CacheSpec:
    """Return the cache that ``--cache`` names, for use without a manifest. Raises UsageError."""
    document = Document.parse("--cache", b"")
    options = OverrideReader(document, Overrides(cache=location))
    spec = read_cache(document.root().table("cache"), options)
    rules = policy.current()
    if rules is not None:
        rules.bounded(replace(without_tasks(), cache=spec), document, options.given, ("cache",))
    if document.problems:
        raise UsageError(f"--cache {location} cannot be used", document.in_order())
    return spec


def image_alone(ref: str) -> Manifest:
    """Return a manifest that names the image of ``--image`` and nothing else. Raises UsageError."""
    manifest, rules = without_tasks(ref), policy.current()
    if rules is not None:
        document = Document.parse("--image", b"")
        rules.bounded(manifest, document, lambda option: True, ("image",))
        if document.problems:
            raise UsageError(f"--image {ref} cannot be used", document.problems)
    return manifest


def without_tasks(image: str = "") -> Manifest:
    """Return a manifest that names an image and nothing else, for use where no manifest is named."""
    return Manifest(
        path="",
        image=ImageSpec(ref=image),
        cache=CacheSpec(root=Path(files.temporary_directory())),
        models=ModelsSpec(),
        container=ContainerSpecs(),
        gpus=GpusSpec(count=0),
        run=RunSpec(),
        prebuild=PrebuildSpec(),
        refresh=RefreshSpec(),
        tasks=(),
    )


def profiles() -> list[str]:
    """Return the names of the packaged profiles."""
    return sorted(path.stem for path in _PROFILES.glob("*.toml"))


def select(manifest: Manifest, only: Sequence[str]) -> Manifest:
    """Return the manifest with the tasks that a pattern matches by label, model or the model's last part.

    only: names or globs, in any case; empty: every task. Raises UsageError for each pattern that selects nothing.
    """
    if not only:
        return manifest
    names = {task.label: (task.label, task.model, task.model.rpartition("/")[2]) for task in manifest.tasks}
    chosen: set[str] = set()
    problems = []
    for pattern in only:
        found = {
            label
            for label, forms in names.items()
            if any(fnmatch.fnmatchcase(form.lower(), pattern.lower()) for form in forms)
        }
        if not found:
            hint = did_you_mean(pattern, {form for forms in names.values() for form in forms[1:]} | set(names))
            problems.append(Problem("--only", f"no task of {manifest.path} matches {pattern!r};", hint))
        chosen |= found
    if problems:
        raise UsageError("--only selects nothing", problems)
    return replace(manifest, tasks=tuple(task for task in manifest.tasks if task.label in chosen))


def _read_profile(name: str) -> tuple[str, bytes]:
    known = profiles()
    if name not in known:
        hint = did_you_mean(name, known)
        raise UsageError(
            f"there is no profile {name!r}", [Problem("--profile", f"there is no profile {name!r};", hint)]
        )
    return f"{name}.toml", (_PROFILES / f"{name}.toml").read_bytes()


def _require_regular(name: str) -> None:
    """Raise UsageError for a path that another manifest names, and that is no regular file."""
    try:
        os.close(files.open_regular(name)[0])
    except files.UnreadableError as error:
        raise UsageError(f"{printable(name)} cannot be read", [Problem(printable(name), f"{error}.")]) from None


def _read_file(path: Path) -> tuple[str, bytes]:
    name = printable(str(path))
    try:
        # Not by its size: it may be a pipe (/dev/stdin, <(…)), or a device without an end.
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise ValueError(f"it has more than {_LARGEST >> 20} MiB, and no manifest has")
        return name, data
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        hint = "Name a file with --manifest, or a packaged profile with --profile: " + ", ".join(profiles()) + "."
        raise UsageError(f"{name} cannot be read", [Problem(name, f"{reason}.", hint)]) from None


def _manifest(document: Document, overrides: Overrides) -> Manifest:
    root = document.root()
    schema = root.require("schema", count, SCHEMA)
    if schema != SCHEMA:
        root.add_problem("schema", f"schema {schema} is not known to this builder;", f"it reads schema {SCHEMA}.")
    options = OverrideReader(document, overrides)
    gpus = read_gpus(root.table("gpus"), options)
    manifest = Manifest(
        path=document.name,
        image=read_image(root.table("image"), options),
        cache=read_cache(root.table("cache"), options),
        models=read(ModelsSpec(), root.table("models"), options),
        container=read(ContainerSpecs(), root.table("container"), options),
        gpus=gpus,
        run=read(RunSpec(), root.table("run"), options),
        prebuild=read(PrebuildSpec(), root.table("prebuild"), options),
        refresh=read(RefreshSpec(), root.table("refresh"), options),
        tasks=read_tasks(root, gpus, options),
    )
    root.finish()
    rules = policy.current()
    if rules is not None:
        used = policy.SECTIONS if overrides.needs_cache else [each for each in policy.SECTIONS if each != "cache"]
        manifest = rules.bounded(manifest, document, options.given, used)
    return _with_lifetime(manifest, root)


def _with_lifetime(manifest: Manifest, root: Table) -> Manifest:
    """Set the lifetime, unless it is given, to more than the run can take: it is the last of all deadlines."""
    run = manifest.run
    longest = max((task.timeout for task in manifest.tasks), default=0.0)
    table = root.table("run")
    if not table.has("lifetime"):
        whole = run.budget or sum(task.timeout for task in manifest.tasks)
        return replace(manifest, run=replace(run, lifetime=max(run.lifetime, whole + 600, longest + 600)))
    if run.lifetime <= longest:
        table.add_problem(
            "lifetime", f"lifetime is not longer than the longest task timeout ({longest:.0f} s).", "Raise it."
        )
    return manifest
