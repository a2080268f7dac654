"""Checks of this machine beyond preflight: findings that do not prevent a run, each of which once spoilt one.

CHECKS is the table: a name, and a function from what is known (`Facts`) to a `CheckResult`. The state of a check that
cannot know is ``unknown``; no check raises, starts a container or wakes a GPU.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from builder.cache import model_store
from builder.cache.coverage import needs_config
from builder.engine import gpu_request
from builder.engine.api import Image
from builder.engine.podman import is_podman
from builder.host.gpus import HostGpus
from builder.manifest.load import Manifest
from builder.run import image_checks
from builder.task import Task
from builder.text import size

OK, WARN, UNKNOWN = "ok", "warning", "unknown"

#: Seconds between the engine's clock and ours above which times of the log and ages of markers mislead.
CLOCK_SKEW = 5.0
#: Descriptors that one container takes in this process (log, lease, attachment, connections), with room.
DESCRIPTORS = 64
#: File systems that live on another machine, where flock may be local to each host, or missing.
REMOTE_FILE_SYSTEMS = (
    "nfs", "nfs4", "cifs", "smb3", "9p", "virtiofs", "lustre", "ceph", "beegfs", "gpfs", "wekafs", "glusterfs", "panfs",
    "orangefs", "afs", "ocfs2", "gfs2", "vboxsf", "fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.juicefs",
    "fuse.s3fs", "fuse.gcsfuse", "fuse.mountpoint-s3", "fuse.blobfuse2", "fuse.goofys", "fuse.rclone", "fuse.cvmfs",
)  # fmt: skip
#: File systems that are empty after a reboot, or end with their container.
VOLATILE_FILE_SYSTEMS = ("tmpfs", "ramfs", "overlay")
#: The type that SELinux wants of files which containers write (container-selinux).
CONTAINER_LABEL = "container_file_t"
#: The character device major number of the NVIDIA driver (Documentation/admin-guide/devices.txt).
NVIDIA_MAJOR = 195


@dataclass(frozen=True)
class CheckResult:
    """What one check found."""

    state: str  # OK, WARN or UNKNOWN
    text: str
    remedy: str = ""  # for a warning: what to do


@dataclass(frozen=True)
class Facts:
    """What the checks use."""

    manifest: Manifest
    info: Mapping[str, Any]  # the engine's answer to `docker info`
    local: bool  # the engine is on this machine
    host: HostGpus | None  # the GPUs of this machine by /proc; None without a driver
    now: float  # seconds since the epoch, at the time of that answer
    image: Image | None = None  # the serving image, where the engine has it
    powerful: Sequence[str] = ()  # running containers that mount the cache and have CAP_SYS_ADMIN
    dev: Path = Path("/dev")
    proc: Path = Path("/proc")


def examine(facts: Facts) -> dict[str, CheckResult]:
    """Return the result of every check, by its name."""
    found = {}
    for name, check in CHECKS.items():
        try:
            found[name] = check(facts)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            found[name] = CheckResult(UNKNOWN, f"cannot be known: {error}")
    return found


def _engine(facts: Facts) -> CheckResult:
    version = f"{facts.info.get('ServerVersion') or 'of unknown version'}"
    if facts.info.get("LiveRestoreEnabled"):
        return CheckResult(OK, f"engine {version}; its restart leaves a running warm-up alone (live-restore)")
    return CheckResult(OK, f"engine {version}; its restart ends a running warm-up, and the next run continues it")


def _driver(facts: Facts) -> CheckResult:
    if not facts.manifest.gpus.count:
        return CheckResult(OK, "the manifest needs no GPU")
    if not facts.local:
        return CheckResult(UNKNOWN, "the engine is on another machine")
    if facts.host is None:
        return CheckResult(UNKNOWN, "no NVIDIA driver is visible in /proc; the probe's container decides")
    kinds = ", ".join(sorted(set(facts.host.names))) or "no GPU"
    return CheckResult(OK, f"driver {facts.host.driver or 'of unknown version'}, {len(facts.host.names)} × {kinds}")


def _toolkit(facts: Facts) -> CheckResult:
    """Check that the engine can give GPUs to containers: by the toolkit's hook in PATH, its runtime, or CDI."""
    if not facts.manifest.gpus.count:
        return CheckResult(OK, "the manifest needs no GPU")
    ways = gpu_request.other_ways(facts.info, local=facts.local)
    ways += gpu_request.cdi_devices(facts.info)[:1]
    if is_podman(facts.info):
        if gpu_request.podman_version(facts.info) >= gpu_request.PODMAN_WITH_CDI:
            return CheckResult(OK, "Podman, which hands out GPUs by its CDI specification")
        return CheckResult(
            WARN, "Podman before 5.4 ignores requests for GPUs", "Update Podman, or use a Docker Engine."
        )
    if ways:
        return CheckResult(OK, f"found {', '.join(ways)}")
    return CheckResult(
        WARN,
        "the engine lists no nvidia runtime and no CDI device"
        + (", and nvidia-container-runtime-hook is not in PATH" if facts.local else ""),
        "Install nvidia-container-toolkit, run: nvidia-ctk runtime configure --runtime=docker, and restart dockerd.",
    )


