"""What a test job needs so that it hits the cache, and can prove nothing: mounts, variables and options.

The root is read-only for a job; writable are the directories of its environment's families, and nothing else: markers,
memos, generations, stamps, locks and the kernels of other keys cannot be changed, linked to or replaced, because they
are on another mount. A family whose directory is missing, or cannot be written, is pointed at a private directory of
the job: it is compiled anew, which is slower, and no failure.
"""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from builder import files
from builder.cache import families, layout, variables
from builder.cache.environment import IMAGE_VARIABLE
from builder.cache.model_store import STORE_MOUNT as STORE
from builder.cache.toolchain import Record, family_keys
from builder.errors import CANNOT_RUN, ColdError, PreflightError, Problem, UsageError
from builder.manifest import policy
from builder.manifest.sections import CacheSpec
from builder.report import github
from builder.report.results import TaskResult
from builder.run.container_executor import ContainerExecutor
from builder.run.executor import Executor
from builder.run.plan import Item, Plan, result_of
from builder.task import PRETEND_VARIABLE, Task
from builder.text import duration

#: Why a task is cold whose image must not be probed.
NO_MEMO = (
    "no-memo: the cache does not know this image, and --no-probe builds and starts nothing to look at it. In a trusted "
    "job, warm-cache check without --no-probe does so, once for an image"
)
#: What that means for a job.
NO_MOUNTS = "Nothing is printed: a job without these mounts works, and compiles every kernel itself"

#: Options of docker run that every job gets: no gain of privileges by set-user-id files, and no device nodes.
OPTIONS = ("--security-opt no-new-privileges", "--cap-drop MKNOD")
#: Where a container's job compiles families that it has no directory of: in the container itself.
PRIVATE = "/tmp/warm-cache-cold"  # noqa: S108 - of the job's container alone
#: The same for a process here: how the names of its directories begin.
_PRIVATE_HERE = "warm-cache-cold-"
#: The first version of Docker's API that mounts a directory of a volume (Docker 26, March 2024).
SUBPATH_API = (1, 45)
#: Makes sglang fail where it would compile (0.5.23, srt/environ.py).
CRASH_ON_JIT = "SGLANG_CRASH_ON_JIT_COMPILE"
#: What to do about variables and directories that only some tasks have: for jobs on the root, and in a view.
_OF_ONE_TASK = "warm-cache env --only TASK prints what one task needs"
_IN_A_VIEW = "a job in a view that needs it sets it itself (docker run -e)"
#: Why a family is compiled anew by jobs.
NO_DIRECTORY = "it has no directory yet"
NOT_SHARED = f"{policy.PATH} does not have this root on its list [cache] shared; give the job a view"


@dataclass(frozen=True, kw_only=True)
class JobEnvironment:
    """What one job gets. private: the families that it compiles anew, and why."""

    variables: Mapping[str, str]
    private: Mapping[str, str] = field(default_factory=dict)
    mounts: Sequence[str] = ()

    def text(self, form: str, toolchain: str | None) -> str:
        """Return it as arguments of docker run, a shell's exports, lines for GitHub, JSON, or part of a pod's spec.

        Raises UsageError for docker arguments that a shell would split, and for a pod that had a volume of an engine.
        """
        if form == "docker":
            return _docker_arguments(self.mounts, self.variables)
        if form == "kubernetes":
            return json.dumps(_pod(self.mounts, self.variables), indent=2)
        if form in ("shell", "github"):
            return render_variables(self.variables, form)
        return json.dumps(self.document(toolchain), indent=2)

    def document(self, toolchain: str | None) -> Mapping[str, object]:
        """Return it as values of JSON's types."""
        mounts = {"mounts": list(self.mounts), "options": list(OPTIONS)} if self.mounts else {}
        return {"toolchain": toolchain, **mounts, "env": dict(self.variables), "cold": dict(self.private)}


