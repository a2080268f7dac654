"""Which test files of a checkout of sglang belong to a suite, by their registrations.

A registration is a call at the top of a file, ``register_cuda_ci(est_time, suite, nightly, disabled, stage=…,
runner_config=…)``, and is read without running the file, as upstream's own ``ci_register.py`` does: its arguments are
literals, and a suite's name is ``{stage}-test-{runner_config}``, or else the argument ``suite``.
"""

from __future__ import annotations

import ast
import fnmatch
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from builder import files
from builder.errors import Problem, UsageError
from builder.recording import TestFile, Unrecorded
from builder.text import counted, did_you_mean, printable

_PARAMETERS = ("est_time", "suite", "nightly", "disabled")  # as positional arguments
_REGISTER = re.compile(r"register_\w+_ci")
#: Bytes; no source that people wrote is longer.
_LARGEST = 16 << 20
_LARGEST_REF = 4096
#: Folders that hold no tests, however many files are below them.
_SKIPPED = ("__pycache__", ".git", "node_modules")
#: Files that support tests, and hold none.
_SUPPORT = ("__init__.py", "conftest.py")


@dataclass(frozen=True)
class Registration:
    """One registration of a file for CUDA. suite: its effective name; disabled: the reason, empty where it runs."""

    suite: str
    disabled: str
    line: int


@dataclass(frozen=True)
class Selection:
    """The files of a suite. checkout: the folder with ``python/sglang/test``; passed_over: files of other suites;
    problems: files that are disabled, or with a registration that is not understood.
    """

    checkout: Path
    files: tuple[TestFile, ...]
    problems: tuple[Unrecorded, ...]
    passed_over: int


