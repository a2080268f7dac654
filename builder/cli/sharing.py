"""The verbs that take a cache to other machines, as data (`builder.cli.verbs`)."""

from __future__ import annotations

from builder.cli.options import REGISTRY
from builder.cli.verb import Action, Argument, Verb, named

#: What all printed documents are made of, and what those that restore have besides.
_MANIFEST = ("manifest", "profile", "cache", "image", "models")
_RESTORE = ("key", "stream", "deadline", "jitter")

_FLEET_ACTIONS = (
    Action(
        "kubernetes",
        "print JSON for kubectl apply -f -: what warms once, restores on nodes, and checks",
        "warm-cache fleet kubernetes r.example/jit --profile h200 --image r.example/sglang@sha256:DIGEST "
        "--builder-image r.example/builder:1",
        (
            *(*_MANIFEST, "builder-image", "target", "part", "name", "namespace", "budget", *_RESTORE),
            *("schedule", "queue", "node-selector", "toleration", "max-unavailable", "user"),
            *("claim", "models-claim", "registry-secret", "env-secret"),
        ),
        ("ref",),
    ),
    Action(
        "slurm",
        "print a script for sbatch that warms one node, and with --push pushes its cache",
        "warm-cache fleet slurm --profile h200 --logs /srv/jobs",
        (
            *(*_MANIFEST, "push", "logs", "name", "budget", "gres", "partition", "account"),
            *("pass-variable", "runtime", "program"),
        ),
    ),
    Action(
        "prolog",
        "print the lines of a Prolog of Slurm that restores, and never fails",
        "warm-cache fleet prolog r.example/jit --profile h200",
        (*_MANIFEST, *_RESTORE, "program"),
        ("ref",),
    ),
    Action(
        "summary",
        "sum up the reports of many runs, and end with the status that counts most",
        "warm-cache fleet summary /srv/jobs/h1.json /srv/jobs/h2.json",
        (),
        ("reports",),
    ),
)

SHARING: dict[str, Verb] = {
    "push": Verb(
        "Share",
        "publish what is warm as a cache image",
        "warm-cache push r.example/jit --profile h200 --cache /data/sglang-jit",
        ("only", "tag", "dry-run", "lock-timeout", *REGISTRY),
        (Argument("ref", "REF", "repository of cache images, with its registry"),),
        here=True,
        details="""Packs what the markers of warm tasks claim, while no other builder works in the cache, and sends the
layers that the registry lacks. The image gets a tag of its own, GPU-TOOLCHAIN-DATE-TIME; where nothing has changed
since the last push, it keeps its tag and digest, and nothing is sent. Cold tasks are left out, and named. So are tasks
whose model is a local path, or that set variables which are no switches, unless --only names them. Sign the digest that
it prints: warm-cache sign.""",
        exits=(0, 10, 15),
    ),
    "pull": Verb(
        "Share",
        "restore a cache image into the cache, as far as it is proven and fits",
        "warm-cache pull r.example/jit --profile h200 --key cache.pub",
        (
            *("key", "stream", "fallback", "fail-open", "deadline", "jitter"),
            *("create", "metrics", "lock-timeout"),
            *REGISTRY,
        ),
        (Argument("ref", "REF", "cache image; without tag and digest the newest one for this machine"),),
        here=True,
        details="""Resolves REF to a digest once; verifies the signature ahead of any layer; compares the key of each
family with this machine's, and takes those that are equal; verifies every blob, file and entry beside the cache, and
puts them in place by renames, markers last. What is valid in the cache stays. An image that was restored before is not
fetched again. With --here it needs the installed package, and --image NAME@DIGEST where it does not run in the image of
the tests.

With --fail-open and --deadline nothing that goes wrong keeps a node from working: the cache is whole, and tasks compile
what is not there.""",
        exits=(0, 15),
    ),
    "sign": Verb(
        "Share",
        "sign a cache image in a registry, so that machines with a key restore it",
        "warm-cache sign r.example/jit:h200-20261129 --key cache.pem --stream nightly",
        ("key", "stream", *REGISTRY),
        (Argument("ref", "REF", "cache image, with its registry and a tag or digest"),),
        needs="nothing",
        text=True,
        details="""Resolves the tag to a digest once, signs that digest in the form of cosign 2 (the tag
sha256-….sig of the same repository), and prints it. Signatures of other keys stay; a second one by the same key for the
same stream changes nothing. The key is a private one of ECDSA on P-256, in PEM and not encrypted; where it lies in a
KMS, cosign signs. Needs the package cryptography: pip install 'warm-cache[sign]'.""",
        exits=(0,),
    ),
    "bake": Verb(
        "Share",
        "build the serving image with the warm cache in it",
        "warm-cache bake sglang-warm:v0.5.23 --profile h200 --cache /data/sglang-jit",
        ("only", "lock-timeout"),
        (Argument("name", "TAG", "name of the new image on the engine"),),
        details="""Packs what the markers of warm tasks claim, while no other builder works in the cache, and builds an
image: the serving image (with the commands of [image] setup), the cache at its mount, and the variables that find it. A
container of it is warm without any volume. Cold tasks are left out, and named. The engine builds it; nothing is pushed.
To bake what another machine warmed, pull it first.""",
        exits=(0, 10, 15),
    ),
    "fleet": Verb(
        "Share",
        "print what Kubernetes or Slurm run to warm once and restore everywhere",
        "warm-cache fleet slurm --profile h200 --logs /srv/jobs",
        tuple(dict.fromkeys(option for action in _FLEET_ACTIONS for option in action.own)),
        (
            named(_FLEET_ACTIONS),
            Argument("ref", "REF", "cache image, with its registry", optional=True),
            Argument("reports", "REPORT", "documents that warm-cache --json wrote", many=True, optional=True),
        ),
        _FLEET_ACTIONS,
        needs="nothing",
        engine=False,
        text=True,
        details="""kubernetes prints a job that restores, warms on a GPU node and pushes (with --schedule a CronJob),
what restores on every node (a DaemonSet for --target hostpath, a Job for pvc), and a pod that uses the cache as jobs do
and ends with 0 or 10. The serving image has to be named with its digest: --image NAME@sha256:DIGEST. The job's
statuses 2 and 12 fail it at once, 15 and 17 are tried again; --budget is its deadline.

summary ends with a signal's status, 1, 16, 13, 14, 11, 12, 2, 10, 15, 17 or 0, the first of these that a report has. A
run without a report counts as 11.

Reads the manifest and the key; starts nothing, and speaks to no cluster. Every value is checked.""",
        exits=(0, 10, 11, 13, 14, 15, 17),
    ),
}
