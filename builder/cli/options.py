"""The words of the command line, as data: verbs, their options and arguments, and the function that does each verb.

Nothing here is imported by a verb; adding one is a row in VERBS.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from builder.manifest.load import profiles

#: What a verb needs before it can begin. engine: a manifest and an engine that answers; its function gets
#: ``(executor, said)``. nothing: neither (its function may ask for a manifest); it gets ``(call)``, a `Call`.
#: command: somebody else's command follows after ``--`` and owns stdout; it gets ``(call)``.
Needs = Literal["engine", "nothing", "command"]


@dataclass(frozen=True)
class Argument:
    """A positional argument. name: its attribute of what was said; many: at least one, kept as a list; choices: the
    words it may be.
    """

    name: str
    metavar: str
    help: str
    many: bool = False
    optional: bool = False
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verb:
    """One subcommand.

    help: one line; example: a command line that works; act: ``module:function`` that does it; own: names in OPTIONS,
    beside the SHARED ones; text: its result is text on stdout, and what else it says goes to
    stderr; creates: it may make a cache root that is not there; here: the
    function (of a Call) that does it with --here, for the environment that it runs in, with the standard library
    alone; details: paragraphs below the options in its help: what it reads, writes and means; exits: its statuses,
    beside those that every verb has (COMMON).
    """

    help: str
    example: str
    act: str
    own: tuple[str, ...] = ()
    arguments: tuple[Argument, ...] = ()
    needs: Needs = "engine"
    text: bool = False
    creates: bool = False
    here: str = ""
    details: str = ""
    exits: tuple[int, ...] = ()

    @property
    def options(self) -> tuple[str, ...]:
        return (*SHARED[self.needs], *self.own, *(("here",) if self.here else ()))


#: name → keyword arguments of argparse, and choices, which the environment has to keep to as well. Every option can be
#: given as WARM_CACHE_<NAME> too: a switch by a word of SWITCHES, one that may be repeated by a list with commas.
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
    "json": {"action": "store_true", "help": "print one JSON document on stdout; everything else goes to stderr"},
    "verbose": {"action": "store_true", "help": "show image builds, and a traceback with a defect"},
    "force": {"action": "store_true", "help": "run warm tasks too"},
    "allow-busy": {"action": "store_true", "help": "take no offence where somebody else holds a GPU"},
    "pull": {"action": "store_true", "help": "pull the image first"},
    "strict": {"action": "store_true", "help": "only a marker whose second pass added nothing counts as warm"},
    "budget": {"metavar": "55m", "help": "how long the whole run may take"},
    "timeout": {"metavar": "20m", "help": "how long one task may take"},
    "silence": {"metavar": "10m", "help": "how long a task may be silent"},
    "repair": {"action": "store_true", "help": "move bad entries aside, so that they are compiled again"},
    "lock-timeout": {"metavar": "1m", "help": "how long to wait for another builder on the same cache or GPUs"},
    "log-dir": {"metavar": "DIR", "help": "where each task's whole log goes (default: below the state directory)"},
    "replace": {"action": "store_true", "help": "drop a view of this name first"},
    "fail-on-jit": {"action": "store_true", "help": "exit 10 when anything was compiled in spite of the cache"},
    "before": {"metavar": "FILE", "help": "ahead of a job: write down what the cache holds"},
    "after": {"metavar": "FILE", "help": "after the job: compare with what was written down"},
    "here": {"action": "store_true", "help": "for the environment that this runs in: no engine, nothing to install"},
    "suite": {"metavar": "NAME", "help": "only tests of this suite, by upstream's name for it (* matches)"},
    "gpu": {
        "metavar": "GPU",
        "choices": ("H200", "H100", "B200"),
        "help": "the GPU that the tests find: H200 (default), H100 or B200",
    },
    "update": {"metavar": "FILE", "help": "rewrite the tasks of this manifest in place"},
    "records": {"metavar": "DIR", "help": "where records are kept for the next run (default: the user's cache)"},
    "keep": {"metavar": "N", "help": "how many toolchains of each task stay (default 2)"},
    "older-than": {"metavar": "14d", "help": "what nobody has used for so long goes"},
    "max-size": {"metavar": "200G", "help": "what was used longest ago goes until the cache is no larger"},
    "images": {"action": "store_true", "help": "serving images of dropped toolchains go too, though still tagged"},
    "when-idle": {"metavar": "10m", "help": "wait so long until nobody else has the GPUs, else do nothing: exit 17"},
    "metrics": {"metavar": "FILE", "help": "where to write metrics for Prometheus' textfile collector"},
    "webhook": {"metavar": "URL", "help": "where to POST the outcome; better as WARM_CACHE_WEBHOOK, out of sight"},
    "dry-run": {"action": "store_true", "help": "say what would go, and change nothing"},
    "on-cold": {
        "metavar": "warn|fail",
        "choices": ("warn", "fail"),
        "help": "warn: a cold cache is annotated, and no failure; fail: it is one (default)",
    },
    "format": {
        "metavar": "FORMAT",
        "choices": ("docker", "shell", "github", "json"),
        "help": "docker, shell, github or json",
    },
}
#: The options that all verbs with the same needs have.
SHARED: dict[Needs, tuple[str, ...]] = {
    "engine": ("manifest", "profile", "cache", "image", "models", "json", "verbose"),
    "command": ("manifest", "profile", "cache", "image", "verbose"),
    "nothing": ("json", "verbose"),
}
STARTS = ("pull", "log-dir")
POLICY = ("keep", "older-than", "max-size", "images")

VERBS = {
    "warm": Verb(
        "make every task of the manifest warm",
        "warm-cache warm --profile h200 --cache /data/sglang-jit --budget 55m",
        "builder.run.warm:warm",
        ("only", "force", "strict", "allow-busy", "budget", "timeout", "silence", "lock-timeout", *STARTS),
        creates=True,
        here="builder.run.local_executor:warm",
        details="""Reads the manifest, the engine, the model store and the GPUs. Everything below the cache root is
