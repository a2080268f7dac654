"""Mistakes that new users made, and the one answer that each of them gets."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from builder.cache.model_store import config_digest
from builder.engine.errors import loss
from builder.flock import holders, open_lock, try_lock
from tests.unit.cli.bench import Bench


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            'argv = ["true"]',
            'argv = "python3 -m x"',
            """expected a list of arguments, found a string: 'python3 -m x'; write ["python3", "-m", "x"].""",
        ),
        ("count = 0", 'count = 0\npretend = "B300"', "there is no GPU to pretend 'B300' (known: H200, "),
        ("budget", "bugdet", "[run] has no key 'bugdet'; did you mean 'budget'?"),
        ('recipe = "command"', 'recipe = "comand"', "there is no recipe 'comand' (did you mean 'command'?)"),
    ],
)
def test_mistake_in_a_manifest_is_answered_with_what_to_write(bench: Bench, old: str, new: str, said: str) -> None:
    bench.path.write_text(bench.path.read_text().replace(old, new, 1))
    assert bench.run("check") == 2
    assert said in bench.said()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prune", "--keep", "two"], "--keep  a number of at least 1 is wanted, found 'two'. Exit 2."),
        (["prune", "--max-size", "much"], "--max-size  expected a size"),
        (["env", "--only", "nothing"], "no task of"),
        (["warm", "--lock-timeout", "soon"], "--lock-timeout"),
        (["check", "--max-proof-age", "old"], "--max-proof-age"),
    ],
)
def test_wrong_option_is_2_whatever_the_machine_is(bench: Bench, words: list[str], said: str) -> None:
    """The engine of this bench answers nothing: an option is judged before a machine is."""
    assert bench.run(*words) == 2
    assert said in bench.said()


@pytest.mark.parametrize(("value", "warned"), [("55", True), ("55m", False), ("55s", False), ("1.5h", False)])
def test_budget_without_a_unit_is_questioned(bench: Bench, value: str, warned: bool) -> None:
    assert bench.run("config", WARM_CACHE_BUDGET=value) == 0
    assert ("WARM_CACHE_BUDGET 55 is 55 seconds; 55 minutes are 55m" in bench.said()) == warned


@pytest.mark.parametrize(
    "error",
    [
        ValueError("Invalid bind address format: port is required: foo"),
        ValueError("Invalid bind address protocol: ftp://x"),
        ValueError("Port could not be cast to integer value as 'y'"),
        OSError(errno.EINVAL, "Invalid argument"),
    ],
)
def test_address_of_no_engine_is_answered_with_the_forms_of_one(error: Exception) -> None:
    message = loss("cannot reach a container engine at foo (DOCKER_HOST)", error).message
    assert message.endswith("that is no address. An engine's address is unix:///PATH, tcp://HOST:PORT or ssh://HOST")


def test_missing_model_is_answered_with_its_download(tmp_path: Path) -> None:
    _, problem = config_digest(tmp_path, "org/model", None)
    assert problem and f"(HF_HOME={tmp_path} hf download org/model)" in problem


def test_long_command_line_of_another_builder_is_marked_as_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader of /proc is given a long line: a real one is the interpreter's, of any length."""
    monkeypatch.setattr(Path, "read_bytes", lambda _: b"warm-cache\0warm\0" + b"x" * 200)
    path = tmp_path / "lock"
    descriptor = open_lock(path, create=True)
    try:
        assert try_lock(descriptor)
        (holder,) = holders(path)
    finally:
        os.close(descriptor)
    assert holder.startswith("pid ") and holder.endswith("x…)")
