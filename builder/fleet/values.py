"""Kinds of values that schedulers take: each converts text, or raises ValueError with what is wanted and was found.

Sources: Kubernetes' "Object Names and IDs" and "Labels and Selectors", crontab(5), sbatch(1).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_LABEL = r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?"
_WORD = r"[A-Za-z0-9](?:[-A-Za-z0-9_.]*[A-Za-z0-9])?"
_DIGEST = re.compile(r"(?P<name>[^@\s]+)@(?P<digest>sha256:[0-9a-f]{64})")

EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
#: The shorthands that Kubernetes' CronJob knows.
_MACROS = ("@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly")
#: Least and greatest value of each field of a schedule.
_FIELDS = (("minute", 0, 59), ("hour", 0, 23), ("day of the month", 1, 31), ("month", 1, 12), ("day of the week", 0, 7))
_NAMES = {"month": "jan feb mar apr may jun jul aug sep oct nov dec", "day of the week": "sun mon tue wed thu fri sat"}
_RANGE = re.compile(r"(\*|[0-9a-z]+)(?:-([0-9a-z]+))?(?:/([0-9]+))?")
#: The longest name of an object whose pods get names made of it (52 for a CronJob), without the suffixes given here.
_LONGEST_NAME = 40


@dataclass(frozen=True)
class Toleration:
    """A taint that pods of ours tolerate. value: None for any; effect: None for all."""

    key: str
    value: str | None
    effect: str | None

    @property
    def document(self) -> dict[str, str]:
        """Return it as Kubernetes has it."""
        found = {"key": self.key, "operator": "Exists" if self.value is None else "Equal"}
        if self.value is not None:
            found["value"] = self.value
        return found | ({"effect": self.effect} if self.effect else {})


def object_name(text: str) -> str:
    """Return a name of which names of objects can be made."""
    if not re.fullmatch(_LABEL, text) or len(text) > _LONGEST_NAME:
        raise ValueError(
            f"a name of at most {_LONGEST_NAME} lower-case letters, digits and dashes is wanted, found {text!r}"
        )
    return text


def namespace(text: str) -> str:
    """Return the name of a namespace, or of a local queue of Kueue."""
    if not re.fullmatch(_LABEL, text) or len(text) > 63:
        raise ValueError(f"a name of at most 63 lower-case letters, digits and dashes is wanted, found {text!r}")
    return text


def existing_name(text: str) -> str:
    """Return the name of a secret or a claim that exists already."""
    if not re.fullmatch(rf"{_LABEL}(?:\.{_LABEL})*", text) or len(text) > 253:
        raise ValueError(
            f"the name of an object is wanted (lower-case letters, digits, dashes and dots), found {text!r}"
        )
    return text


def any_image(text: str) -> str:
    """Return the reference of an image."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/:@-]*", text):
        raise ValueError(f"an image reference is wanted, found {text!r}")
    return text


def pinned(text: str) -> tuple[str, str]:
    """Return an image's reference and its digest."""
    found = _DIGEST.fullmatch(text)
    if found is None:
        raise ValueError(
            f"an image that is pinned is wanted, as NAME@sha256:DIGEST, found {text!r}: a pod is not told of which "
            "image it was made, and a tag may be another one on the next node"
        )
    return text, found["digest"]


def label(text: str) -> tuple[str, str]:
    """Return key and value of a label, ``KEY=VALUE``."""
    key, equals, value = text.partition("=")
    if not equals or not _is_key(key) or (value and not _is_word(value)):
        raise ValueError(f"a label is wanted, as nvidia.com/gpu.product=NVIDIA-H200, found {text!r}")
    return key, value


def toleration(text: str) -> Toleration:
    """Return a toleration, ``KEY[=VALUE][:EFFECT]``."""
    named, colon, effect = text.partition(":")
    key, equals, value = named.partition("=")
    if not _is_key(key) or (value and not _is_word(value)) or (colon and effect not in EFFECTS):
        raise ValueError(
            "a toleration is wanted, as nvidia.com/gpu:NoSchedule or dedicated=ci:NoExecute (effects: "
            f"{', '.join(EFFECTS)}), found {text!r}"
        )
    return Toleration(key, value if equals else None, effect or None)


def schedule(text: str) -> str:
    """Return the schedule of a CronJob: five fields, or a shorthand such as ``@daily``."""
    wanted = 'a schedule is wanted, as "0 3 * * *" (minute, hour, day, month, day of the week) or @daily'
    if text.startswith("@"):
        if text not in _MACROS:
            raise ValueError(f"{wanted}, found {text!r}; known: {', '.join(_MACROS)}")
        return text
    parts = text.split()
    if len(parts) != len(_FIELDS):
        raise ValueError(f"{wanted}, found {text!r}")
    for part, (field, least, most) in zip(parts, _FIELDS, strict=True):
        for piece in part.split(","):
            if not _is_range(piece.lower(), field, least, most):
                raise ValueError(f"{wanted}; {piece!r} is no {field} ({least} to {most})")
    return text


def _is_range(piece: str, field: str, least: int, most: int) -> bool:
    found = _RANGE.fullmatch(piece)
    if found is None or (found[1] == "*" and found[2]) or found[3] == "0":
        return False
    names = {name: least + at for at, name in enumerate(_NAMES.get(field, "").split())}
    ends = [each for each in found.groups()[:2] if each not in (None, "*")]
    numbers = [names.get(each, int(each) if each.isdigit() else -1) for each in ends]
    return all(least <= number <= most for number in numbers) and numbers == sorted(numbers)


def max_unavailable(text: str) -> int | str:
    """Return how many nodes may be updated at a time: a number, or a part of all."""
    found = re.fullmatch(r"([0-9]{1,5})(%?)", text)
    if not found or not int(found[1]) or (found[2] and int(found[1]) > 100):
        raise ValueError(f"a number of nodes (1) or a part of them (10%) is wanted, found {text!r}")
    return f"{int(found[1])}%" if found[2] else int(found[1])


def user_id(text: str) -> int:
    """Return a user's id that is not root's."""
    if not re.fullmatch(r"[0-9]{1,10}", text) or not 0 < int(text) < 1 << 31:
        raise ValueError(f"the id of a user who is not root is wanted, as 65532, found {text!r}")
    return int(text)


def scheduler_word(text: str) -> str:
    """Return the name of a partition, an account or a generic resource of Slurm."""
    if not re.fullmatch(r"[A-Za-z0-9_.:,-]+", text):
        raise ValueError(f"letters, digits and _.:,- are wanted, found {text!r}")
    return text


def _is_word(text: str) -> bool:
    return len(text) <= 63 and re.fullmatch(_WORD, text) is not None


def _is_key(text: str) -> bool:
    prefix, slash, name = text.rpartition("/")
    return _is_word(name) and (
        not slash or (len(prefix) <= 253 and re.fullmatch(rf"{_LABEL}(?:\.{_LABEL})*", prefix) is not None)
    )