def _daemon_reload(facts: Facts) -> CheckResult:
    """Check that ``systemctl daemon-reload`` takes no GPU from running containers.

    It rewrites the device rules of containers whose cgroups systemd manages. They lose GPUs that have no link below
    /dev/char ("Failed to initialize NVML: Unknown Error").
    """
    driver = facts.info.get("CgroupDriver")
    version = f"cgroup v{facts.info.get('CgroupVersion') or '?'}, driver {driver or 'unknown'}"
    if driver != "systemd" or not facts.manifest.gpus.count:
        return CheckResult(OK, f"{version}: systemctl daemon-reload takes no GPU from a container")
    if not facts.local:
        return CheckResult(UNKNOWN, f"{version}: whether /dev/char has links to the GPUs cannot be seen from here")
    links = [path.name for path in (facts.dev / "char").glob(f"{NVIDIA_MAJOR}:*")]
    if links:
        return CheckResult(OK, f"{version}; /dev/char has links to the GPUs, so that daemon-reload leaves them alone")
    return CheckResult(
        WARN,
        f"{version}, and /dev/char has no links to the GPUs: systemctl daemon-reload, which package updates run, "
        "takes the GPUs from running containers",
        "Run: nvidia-ctk system create-dev-char-symlinks --create-all (with a udev rule for reboots), use CDI, "
        'or set "exec-opts": ["native.cgroupdriver=cgroupfs"] in daemon.json.',
    )


def _shared_memory(facts: Facts) -> CheckResult:
    wanted, memory = facts.manifest.container.shm_size, int(facts.info.get("MemTotal") or 0)
    if memory and wanted > memory:
        return CheckResult(
            WARN,
            f"shm_size is {size(wanted)}, and the machine has {size(memory)} of memory",
            "Set [container] shm_size below it: what NCCL and the tokenizer leave there is memory.",
        )
    return CheckResult(OK, f"{size(wanted)} for each container, private to it, of {size(memory)} of memory")


def _cache_disk(facts: Facts) -> CheckResult:
    root = facts.manifest.cache.root
    if root is None or not facts.local:
        return CheckResult(UNKNOWN, "a volume, or another machine's directory: its disk cannot be seen from here")
    place = _nearest(root)
    kind, free, inodes = _file_system(facts.proc, place), shutil.disk_usage(place).free, os.statvfs(place)
    if kind in VOLATILE_FILE_SYSTEMS:
        return CheckResult(
            WARN, f"{root} is on {kind}, which is empty after a reboot", "Set [cache] root on a local disk."
        )
    if kind in REMOTE_FILE_SYSTEMS:
        return CheckResult(
            WARN,
            f"{root} is on {kind}, where locks of several machines may not see each other",
            "Set [cache] root on a local disk, and refresh it on each machine.",
        )
    if inodes.f_files and inodes.f_favail < 100_000:
        return CheckResult(
            WARN, f"{root}: {inodes.f_favail} inodes are left", "An entry takes two to eight. Free some."
        )
    if not root.exists():
        return CheckResult(WARN, f"{root} does not exist", f"Run: mkdir {root}, or pass --create to warm.")
    return CheckResult(OK, f"{root} on {kind or 'an unknown file system'}, {size(free)} free")


def _engine_disk(facts: Facts) -> CheckResult:
    place = facts.info.get("DockerRootDir")
    if not facts.local or not place or not Path(place).is_dir():
        return CheckResult(UNKNOWN, "the engine's own directory cannot be seen from here")
    free, limit = shutil.disk_usage(place).free, facts.manifest.container.log_limit
    if free < limit:
        return CheckResult(
            WARN,
            f"{place} has {size(free)} free, and one task's log may take {size(limit)} there",
            "Free space (docker system df shows what takes it), or lower [container] log_limit.",
        )
    return CheckResult(OK, f"{place} has {size(free)} free; a task's log takes at most {size(limit)} of it")


