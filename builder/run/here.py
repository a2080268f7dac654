"""check, explain and env for the environment that this runs in: a test job inside its own container.

No engine, and nothing that is not in the standard library: a job needs only a copy of this package's folder, and has to
start it with the very Python that its tests use. The cache root is where the job has it mounted. Judged is what the job
would find with the variables that ``env --here`` prints; every other switch that the job has set counts as its own.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from builder import files, text
from builder.cache import environment, families, layout, model_store, toolchain
from builder.cache.environment import Image, Standing
from builder.cache.markers import Judgement, difference
from builder.cache.toolchain import Record
from builder.cli.commands.check import blame_cold, common_env, explained, families_told, gate, lines
from builder.errors import ColdError, UsageError
from builder.manifest.load import Manifest
from builder.report.results import TaskResult
from builder.run import local_job
from builder.run.call import Call
from builder.run.plan import Plan, ProbeEnv, make_plan, probe_env
from builder.task import PRETEND_VARIABLE, Task

MOUNT = "/jit"
REMEDY = "warm-cache warm, on the host or in a trusted job here, warms them"


@dataclass(frozen=True)
class Surroundings:
    """What this process sees. missing: why there is no cache root; "" where there is one. manifest: None where none was
    named, and then only families are compared.
    """

    root: Path
    missing: str
    manifest: Manifest | None
    image: Image
    records: Mapping[ProbeEnv, Record]
    families: Sequence[Standing]
    strict: bool
    store: Path

    @property
    def record(self) -> Record:
        return next(iter(self.records.values()))

    @property
    def tasks(self) -> tuple[Task, ...]:
        return self.manifest.tasks if self.manifest else ()

    def plan(self, tasks: Sequence[Task]) -> Plan | None:
        """These tasks against the cache as it is now; None where there is no cache root."""
        if self.missing:
            return None
        plan = make_plan(tasks, self.records, root=self.root, store=self.store, strict=self.strict)
        return Plan(tuple(replace(item, judgement=_honest(item.judgement, self.image)) for item in plan.items))


def check(call: Call) -> None:
    """Warm or cold per task, and per family what the cache has for this environment. Raises ColdError."""
    seen = look(call)
    judged(call, seen)
    _tell(call, seen)
    if seen.manifest is not None:
        gate(call.console, call.report, call.said.on_cold, REMEDY)
        return
    other = [standing.family for standing in seen.families if standing.state in ("differs", "absent")]
    if not other:
        call.console.say(f"warm-cache: every family that can be told has a directory in {seen.root}")
        return
    error = ColdError(f"{', '.join(other)} of this environment: not in {seen.root}; {REMEDY}")
    call.console.annotate("cache cold", error.message, "warning" if call.said.on_cold == "warn" else "error")
    if call.said.on_cold != "warn":
        raise error
    call.report.warnings.append(error.message)


def explain(call: Call) -> None:
    """Per family and per task, what differs from the nearest thing that the cache has."""
    seen = look(call)
    plan = judged(call, seen)
    _tell(call, seen, everything=True)
    explained(call.console, call.report, plan)


def env(call: Call) -> None:
    """Prints the variables with which a process here uses the cache. Raises ColdError where it would find something
    cold, and where there is no cache root at all, printing nothing then.
    """
    form = call.said.format or "shell"
    if form == "docker":
        raise UsageError(
            "--format docker is for who starts a container, and --here is inside of one: use shell, github or json"
        )
    seen = look(call)
    if seen.missing:
        raise ColdError(f"{seen.missing}: there is nothing that variables could point at")
    judged(call, seen)
    variables = {
        **(common_env(seen.tasks) if seen.tasks else {}),
        **families.environment(str(seen.root), environment.keys(seen.record)),
    }
    unknown = [standing.family for standing in seen.families if standing.key is None]
    if unknown:
        call.console.say(f"left out: {', '.join(unknown)}, which belong to one image; {_unknown(seen.image)}")
    if form == "json":
        import json

        call.report.text = json.dumps({"toolchain": call.report.toolchain, "env": variables}, indent=2)
    else:
        call.report.text = lines(variables, form)
    blame_cold(call.report)


def look(call: Call) -> Surroundings:
    """Probes this environment, once for every environment that tasks have. Raises UsageError."""
    manifest = call.manifest() if call.names_a_manifest else None
    root, environ = _root(call, manifest), call.environ
    image = environment.said(root, call.said.image, environ.get(environment.IMAGE_VARIABLE))
    known = local_job.serving_image(image)
    records: dict[ProbeEnv, Record] = {}
    for wanted in sorted({probe_env(task) for task in manifest.tasks} if manifest else {()}):
        own = {name: value for name, value in wanted if name != PRETEND_VARIABLE}  # the GPUs here are what counts here
        records[wanted] = toolchain.probe(environ={**environ, **own}, mount=str(root), image=known, inherited=environ)
    first = next(iter(records.values()))
    if image is None:
        image = environment.recognised(root, first)
        records = {wanted: environment.of_image(record, image) for wanted, record in records.items()}
        first = next(iter(records.values()))
    if (other := _other_python(environ)) is not None:
        call.report.warnings.append(
            f"python3 on PATH is {other}, and this runs with {sys.executable}: what is said holds for the latter"
        )
    report = call.report
    report.image_ref, report.image_id, report.cache = "this environment", image.id, str(root)
    report.toolchain = toolchain.digest(environment.keys(first))
    standings = environment.compare(list(environment.described(root)), first)
    report.extra["image_known"] = image.how
    return Surroundings(
        root=root,
        missing=_missing(root),
        manifest=manifest,
        image=image,
        records=records,
        families=standings,
        strict=bool(getattr(call.said, "strict", False)),
        store=model_store.home(environ),
    )


def judged(call: Call, seen: Surroundings) -> Plan | None:
    """The plan, reported; None, and every task cold, where there is no cache root."""
    plan = seen.plan(seen.tasks)
    if plan is None:
        reason = f"no-marker: {seen.missing}"
        call.report.tasks = [TaskResult(task.label, task.model, "", "cold", reason) for task in seen.tasks]
    else:
        call.report.set_tasks(plan.results())
    return plan


def _root(call: Call, manifest: Manifest | None) -> Path:
    """Where the cache is mounted here: what --cache says, else the manifest's mount."""
    if not call.said.cache:
        return Path(manifest.cache.mount if manifest else MOUNT)
    root = (manifest.cache if manifest else call.cache()).root
    if root is None:
        raise UsageError(f"--cache {call.said.cache}: with --here, the directory is wanted where the cache is mounted")
    return root


