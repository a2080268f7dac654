"""Scripts for Slurm: one warm job for a node, and a restore in its Prolog.

The job's script ends in `exec`, so that scancel, a time limit and a requeue reach the program itself: as a child of the
shell it would be killed with it, and its report lost. A Prolog that fails drains its node, so the restore's never does.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

#: Where the program runs: in containers of the node's engine, or in the serving image that Slurm starts itself.
Runtime = Literal["engine", "pyxis", "apptainer"]

#: Seconds before the time limit at which the program is asked to end: Slurm may warn up to a minute early.
_WARNING = 60
#: Minutes of the job beside the run's budget.
_SLACK = 5
#: Seconds that the Prolog's restore may take beyond its own deadline and jitter.
_PROLOG_SLACK = 30
_PROLOG_LOG = "/var/log/warm-cache-restore.log"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: Where the program is in the serving image.
_PROGRAM = "/opt/warm-cache-program"


@dataclass(frozen=True, kw_only=True)
class SlurmNode:
    """Where things are on every node, as options name them. One of profile and manifest is None."""

    profile: str | None
    manifest: str | None  # the absolute path of the file
    image: str
    cache: str
    models: str | None

    @property
    def named(self) -> list[str]:
        """Return the options that name the manifest."""
        return ["--manifest", self.manifest] if self.manifest else ["--profile", self.profile or ""]

    @property
    def options(self) -> list[str]:
        """Return the options of a verb that uses the node's engine or its cache root."""
        found = [*self.named, "--cache", self.cache, "--image", self.image]
        return found + (["--models", self.models] if self.models else [])


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """A job that warms one node. Seconds; None: not given."""

    node: SlurmNode
    name: str
    push: str | None  # the cache image
    mount: str
    gres: str | None
    partition: str | None
    account: str | None
    budget: float
    runtime: Runtime
    program: str  # on every node: the command; for pyxis and apptainer the folder that holds builder/
    logs: str  # directory of reports and logs, on every node
    passed: Sequence[str]  # names of variables of the submitter that jobs get


@dataclass(frozen=True, kw_only=True)
class SlurmRestore:
    """A restore ahead of each job of a node. Seconds; key: path on the node."""

    node: SlurmNode
    program: str
    ref: str
    key: str | None
    stream: str | None
    deadline: float
    jitter: float


def job_script(job: SlurmJob) -> str:
    """Return the script of one warm job. Each node gets a job of its own, which starts when the node is free."""
    options = [
        f"--job-name={job.name}",
        *([f"--partition={job.partition}"] if job.partition else []),
        *([f"--account={job.account}"] if job.account else []),
        "--nodes=1",
        "--ntasks=1",
        "--exclusive",
        *([f"--gres={job.gres}"] if job.gres else []),
        f"--time={math.ceil(job.budget / 60) + _SLACK}",
        f"--signal=B:TERM@{_WARNING}",
        "--requeue",
        "--open-mode=append",
        f"--export={','.join(job.passed) or 'NIL'}",
        f"--output={job.logs}/%x-%N-%j.log",
    ]
    nodes = f"sinfo -h -N -o %N{f' -p {job.partition}' if job.partition else ''}"
    report = '"$logs/$SLURM_JOB_NAME-$SLURMD_NODENAME-$SLURM_JOB_ID.json"'
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in options),
        "# Printed by warm-cache fleet slurm. One job for each node; an array would not visit them all:",
        f'#   for node in $({nodes} | sort -u); do sbatch -w "$node" THIS_FILE; done',
        "# Afterwards, on the reports:",
        f"#   warm-cache fleet summary {shlex.quote(job.logs)}/{job.name}-*.json",
        "set -euo pipefail",
        f"export PATH={_PATH}",
        'export HOME="${HOME:-$(getent passwd "$(id -u)" | cut -d: -f6)}"',
        f"logs={shlex.quote(job.logs)}",
        "# A requeued job goes on: what is warm stays warm, and its own report replaces the one of its first start.",
        f"exec {_words(_warm(job))} >{report}",
    ]
    return "\n".join(lines) + "\n"


def prolog_script(restore: SlurmRestore) -> str:
    """Return the lines for the Prolog of the nodes: they restore the cache, and end with 0 whatever happens."""
    words = [restore.program, "pull", restore.ref, *restore.node.options, "--fail-open"]
    words += ["--deadline", f"{restore.deadline:g}s", "--jitter", f"{restore.jitter:g}s"]
    words += ["--key", restore.key] if restore.key else []
    words += ["--stream", restore.stream] if restore.stream else []
    limit = math.ceil(restore.deadline + restore.jitter) + _PROLOG_SLACK
    lines = [
        "#!/bin/sh",
        "# Printed by warm-cache fleet prolog. The Prolog of slurm.conf, or a part of it: root runs it on each node",
        "# ahead of a job. Where it fails Slurm drains the node, so it never does: without the cache the job compiles",
        "# what it needs.",
        f"export PATH={_PATH} HOME=/root",
        f"timeout -k 5 {limit} {_words(words)} >>{_PROLOG_LOG} 2>&1 </dev/null || :",
        "exit 0",
    ]
    return "\n".join(lines) + "\n"


def _warm(job: SlurmJob) -> list[str]:
    """Return the command that warms."""
    budget = ["--budget", f"{int(job.budget)}s", "--json"]
    if job.runtime == "engine":
        verb = ["refresh", "--push", job.push] if job.push else ["warm"]
        return [job.program, *verb, *job.node.options, *budget]
    here = ["python3", "-m", "builder", "warm", "--here", *job.node.named, "--cache", job.mount, *budget]
    binds = [f"{job.node.cache}:{job.mount}", f"{job.program}:{_PROGRAM}:ro"]
    variables = []
    if job.node.manifest:
        binds.append(f"{job.node.manifest}:{job.node.manifest}:ro")
    if job.node.models:
        binds.append(f"{job.node.models}:/models:ro")
        variables += ["HF_HOME=/models", "HF_HUB_OFFLINE=1"]
    if "@sha256:" in job.node.image:
        variables.append(f"WARM_CACHE_IMAGE_ID={job.node.image.rpartition('@')[2]}")
    if job.runtime == "pyxis":
        start = ["srun", f"--container-image={_pyxis(job.node.image)}", f"--container-mounts={','.join(binds)}"]
        start += ["--container-writable", "--no-container-mount-home", f"--container-workdir={_PROGRAM}"]
        return [*start, "env", *variables, *here]
    start = ["apptainer", "exec", "--nv", "--cleanenv", "--no-home", "--writable-tmpfs", "--pwd", _PROGRAM]
    for bind in binds:
        start += ["--bind", bind]
    return [*start, f"docker://{job.node.image}", "env", *variables, *here]


def _pyxis(image: str) -> str:
    """Return an image as Pyxis names it: a ``#`` between registry and repository."""
    registry, slash, rest = image.partition("/")
    return f"{registry}#{rest}" if slash and ("." in registry or ":" in registry) else image


def _words(words: Sequence[str]) -> str:
    """Return words as a shell reads them, on as many lines as a person reads them."""
    lines, line = [], ""
    for word in map(shlex.quote, words):
        if line and (word.startswith("--") or len(line) + len(word) > 110):
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}" if line else word
    return " \\\n  ".join([*lines, line])