written by containers; each task's whole log goes to --log-dir. With --here there is no container: the program runs in
this environment, which has to be the one of the tests.""",
        exits=(0, 11, 13, 14, 15),
    ),
    "check": Verb(
        "say warm or cold per task; exit 0 or 10",
        "warm-cache check --profile h200 --cache /data/sglang-jit",
        "builder.cli.commands.check:check",
        ("only", "strict", "on-cold"),
        here="builder.run.here:check",
        details="""Reads markers and the entries that they list. Writes nothing, and starts nothing where the image is
known. In GitHub Actions every cold task is annotated.""",
        exits=(0, 10),
    ),
    "explain": Verb(
        "per task: why it is warm or cold, factor by factor",
        "warm-cache explain --profile h200 --only DeepSeek-V3.2",
        "builder.cli.commands.check:explain",
        ("only", "strict"),
        here="builder.run.here:explain",
        details="""Reads what check reads, and what each directory of the cache is for. Writes nothing; where the
cache cannot be read from here, a container looks.""",
        exits=(0,),
    ),
    "status": Verb(
        "what is in the cache, how old it is, who uses it, and what it cost",
        "warm-cache status --profile h200 --json",
        "builder.cli.commands.status:status",
        details="""Reads every family, marker and lock, and asks the engine which containers have the cache mounted.
Writes nothing. What a task took is the last run of its container, and GPU-minutes are that times its GPUs. What has
the cache mounted need not use it: only a hold, a view or a builder keeps things from being removed.""",
        exits=(0,),
    ),
    "verify": Verb(
        "look at every entry in the cache; exit 0 or 10",
        "warm-cache verify --repair --profile h200",
        "builder.run.upkeep:verify",
        ("repair", "lock-timeout"),
        details="""Reads the whole cache, in a container. With --repair it moves bad entries below aside/, where sweep
