"""Limits for a process that runs code of a checkout: memory, CPU time, files, and system calls that reach others.

Standard library only; the filter of system calls is a classic BPF program (linux/seccomp.h, linux/filter.h).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import resource
import struct

_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _PR_SET_PDEATHSIG = 4, 22, 38, 1  # linux/prctl.h
_SECCOMP_MODE_FILTER = 2
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06  # BPF_LD|W|ABS, JMP|JEQ|K, JMP|JSET|K, RET|K
_CLONE_THREAD = 0x00010000

#: (audit architecture, numbers of system calls): asm/unistd_64.h and asm-generic/unistd.h.
_ARCHITECTURES = {
    "x86_64": (
        0xC000003E,
        {"kill": 62, "tkill": 200, "tgkill": 234, "ptrace": 101, "fork": 57, "vfork": 58, "clone": 56, "clone3": 435}
        | {"execve": 59, "execveat": 322, "connect": 42, "sendto": 44, "sendmsg": 46, "sendmmsg": 307}
        | {"process_vm_readv": 310, "process_vm_writev": 311, "pidfd_open": 434, "pidfd_send_signal": 424}
        | {"pidfd_getfd": 438, "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297, "prlimit64": 302, "setpgid": 109}
        | {"setpriority": 141, "sched_setaffinity": 203, "sched_setscheduler": 144, "sched_setparam": 142}
        | {"setsid": 112, "unshare": 272, "setns": 308, "mount": 165, "bpf": 321, "io_uring_setup": 425},
    ),
    "aarch64": (
        0xC00000B7,
        {"kill": 129, "tkill": 130, "tgkill": 131, "ptrace": 117, "clone": 220, "clone3": 435, "execve": 221}
        | {"execveat": 281, "connect": 203, "sendto": 206, "sendmsg": 211, "sendmmsg": 269, "process_vm_readv": 270}
        | {"process_vm_writev": 271, "pidfd_open": 434, "pidfd_send_signal": 424, "pidfd_getfd": 438}
        | {"rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240, "prlimit64": 261, "setpgid": 154, "setpriority": 140}
        | {"sched_setaffinity": 122, "sched_setscheduler": 119, "sched_setparam": 118, "setsid": 157, "unshare": 97}
        | {"setns": 268, "mount": 40, "bpf": 280, "io_uring_setup": 425},
    ),
}


def hide_process() -> None:
    """Keep other processes of this user out of this one's memory, environment and descriptors (/proc/PID/…)."""
    _prctl(_PR_SET_DUMPABLE, 0)


def limit(*, memory: int, cpu: int, file_size: int, open_files: int = 256) -> None:
    """Set limits of this process. memory and file_size: bytes; cpu: seconds, after which the kernel ends it."""
    for kind, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_FSIZE, file_size),
        (resource.RLIMIT_NOFILE, open_files),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (most, most))


def forbid_other_processes(parent: int) -> bool:
    """Forbid this process for ever to start, signal or trace another one, and to connect; False where it cannot be.

    It ends when `parent` does. Threads, and signals to itself, stay possible. A connection is refused as if nothing
    listened.
    """
    _prctl(_PR_SET_PDEATHSIG, 9)
    if os.getppid() != parent:
        os._exit(1)
    known = _ARCHITECTURES.get(platform.machine())
    if known is None or ctypes.sizeof(ctypes.c_void_p) != 8 or not _prctl(_PR_SET_NO_NEW_PRIVS, 1):
        return False
    program = _filter(*known, own=os.getpid())
    buffer = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    sock_fprog = Program(len(program) // 8, ctypes.addressof(buffer))
    return _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(sock_fprog))


def _filter(architecture: int, numbers: dict[str, int], own: int) -> bytes:
    """Return the BPF program. Offsets are those of struct seccomp_data: nr 0, arch 4, args from 16, 8 bytes each."""
    lines: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
    ]
    if architecture == 0xC000003E:
        lines += [(_ANY_BIT, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL)]  # x32 has other numbers
    for name, number in numbers.items():
        if name in ("kill", "tgkill"):
            # Only to this process: args[0].
            body = [(_LOAD, 0, 0, 16), (_EQUAL, 0, 1, own), (_RETURN, 0, 0, _ALLOW), _refuse(errno.EPERM)]
        elif name == "prlimit64":
            body = [(_LOAD, 0, 0, 16), (_EQUAL, 0, 1, 0), (_RETURN, 0, 0, _ALLOW), _refuse(errno.EPERM)]
        elif name == "clone":
            body = [(_LOAD, 0, 0, 16), (_ANY_BIT, 0, 1, _CLONE_THREAD), (_RETURN, 0, 0, _ALLOW), _refuse(errno.EPERM)]
        elif name == "sendto":
            # Without an address it is send(), of a socket pair: args[4], both halves.
            body = [(_LOAD, 0, 0, 48), (_EQUAL, 0, 3, 0), (_LOAD, 0, 0, 52), (_EQUAL, 0, 1, 0)]
            body += [(_RETURN, 0, 0, _ALLOW), _refuse(errno.ECONNREFUSED)]
        elif name in ("connect", "sendmsg", "sendmmsg"):
            body = [_refuse(errno.ECONNREFUSED)]
        elif name == "clone3":
            body = [_refuse(errno.ENOSYS)]  # glibc then calls clone, with flags that can be read
        else:
            body = [_refuse(errno.EPERM)]
        lines += [(_EQUAL, 0, len(body), number), *body]
    lines.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


def _refuse(number: int) -> tuple[int, int, int, int]:
    return (_RETURN, 0, 0, _ERRNO | number)


def _prctl(option: int, value: int, pointer: int = 0) -> bool:
    try:
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)
        return int(prctl(option, value, pointer, 0, 0)) == 0
    except (OSError, AttributeError):
        return False
