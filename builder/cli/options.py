"""The options of the command line as data, and the dataclasses of arguments that several verbs share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from builder.cache.build_proofs import Builds, ProofWanted
from builder.errors import Problem, UsageError
from builder.manifest.load import profiles
from builder.manifest.values import positive_seconds

T = TypeVar("T")
D = TypeVar("D")


@dataclass(frozen=True, kw_only=True)
class Args:
    """The options that every verb has, and where values came from."""

    json: bool = False  # never with `hold`, where stdout is the command's
    verbose: bool = False
    sources: Mapping[str, str] = field(default_factory=dict)  # option → the variable that gave its value

    def location(self, option: str) -> str:
        """Return where an option's value came from, for messages: the flag, or the variable."""
        return self.sources.get(option, f"--{option}")

    def converted(
        self, option: str, value: str | None, convert: Callable[[Any], T], default: D, problems: list[Problem]
    ) -> T | D:
        """Return an option's value, converted; the default where it was not given, or cannot be converted.

        convert: raises ValueError, which is added to the problems.
        """
        if value is None:
            return default
        try:
            return convert(value)
        except ValueError as error:
            problems.append(Problem(self.location(option), f"{error}."))
            return default


@dataclass(frozen=True, kw_only=True)
class ManifestArgs(Args):
    """The options that name a manifest, and those that replace values of it."""

    manifest: str | None = None
    profile: str | None = None
    cache: str | None = None
    image: str | None = None
    models: str | None = None  # no option of `hold` and `import-tests`

    @property
    def names_manifest(self) -> bool:
        """Return whether a manifest or a profile was given."""
        return bool(self.manifest or self.profile)


@dataclass(frozen=True, kw_only=True)
class ProofArgs(ManifestArgs):
    """The options for which proof makes a task warm: PROOF."""

    build: str | None = None
    max_proof_age: str | None = None

    def wanted(self, build: Builds, *, strict: bool = False) -> ProofWanted:
        """Return which proof counts. build: where the option was not given. Raises UsageError."""
        problems: list[Problem] = []
        age = self.converted("max-proof-age", self.max_proof_age, positive_seconds, None, problems)
        if problems:
            raise UsageError(str(problems[0]), problems)
        return ProofWanted(strict, "same" if (self.build or build) == "same" else "any", age)


@dataclass(frozen=True, kw_only=True)
class PolicyArgs(ManifestArgs):
    """The options of the policy for removal: POLICY."""

    keep: str | None = None
    older_than: str | None = None
    max_size: str | None = None
    images: bool = False


@dataclass(frozen=True, kw_only=True)
class RegistryArgs(Args):
    """The options for reaching a registry: REGISTRY."""

    insecure: bool = False
    ca_file: str | None = None