def judge(executor: Executor) -> Plan | None:
    """Return the plan of the manifest's tasks, and put it into the report.

    None where there is no cache root, which reading must not make: then every task is cold. None as well where an
    image is unknown and must not be probed: then the tasks that this concerns are cold.
    """
    context = executor.context
    tasks = context.manifest.tasks
    if missing := executor.missing_root():
        reason = f"no-marker: {missing}"
        context.report.tasks = [TaskResult(task.label, task.model, "", "cold", reason) for task in tasks]
        context.report.cache = executor.root_name
        return None
    if unknown := executor.unknown(tasks):
        known = [task for task in tasks if task not in unknown]
        results = {result.label: result for result in (executor.plan(known).results() if known else ())}
        cold = {task.label: TaskResult(task.label, task.model, "", "cold", NO_MEMO) for task in unknown}
        context.report.set_tasks([(results | cold)[task.label] for task in tasks])
        context.report.cache = executor.root_name
        return None
    plan = executor.plan(tasks)
    context.report.set_tasks(plan.results())
    return plan


def of_job(
    executor: ContainerExecutor, form: str = "docker", *, root: Sequence[str] = (), crash_on_jit: bool = False
) -> JobEnvironment:
    """Return what a job gets, for docker arguments, shell, lines for GitHub, or JSON. Warns of what it does not get.

    Raises ColdError where there is no cache root. Raises UsageError for the formats that a process uses in place
    (shell, github) where the root is not at its mount path here. Raises PreflightError for a volume of which the engine
    cannot mount a part.

    root: mounts that the job gets instead of the cache root's, with all of it writable.
    """
    context = executor.context
    plan = judge(executor)
    if plan is None:
        missing = executor.missing_root()
        raise ColdError(f"{missing}: nothing is warm there yet" if missing else f"{NO_MEMO}. {NO_MOUNTS}")
    tasks, mount = context.manifest.tasks, context.manifest.cache.mount
    named = [(item.task.label, item.record) for item in plan.items]
    remedy = _IN_A_VIEW if root else _OF_ONE_TASK
    keys, others = common_keys(named, remedy=remedy)
    found: dict[str, str] = {**common_env(tasks), **families.environment(mount, keys), **toolkit(named)}
    if crash_on_jit:
        found[CRASH_ON_JIT] = "1"
    if context.manifest.models.store:
        found["HF_HOME"] = STORE
    if form in ("shell", "github") and not Path(mount, "layout.json").is_file():
        raise UsageError(
            f"--format {form} is for a process that sees the cache at {mount}, and there is none here. "
            f"Use --format docker, or mount {executor.root_name} at {mount}."
        )
    private: Mapping[str, str] = {}
    place, job_max = None, context.manifest.cache.job_max
    mounts: list[str] = []
    if form in ("shell", "github"):
        places, private, place = places_here(Path(mount), keys, job_max)
        found |= places
    elif root:
        mounts = [*root, *_store(executor)]
    else:
        wanted = {pair for _, record in named for pair in family_keys(record).items()}
        shared = is_shared(context.manifest.cache, policy.current())
        writable = _directories(executor) & wanted if shared else set()
        mounts = [*_root(executor, sorted(writable)), *_store(executor)]
        why = NO_DIRECTORY if shared else NOT_SHARED
        private = {name: why for name, key in keys.items() if (name, key) not in writable}
        found |= families.environment(PRIVATE, {name: keys[name] for name in private})
        results = zip(plan.items, context.report.tasks, strict=True)
        context.report.tasks = [_without(private, item, result) for item, result in results]
    if form not in ("shell", "github"):
        found[IMAGE_VARIABLE] = executor.identity
    warnings = context.report.warnings
    warnings += [*missed(tasks, remedy=remedy), *others, *unlisted(named), *told(private, place, job_max)]
    return JobEnvironment(variables=found, private=private, mounts=mounts)


# --- variables -------------------------------------------------------------------------------------------------------


def common_env(tasks: Sequence[Task]) -> dict[str, str]:
    """Return the variables that all tasks have, with the same value: kernels were compiled under them."""
    if not tasks:
        return {}
    first, *others = [task.env.items() for task in tasks]
    return {
        name: value
        for name, value in sorted(first)
        if name != PRETEND_VARIABLE and all((name, value) in other for other in others)
    }


def missed(tasks: Sequence[Task], *, remedy: str = _OF_ONE_TASK) -> list[str]:
    """Return a warning for each variable that some tasks set and a job of all tasks does not get."""
    common = common_env(tasks)
    names = sorted({name for task in tasks for name in task.env if name not in common and name != PRETEND_VARIABLE})
    return [
        f"{name} is not set here, because only {_some([task.label for task in tasks if name in task.env])} "
        f"{'have' if sum(name in task.env for task in tasks) > 1 else 'has'} it, or their values differ: " + remedy
        for name in names
    ]