def _descriptors(facts: Facts) -> CheckResult:
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < DESCRIPTORS * 2:
        return CheckResult(WARN, f"this process may open {soft} files", "Raise it: ulimit -n 1024.")
    return CheckResult(OK, f"this process may open {'any number of' if soft == resource.RLIM_INFINITY else soft} files")


def _clock(facts: Facts) -> CheckResult:
    text = str(facts.info.get("SystemTime") or "")
    found = re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.\d+)?(Z|[+-]\d\d:\d\d)", text)
    if not found:
        return CheckResult(UNKNOWN, "the engine does not report its time")
    engine = datetime.fromisoformat(found[1] + found[2].replace("Z", "+00:00")).timestamp()
    skew = abs(engine - facts.now)
    if skew > CLOCK_SKEW:
        return CheckResult(
            WARN,
            f"the engine's clock and this machine's are {skew:.0f} s apart",
            "Synchronise both (chrony, systemd-timesyncd): ages of markers and times in logs mislead.",
        )
    return CheckResult(OK, "the engine's clock and this machine's agree")


def _models(facts: Facts) -> CheckResult:
    """Check that the store has the config.json of each task's model: without it the task would be skipped."""
    store = facts.manifest.models.store
    reading = [task for task in facts.manifest.tasks if _needs_store(task)]
    named = sorted({task.model for task in reading})
    if not named:
        return CheckResult(OK, "no task reads a model")
    if store is None:
        return CheckResult(OK, "no store: models come from the image or the network")
    if not facts.local:
        return CheckResult(UNKNOWN, "the store is on another machine")
    if not Path(store).is_dir():
        return CheckResult(UNKNOWN, f"{store} does not exist")
    missing = sorted({task.model for task in reading if not model_store.has(store, task)})
    if missing:
        return CheckResult(
            WARN,
            f"{len(missing)} of {len(named)} models are not in {store}, as a container would see it: "
            f"{', '.join(missing)}",
            f"Run there: HF_HOME={store} hf download MODEL. Links must lead to places inside the store.",
        )
    return CheckResult(OK, f"{len(named)} of {len(named)} models are in {store}")


def _permissions(facts: Facts) -> CheckResult:
    root = facts.manifest.cache.root
    if root is None or not facts.local:
        return CheckResult(OK, "containers write the cache; this process only uses the engine")
    user = "root" if os.geteuid() == 0 else f"uid {os.geteuid()}"
    if root.is_dir() and not os.access(root, os.R_OK | os.X_OK):
        return CheckResult(
            WARN,
            f"{user} cannot read {root}: every check reads it through a container, which takes longer",
            f"Run: sudo chmod a+rx {root}",
        )
    return CheckResult(OK, f"{user} may use the engine, and reads the cache directly")


def _isolation(facts: Facts) -> CheckResult:
    """Check that containers may write the cache root despite SELinux and of user namespaces."""
    options = [str(option) for option in facts.info.get("SecurityOptions") or ()]
    root = facts.manifest.cache.root
    if root is None or not facts.local:
        return CheckResult(OK, "no directory of this machine is mounted as the cache")
    if not root.is_dir():
        return CheckResult(UNKNOWN, f"there is no directory {root}")
    if any("name=selinux" in option for option in options) and (label := _selinux_type(root)) != CONTAINER_LABEL:
        return CheckResult(
            WARN,
            f"the engine confines containers with SELinux, and {root} has the label {label or 'of no type'}",
            f"Run: chcon -Rt {CONTAINER_LABEL} {root} (lasting: semanage fcontext -a -t {CONTAINER_LABEL} "
            f"'{root}(/.*)?', then restorecon -R {root}).",
        )
    uid = _mapped_root(facts)
    if uid is not None and root.stat().st_uid != uid and not root.stat().st_mode & 0o002:
        return CheckResult(
            WARN,
            f"root in the engine's containers is user {uid} here (user namespaces), and {root} belongs to user "
            f"{root.stat().st_uid}",
            f"Run: chown -R {uid}:{uid} {root}, or warm on an engine without userns-remap.",
        )
    return CheckResult(OK, "containers may write the cache root: neither SELinux nor a user namespace prevents it")


