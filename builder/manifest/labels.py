"""Labels of tasks: the names that people and file names use for them.

A label is the model's last part and its parallelism. Where that is the same for two tasks of one manifest, both get a
suffix made of the task itself (its recipe, else a digest), so that a label does not depend on the order of the tasks.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence

from builder import sglang_args
from builder.task import Task


def labels(tasks: Sequence[Task]) -> list[str]:
    """Return one label per task, all different, each the same for every order of the tasks."""
    plain = [_plain_label(task) for task in tasks]
    names = list(plain)
    for suffix in (lambda task: task.recipe, lambda task: digest(task)[:4], digest):
        names = _with_suffixes(names, plain, tasks, suffix)
    return names


def digest(task: Task) -> str:
    """Return the digest of the task without its label, deadlines and number of workers."""
    return hashlib.sha256(content(task).encode()).hexdigest()[:16]


def content(task: Task) -> str:
    """Return, as JSON, what makes two tasks the same work."""
    ignored: dict[str, object] = {"label": "", "timeout": 0, "silence": 0, "workers": 0}
    if task.recipe == "shapes":
        ignored["gpus"] = 0  # what is compiled does not depend on the number of workers
    return json.dumps({**vars(task), **ignored}, sort_keys=True, default=vars)


def _with_suffixes(
    names: Sequence[str], plain: Sequence[str], tasks: Sequence[Task], suffix: Callable[[Task], str]
) -> list[str]:
    """Return the names, with a suffix where several tasks share one and the suffixes differ.

    Upper and lower case count as the same: some file systems do not distinguish them.
    """
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(names):
        groups[name.lower()].append(index)
    result = list(names)
    for members in groups.values():
        if len(members) == 1:
            continue
        longer = {index: f"{plain[index]}-{suffix(tasks[index])}" for index in members}
        if len(set(longer.values())) == len(members):
            for index, name in longer.items():
                result[index] = name
    return result


def _plain_label(task: Task) -> str:
    parts = [re.sub(r"[^A-Za-z0-9._-]+", "-", task.model.rstrip("/").rpartition("/")[2]).strip("-.")[:64] or "task"]
    parts += [
        f"{name}{found}" for name in sglang_args.PARALLELISM if (found := sglang_args.degree(task.argv, name)) > 1
    ]
    return "-".join(parts)
