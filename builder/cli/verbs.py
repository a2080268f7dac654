"""The verbs of the command line as data: their options and arguments, help texts and groups.

A verb is a row in VERBS and a module of `builder.cli.commands` with the verb's name. That module has a frozen dataclass
with one field for each option and argument (``CheckArgs`` for ``check``), and ``run(args, invocation)``.
"""

from __future__ import annotations

from builder.cli.options import POLICY, PROOF, REGISTRY, STARTS
from builder.cli.sharing import SHARING
from builder.cli.verb import Action, Argument, Verb, named

_VIEW_ACTIONS = (
    Action(
        "create",
        "make a view, and print the arguments of docker run that give it to a job",
        "warm-cache view create pr-4711 --profile h200",
        ("replace", "lock-timeout"),
        ("job",),
    ),
    Action(
        "audit",
        "report what the job compiled although the cache is warm, and what it changed",
        "warm-cache view audit pr-4711 --profile h200 --fail-on-jit",
        ("fail-on-jit",),
        ("job",),
    ),
    Action(
        "promote",
        "print lines of a manifest that would cover what the job compiled",
        "warm-cache view promote pr-4711 --profile h200",
        ("fail-on-jit",),
        ("job",),
    ),
    Action(
        "drop",
        "remove a view and what was written in it",
        "warm-cache view drop pr-4711 --profile h200",
        ("lock-timeout",),
        ("job",),
    ),
    Action("list", "show all views, with size and age", "warm-cache view list --profile h200"),
)

_PROFILE_ACTIONS = (Action("show", "print one, with its comments", "warm-cache profiles show h200", (), ("name",)),)