def select(paths: Sequence[str], suite: str | None) -> Selection:
    """Return the files at or below these paths that belong to a suite. Raises UsageError.

    suite: names or globs, with commas between them; None: any, and files without a registration too.
    """
    given = _given(paths)
    checkout = _checkout(given)
    wanted = None if suite is None else [each.strip() for each in suite.split(",")]
    chosen: list[TestFile] = []
    problems: list[Unrecorded] = []
    passed_over = 0
    for path in given:
        name = path.relative_to(checkout).as_posix()
        try:
            text = files.read_bytes(str(path), _LARGEST)
        except files.UnreadableError as error:
            raise UsageError(f"{printable(str(path))} {error}") from None
        if wanted is not None and not any(_may_be_of(text, each) for each in wanted):
            passed_over += 1
            continue
        try:
            registrations, others = read(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            line = getattr(error, "lineno", None) or 1
            problems.append(Unrecorded("not-understood", "", f"{name}:{line}", f"not understood: {error}"))
            continue
        mine = [each for each in registrations if wanted is None or _is_of(each.suite, wanted)]
        running = [each for each in mine if not each.disabled]
        if running:
            chosen.append(TestFile(name, max(map(_gpus, running))))
        elif mine:
            problems.append(Unrecorded("disabled", "", f"{name}:{mine[0].line}", mine[0].disabled))
        elif suite is None and not registrations and not others:
            chosen.append(TestFile(name, 8))
        else:
            passed_over += 1
    if not chosen and not problems:
        raise UsageError(_nothing(given, suite))
    if wanted is not None and len(wanted) > 1:
        _check_each(given, wanted)
    return Selection(checkout, tuple(chosen), tuple(problems), passed_over)


def _is_of(suite: str, wanted: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(suite, each) for each in wanted)


def _check_each(given: Sequence[Path], wanted: Sequence[str]) -> None:
    """Raise UsageError if one of several suites has no file."""
    known = _known(given)
    problems = [
        Problem(f"--suite {printable(each)}", "there is no such suite.", did_you_mean(each, sorted(known)))
        for each in wanted
        if not any(fnmatch.fnmatchcase(suite, each) for suite in known)
    ]
    if problems:
        raise UsageError("not all of these suites exist", problems)


def read(source: bytes) -> tuple[list[Registration], bool]:
    """Return a file's registrations for CUDA, and whether it has others.

    Raises ValueError for arguments that are no literals, and what `ast.parse` raises.
    """
    if b"register_" not in source:
        return [], False
    found, others = [], False
    for node in ast.parse(source).body:
        call = node.value if isinstance(node, ast.Expr) else None
        if not isinstance(call, ast.Call):
            continue
        name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
        if name == "register_cuda_ci":
            found.append(_registration(call))
        else:
            others = others or bool(_REGISTER.fullmatch(name))
    return found, others


def commit_of(checkout: Path) -> str:
    """Return the commit that a checkout's ``.git`` folder names; "" where it names none. Runs no git."""
    try:
        head = files.read_bytes(str(checkout / ".git" / "HEAD"), _LARGEST_REF).decode("ascii", "replace").strip()
        if reference := re.fullmatch(r"ref: (refs/heads/[\w./-]{1,200})", head):
            head = _reference(checkout / ".git", reference[1])
    except files.UnreadableError:
        return ""
    return head if re.fullmatch(r"[0-9a-f]{40}", head) else ""


def _reference(git: Path, name: str) -> str:
    try:
        return files.read_bytes(str(git / name), _LARGEST_REF).decode("ascii", "replace").strip()
    except files.UnreadableError:
        packed = files.read_bytes(str(git / "packed-refs"), _LARGEST).decode("ascii", "replace")
        return next((line[:40] for line in packed.splitlines() if line[41:] == name), "")


def _registration(call: ast.Call) -> Registration:
    given = dict(zip(_PARAMETERS, call.args, strict=False)) | {
        each.arg: each.value for each in call.keywords if each.arg
    }
    values: dict[str, object] = {}
    for name, node in given.items():
        try:
            values[name] = ast.literal_eval(node)
        except ValueError:
            raise ValueError(f"line {node.lineno}: {name} of register_cuda_ci is no literal") from None
    stage, runner = values.get("stage"), values.get("runner_config")
    suite = f"{stage}-test-{runner}" if stage is not None and runner is not None else values.get("suite")
    reason = values.get("disabled")
    return Registration(str(suite or ""), str(reason) if reason not in (None, False) else "", call.lineno)


def _gpus(registration: Registration) -> int:
    """Return how many GPUs the runner has, by its name."""
    found = re.search(r"(?:^|-)(\d{1,2})-gpu", registration.suite)
    return int(found[1]) if found else 1


def _may_be_of(text: bytes, suite: str) -> bool:
    """Return False where a file cannot be of the suite, without parsing it."""
    if b"register_cuda_ci" not in text:
        return False
    if re.search(r"[*?\[]", suite):
        return True
    return suite.encode() in text or all(part.encode() in text for part in suite.split("-test-", 1))


def _given(paths: Sequence[str]) -> list[Path]:
    """Return the test files at and below these paths, in order. Links below a folder are not followed."""
    found: dict[Path, None] = {}
    problems = []
    for given in paths:
        path = Path(given)
        if path.is_dir():
            below = sorted(_below(path))
            if not below:
                problems.append(Problem(printable(given), "no Python file is below it."))
        elif path.is_file():
            below = [path]
        else:
            what = "is neither a file nor a folder." if os.path.lexists(path) else "does not exist."
            known = sorted(each.name for each in path.parent.iterdir()) if path.parent.is_dir() else []
            problems.append(Problem(printable(given), what, _hint(path.name, known)))
            continue
        found |= dict.fromkeys(Path(os.path.realpath(each)) for each in below)
    if problems:
        raise UsageError("not all of these can be read", problems)
    return list(found)


def _hint(name: str, known: Sequence[str]) -> str:
    """Return the near match among a folder's names; all of them are no help."""
    near = did_you_mean(name, known)
    return near if near.startswith("did you mean") else ""


def _below(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = [each for each in folders if each not in _SKIPPED]
        for name in names:
            path = Path(place, name)
            if name.endswith(".py") and name not in _SUPPORT and path.is_file() and not path.is_symlink():
                yield path


def _checkout(given: Sequence[Path]) -> Path:
    """Return the folder above all of these that has ``python/sglang/test``. Raises UsageError."""
    roots: dict[Path, None] = {}
    for path in given:
        root = next((each for each in path.parents if (each / "python" / "sglang" / "test").is_dir()), None)
        if root is None:
            raise UsageError(
                f"{printable(str(path))} is not in a checkout of sglang: no folder above it has python/sglang/test, "
                "where the launchers of its tests are"
            )
        roots[root] = None
    if len(roots) > 1:
        raise UsageError(f"these paths are of {len(roots)} checkouts of sglang; name those of one")
    return next(iter(roots))


def _nothing(given: Sequence[Path], suite: str | None) -> str:
    if suite is None:
        return f"no test of CUDA in {counted(len(given), 'file')}"
    known = _known(given)
    hint = did_you_mean(suite, known) if known else "none of them is registered for CUDA"
    return f"no suite {suite!r} in {counted(len(given), 'file')}; {hint}"


def _known(given: Sequence[Path]) -> set[str]:
    """Return the names of the suites that these files are of."""
    known: set[str] = set()
    for path in given:
        try:
            known |= {each.suite for each in read(files.read_bytes(str(path), _LARGEST))[0]}
        except (files.UnreadableError, SyntaxError, ValueError, RecursionError, MemoryError):
            continue
    return known
