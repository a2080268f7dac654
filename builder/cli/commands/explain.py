"""The verb `explain`: why each task is warm or cold, and what the cache has for each family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from builder import text
from builder.cache import environment, families, loadable
from builder.cache.coverage import brief
from builder.cache.environment import Standing
from builder.cache.families import FAMILY
from builder.cli.invocation import Invocation
from builder.cli.options import ProofArgs
from builder.report.console import Console
from builder.report.results import Report, Section
from builder.run.job_environment import judge
from builder.run.local_executor import LocalExecutor
from builder.run.plan import Item, Plan


@dataclass(frozen=True, kw_only=True)
class ExplainArgs(ProofArgs):
    """Arguments of `explain`."""

    only: tuple[str, ...] = ()
    strict: bool = False
    no_probe: bool = False
    here: bool = False


@dataclass(frozen=True)
class TaskFactor:
    """A factor that differs from the nearest marker."""

    factor: str
    marker: str
    now: str


@dataclass(frozen=True)
class ExplainedTask:
    """Why a task is warm or cold.

    marker: path of the one that it was compared with. unjudged: compilers without compared headers.
    """

    label: str
    state: str
    reason: str
    reservation: str | None
    marker: str | None
    unjudged: list[str]
    factors: list[TaskFactor]


@dataclass
class ExplainedTasks(Section):
    """All tasks."""

    explain: list[ExplainedTask]


@dataclass
class ExplainedFamilies(Section):
    """How the directory of each family compares with this environment."""

    families: Sequence[Standing]

    def to_json(self) -> Mapping[str, object]:
        return {"families": [_family_document(each) for each in self.families]}


def _family_document(standing: Standing) -> Mapping[str, object]:
    factors = [{"factor": factor, "was": was, "is": now} for factor, was, now in standing.rows]
    return {
        "family": standing.family,
        "state": standing.state,
        "key": standing.key,
        "nearest": standing.nearest,
        "factors": factors,
    }


def run(args: ExplainArgs, invocation: Invocation) -> None:
    """Report what differs from the nearest marker for each task, and from the nearest directory for each family."""
    console, report = invocation.console, invocation.report
    if args.here:
        local = invocation.local(
            invocation.named_manifest(only=args.only), wanted=args.wanted("any", strict=args.strict)
        )
        plan = judge(local)
        show_here(local, everything=True)
        show_tasks(console, report, plan)
        return
    wanted = args.wanted("any", strict=args.strict)
    context = invocation.context(invocation.manifest(only=args.only), wanted=wanted, probes=not args.no_probe)
    with invocation.containers(context, greet=True) as executor:
        plan = judge(executor)
        show_tasks(console, report, plan)
        if plan is not None:
            standings = environment.compare(executor.described(), plan.items[0].record)
            show_families(console, report, standings, standings)


def show_tasks(console: Console, report: Report, plan: Plan | None) -> None:
    """Report for every task what differs from the nearest marker."""
    explained: list[ExplainedTask] = []
    for index, result in enumerate(report.tasks):
        judgement = plan.items[index].judgement if plan else None
        because = f", because {result.reason}" if result.reason else f", since {result.since}"
        if result.proven_by and result.proven_by.sentence and not result.reason:
            because += f"; {result.proven_by.sentence}"
        if result.reservation:
            because += f"; {result.reservation}"
        unjudged = _unjudged(plan.items[index]) if plan else ()
        if unjudged:
            because += f"; headers of {' and '.join(unjudged)} were not compared: an earlier version noted no times"
        console.say(f"{result.label}: {result.state}{because}")
        differences = list(judgement.differences) if judgement else []
        if differences:
            console.table(("factor", "marker", "now"), [[str(cell) for cell in row] for row in differences])
        explained.append(
            ExplainedTask(
                result.label,
                result.state,
                result.reason,
                result.reservation or None,
                judgement.path if judgement else None,
                list(unjudged),
                [TaskFactor(*row) for row in differences],
            )
        )
    report.add(ExplainedTasks(explained))


def _unjudged(item: Item) -> tuple[str, ...]:
    """Return the compilers of this warm task without compared headers."""
    marker = item.judgement.marker if item.judgement.state == "warm" else None
    if marker is None:
        return ()
    names = (name for each in marker.claims for name in loadable.unjudged(FAMILY[each], item.record, marker.newest))
    return tuple(dict.fromkeys(names))


def show_families(console: Console, report: Report, standings: Sequence[Standing], shown: Sequence[Standing]) -> None:
    """Report how each family's directory compares with this environment. shown: the rows of the table."""
    report.add(ExplainedFamilies(standings))
    if shown:
        rows = [[each.family, each.state, each.key, _against(each)] for each in shown]
        console.table(("family", "state", "key", "against the nearest one"), rows, styles={})


def show_here(local: LocalExecutor, *, everything: bool) -> list[Standing]:
    """Report the families of this environment, and return them. everything: show also those that the cache has."""
    console, report = local.context.console, local.context.report
    standings = local.families()
    shown = [standing for standing in standings if everything or standing.state != "found"]
    show_families(console, report, standings, [] if local.missing_root() else shown)
    image = local.image
    if everything:
        console.say(f"image {image.id[:19]}… ({image.how})" if image.id else f"image unknown: {image.how}")
    cold = any(task.state == "cold" for task in report.tasks)
    for problem in local.record["observed"]["problems"] if cold or everything else ():
        console.say(f"  ▸ {text.printable(problem)}")
    return standings


def _against(standing: Standing) -> str:
    """Return what differs from the nearest directory, and whether that one can be shared at all."""
    texts = []
    for factor, was, now in standing.rows:
        before, after = brief(was, now)
        texts.append(f"{factor} was {before} is {after}")
    bound = standing.state == "differs" and not families.FAMILY[standing.family].shared
    return "; ".join(texts) + (" (belongs to one build: never shared)" if bound else "")
