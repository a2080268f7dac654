"""Containers and volumes of pods: the program, what they may do, and where things are in them.

The restoring container has nothing that the *restricted* Pod Security standard refuses: it is not root, gains no
privilege, has no capability, the runtime's seccomp profile and a read-only root file system.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from builder.fleet.values import Toleration

Object = dict[str, Any]

#: Where in a pod things are.
PROGRAM = "/opt/warm-cache-program"
FILES = "/etc/warm-cache-files"
REGISTRY = "/etc/warm-cache-registry"
SOURCE = "/mnt/warm-cache"
SCRATCH = "/tmp"  # noqa: S108 - of the pod's own
MODELS = "/models"
KEY_FILE = "cache-key.pem"

Target = Literal["hostpath", "pvc", "emptydir"]


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """What a fleet of Kubernetes nodes runs. Seconds and bytes; None: not given."""

    name: str
    namespace: str | None
    ref: str  # the cache image, as it is restored
    push: tuple[str, ...]  # its repository, and with --tag the tag that is moved
    builder_image: str
    image: str  # the serving image, with its digest
    digest: str
    mount: str
    manifest: tuple[str, ...]  # the options that name the manifest in a pod
    files: Mapping[str, str]  # text by name in FILES: the manifest, if it is no profile, and the public key
    stream: str | None
    gpus: int
    shm_size: int
    budget: float
    models: Path | None
    models_claim: str | None
    target: Target
    root: Path | None  # on the node
    claim: str | None
    user: int
    schedule: str | None
    queue: str | None
    selector: Mapping[str, str]
    tolerations: Sequence[Toleration]
    registry_secret: str | None
    env_secret: str | None
    max_unavailable: int | str
    deadline: str
    jitter: str
    keep: int  # seconds that finished jobs stay

    @property
    def key_options(self) -> tuple[str, ...]:
        """Return the options for the keys of signatures."""
        key = ("--key", f"{FILES}/{KEY_FILE}") if KEY_FILE in self.files else ()
        return (*key, "--stream", self.stream) if self.stream else key


#: What a job's container may do, and what one of the builder image may.
UNPRIVILEGED: Object = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
RESTRICTED: Object = {**UNPRIVILEGED, "readOnlyRootFilesystem": True}
#: What a container of the serving image may do that warms, and one that reads what it wrote: they are root, with the
#: capabilities to read a model store and to write a cache whoever owns them.
AS_ROOT: Object = {
    "runAsUser": 0,
    "runAsNonRoot": False,
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"], "add": ["CHOWN", "DAC_OVERRIDE", "FOWNER"]},
}
_SMALL: Object = {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "1Gi"}}
#: Ends at once on SIGTERM, which PID 1 would ignore without a handler.
_WAITS = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); signal.pause()"
#: The program, and beside it the packages that a push needs: in the serving image, whose own it does not touch.
_COPIES = f"""\
import pathlib, shutil, builder
site = pathlib.Path(builder.__path__[0]).parent
shutil.copytree(site / "builder", "{PROGRAM}/builder", dirs_exist_ok=True)
left = shutil.ignore_patterns("builder", "pip*", "setuptools*", "__pycache__", "bin")
shutil.copytree(site, "{PROGRAM}/lib", ignore=left, dirs_exist_ok=True)
"""
#: The shell is PID 1 there: it passes SIGTERM on, and waits for the report. What failed for some tasks (11, 14) does
#: not keep the rest from being pushed; the pod ends with that status after the push.
WARMS = f"""\
python3 -m builder "$@" & child=$!
trap 'kill -TERM $child; stopped=1' TERM
wait $child; status=$?
if [ -n "${{stopped:-}}" ]; then wait $child; status=$?; fi
echo $status >{SCRATCH}/status
case $status in 11|14) exit 0 ;; esac
exit $status"""
PUSHES = f"""\
python3 -m builder "$@"; pushed=$?
read -r status <{SCRATCH}/status
if [ "$status" -ne 0 ]; then exit "$status"; fi
exit $pushed"""
#: A cache that cannot be copied makes a job slower; it does not keep it from running.
RESETS = """\
warm-cache "$@" || echo "no cache: this pod compiles what it needs" >&2"""
#: The job's own words follow. Something cold is no failure of a job.
CONSUMES = """\
variables=$(python3 -m builder env --here --format shell "$@") || echo "something is cold" >&2
eval "$variables"
exec python3 -m builder check --here "$@\""""