VERBS: dict[str, Verb] = {
    "warm": Verb(
        "Warm",
        "make every task of the manifest warm",
        "warm-cache warm --profile h200 --cache /data/sglang-jit --budget 55m",
        (
            *("only", "force", "strict", *PROOF, "create", "dry-run", "prebuild-only", "allow-busy"),
            *("budget", "timeout", "silence", "lock-timeout", *STARTS),
        ),
        here=True,
        details="""Reads the manifest, the engine, the model store and the GPUs. Everything below the cache root is
written by containers; each task's complete log is written to --log-dir. A root that does not exist is an error
without --create. With --here there is no container: tasks run in this environment, which has to be the one of the
tests.

With --dry-run nothing is warmed: it shows which tasks would start when, on which GPUs, and for how long. Only an image
that the cache does not know is looked at in a container, as for a check. The exit status is 0, cold or warm.

With --prebuild-only no task runs and no GPU is used: kernels of cold tasks are compiled for the GPU of the manifest
([gpus] name) and nothing is proven. It exits with 11 where a kernel that was named is missing.""",
        exits=(0, 11, 13, 14, 15),
    ),
    "check": Verb(
        "Warm",
        "report warm or cold per task; exit 0 or 10",
        "warm-cache check --profile h200 --cache /data/sglang-jit",
        ("only", "strict", *PROOF, "on-cold", "no-probe", "metrics"),
        here=True,
        details="""Reads markers and the entries that they list. An image that was never used with this cache is
looked at in a container, for which the warm-up image is built, and what was found is kept in the folder images of the
root; otherwise no container is started, and nothing is written. In GitHub Actions one cold task is annotated, the one
that costs most.""",
        exits=(0, 10),
    ),
    "explain": Verb(
        "Inspect",
        "per task: why it is warm or cold, factor by factor",
        "warm-cache explain --profile h200 --only GLM-5.2-FP8",
        ("only", "strict", *PROOF, "no-probe"),
        here=True,
        details="""Reads what check reads, and which toolchain each directory of the cache is for. Writes nothing. A
cache that cannot be read directly is read by a container.""",
        shown=True,
        exits=(0,),
    ),
    "status": Verb(
        "Inspect",
        "what is in the cache, how old it is, what uses it, and what it cost",
        "warm-cache status --profile h200 --json",
        details="""Reads every family, marker and lock, and asks the engine which containers have the cache mounted.
Writes nothing. The time of a task is that of its last container, and its GPU-minutes are this time multiplied by its
GPUs. A container that has the cache mounted need not use it: only a hold, a view or a builder prevents removal.""",
        shown=True,
        exits=(0,),
    ),
    "report": Verb(
        "Inspect",
        "past runs, proven tasks, bytes, and what jobs compiled: as text, JSON or one HTML page",
        "warm-cache report --cache /data/sglang-jit --html report.html",
        ("cache", "html", "audits", "metrics"),
        needs="nothing",
        engine=False,
        shown=True,
        details="""Reads the directory of the cache: markers, entries, and runs.jsonl, in which each task of a run has
a line. Writes nothing but FILE. The page has no script and loads nothing: it can be opened from a file, mailed, or kept
as an artifact. With --audits it adds up what test jobs compiled, by family and build, from the JSON documents of
`audit --here --after FILE --json` and of `view audit JOB --json` of any number of runners; that needs no cache.""",
        exits=(0,),
    ),
    "verify": Verb(
        "Maintain",
        "check every entry in the cache; exit 0 or 10",
        "warm-cache verify --repair --profile h200",
        ("repair", "lock-timeout"),
        details="""Reads the whole cache, in a container. With --repair bad entries are quarantined below aside/, and
sweep removes them once no job can have them open.""",
        shown=True,
        exits=(0, 10, 15),
    ),
    "sweep": Verb(
        "Maintain",
        "remove containers of killed builders, and quarantine what they left in the cache",
        "warm-cache sweep --profile h200 --cache /data/sglang-jit",
        ("lock-timeout",),
        details="""Ends only containers whose builder is known to be dead, of whatever manifest, and puts the machine
back into service for a killed builder. That is all without a manifest. With one, below the cache root leftovers are
quarantined. What was quarantined for [cache] job_max is removed, and so are views whose job is over, and generations
that no view uses.""",
        exits=(0, 15),
    ),
    "refresh": Verb(
        "Warm",
        "nightly: pull the image if it moved, warm what is cold, prune, and report the outcome",
        "warm-cache refresh --profile h200 --when-idle 10m --metrics FILE.prom",
        (
            *("manifest", "profile", "cache", "image", "models"),
            *("create", "allow-busy", "budget", "timeout", "silence", "lock-timeout", "log-dir"),
            *("when-idle", "metrics", "webhook", *PROOF, *POLICY),
            *("pull", "push", "key", "stream", *REGISTRY),
        ),
        needs="nothing",
        details="""A cache root that does not exist is an error without --create. Asks the registry whether the image
has moved, without pulling it. Kernels of a new image are added to those in use, which stay until the policy of prune
removes them. If nothing has changed, no container is started. A second refresh of the same cache ends at once with
15, unless --lock-timeout lets it wait.

With --push one machine publishes what is warm, also where a task failed; with --pull others restore that, verified, and
compile only what does not fit or is not there. What goes wrong with a restore is a warning.""",
        exits=(0, 11, 13, 14, 15, 17),
    ),
    "prune": Verb(
        "Maintain",
        "remove what no kept toolchain needs, and never what the manifest's image needs or a job uses",
        "warm-cache prune --profile h200 --keep 2 --max-size 200G --dry-run",
        (*POLICY, "dry-run", "lock-timeout"),
        details="""Markers list what a toolchain needs. The newest toolchains of each task are kept. --older-than
removes those that were not used for that long; --max-size removes the least recently used ones until the cache fits.
Directories that no kept toolchain refers to are removed with them, and so are warm-up images and untagged serving
images that no container uses. The manifest's [cache] keep, older_than and max_size mean the same.

Nothing is removed that was touched within [cache] job_max, that a warm-up works in, or while a test job holds the
cache.""",
        exits=(0, 15),
    ),
    "hold": Verb(
        "Test jobs",
        "run a command while nothing is removed from the cache; exit with its status",
        "warm-cache hold --cache /jit -- pytest test/srt",
        needs="command",
        details="""Takes a shared lock in the cache root, and writes nothing. A cold or missing cache is a warning and
never fails the command. Signals are passed on to the command.""",
    ),
    "env": Verb(
        "Test jobs",
        "mounts and variables of a test job that must hit the cache",
        "docker run $(warm-cache env --profile h200) lmsysorg/sglang:v0.5.23 env",
        ("only", "format", "crash-on-jit", *PROOF, "no-probe"),
        text=True,
        here=True,
        details="""Reads what check reads, and writes to stdout alone. For a cold cache they are printed too, with
exit 10. docker: for docker run; shell, github: for a process that sees the cache at its mount path; json: for
programs; kubernetes: what is merged into a pod's spec.

The job gets the root read-only, and each directory of its environment's kernels writable: it may add kernels, and can
change no marker. What it has no writable directory of is named as cold, and compiled in a private one. Variables that
only some tasks set are named and not printed: --only TASK prints what one task needs.""",
        exits=(0, 10),
    ),
    "here-reset": Verb(
        "Test jobs",
        "in a runner's container: make its own copy of the cache equal to a published one again",
        "warm-cache here-reset --source /mnt/warm-cache --target /jit",
        ("source", "target"),
        needs="nothing",
        engine=False,
        details="At the start of a job, in a long-lived container that has the root or one generation mounted "
        "read-only at --source, and the directory --target for itself. Afterwards the target holds every kernel, "
        "marker and memo of the source, and nothing else: what earlier jobs added or changed is gone, by content, "
        "whatever its times are; what a refresh made is there, with the times of the source. Needs the standard "
        "library alone. Follows no link. Refuses a target that is the source, or in it, or above it.\n\n"
        "It promises nothing against a process of an earlier job that still runs in this container.",
        exits=(0,),
    ),
    "import-tests": Verb(
        "Manifests",
        "which servers sglang's tests launch: as a manifest, or compared with one; exit 0 or 10",
        "warm-cache import-tests test --suite base-c-test-8-gpu-h200 --here",
        ("manifest", "profile", "image", "cache", "suite", "gpu", "update", "anew", "records", "pull"),
        arguments=(Argument("paths", "PATH", "test files of a checkout of sglang, or folders of them", many=True),),
        needs="nothing",
        text=True,
        here=True,
        details="The tests are run, with recorders in the place of launchers: in a container of the serving image "
        "without network, GPU or capabilities, the checkout read-only. With --here they run in a process of this "
        "environment: for refs that are trusted, and where there is no engine. A test that fails, skips itself or is "
        "disabled is named with its line.\n\n"
        "Without a manifest: prints one. With --manifest or --profile: which launches no task covers, and in which "
        "flags the nearest task differs; and, where everything was recorded, which tasks no test needs. With --update "
        "the tasks of that file are rewritten instead: those that cover a launch stay, or with --anew none of them. "
        "The recipe is compile-deep-gemm where DeepGEMM compiles a model's matrix products, else serve. Exit 0 when "
        "every launch is covered and everything was recorded, 10 otherwise.",
        exits=(0, 10),
    ),
    "init": Verb(
        "Manifests",
        "write a manifest to begin with; refuses to overwrite",
        "warm-cache init warm-cache.toml",
        ("profile",),
        (Argument("file", "FILE", "where (default warm-cache.toml); - is stdout", optional=True),),
        needs="nothing",
        engine=False,
        text=True,
        details="Asks nothing. The file has every key with its meaning: what is needed is set, and the rest is there "
        "as comments. Its first line names the JSON Schema, by which editors complete and check it. With --profile it "
        "is that profile instead.",
        exits=(0,),
    ),
    "profiles": Verb(
        "Manifests",
        "list the packaged manifests, or print one",
        "warm-cache profiles show h200",
        (),
        (named(_PROFILE_ACTIONS, optional=True), Argument("name", "NAME", "profile to print", optional=True)),
        _PROFILE_ACTIONS,
        needs="nothing",
        engine=False,
        text=True,
        details="A profile is a manifest that comes with the program; --profile NAME takes it wherever --manifest "
        "FILE takes a file.",
        exits=(0,),
    ),
    "config": Verb(
        "Inspect",
        "the values that a run would work with, and where each comes from",
        "warm-cache config --profile h200 --budget 40m",
        ("manifest", "profile", "cache", "image", "models", "only", "budget", "timeout", "silence", "lock-timeout"),
        needs="nothing",
        engine=False,
        text=True,
        details="Reads the manifest and nothing else. A value comes from a flag, else from a variable, else from a "
        "line of the manifest, else it is the default.",
        exits=(0,),
    ),
    "help": Verb(
        "Help",
        "the help of a verb, or a page of the reference",
        "warm-cache help manifest",
        (),
        (Argument("topic", "TOPIC", "a verb, or a topic of the list below", many=True, optional=True),),
        needs="nothing",
        engine=False,
        text=True,
        details="Topics are the pages of builder/docs/, in Markdown. Without a topic it is the help of the program.",
        exits=(0,),
    ),
    "version": Verb(
        "Help",
        "print the version of the program",
        "warm-cache version --json",
        needs="nothing",
        engine=False,
        text=True,
        details="Reads and writes nothing but stdout.",
        exits=(0,),
    ),
    "completion": Verb(
        "Help",
        "print a script by which a shell completes verbs, options and profiles",
        "source <(warm-cache completion bash)",
        arguments=(Argument("shell", "SHELL", "bash, zsh, fish or tcsh", choices=("bash", "zsh", "fish", "tcsh")),),
        needs="nothing",
        engine=False,
        text=True,
        details="""Reads and writes nothing but stdout.""",
        exits=(0,),
    ),
    "view": Verb(
        "Test jobs",
        "writable views of the warm cache for test jobs, and what jobs changed in theirs",
        "warm-cache view create pr-4711 --profile h200",
        ("replace", "fail-on-jit", "lock-timeout"),
        (named(_VIEW_ACTIONS), Argument("job", "JOB", "name of the view", optional=True)),
        _VIEW_ACTIONS,
        text=True,
        details="A job with a view reads the warm cache, and what it writes stays in the view: nothing that it does "
        "reaches other jobs.",
        exits=(0, 10, 15),
    ),
    "audit": Verb(
        "Test jobs",
        "what a job compiled although the cache is warm, where there is no engine",
        "warm-cache audit --here --after before.json --fail-on-jit",
        ("cache", "before", "after", "fail-on-jit"),
        needs="nothing",
        engine=False,
        text=True,
        here=True,
        details="Without --cache DIR it compares the directories that the families' variables name here.",
        exits=(0, 10),
    ),
    "doctor": Verb(
        "Inspect",
        "everything that prevents this machine from running the manifest",
        "warm-cache doctor --profile h200",
        ("allow-busy",),
        details="""Reads the machine, the engine, the driver and the cache root, and looks at the GPUs in a container,
for which the warm-up image is built. What that container found is kept in the folder images of a cache root; nothing
else is written there. Each warning has its remedy, and 12 means that a warm-up cannot run.""",
        shown=True,
        exits=(0,),
    ),
    **SHARING,
}