def common_keys(
    records: Sequence[tuple[str, Record]], *, remedy: str = _OF_ONE_TASK
) -> tuple[dict[str, str], list[str]]:
    """Return the key of each family, and a warning for each family of which tasks have different ones.

    records: label and record of each task; the first one's keys are returned.
    """
    keys = family_keys(records[0][1])
    own = {
        family: [label for label, record in records if family_keys(record).get(family) != key]
        for family, key in keys.items()
    }
    return keys, [
        f"{_some(labels)} {'have' if len(labels) > 1 else 'has'} a directory of {family} of their own, because of "
        f"their variables: {remedy}"
        for family, labels in own.items()
        if labels
    ]


def unlisted(records: Iterable[tuple[str, Record]]) -> list[str]:
    """Return a warning with the variables that count only because of how their names begin."""
    names = variables.unlisted({name for _, record in records for name in record.get("variables", {})})
    return [f"{', '.join(names)}: on no list of this program, so counted as a factor of kernels"] if names else []


def toolkit(records: Iterable[tuple[str, Record]]) -> dict[str, str]:
    """Return CUDA_HOME as the warm-up found it: FlashInfer and torch take it from PATH else, which jobs change.

    Nothing where only PATH named one that is not the usual one: the variable would be another key.
    """
    homes = set()
    for _, record in records:
        named = record.get("variables", {}).get(variables.CUDA_HOME)
        found = record["observed"].get("cuda_home") if record["factors"].get("nvcc") else None
        homes.add(named or (found if found == variables.DEFAULT_HOME else None))
    home = homes.pop() if len(homes) == 1 else None
    return {variables.CUDA_HOME: home} if home else {}


def places_here(
    root: Path, keys: Mapping[str, str], job_max: float
) -> tuple[dict[str, str], dict[str, str], str | None]:
    """Return the variables of a process here, why families are compiled in a private directory, and where that is.

    That directory is new with each call, so that no earlier job can have left anything there. Each call removes those
    of earlier jobs. job_max: seconds that a job may take; where something was made more recently, it stays.
    """
    import tempfile  # only `env` here needs it

    place: str | None = None
    files.remove_unused(_PRIVATE_HERE, job_max)
    private = {name: why for name, key in keys.items() if (why := layout.closed(root / name / key))}
    found = families.environment(str(root), {name: key for name, key in keys.items() if name not in private})
    if private:
        mine = {name: keys[name] for name in private}
        try:
            place = tempfile.mkdtemp(prefix=_PRIVATE_HERE)
            for name, key in mine.items():
                Path(families.directory(place, name, key)).mkdir(parents=True)
        except OSError as error:
            private = {name: f"{why}, and there is no private one ({error.strerror})" for name, why in private.items()}
        else:
            found |= families.environment(place, mine)
    return found, private, place


def told(private: Mapping[str, str], place: str | None = None, job_max: float = 0.0) -> list[str]:
    """Return a warning for each reason, with the families that are compiled anew. place, job_max: of `places_here`."""
    where = "in a private directory"
    if place is not None:
        where += f", {place}, which a later env --here removes if nothing is made in it for {duration(job_max)}"
    named = {name: why for name, why in private.items() if families.FAMILY[name].claimable}
    return [
        f"cold: {', '.join(name for name in named if named[name] == why)} (compiled anew by each job, {where}: {why})"
        for why in dict.fromkeys(named.values())
    ]


def _some(labels: Sequence[str]) -> str:
    return ", ".join(labels[:3]) + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")


# --- mounts and formats ----------------------------------------------------------------------------------------------


def _directories(executor: ContainerExecutor) -> set[tuple[str, str]]:
    """Return (family, key) of the directories that the root has: a mount of a missing one would fail the job."""
    root = executor.direct_root()
    if root is None:
        return {(each.family, each.key) for each in executor.described()}
    return {directory.name for directory in layout.family_directories(root) if not directory.path.parent.is_symlink()}


def is_shared(cache: CacheSpec, rules: policy.Policy | None) -> bool:
    """Return whether jobs may write kernels of this cache. Where the host has a policy, it names them."""
    return rules is None or rules.shares(cache.root, cache.volume)