removes them once no job can have them open.""",
        exits=(0, 10, 15),
    ),
    "sweep": Verb(
        "end containers of builders that were killed, and move aside what they left in the cache",
        "warm-cache sweep --profile h200 --cache /data/sglang-jit",
        "builder.run.upkeep:sweep",
        ("lock-timeout",),
        details="""Ends only containers whose builder is known to be dead. Below the cache root it moves leftovers
aside, and removes what has lain there for [cache] job_max, views whose job is over, and generations that no view
has.""",
        exits=(0, 15),
    ),
    "refresh": Verb(
        "nightly: pull the image if it has moved, warm what is cold, remove what is superseded, tell the outcome",
        "warm-cache refresh --profile h200 --when-idle 10m --metrics FILE.prom",
        "builder.run.refresh:refresh",
        (
            *("manifest", "profile", "cache", "image", "models"),
            *("allow-busy", "budget", "timeout", "silence", "lock-timeout", "log-dir"),
            *("when-idle", "metrics", "webhook", *POLICY),
        ),
        needs="nothing",
        creates=True,
        details="""The registry is asked whether the image has moved, and nothing is pulled to find out. What is new
is warmed beside what is in use, which stays until the policy of prune lets it go. Where nothing has changed nothing
is started. A second refresh of the same cache ends at once with 15, unless --lock-timeout lets it wait.""",
        exits=(0, 11, 13, 14, 15, 17),
    ),
    "prune": Verb(
        "remove what no toolchain that is kept needs, and never what the manifest's image needs or a job uses",
        "warm-cache prune --profile h200 --keep 2 --max-size 200G --dry-run",
        "builder.run.prune:prune",
        (*POLICY, "dry-run", "lock-timeout"),
        details="""Markers say what a toolchain needs. Of each task the newest toolchains stay; with --older-than
whatever nobody has used for so long goes, and with --max-size what was used longest ago, until the cache fits.
Directories that nothing kept refers to go with them, and so do warm-up images and untagged serving images that no
container uses. The manifest's [cache] keep, older_than and max_size say the same.

Nothing goes that was touched within [cache] job_max, that a warm-up works in, or while a test job holds the cache.""",
        exits=(0, 15),
    ),
    "hold": Verb(
        "run a command, its exit status included, and tell the cleaner meanwhile that the cache is in use",
        "warm-cache hold --cache /jit -- pytest test/srt",
        "builder.cli.commands.hold:hold",
        needs="command",
        details="""Takes a shared lock in the cache root, and writes nothing. A cold or missing cache is said and
never fails the command. Signals go to the command.""",
    ),
    "env": Verb(
        "mounts and variables of a test job that must hit the cache",
        "docker run $(warm-cache env --profile h200) lmsysorg/sglang:v0.5.23 env",
        "builder.cli.commands.check:env",
        ("format",),
        text=True,
        here="builder.run.here:env",
        details="""Reads what check reads, and writes to stdout alone. What there is of a cold cache is printed too,
