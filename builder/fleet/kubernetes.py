"""Objects for ``kubectl apply -f -``: a job that warms and pushes, what restores on nodes, a pod that uses the cache.

Nothing here speaks to a cluster: the user's kubectl has the login. Fields are those of Kubernetes 1.29 and later.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from builder.fleet import pods
from builder.fleet.pods import Fleet, Object

#: What can be printed, in the order of the list.
PARTS = ("warm", "restore", "check")
#: Seconds that a pod which warms has between SIGTERM and SIGKILL: a run ends within five.
_WARM_GRACE = 30
_GRACE = 10
#: The part of a job's time that its run gets: the rest is for pulling images, and for the push.
_RUN_SHARE = 0.9
#: Statuses of the program that another attempt does not change: usage, and a machine that cannot run it.
_HOPELESS = (2, 12)
#: Those that pass by themselves: another builder is at work, and no idle machine.
_PASSING = (15, 17)
_ATTEMPTS = 2
#: Seconds in which a restore that began late has to be done.
_RESTORE_SLACK = 600


def objects(fleet: Fleet, parts: Sequence[str]) -> Object:
    """Return the list of objects. parts: of PARTS."""
    known = {"warm": warm_job, "restore": restore_object, "check": check_pod}
    items = [known[part](fleet) for part in PARTS if part in parts]
    items = [each for each in items if each]
    if fleet.files:
        files = {"kind": "ConfigMap", **_metadata(fleet, "files"), "data": dict(fleet.files)}
        items.insert(0, {"apiVersion": "v1", **files})
    return {"apiVersion": "v1", "kind": "List", "items": items}


def warm_job(fleet: Fleet) -> Object:
    """Return the job that warms on a GPU node and pushes what is warm; with a schedule, a CronJob of it."""
    run = f"{max(1, int(fleet.budget * _RUN_SHARE))}s"
    restore = pods.restore_container(fleet, alone=True)  # it has the GPUs meanwhile
    first = [pods.program_container(fleet), restore, pods.warm_container(fleet, run)]
    pod = _pod(fleet, "warm", first, [pods.push_container(fleet)], {"emptyDir": {}}, grace=_WARM_GRACE)
    job = _job(fleet, pod, fleet.budget)
    queue = {"kueue.x-k8s.io/queue-name": fleet.queue} if fleet.queue else {}
    if fleet.queue:
        job["suspend"] = True  # Kueue resumes it
    if fleet.schedule is None:
        return {"apiVersion": "batch/v1", "kind": "Job", **_metadata(fleet, "warm", queue), "spec": job}
    spec = {
        "schedule": fleet.schedule,
        "concurrencyPolicy": "Forbid",
        "startingDeadlineSeconds": 3600,
        "successfulJobsHistoryLimit": 1,
        "failedJobsHistoryLimit": 2,
        "jobTemplate": {"metadata": {"labels": {**_labels(fleet, "warm"), **queue}}, "spec": job},
    }
    return {"apiVersion": "batch/v1", "kind": "CronJob", **_metadata(fleet, "warm"), "spec": spec}


def restore_object(fleet: Fleet) -> Object | None:
    """Return what restores: a DaemonSet for directories of nodes, a Job for a claim, nothing for a pod's own cache.

    There it is an init container of each pod that uses the cache.
    """
    cache = pods.node_cache(fleet)
    restore = pods.restore_container(fleet)
    if fleet.target == "emptydir":
        return None
    if fleet.target == "pvc":
        spec = _job(fleet, _pod(fleet, "restore", [], [restore], cache), _RESTORE_SLACK)
        return {"apiVersion": "batch/v1", "kind": "Job", **_metadata(fleet, "restore"), "spec": spec}
    pod = _pod(fleet, "restore", [restore], [pods.waiting_container(fleet)], cache)
    pod["spec"]["restartPolicy"] = "Always"
    return {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        **_metadata(fleet, "restore"),
        "spec": {
            "selector": {"matchLabels": _labels(fleet, "restore")},
            "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": fleet.max_unavailable}},
            "template": pod,
        },
    }


def check_pod(fleet: Fleet) -> Object:
    """Return a pod that uses the cache as jobs do, and ends with 0 where it is warm and with 10 where it is cold."""
    cache: Object = {"emptyDir": {}}
    filled = pods.restore_container(fleet) if fleet.target == "emptydir" else pods.reset_container(fleet)
    pod = _pod(fleet, "check", [pods.program_container(fleet), filled], [pods.consumer_container(fleet)], cache)
    metadata = _metadata(fleet, "check")["metadata"]
    metadata |= {"annotations": pod["metadata"].get("annotations", {})}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod["spec"]}


def text(document: Object) -> str:
    """Return a document as kubectl reads it."""
    return json.dumps(document, indent=2)


def _pod(
    fleet: Fleet,
    part: str,
    first: Sequence[Object],
    containers: Sequence[Object],
    cache: Object,
    *,
    grace: int = _GRACE,
) -> Object:
    """Return the template of a pod. first: its init containers."""
    spec: Object = {
        "restartPolicy": "Never",
        # Variables of services would be taken for options of this program: WARM_CACHE_PORT.
        "enableServiceLinks": False,
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": grace,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": fleet.user,
            "runAsGroup": fleet.user,
            "fsGroup": fleet.user,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": list(containers),
        "volumes": pods.volumes(fleet, [*first, *containers], cache),
    }
    if first:
        spec["initContainers"] = list(first)
    if fleet.selector:
        spec["nodeSelector"] = dict(fleet.selector)
    if fleet.tolerations:
        spec["tolerations"] = [each.document for each in fleet.tolerations]
    if fleet.registry_secret:
        spec["imagePullSecrets"] = [{"name": fleet.registry_secret}]
    metadata: Object = {"labels": _labels(fleet, part)}
    if fleet.files:
        # Pods begin anew when a file changes, and only then.
        digest = hashlib.sha256(json.dumps(dict(fleet.files), sort_keys=True).encode()).hexdigest()
        metadata["annotations"] = {"io.sglang.warm-cache/files": digest[:16]}
    return {"metadata": metadata, "spec": spec}


def _job(fleet: Fleet, pod: Object, deadline: float) -> Object:
    """Return a Job's spec: what becomes of it by the program's exit status."""
    return {
        "activeDeadlineSeconds": int(deadline),
        "ttlSecondsAfterFinished": fleet.keep,
        "backoffLimit": _ATTEMPTS,
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": {"operator": "In", "values": list(_HOPELESS)}},
                {"action": "Ignore", "onExitCodes": {"operator": "In", "values": list(_PASSING)}},
                # The node was drained, or the pod had to make room.
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": pod,
    }


def _metadata(fleet: Fleet, part: str, labels: Object | None = None) -> Object:
    found: Object = {"name": f"{fleet.name}-{part}", "labels": {**_labels(fleet, part), **(labels or {})}}
    if fleet.namespace:
        found["namespace"] = fleet.namespace
    return {"metadata": found}


def _labels(fleet: Fleet, part: str) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "warm-cache",
        "app.kubernetes.io/instance": fleet.name,
        "app.kubernetes.io/component": part,
    }
