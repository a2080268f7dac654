"""The verb `report`: what a cache root, its runs and test jobs come to, for people, programs and a browser.

Reads directories alone: no engine, no GPU and no model store.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from builder import files
from builder.beneath import Tree
from builder.cache import history, inventory, layout, marker_files
from builder.cli import measuring
from builder.cli.invocation import Invocation
from builder.cli.options import Args
from builder.errors import PreflightError, UsageError
from builder.report import overview, page
from builder.report.audit import jit_of
from builder.report.overview import FamilySize, Overview, PastTask, ProvenTask
from builder.text import counted, printable, size

#: Files of audits that are read, and bytes of one.
_MOST_FILES, _MOST_BYTES = 20_000, 16 << 20


@dataclass(frozen=True, kw_only=True)
class ReportArgs(Args):
    """Arguments of `report`."""

    cache: str | None = None
    html: str | None = None
    audits: str | None = None
    metrics: str | None = None


def run(args: ReportArgs, invocation: Invocation) -> None:
    """Show what is there, and write the page. Raises UsageError, and PreflightError for a root that cannot be read."""
    found = Overview()
    if args.cache:
        _read_root(_root(args.cache, invocation), found)
    elif not args.audits:
        raise UsageError("a report of what? Pass --cache DIR, or --audits DIR, or both")
    if args.audits:
        _read_audits(Path(args.audits), found)
    invocation.report.add(found)
    invocation.report.warnings += found.problems
    _show(invocation, found)
    if args.metrics:
        measuring.report(args.metrics, found, invocation)
    if args.html:
        _write(args, found, invocation)


def _root(place: str, invocation: Invocation) -> Path:
    spec = invocation.cache(place)
    if spec.root is None:
        raise UsageError(
            f"the cache is the volume {spec.volume}, and report reads a directory: pass --cache DIR, or run it in a "
            "container that has the volume mounted"
        )
    if not spec.root.is_dir():
        raise PreflightError(f"there is no cache at {spec.root}")
    if stranger := layout.foreign(spec.root):
        raise PreflightError(f"{spec.root} is no cache root: {stranger} is in it")
    invocation.report.cache = str(spec.root)
    return spec.root


def _read_root(root: Path, found: Overview) -> None:
    found.root = str(root)
    past = history.read(root)
    if past.problem:
        found.problems.append(past.problem)
    if past.damaged:
        found.problems.append(f"{history.NAME}: {counted(past.damaged, 'damaged line')} left out")
    names = PastTask.__dataclass_fields__
    found.runs = [PastTask(**{name: getattr(line, name) for name in names}) for line in past.lines]
    for each in marker_files.every(root):
        if each.marker is None:
            found.problems.append(f"{each.path}: {each.problem}")
            continue
        marker = each.marker
        task, chain = printable(marker.label or each.folder)[:120], printable(str(marker.toolchain))[:40]
        found.proven.append(ProvenTask(task, chain, printable(marker.proof)[:40], round(each.written, 3)))
    sizes: dict[str, FamilySize] = {}
    for held in inventory.contents(root):
        known = sizes.get(held.family, FamilySize(held.family, 0, 0))
        sizes[held.family] = FamilySize(held.family, known.entries + held.entries, known.bytes + held.bytes)
    found.families = [each for each in sizes.values() if each.entries or each.bytes]


def _read_audits(folder: Path, found: Overview) -> None:
    """Read the JSON documents of ``audit --json`` and ``view audit --json`` below a directory."""
    if not folder.is_dir():
        raise UsageError(f"--audits: there is no directory {folder}")
    others = 0
    with Tree(folder) as tree:
        for number, name in enumerate(_documents(tree)):
            if number >= _MOST_FILES:
                found.problems.append(f"--audits: only the first {_MOST_FILES} files are read")
                break
            try:
                jits = jit_of(tree.read_json(name, _MOST_BYTES), printable(name.removesuffix(".json"))[:200])
            except (files.UnreadableError, OSError, ValueError):
                others += 1
                continue
            found.audits += 1
            found.jobs += jits
    if others:
        found.problems.append(f"--audits: {counted(others, 'file')} below {folder} hold no audit")


def _documents(tree: Tree) -> Iterator[str]:
    for _, item in tree.walk():
        if item is not None and item.last.endswith(".json") and not item.is_dir:
            yield item.name


def _show(invocation: Invocation, found: Overview) -> None:
    console = invocation.console
    if found.root:
        tasks = len({each.task for each in found.proven})
        total = sum(each.bytes for each in found.families)
        console.say(
            f"cache {found.root}: {counted(len(found.proven), 'marker')} of {counted(tasks, 'task')}, "
            f"{size(total)} of entries"
        )
        if rows := overview.run_rows(found):
            console.table(overview.RUN_COLUMNS, rows)
        else:
            console.say("no run is recorded")
    console.say(overview.jit_line(found))
    for (family, build), (kernels, seconds) in sorted(overview.by_family(found.jobs).items()):
        of = f" of build {build}" if build else ""
        console.say(f"  {family}: {counted(kernels, 'kernel')} in about {seconds:.0f} s, in jobs{of}")


def _write(args: ReportArgs, found: Overview, invocation: Invocation) -> None:
    path = Path(args.html or "")
    try:
        files.replace_file(path, page.page(found, now=time.time()).encode("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{args.location('html')}: cannot write {args.html!r}: {files.why(error)}") from None
    invocation.console.say(f"page: {path.absolute()}")
