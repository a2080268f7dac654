"""The *restricted* Pod Security standard, as rules on a pod's spec (kubernetes.io, "Pod Security Standards", 1.29 on).

Each violation is named by its control. Controls of the *baseline* standard are part of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Object = dict[str, Any]

VOLUMES = {
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "image", "persistentVolumeClaim", "projected"),
    "secret",
}
#: What *baseline* lets a container add; *restricted* has the last one alone.
BASELINE_CAPABILITIES = {
    *("AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE", "SETFCAP"),
    *("SETGID", "SETPCAP", "SETUID", "SYS_CHROOT"),
}


def container_violations(pod: Object, container: Object) -> Iterator[str]:
    """What of a container the restricted standard refuses, with what it has from its pod."""
    mine, above = container.get("securityContext", {}), pod.get("securityContext", {})
    yield from baseline_violations(pod, container)
    if mine.get("allowPrivilegeEscalation") is not False:
        yield "privilege escalation"
    if not mine.get("runAsNonRoot", above.get("runAsNonRoot")):
        yield "running as non-root"
    if mine.get("runAsUser", above.get("runAsUser", 1)) == 0:
        yield "running as non-root user"
    if mine.get("seccompProfile", above.get("seccompProfile", {})).get("type") not in ("RuntimeDefault", "Localhost"):
        yield "seccomp"
    capabilities = mine.get("capabilities", {})
    if "ALL" not in capabilities.get("drop", []) or set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
        yield "capabilities"


def baseline_violations(pod: Object, container: Object) -> Iterator[str]:
    """What of a container the baseline standard refuses."""
    mine = container.get("securityContext", {})
    if mine.get("privileged"):
        yield "privileged"
    if set(mine.get("capabilities", {}).get("add", [])) - BASELINE_CAPABILITIES:
        yield "capabilities (baseline)"
    if any(port.get("hostPort") for port in container.get("ports", [])):
        yield "host ports"
    if mine.get("procMount", "Default") != "Default":
        yield "/proc mount type"
    if mine.get("seccompProfile", pod.get("securityContext", {}).get("seccompProfile", {})).get("type") == "Unconfined":
        yield "seccomp (baseline)"


def pod_violations(pod: Object) -> Iterator[str]:
    """What of a pod itself both standards refuse, or restricted alone: namespaces, sysctls, kinds of volumes."""
    if any(pod.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")):
        yield "host namespaces"
    if pod.get("securityContext", {}).get("sysctls"):
        yield "sysctls"
    kinds = {kind for volume in pod.get("volumes", []) for kind in volume if kind != "name"}
    yield from (f"volume type {kind}" for kind in sorted(kinds - VOLUMES))