def _without(private: Mapping[str, str], item: Item, result: TaskResult) -> TaskResult:
    """Return a task's result, cold where a job compiles one of the families that its marker claims."""
    claims = item.judgement.marker.claims if item.warm and item.judgement.marker else {}
    anew = [name for name in claims if name in private]
    if not anew:
        return result
    return result_of(item, "cold", f"unwritable: {', '.join(anew)}: {private[anew[0]]}")


def _root(executor: ContainerExecutor, writable: Sequence[tuple[str, str]]) -> list[str]:
    """Return the mounts of the root: read-only, but for the directories in which kernels may be added."""
    cache = executor.context.manifest.cache
    below = [f"{family}/{key}" for family, key in writable]
    if cache.root is not None:
        return [_bind(cache.root, cache.mount, "readonly")] + [
            _bind(f"{cache.root}/{part}", f"{cache.mount}/{part}") for part in below
        ]
    if executor.engine.podman or tuple(map(int, executor.engine.api_version.split("."))) < SUBPATH_API:
        text = f"this engine cannot mount parts of the volume {cache.volume}, and all of it is not a job's to change."
        remedy = "Use a directory, Docker 26 or later, or give the job a view: warm-cache view create JOB."
        raise PreflightError(CANNOT_RUN, [Problem("cache", text, remedy)])
    return [f"type=volume,src={cache.volume},dst={cache.mount},readonly,volume-nocopy"] + [
        f"type=volume,src={cache.volume},dst={cache.mount}/{part},volume-nocopy,volume-subpath={part}" for part in below
    ]


def _store(executor: ContainerExecutor) -> list[str]:
    store = executor.context.manifest.models.store
    return [_bind(store, STORE, "readonly")] if store else []


def _bind(source: Path | str, target: str, *flags: str) -> str:
    """Return a mount in docker's words: fields of CSV, of which a path with a comma is one and not two."""
    import csv  # a check mounts nothing

    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(["type=bind", f"src={source}", f"dst={target}", *flags])
    return line.getvalue()


#: What every shell leaves alone in the middle of a word, pasted, substituted or in a workflow's script.
_WORD = re.compile(r"[\w@%+=:,./~#-]+")


def _docker_arguments(mounts: Sequence[str], variables: Mapping[str, str]) -> str:
    words = [*mounts, *(f"{name}={value}" for name, value in sorted(variables.items()))]
    split = [word for word in words if not _WORD.fullmatch(word)]
    if split:
        raise UsageError(
            f"docker run $(…) would not get {split[0]!r} as it is: shells interpret blanks, quotes and some signs, and "
            "docker splits at commas. Use --format json, or a cache root and model store without such characters."
        )
    return " ".join(
        [f"--mount {mount}" for mount in mounts] + [f"-e {word}" for word in words[len(mounts) :]] + list(OPTIONS)
    )


def _pod(mounts: Sequence[str], variables: Mapping[str, str]) -> dict[str, object]:
    """Return what is merged into a pod's spec, whose container is named sglang: variables, mounts and volumes."""
    import csv

    container: dict[str, object] = {
        "name": "sglang",
        "env": [{"name": name, "value": value} for name, value in sorted(variables.items())],
    }
    sources: dict[str, str] = {}  # directory of the node → name of the volume
    mounted: list[dict[str, object]] = []
    for mount in mounts:
        kind, source, path, *flags = next(csv.reader([mount]))
        source, path = source.removeprefix("src="), path.removeprefix("dst=")
        if kind != "type=bind":
            raise UsageError(f"--format kubernetes: a pod cannot have the engine's volume {source}: use a directory")
        above = next((each for each in sources if source.startswith(f"{each}/")), source)
        name = sources.setdefault(above, "models" if path == STORE else "warm-cache")
        where: dict[str, object] = {"name": name, "mountPath": path}
        if above != source:
            where["subPath"] = source[len(above) + 1 :]
        if "readonly" in flags:
            where["readOnly"] = True
        mounted.append(where)
    if not mounts:
        return {"containers": [container]}
    container["volumeMounts"] = mounted
    container["securityContext"] = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["MKNOD"]}}
    volumes = [{"name": name, "hostPath": {"path": path, "type": "Directory"}} for path, name in sources.items()]
    return {"containers": [container], "volumes": volumes}


def render_variables(variables: Mapping[str, str], form: str) -> str:
    """Return variables as a shell's exports, or as lines of GitHub's file of variables."""
    if form == "shell":
        return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in sorted(variables.items()))
    return "\n".join(github.variable(name, value) for name, value in sorted(variables.items()))