#: name → keyword arguments of argparse. `choices` also hold for the environment: every option can be given as
#: WARM_CACHE_<NAME>, a switch by a word of `parser.SWITCHES`, a repeatable option as a list with commas.
OPTIONS: dict[str, dict[str, Any]] = {
    "manifest": {"metavar": "FILE", "help": "the manifest (TOML)"},
    "profile": {"metavar": "NAME", "help": f"a packaged manifest: {', '.join(profiles())}"},
    "cache": {"metavar": "DIR|volume:NAME", "help": "the cache root, instead of the manifest's"},
    "image": {"metavar": "REF", "help": "the serving image, instead of the manifest's"},
    "models": {"metavar": "DIR", "help": "the model store (HF_HOME), instead of the manifest's"},
    "only": {
        "metavar": "MODEL",
        "action": "append",
        "help": "only tasks of this model or label (may be repeated; * matches)",
    },
    "json": {"action": "store_true", "help": "print one JSON document on stdout, and the rest on stderr"},
    "verbose": {"action": "store_true", "help": "show image builds, and a traceback with a defect"},
    "force": {"action": "store_true", "help": "run warm tasks too"},
    "create": {"action": "store_true", "help": "make the cache root if it does not exist"},
    "allow-busy": {"action": "store_true", "help": "start even if other processes use a GPU"},
    "prebuild-only": {
        "action": "store_true",
        "help": "only compile DeepGEMM's kernels on CPU cores; on a machine without GPUs, too",
    },
    "pull": {"action": "store_true", "help": "pull the image first"},
    "strict": {"action": "store_true", "help": "only a marker whose second pass added nothing counts as warm"},
    "build": {
        "metavar": "any|same",
        "choices": ("any", "same"),
        "help": "any: a proof by another build of the same release of sglang counts, the default of check, explain and "
        "env; same: only this build's own, the default of warm and refresh",
    },
    "max-proof-age": {"metavar": "7d", "help": "a task whose proof is older is cold"},
    "no-probe": {
        "action": "store_true",
        "help": "build and start nothing: tasks of an image that the cache does not know are cold",
    },
    "budget": {"metavar": "55m", "help": "how long the whole run may take"},
    "timeout": {"metavar": "20m", "help": "how long one task may take"},
    "silence": {"metavar": "10m", "help": "how long a task may write nothing"},
    "repair": {"action": "store_true", "help": "quarantine bad entries, so that they are compiled again"},
    "lock-timeout": {"metavar": "1m", "help": "how long to wait for another builder on the same cache or GPUs"},
    "log-dir": {
        "metavar": "DIR",
        "help": "where complete logs are written (default: below the state directory)",
    },
    "replace": {"action": "store_true", "help": "remove a view of this name first"},
    "crash-on-jit": {
        "action": "store_true",
        "help": "also set SGLANG_CRASH_ON_JIT_COMPILE=1: sglang then fails where it would compile",
    },
    "fail-on-jit": {"action": "store_true", "help": "exit 10 if anything was compiled although the cache is warm"},
    "html": {"metavar": "FILE", "help": "write one HTML page that needs nothing else"},
    "audits": {"metavar": "DIR", "help": "add what jobs compiled: JSON documents of audits, in any folder below"},
    "source": {"metavar": "DIR", "help": "the cache root, or one generation of it, mounted read-only"},
    "target": {"metavar": "DIR", "help": "the container's own directory where jobs look for kernels (default /jit)"},
    "before": {"metavar": "FILE", "help": "before a job: record what the cache holds"},
    "after": {"metavar": "FILE", "help": "after the job: compare with that record"},
    "here": {"action": "store_true", "help": "in the environment that this runs in: no engine, nothing to install"},
    "suite": {
        "metavar": "NAME",
        "help": "only tests of this suite, by upstream's name (* matches); several with commas",
    },
    "gpu": {
        "metavar": "GPU",
        "choices": ("H200", "H100", "B200"),
        "help": "the GPU that the tests find: H200, H100 or B200 (default: the manifest's, else H200)",
    },
    "update": {"metavar": "FILE", "help": "rewrite the tasks of this manifest in place"},
    "anew": {"action": "store_true", "help": "with --update: write every task again, also those that cover a launch"},
    "records": {"metavar": "DIR", "help": "where records are kept for the next run (default: the user's cache)"},
    "keep": {"metavar": "N", "help": "how many toolchains to keep for each task (default 2)"},
    "older-than": {"metavar": "14d", "help": "remove what was not used for this long"},
    "max-size": {"metavar": "200G", "help": "remove least recently used things until the cache is no larger"},
    "images": {"action": "store_true", "help": "remove serving images of removed toolchains even if they have a tag"},
    "when-idle": {"metavar": "10m", "help": "wait at most this long for idle GPUs, else do nothing: exit 17"},
    "metrics": {"metavar": "FILE", "help": "where to write metrics for Prometheus' textfile collector"},
    "webhook": {"metavar": "URL", "help": "where to POST the outcome; a secret belongs in WARM_CACHE_WEBHOOK"},
    "dry-run": {"action": "store_true", "help": "show what would be done, and do nothing"},
    "on-cold": {
        "metavar": "warn|fail",
        "choices": ("warn", "fail"),
        "help": "warn: a cold cache is an annotation and no failure; fail: a failure (default)",
    },
    "stream": {"metavar": "NAME", "help": "the stream of images that is meant: nightly, release, …"},
    "insecure": {
        "action": "store_true",
        "help": "accept plain http and certificates of unknown authorities (test beds)",
    },
    "ca-file": {"metavar": "FILE", "help": "certificates (PEM) that are trusted in addition to the usual ones"},
    "format": {
        "metavar": "FORMAT",
        "choices": ("docker", "shell", "github", "json", "kubernetes"),
        "help": "docker, shell, github, json or kubernetes",
    },
    "key": {
        "metavar": "FILE",
        "help": "public keys (PEM, one or more) with which cache images are signed",
    },
    "deadline": {"metavar": "20s", "help": "how long a restore may take"},
    "jitter": {"metavar": "60s", "help": "a restore begins after a random time of at most this"},
    "tag": {"metavar": "TAG", "help": "let this tag name the image too; many registries forbid that a tag moves"},
    "fallback": {"metavar": "N", "help": "try up to N older images where one is refused; each is verified"},
    "fail-open": {"action": "store_true", "help": "exit 0 whatever happens; the JSON document has the reason"},
    "part": {"metavar": "PART", "help": "print these parts only; several with commas"},
    "name": {"metavar": "NAME", "help": "how names of objects or jobs begin (default warm-cache)"},
    "builder-image": {"metavar": "REF", "help": "the image that has warm-cache installed, for pods"},
    "namespace": {"metavar": "NAME", "help": "the namespace of all objects"},
    "schedule": {"metavar": "CRON", "help": 'warm at these times, as "0 3 * * *" (default: once)'},
    "queue": {"metavar": "NAME", "help": "the local queue of Kueue that admits the warm job"},
    "claim": {"metavar": "NAME", "help": "with --target pvc: the claim that holds the cache"},
    "models-claim": {"metavar": "NAME", "help": "the claim with the model store, instead of a directory of nodes"},
    "user": {"metavar": "UID", "help": "the user of containers that are not root's (default 65532)"},
    "node-selector": {
        "metavar": "KEY=VALUE",
        "action": "append",
        "help": "a label of the nodes (may be repeated)",
    },
    "toleration": {
        "metavar": "KEY[=VALUE][:EFFECT]",
        "action": "append",
        "help": "a taint of the nodes that is tolerated (may be repeated)",
    },
    "registry-secret": {"metavar": "NAME", "help": "the secret with the registries' logins (dockerconfigjson)"},
    "env-secret": {"metavar": "NAME", "help": "the secret whose keys are variables of the warm-up, as HF_TOKEN"},
    "max-unavailable": {
        "metavar": "N|PERCENT",
        "help": "how many nodes restore at a time after a change (default a tenth)",
    },
    "gres": {"metavar": "GRES", "help": "Slurm's generic resources of a job (default gpu:COUNT)"},
    "partition": {"metavar": "NAME", "help": "Slurm's partition"},
    "account": {"metavar": "NAME", "help": "Slurm's account"},
    "runtime": {
        "metavar": "RUNTIME",
        "help": "where a Slurm job warms: engine (the node's), pyxis or apptainer (default engine)",
    },
    "program": {
        "metavar": "PATH",
        "help": "the program on all nodes (default: warm-cache on PATH); for pyxis and apptainer the folder that "
        "holds builder/",
    },
    "push": {"metavar": "REF", "help": "the cache image to which what is warm is pushed"},
    "logs": {"metavar": "DIR", "help": "where reports and logs go; the directory exists on all nodes"},
    "pass-variable": {
        "metavar": "NAME",
        "action": "append",
        "help": "a variable of the submitter that Slurm jobs get, as HF_TOKEN (may be repeated; default: none)",
    },
}
#: verb → option → what its help has otherwise than OPTIONS.
OPTIONS_OF: dict[str, dict[str, dict[str, Any]]] = {
    "prune": {"dry-run": {"help": "show what would be removed, and change nothing"}},
    "init": {"profile": {"help": f"begin with a packaged manifest: {', '.join(profiles())}"}},
    "push": {
        "only": {"help": "only these tasks, also one whose model is a local path (may be repeated; * matches)"},
    },
    "sign": {
        "key": {"help": "the private key (PEM) to sign with"},
        "stream": {"help": "the stream that the image is of: machines that take another one refuse it"},
    },
    "report": {"cache": {"metavar": "DIR", "help": "the cache root"}},
    "audit": {"cache": {"metavar": "DIR", "help": "the cache root, where it is mounted here"}},
    "refresh": {
        "pull": {
            "metavar": "REF",
            "action": "store",
            "help": "restore this cache image first, and compile only what it has not",
        },
        "push": {"metavar": "REF", "help": "publish what is warm as a cache image; its tag, if it has one, is moved"},
    },
    "fleet": {
        "cache": {"metavar": "DIR", "help": "the cache root on the nodes, instead of the manifest's"},
        "target": {
            "metavar": "TARGET",
            "help": "where pods restore to: hostpath (a directory of each node), pvc (a claim) or emptydir (the pod's "
            "own) (default hostpath)",
        },
    },
}
REGISTRY = ("insecure", "ca-file")
STARTS = ("pull", "log-dir")
PROOF = ("build", "max-proof-age")
POLICY = ("keep", "older-than", "max-size", "images")