def program_container(fleet: Fleet) -> Object:
    """Return the init container that copies the program to where the serving image's Python finds it."""
    return builder_container(fleet, "program", ["python3", "-c", _COPIES], ["program", "scratch"])


def restore_container(fleet: Fleet, *, alone: bool = False) -> Object:
    """Return the container that restores the cache, verified, or leaves it as it is: it never fails.

    alone: no other pod begins at the same time, so that it does not wait.
    """
    jitter = () if alone else ("--jitter", fleet.jitter)
    words = ["pull", fleet.ref, "--here", "--cache", fleet.mount, *fleet.manifest, "--image", fleet.image]
    words += ["--fail-open", "--deadline", fleet.deadline, *jitter, *fleet.key_options]
    return builder_container(fleet, "restore", ["warm-cache", *words], ["cache", "scratch", "files", "registry"])


def waiting_container(fleet: Fleet) -> Object:
    """Return the container that keeps a pod of a DaemonSet alive and does nothing."""
    small = {"requests": {"cpu": "1m", "memory": "16Mi"}, "limits": {"memory": "64Mi"}}
    return builder_container(fleet, "restored", ["python3", "-c", _WAITS], []) | {"resources": small}


def warm_container(fleet: Fleet, budget: str) -> Object:
    """Return the container that warms. budget: as the option has it."""
    words = ["warm", "--here", "--cache", fleet.mount, "--create", *fleet.manifest, "--image", fleet.digest]
    words += ["--budget", budget, "--log-dir", f"{SCRATCH}/logs"]
    found = _serving_container(fleet, "warm", WARMS, words, AS_ROOT)
    return found | ({"envFrom": [{"secretRef": {"name": fleet.env_secret}}]} if fleet.env_secret else {})


def push_container(fleet: Fleet) -> Object:
    """Return the container that pushes what is warm, and ends with the status of the warm-up.

    It is of the serving image, with the same GPUs: only there is the cache known to be warm.
    """
    words = ["push", *fleet.push, "--here", "--cache", fleet.mount, *fleet.manifest, "--image", fleet.digest]
    found = _serving_container(fleet, "push", PUSHES, words, AS_ROOT, "registry")
    found["env"] += [{"name": "PYTHONPATH", "value": f"{PROGRAM}/lib"}, {"name": "HOME", "value": SCRATCH}]
    if fleet.registry_secret:
        found["env"] += [{"name": "DOCKER_CONFIG", "value": REGISTRY}]
    return found


def reset_container(fleet: Fleet) -> Object:
    """Return the container that gives a job its own copy of the node's cache."""
    words = ["here-reset", "--source", SOURCE, "--target", fleet.mount]
    return builder_container(fleet, "copy", ["sh", "-c", RESETS, "copy", *words], ["source", "cache", "scratch"])


def consumer_container(fleet: Fleet) -> Object:
    """Return a job's container: it sets the variables of its environment, and checks that the cache is warm."""
    found = _serving_container(fleet, "sglang", CONSUMES, ["--cache", fleet.mount, *fleet.manifest], UNPRIVILEGED)
    found["env"] += [{"name": "HOME", "value": SCRATCH}]
    return found