def _selinux_type(path: Path) -> str:
    """Return the type in a file's SELinux label, e.g. ``container_file_t``; "" without a label."""
    try:
        fields = os.getxattr(path, "security.selinux").decode("ascii", "replace").rstrip("\0").split(":")
    except OSError:
        return ""
    return fields[2] if len(fields) > 2 else ""


def _mapped_root(facts: Facts) -> int | None:
    """Return the user of this machine that is root in the engine's containers; None where that is root itself.

    dockerd keeps the data of a remapped engine in a folder ``UID.GID``; a rootless one runs as the user itself.
    """
    options = [str(option) for option in facts.info.get("SecurityOptions") or ()]
    data = str(facts.info.get("DockerRootDir") or "")
    if any("name=rootless" in option for option in options):
        try:
            return Path(data).stat().st_uid
        except OSError:
            return None
    found = re.fullmatch(r"(\d+)\.\d+", Path(data).name)
    return int(found[1]) if found and any("name=userns" in option for option in options) else None


def _job_files(facts: Facts) -> CheckResult:
    """Check that what jobs make in the root is no way to become root on this machine."""
    root = facts.manifest.cache.root
    if root is None or not facts.local:
        return CheckResult(UNKNOWN, "a volume, or another machine's directory: its mount options are unknown")
    if not root.is_dir():
        return CheckResult(UNKNOWN, f"there is no directory {root}")
    flags = os.statvfs(root).f_flag
    lacking = [name for name, flag in (("nosuid", os.ST_NOSUID), ("nodev", os.ST_NODEV)) if not flags & flag]
    if not lacking:
        return CheckResult(OK, f"{root} is mounted nosuid,nodev")
    closed = next((folder for folder in (root, *root.parents) if not folder.stat().st_mode & stat.S_IXOTH), None)
    if closed is not None:
        return CheckResult(OK, f"{closed} is closed to other users")
    return CheckResult(
        WARN,
        f"the file system of {root} lacks {','.join(lacking)}: a job that writes kernels can leave programs with "
        "root's set-user-ID bit there, for any user of this machine to start",
        "Mount it nosuid,nodev, or put the root into a directory of mode 0700.",
    )


def _job_containers(facts: Facts) -> CheckResult:
    """Check that jobs cannot mount the cache writable: what they get of it read-only is worth nothing then."""
    if not facts.powerful:
        return CheckResult(OK, "no running container that mounts the cache has CAP_SYS_ADMIN")
    return CheckResult(
        WARN,
        f"{', '.join(facts.powerful)} {'mounts' if len(facts.powerful) == 1 else 'mount'} the cache with "
        "CAP_SYS_ADMIN: a job there can write markers, whatever its mounts are",
        "Start it without --privileged and --cap-add SYS_ADMIN.",
    )


def _jit_keep(facts: Facts) -> CheckResult:
    """Check that no variable makes sglang remove kernels that markers list."""
    root = facts.manifest.cache.root if facts.local else None
    found = image_checks.keep_warnings(facts.manifest.tasks, image_checks.variables(facts.image), root)
    return CheckResult(WARN, *found) if found else CheckResult(OK, "no variable makes sglang remove listed kernels")


#: In the order in which they are shown.
CHECKS: dict[str, Callable[[Facts], CheckResult]] = {
    "engine": _engine,
    "driver": _driver,
    "toolkit": _toolkit,
    "daemon-reload": _daemon_reload,
    "shared memory": _shared_memory,
    "cache disk": _cache_disk,
    "engine disk": _engine_disk,
    "descriptors": _descriptors,
    "clock": _clock,
    "models": _models,
    "permissions": _permissions,
    "isolation": _isolation,
    "files of jobs": _job_files,
    "job containers": _job_containers,
    "image user": lambda facts: CheckResult(*image_checks.user_state(facts.image)),
    "builds of jobs": _jit_keep,
}


def _needs_store(task: Task) -> bool:
    return needs_config(task) and not model_store.is_directory(task.model)


def _nearest(path: Path) -> Path:
    """Return the path, or the nearest directory above it that exists."""
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def _file_system(proc: Path, path: Path) -> str:
    """Return the type of the file system that holds a path; "" if it is unknown."""
    best, kind = "", ""
    resolved = str(path.resolve())
    for line in (proc / "self" / "mounts").read_text(encoding="utf-8", errors="replace").splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), fields[1])
        inside = resolved == point or resolved.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, fields[2]
    return kind