def _missing(root: Path) -> str:
    """Why this is no cache root; "" where it is one."""
    if not root.is_dir():
        return f"there is no directory {root} here"
    if stranger := layout.foreign(root):
        return f"{root} is no cache root ({stranger} is in it)"
    if files.listing(str(root)) is None:
        return f"{root} cannot be read"
    return "" if (root / "layout.json").is_file() else f"{root} is empty"


def _other_python(environ: Mapping[str, str]) -> str | None:
    """The python3 that tests would start, where it is of another environment than this one."""
    found = shutil.which("python3", path=environ.get("PATH"))
    if found is None or os.path.realpath(Path(found).parent) == os.path.realpath(Path(sys.executable).parent):
        return None
    return found


def _honest(judgement: Judgement, image: Image) -> Judgement:
    """Return a judgement that does not take an unknown image for another one."""
    if image.id is not None or judgement.kind != "compile":
        return judgement
    rows = [row for row in judgement.differences if row[0] != "toolchain"]
    told = [row for row in rows if not (row[0].endswith(f" {environment.IMAGE}") and row[2] == "absent")]
    if told:
        return replace(judgement, detail=difference(told[0]))
    names = ", ".join(row[0].rpartition(" ")[0] for row in rows)
    return replace(judgement, kind="unknown", detail=f"{names} may be of another image; {_unknown(image)}")


def _unknown(image: Image) -> str:
    return (
        f"{image.how}. Start the container with what `warm-cache env` prints, which sets "
        f"{environment.IMAGE_VARIABLE}, or pass --image sha256:…"
    )


def _tell(call: Call, seen: Surroundings, *, everything: bool = False) -> None:
    """The families that the cache does not have for this environment, or all of them."""
    shown = [standing for standing in seen.families if everything or standing.state != "found"]
    families_told(call.console, call.report, seen.families, shown=[] if seen.missing else shown)
    image = f"{seen.image.id[:19]}… ({seen.image.how})" if seen.image.id else f"unknown: {seen.image.how}"
    if everything or any(standing.state == "unknown" for standing in shown):
        call.console.say(f"image {image}")
    cold = any(task.state == "cold" for task in call.report.tasks)
    for problem in seen.record["observed"]["problems"] if cold or everything else ():
        call.console.say(f"  ▸ {text.printable(problem)}")