def _serving_container(
    fleet: Fleet, name: str, script: str, words: Sequence[str], security: Object, *volumes: str
) -> Object:
    """Return a container of the serving image that runs a script with these words, on all GPUs."""
    names = ["program", "cache", "scratch", "shm", "files", *(["models"] if _has_models(fleet) else []), *volumes]
    found: Object = {
        "name": name,
        "image": fleet.image,
        "workingDir": PROGRAM,
        "command": ["sh", "-c", script, name],
        "args": list(words),
        "env": serving_environment(fleet),
        "volumeMounts": mounts(fleet, names),
        "securityContext": security,
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    return found | ({"resources": {"limits": {"nvidia.com/gpu": str(fleet.gpus)}}} if fleet.gpus else {})


def builder_container(fleet: Fleet, name: str, command: Sequence[str], names: Sequence[str]) -> Object:
    """Return a container of the builder image. names: of its volumes."""
    found: Object = {
        "name": name,
        "image": fleet.builder_image,
        "command": list(command),
        "env": [{"name": "HOME", "value": SCRATCH}],
        "volumeMounts": mounts(fleet, names),
        "resources": _SMALL,
        "securityContext": RESTRICTED,
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    if "registry" in names and fleet.registry_secret:
        found["env"] = [*found["env"], {"name": "DOCKER_CONFIG", "value": REGISTRY}]
    return found


def serving_environment(fleet: Fleet) -> list[Object]:
    """Return the variables of a container of the serving image: which one it is, and where its models are."""
    found = [{"name": "WARM_CACHE_IMAGE_ID", "value": fleet.digest}]
    if _has_models(fleet):
        found += [{"name": "HF_HOME", "value": MODELS}, {"name": "HF_HUB_OFFLINE", "value": "1"}]
    return found


def mounts(fleet: Fleet, names: Sequence[str]) -> list[Object]:
    """Return the mounts of a container; a volume that this fleet does not have is left out."""
    known: dict[str, Object] = {
        "program": {"mountPath": PROGRAM},
        "cache": {"mountPath": fleet.mount},
        "source": {"mountPath": SOURCE, "readOnly": True},
        "scratch": {"mountPath": SCRATCH},
        "shm": {"mountPath": "/dev/shm"},  # noqa: S108 - the container's own
        "files": {"mountPath": FILES, "readOnly": True},
        "registry": {"mountPath": REGISTRY, "readOnly": True},
        "models": {"mountPath": MODELS, "readOnly": True},
    }
    absent = set() if fleet.files else {"files"}
    absent |= set() if fleet.registry_secret else {"registry"}
    return [{"name": name, **known[name]} for name in names if name not in absent]


def volumes(fleet: Fleet, containers: Sequence[Object], cache: Object) -> list[Object]:
    """Return the volumes that these containers mount. cache: what their cache is on."""
    secret = {"secretName": fleet.registry_secret, "defaultMode": 0o440}
    known: dict[str, Object] = {
        "program": {"emptyDir": {}},
        "cache": cache,
        "source": node_cache(fleet, read_only=True),
        "scratch": {"emptyDir": {}},
        "shm": {"emptyDir": {"medium": "Memory", "sizeLimit": str(fleet.shm_size)}},
        "files": {"configMap": {"name": f"{fleet.name}-files"}},
        "registry": {"secret": {**secret, "items": [{"key": ".dockerconfigjson", "path": "config.json"}]}},
        "models": _models(fleet),
    }
    used = dict.fromkeys(mount["name"] for each in containers for mount in each["volumeMounts"])
    return [{"name": name, **known[name]} for name in used]


def node_cache(fleet: Fleet, *, read_only: bool = False) -> Object:
    """Return the volume into which the cache is restored."""
    match fleet.target:
        case "hostpath":
            # A missing one is an error: the kubelet would make it root's, and the restoring container is not root.
            return {"hostPath": {"path": str(fleet.root), "type": "Directory"}}
        case "pvc":
            return {"persistentVolumeClaim": {"claimName": fleet.claim, "readOnly": read_only}}
        case _:
            return {"emptyDir": {}}


def _has_models(fleet: Fleet) -> bool:
    return bool(fleet.models or fleet.models_claim)


def _models(fleet: Fleet) -> Object:
    if fleet.models_claim:
        return {"persistentVolumeClaim": {"claimName": fleet.models_claim, "readOnly": True}}
    return {"hostPath": {"path": str(fleet.models), "type": "Directory"}}