with 10. docker: for docker run; shell, github: for a process that sees the cache at its mount path; json: for
programs.""",
        exits=(0, 10),
    ),
    "import-tests": Verb(
        "which servers sglang's tests launch: as a manifest, or compared with one; exit 0 or 10",
        "warm-cache import-tests test --suite base-c-test-8-gpu-h200 --here",
        "builder.cli.commands.import_tests:in_container",
        ("manifest", "profile", "image", "cache", "suite", "gpu", "update", "records", "pull"),
        arguments=(Argument("paths", "PATH", "test files of a checkout of sglang, or folders of them", many=True),),
        needs="nothing",
        text=True,
        here="builder.cli.commands.import_tests:in_child",
        details="The tests are run, with recorders in the place of launchers: in a container of the serving image "
        "without network, GPU or capabilities, the checkout read-only. With --here they run in a process of this "
        "environment: for refs that are trusted, and where there is no engine. A test that fails, skips itself or is "
        "disabled is named with its line.\n\n"
        "Without a manifest: prints one. With --manifest or --profile: which launches no task covers, and in which "
        "flags the nearest task differs; and, where everything was recorded, which tasks no test needs. With --update "
        "the tasks of that file are rewritten instead. Exit 0 when every launch is covered and everything was "
        "recorded, 10 otherwise.",
        exits=(0, 10),
    ),
    "completion": Verb(
        "print a script by which a shell completes verbs, options and profiles",
        "source <(warm-cache completion bash)",
        "builder.cli.commands.completion:completion",
        arguments=(Argument("shell", "SHELL", "bash, zsh, fish or tcsh", choices=("bash", "zsh", "fish", "tcsh")),),
        needs="nothing",
        text=True,
        details="""Reads and writes nothing but stdout.""",
        exits=(0,),
    ),
    "view": Verb(
        "writable views of the warm cache for test jobs, and what jobs did to theirs",
        "warm-cache view create pr-4711 --profile h200",
        "builder.run.views:view",
        ("replace", "fail-on-jit", "lock-timeout"),
        (
            Argument(
                "action",
                "ACTION",
                "create, audit, promote, drop or list",
                choices=("create", "audit", "promote", "drop", "list"),
            ),
            Argument("job", "JOB", "name of the view", optional=True),
        ),
        text=True,
        details="create prints the arguments of docker run that give a job a view: it reads the warm cache, and what "
        "it writes stays in the view. audit says what the job compiled in spite of the cache, promote which lines of a "
        "manifest would cover that. drop removes the view; list shows all.",
        exits=(0, 10, 15),
    ),
    "audit": Verb(
        "what a job compiled in spite of the cache, where there is no engine",
        "warm-cache audit --here --after before.json --fail-on-jit",
        "builder.report.audit:elsewhere",
        ("cache", "before", "after", "fail-on-jit"),
        needs="nothing",
        text=True,
        here="builder.report.audit:here",
        details="Without --cache DIR it looks at the directories that the families' variables name here.",
        exits=(0, 10),
    ),
    "doctor": Verb(
        "what keeps this machine from running the manifest, all at once",
        "warm-cache doctor --profile h200",
        "builder.run.diagnostics:doctor",
        ("allow-busy",),
        details="""Reads the machine, the engine, the driver and the cache root; changes nothing. Each row that is not
fine comes with its remedy, and 12 means that a warm-up cannot run.""",
        exits=(0,),
    ),
}

#: What each status means; of some verbs in words of their own.
MEANS: dict[int, str] = {
    0: "done, or warm",
    1: "defect",
    2: "usage or manifest",
    10: "something is cold",
    11: "some tasks failed, were partial, timed out or were skipped",
    12: "this machine can't run it",
    13: "GPUs were not released",
    14: "the budget ended with tasks still cold",
    15: "cache or GPUs are busy",
    16: "the engine was lost",
    17: "deferred: the machine was never idle",
}
MEANS_OF: dict[str, dict[int, str]] = {
    "explain": {0: "done, warm or cold"},
    "verify": {10: "an entry is bad"},
    "import-tests": {10: "a launch is not covered, or not recorded"},
    "audit": {10: "something was compiled (--fail-on-jit)"},
    "view": {10: "nothing is warm (create), or something was compiled (--fail-on-jit)"},
}
COMMON = (1, 2, 12, 16)


def statuses(name: str, verb: Verb) -> str:
    """The exit statuses of a verb, in one sentence."""
    if verb.needs == "command":
        return "exit status: the command's; 2 usage"
    of = {**MEANS, **MEANS_OF.get(name, {})}
    told = [f"{code} {of[code]}" for code in sorted({*verb.exits, *COMMON})]
    return "exit status: " + "; ".join([*told, "129, 130 or 143 a signal"])


STATUSES = """exit status: 0 warm · 1 defect · 2 usage or manifest · 10 cold (check, env),
bad entries (verify), launches not covered (import-tests), something compiled
(audits) · 11 some tasks failed, partial, timed out or skipped · 12 this machine
can't run it · 13 GPUs not released · 14 budget exhausted · 15 cache or GPUs
busy · 16 engine lost · 17 deferred (refresh) · 129/130/143 signal · hold: CMD's
Where several apply: signal, 1, 16, 13, 14, 11."""
