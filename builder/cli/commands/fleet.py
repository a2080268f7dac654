"""The verb `fleet`: print what other machines run, and sum up what became of their runs."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from builder.cli.invocation import Invocation
from builder.cli.options import ManifestArgs
from builder.errors import Problem, UsageError
from builder.fleet import kubernetes, pods, slurm, summary, values
from builder.fleet.slurm import Runtime, SlurmNode
from builder.fleet.summary import RunReport
from builder.manifest.load import Manifest
from builder.manifest.values import a_variable, positive_seconds, seconds
from builder.registry.reference import Reference, parse
from builder.registry.signature import is_stream
from builder.report.results import Section
from builder.report.tables import table
from builder.text import did_you_mean, printable

T = TypeVar("T")
D = TypeVar("D")

#: The user of containers that are not root's: `nobody` of distroless images.
_USER = 65532
#: Seconds that a finished Job stays, so that its logs can be read.
_KEPT = 86400
_DEADLINE, _JITTER = 20.0, 60.0
#: Bytes of the largest manifest or key in a ConfigMap, which holds 1 MiB in all.
_LARGEST = 900 << 10
TARGETS: tuple[pods.Target, ...] = ("hostpath", "pvc", "emptydir")
RUNTIMES: tuple[Runtime, ...] = ("engine", "pyxis", "apptainer")
_BUILDER_IMAGE = "build target `builder` of docker/Dockerfile, push it, and pass --builder-image."


@dataclass(frozen=True, kw_only=True)
class FleetArgs(ManifestArgs):
    """Arguments of `fleet`."""

    action: str
    ref: str | None = None
    reports: tuple[str, ...] = ()
    part: str | None = None
    name: str | None = None
    budget: str | None = None
    key: str | None = None
    stream: str | None = None
    deadline: str | None = None
    jitter: str | None = None
    namespace: str | None = None
    builder_image: str | None = None
    target: str | None = None
    claim: str | None = None
    models_claim: str | None = None
    user: str | None = None
    schedule: str | None = None
    queue: str | None = None
    node_selector: tuple[str, ...] = ()
    toleration: tuple[str, ...] = ()
    registry_secret: str | None = None
    env_secret: str | None = None
    max_unavailable: str | None = None
    gres: str | None = None
    partition: str | None = None
    account: str | None = None
    runtime: str | None = None
    program: str | None = None
    logs: str | None = None
    push: str | None = None
    pass_variable: tuple[str, ...] = ()


@dataclass
class SummarySection(Section):
    """What became of each run."""

    reports: tuple[RunReport, ...]


def run(args: FleetArgs, invocation: Invocation) -> int:
    """Print one document. Return 0, or for `summary` the status that counts most of all reports."""
    if args.action == "summary":
        return _summary(args, invocation)
    manifest = invocation.manifest(budget=args.budget)
    reader = _FleetReader(args, manifest)
    match args.action:
        case "kubernetes":
            invocation.report.text = reader.kubernetes()
        case "slurm":
            invocation.report.text = reader.slurm()
        case _:
            invocation.report.text = reader.prolog()
    return 0


def _summary(args: FleetArgs, invocation: Invocation) -> int:
    reports, problems = [], []
    for name in args.reports:
        try:
            reports.append(summary.read(Path(name)))
        except OSError as error:
            problems.append(Problem(printable(name), f"cannot be read: {error.strerror}."))
    if problems:
        raise UsageError("some reports cannot be read", problems)
    status = summary.status_of(reports)
    lines = [[printable(cell) for cell in row] for row in summary.rows(reports)]
    columns = ("report", "exit", "tasks", "time", "note")
    failed = [f"{label} ({report.name})" for report in reports for label in report.failed]
    invocation.report.add(SummarySection(tuple(reports)))
    if not args.json:
        text = table(columns, lines)
        if failed:
            text += "\nnot warm: " + printable(", ".join(failed))
        invocation.report.text = f"{text}\n{len(reports)} reports, exit {status}"
    return status


class _FleetReader:
    """Reads the options of one action; every problem is kept until all are known."""

    def __init__(self, args: FleetArgs, manifest: Manifest) -> None:
        self.args = args
        self.manifest = manifest
        self.problems: list[Problem] = []

    def kubernetes(self) -> str:
        """Return the list of objects as JSON. Raises UsageError with every problem."""
        args, manifest = self.args, self.manifest
        parts = self._parts()
        if args.builder_image is None:
            self._add("builder-image", "the image that has warm-cache installed is missing:", _BUILDER_IMAGE)
        pinned = self._read("image", manifest.image.ref, values.pinned, ("", ""))
        if manifest.image.setup:
            text = "[image] setup is run in a container that an engine builds, and a pod has none."
            self._add("manifest", text, "Name the image that has these changes.")
        target = self._choice("target", args.target, TARGETS, "hostpath")
        root, claim = manifest.cache.root if target == "hostpath" else None, args.claim
        if target == "hostpath" and root is None:
            self._add("cache", "--target hostpath restores into a directory of the nodes:", "pass --cache DIR.")
        if target == "pvc" and claim is None:
            self._add("claim", "--target pvc restores into a claim:", "pass --claim NAME.")
        if target != "pvc" and claim is not None:
            self._add("claim", f"--target {target} uses no claim.")
        words, files = self._manifest_in_pod()
        reference = self._ref()
        fleet = pods.Fleet(
            name=self._read("name", args.name, values.object_name, "warm-cache"),
            namespace=self._read("namespace", args.namespace, values.namespace, None),
            ref=str(reference),
            push=(reference.name, *(["--tag", reference.tag] if reference.tag else [])),
            builder_image=self._read("builder-image", args.builder_image, values.any_image, ""),
            image=pinned[0],
            digest=pinned[1],
            mount=manifest.cache.mount,
            manifest=words,
            files=files | self._key_file(),
            stream=self._stream(),
            gpus=manifest.gpus.count,
            shm_size=manifest.container.shm_size,
            budget=self._budget(),
            models=None if args.models_claim else manifest.models.store,
            models_claim=self._read("models-claim", args.models_claim, values.existing_name, None),
            target=target,
            root=root,
            claim=self._read("claim", claim, values.existing_name, None),
            user=self._read("user", args.user, values.user_id, _USER),
            schedule=self._read("schedule", args.schedule, values.schedule, None),
            queue=self._read("queue", args.queue, values.namespace, None),
            selector=dict(self._read_all("node-selector", args.node_selector, values.label)),
            tolerations=self._read_all("toleration", args.toleration, values.toleration),
            registry_secret=self._read("registry-secret", args.registry_secret, values.existing_name, None),
            env_secret=self._read("env-secret", args.env_secret, values.existing_name, None),
            max_unavailable=self._read("max-unavailable", args.max_unavailable, values.max_unavailable, "10%"),
            deadline=f"{self._seconds('deadline', _DEADLINE):g}s",
            jitter=f"{self._read('jitter', args.jitter, seconds, _JITTER):g}s",
            keep=_KEPT,
        )
        self._raise_problems()
        return kubernetes.text(kubernetes.objects(fleet, parts))

    def slurm(self) -> str:
        """Return the script for sbatch. Raises UsageError with every problem."""
        args, manifest = self.args, self.manifest
        runtime = self._choice("runtime", args.runtime, RUNTIMES, "engine")
        if runtime != "engine" and manifest.cache.volume:
            self._add("cache", f"--runtime {runtime} has no engine, and so no named volume:", "pass --cache DIR.")
        if runtime != "engine" and args.push:
            text = f"--runtime {runtime} warms inside the serving image, where the program cannot push."
            self._add("push", text, "Leave it out, and push from a node afterwards: warm-cache push REF.")
        paths = {"cache": manifest.cache.root, "models": manifest.models.store, "manifest": args.manifest}
        for option, path in {**paths, "program": args.program}.items() if runtime != "engine" else ():
            if path and re.search("[:,]", os.path.abspath(path)):
                self._add(
                    option,
                    f"{runtime} would read more than one mount from {str(path)!r}:",
                    "use a path without : and ,",
                )
        if args.logs is None:
            self._add("logs", "the directory for reports and logs is missing;", "it has to exist on all nodes.")
        gpus = manifest.gpus.count
        job = slurm.SlurmJob(
            node=self._node(),
            name=self._read("name", args.name, values.object_name, "warm-cache"),
            push=args.push if self._pushed() else None,
            mount=manifest.cache.mount,
            gres=self._read("gres", args.gres, values.scheduler_word, f"gpu:{gpus}" if gpus else None),
            partition=self._read("partition", args.partition, values.scheduler_word, None),
            account=self._read("account", args.account, values.scheduler_word, None),
            budget=self._budget(),
            runtime=runtime,
            program=self._program(runtime),
            logs=self._folder("logs", "/"),
            passed=self._read_all("pass-variable", args.pass_variable, a_variable),
        )
        self._raise_problems()
        return slurm.job_script(job).rstrip("\n")

    def prolog(self) -> str:
        """Return the lines of a Prolog. Raises UsageError with every problem."""
        restore = slurm.SlurmRestore(
            node=self._node(),
            program=self._program("engine"),
            ref=str(self._ref()),
            stream=self._stream(),
            key=os.path.abspath(self.args.key) if self.args.key else None,
            deadline=self._seconds("deadline", _DEADLINE),
            jitter=self._read("jitter", self.args.jitter, seconds, 0.0),
        )
        self._raise_problems()
        return slurm.prolog_script(restore).rstrip("\n")

    def _node(self) -> SlurmNode:
        """Return where things are on a node, as options of a verb name them."""
        cache, path = self.manifest.cache, self.args.manifest
        return SlurmNode(
            profile=self.args.profile,
            manifest=os.path.abspath(path) if path else None,
            image=self.manifest.image.ref,
            cache=str(cache.root) if cache.root else f"volume:{cache.volume}",
            models=str(self.manifest.models.store) if self.manifest.models.store else None,
        )

    def _raise_problems(self) -> None:
        if self.problems:
            raise UsageError(f"fleet {self.args.action} cannot be printed", self.problems)

    # --- single values -----------------------------------------------------------------------------------------------

    def _read(self, option: str, value: str | None, convert: Callable[[str], T], default: D) -> T | D:
        return self.args.converted(option, value, convert, default, self.problems)

    def _read_all(self, option: str, found: Iterable[str], convert: Callable[[str], T]) -> list[T]:
        converted: list[T] = []
        for value in found:
            try:
                converted.append(convert(value))
            except ValueError as error:
                self._add(option, f"{error}.")
        return converted

    def _add(self, option: str, text: str, remedy: str = "") -> None:
        option = option.replace("_", "-")
        location = option if option.isupper() else self.args.location(option)
        self.problems.append(Problem(location, text, remedy))

    def _seconds(self, option: str, default: float) -> float:
        return self._read(option, getattr(self.args, option), positive_seconds, default)

    def _choice(self, option: str, value: str | None, choices: tuple[T, ...], default: T) -> T:
        found = next((each for each in choices if each == value), None)
        if value is not None and found is None:
            self._add(option, f"it is {value!r}; {did_you_mean(value, map(str, choices))}")
        return default if found is None else found

    def _pushed(self) -> bool:
        """Return whether an image is named to push to."""
        if self.args.push is None:
            return False
        try:
            if parse(self.args.push).digest:
                self._add("push", "a push makes a digest of its own:", "name the repository, or a tag to move.")
        except UsageError as error:
            self._add("push", error.message.removeprefix("REF "))
        return True

    def _ref(self) -> Reference:
        """Return the cache image."""
        try:
            return parse(self.args.ref or "")
        except UsageError as error:
            self.problems.append(Problem("REF", error.message.removeprefix("REF ")))
            return Reference("", "")

    def _stream(self) -> str | None:
        if self.args.stream is None:
            return None
        if self.args.key is None:
            self._add("stream", "a stream is a part of a signature:", "pass --key too.")
        if not is_stream(self.args.stream):
            self._add("stream", f"{self.args.stream!r} is no name of a stream.")
        return self.args.stream

    def _parts(self) -> list[str]:
        known = kubernetes.PARTS
        wanted = [part.strip() for part in self.args.part.split(",")] if self.args.part else list(known)
        for part in wanted:
            if part not in known:
                self._add("part", f"there is no part {part!r}; {did_you_mean(part, known)}")
        return [part for part in known if part in wanted]

    def _budget(self) -> float:
        if self.manifest.run.budget is None:
            self._add("budget", "a job without a limit would hold its GPUs for ever:", "pass --budget 55m.")
        return self.manifest.run.budget or 0.0

    def _program(self, runtime: Runtime) -> str:
        """Return the command on the nodes; for a runtime without an engine, the folder that holds builder/."""
        if runtime == "engine" and self.args.program is None:
            return "warm-cache"
        return self._folder("program", str(Path(__file__).resolve().parents[3]))

    def _folder(self, option: str, default: str) -> str:
        value = str(getattr(self.args, option) or default)
        if not value.startswith("/"):
            self._add(option, f"an absolute path on the nodes is wanted, found {value!r}.")
        return os.path.normpath(value)

    def _manifest_in_pod(self) -> tuple[tuple[str, ...], dict[str, str]]:
        """Return the options that name the manifest in a pod, and its file if it is no profile."""
        if self.args.manifest is None:
            return ("--profile", self.args.profile or ""), {}
        name = "manifest.json" if self.args.manifest.endswith(".json") else "manifest.toml"
        return ("--manifest", f"{pods.FILES}/{name}"), {name: self._text("manifest", self.args.manifest)}

    def _key_file(self) -> dict[str, str]:
        if self.args.key is None:
            return {}
        text = self._text("key", self.args.key)
        if "PRIVATE KEY" in text:
            self._add("key", f"{self.args.key} is a private key:", "it stays where images are signed.")
        elif text and "PUBLIC KEY" not in text:
            self._add("key", f"{self.args.key} is no public key in PEM form.")
        return {pods.KEY_FILE: text}

    def _text(self, option: str, path: str) -> str:
        try:
            raw = Path(path).read_bytes()
            if len(raw) > _LARGEST:
                self._add(option, f"{path} has {len(raw)} bytes, and a ConfigMap takes {_LARGEST}.")
            return raw.decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            self._add(option, f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}.")
            return ""
