"""The action and the example workflows, step by step as GitHub's runner would run them, against a real engine."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from tests.actions import ACTION, Runner
from tests.engine.cli import READY, Cli, command, shapes

pytestmark = pytest.mark.engine

#: A process that asks sglang for the kernels of the task `shapes`, and says what its cache lacked.
JIT = (
    "import os, pathlib; c = pathlib.Path(os.environ['DG_JIT_CACHE_DIR'], 'cache'); n = len(list(c.iterdir()));"
    "from sglang.srt.layers.deep_gemm_wrapper import compile_utils as u;"
    "u._compile_deep_gemm_one_type_all(kernel_type=u.DeepGemmKernelType.GEMM_NT_F8F8BF16, n=4096, k=7168,"
    " num_groups=1, m_list=[64, 128]);"
    "print('ENTRIES', n, 'NEW', len(list(c.iterdir())) - n)"
)

#: A Python that lacks the libraries, and whose virtual environments have a pip that needs no index.
PLAYED = """#!/bin/bash
case "$1" in
  -I) exit 1 ;;
  -m) mkdir -p "$3/bin"; ln -s "$0" "$3/bin/pip"; ln -s "$0" "$3/bin/python" ;;
  install)
    echo "$*" > "$(dirname "$0")/asked"
    ;;
  *) exec {python} "$@" ;;
esac
"""


def runner(cli: Cli, event: str = "push", **variables: str) -> Runner:
    """On the host, where this test's Python has what the program needs. Only the action leads to the checkout."""
    environ = {name: value for name, value in cli.environ.items() if name != "PYTHONPATH"}
    environ["PATH"] = f"{Path(sys.executable).parent}:{environ['PATH']}"
    place = cli.place / f"runner-{event}-{len(list(cli.place.iterdir()))}"
    place.mkdir()
    return Runner(place, environ, event, variables)


def statuses(run: Runner) -> list[int | None]:
    """Of the action's four steps: program, run, variables, clean-up."""
    return [step.status for step in run.steps]


def test_action_warm_twice_second_is_warm(cli: Cli) -> None:
    cli.manifest(shapes("dense"), command("ready", READY))
    run = runner(cli)
    good, outputs = run.action(mode="warm", manifest=str(cli.path), budget="5m")
    assert good, run.log
    assert statuses(run) == [0, 0, 0, 0]
    assert outputs["state"] == "warm" and re.fullmatch("[0-9a-f]{16}", outputs["toolchain"])
    assert outputs["docker-args"].startswith(f"--mount type=bind,src={cli.root},dst=/jit,readonly ")
    assert "::group::[1/2] dense" in run.log and "::endgroup::" in run.log and "::error" not in run.log
    assert "| dense | ✅ warmed |" in run.summary and "| ready | ✅ warmed |" in run.summary
    again = runner(cli, "pull_request")
    good, outputs = again.action(mode="check", manifest=str(cli.path))
    assert good and outputs["state"] == "warm" and statuses(again) == [0, 0, 0, None]
    assert "::warning" not in again.log and "::error" not in again.log
    cli.left_nothing()


def test_action_check_cold_warns_pull_request_and_fails_push(cli: Cli) -> None:
    cli.manifest(shapes("dense"))
    cli.root.mkdir()
    run = runner(cli, "pull_request")
    good, outputs = run.action(mode="check", manifest=str(cli.path))
    assert good, run.log
    assert outputs["state"] == "cold" and statuses(run) == [0, 0, 0, None]
    # A pull request starts nothing on the runner, not even the probe's container.
    assert "::warning title=dense cold::no-memo" in run.log and "::error" not in run.log
    assert "| dense | 🟡 cold |" in run.summary
    assert outputs["docker-args"] == "", "where no probe has told what the job may write, it gets nothing"
    run = runner(cli)
    good, outputs = run.action(mode="check", manifest=str(cli.path))
    assert not good and outputs["state"] == "cold" and statuses(run) == [0, 10, None, None]
    assert "::error title=dense cold::no-marker" in run.log
    good, outputs = runner(cli).action(mode="check", manifest=str(cli.path), **{"on-cold": "warn"})
    assert good and outputs["state"] == "cold"
    assert outputs["docker-args"], "the job fills the cache that it did not find"
    cli.left_nothing()


def test_action_failed_task_is_named_and_cleaned_up(cli: Cli) -> None:
    cli.manifest(command("fails", "print('so near'); exit(3)"))
    run = runner(cli)
    good, outputs = run.action(mode="warm", manifest=str(cli.path))
    assert not good and outputs["state"] == "failed" and statuses(run) == [0, 11, None, 0]
    assert re.search(r"::error title=fails failed::exit status 3", run.log)
    assert "| fails | ❌ failed |" in run.summary
    run = runner(cli, "pull_request")
    good, outputs = run.action(mode="warm", manifest=str(cli.path))
    assert good and outputs["state"] == "failed", "a cold cache never fails a pull request"
    assert "::warning title=warm-cache::the cache is cold in part (status 11)" in run.log
    cli.left_nothing()


def test_action_sweeps_after_killed_builder(cli: Cli) -> None:
    """The run's lease ends its container; what is swept is the container that it could not remove."""
    cli.manifest(command("hangs", "print('HANGING', flush=True)\nimport time; time.sleep(60)"))
    started = cli.start("warm")
    started.says("HANGING")
    started.process.kill()
    started.process.wait()
    cli.manifest(command("fails", "exit(3)"))
    run = runner(cli)
    assert run.action(mode="warm", manifest=str(cli.path))[0] is False
    assert run.steps[-1].status == 0
    cli.left_nothing()


def test_action_wrong_input_is_annotation(cli: Cli) -> None:
    run = runner(cli)
    assert run.action(mode="chekc")[0] is False
    assert statuses(run) == [2, None, None, None] and "::error title=warm-cache::mode is one of" in run.log
    run = runner(cli)
    good, outputs = run.action(mode="warm")
    assert not good and outputs["state"] == "failed" and "which manifest?" in run.log
    assert statuses(run) == [0, 2, None, 0]


def test_action_without_libraries_installs_them_temporarily(cli: Cli) -> None:
    """The runner's own Python stays as it is: what is installed goes to RUNNER_TEMP. The index is played."""
    cli.manifest(command("ready", READY))
    cli.root.mkdir()
    python = cli.place / "python3"
    python.write_text(PLAYED.format(python=sys.executable))
    python.chmod(0o755)
    run = runner(cli)
    good, _ = run.action(mode="check", manifest=str(cli.path), python=str(python), **{"on-cold": "warn"})
    assert good, run.log
    asked = (run.temp / "warm-cache" / "venv" / "bin" / "asked").read_text()
    assert asked.split()[0] == "install" and "--require-hashes" in asked
    assert asked.split()[-1] == str(ACTION.parent / "requirements.txt")


def test_pre_test_workflow_on_host_warms(cli: Cli) -> None:
    """Warmed on a push; then the job's container finds every kernel, on a pull request too."""
    cli.manifest(shapes("dense", m_values=[64, 128]))
    names = {
        "WARM_CACHE_HOST": "h200-host",
        "WARM_CACHE_MANIFEST": str(cli.path),
        "WARM_CACHE_IMAGE": cli.image,
        "WARM_CACHE_GPUS": "none",
        "WARM_CACHE_TEST": f'python3 -c "{JIT}"',
    }
    for event in ("push", "pull_request"):
        run = runner(cli, event, **names)
        outputs = run.job("pre-test.yml", "host")
        assert outputs is not None and outputs["cache"]["state"] == "warm", run.log
        assert run.steps[-1].status == 0, run.log
        found = re.search(r"ENTRIES (\d+) NEW (\d+)", run.log)
        assert found and int(found[1]) > 0 and int(found[2]) == 0
    assert runner(cli).job("pre-test.yml", "host") is None, "no runner is named: the job is skipped"
    cli.left_nothing()


#: A Python whose program only writes down what it was asked for, and ends with this status.
ASKED = """#!/bin/bash
if [ "$1" = -c ] && [[ "$2" == *builder* ]]; then
  echo "${{@:4}}" >> {asked}
  [ "$4" != refresh ] || exit {status}
  exit 0
fi
exec {python} "$@"
"""


@pytest.mark.parametrize(("status", "good"), [(0, True), (17, True), (11, False)])
def test_nightly_workflow_calls_refresh(tmp_path: Path, status: int, good: bool) -> None:
    """What the workflow says to the program, and makes of its answers."""
    asked = tmp_path / "asked"
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python3"
    python.write_text(ASKED.format(asked=asked, status=status, python=sys.executable))
    python.chmod(0o755)
    environ = {"PATH": f"{python.parent}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    run = Runner(tmp_path, environ, "schedule", {"WARM_CACHE_HOST": "h200-host"})
    assert run.job("nightly-refresh.yml", "refresh") is not None
    assert asked.read_text().splitlines() == [
        "refresh --profile h200 --budget 100m --when-idle 10m",
        "sweep --profile h200",
    ], run.log
    assert statuses(run) == [0, 0 if good else status, None, 0]
    assert ("::warning title=warm-cache::put off" in run.log) == (status == 17)


def test_action_tasks_by_line_or_comma(tmp_path: Path) -> None:
    """None is lost: a step that looked at the first alone would be green for all."""
    asked, python = tmp_path / "asked", tmp_path / "python3"
    python.write_text(ASKED.format(asked=asked, status=0, python=sys.executable))
    python.chmod(0o755)
    run = Runner(tmp_path, {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}, "push", {})
    only = 'DeepSeek-V3.2, $(touch pwned),\n\n  *\'s "tp8"\n-x\n'
    run.action(mode="check", profile="h200", python=str(python), only=only)
    first = asked.read_text().splitlines()[0]
    names = '--only DeepSeek-V3.2 --only $(touch pwned) --only *\'s "tp8" --only -x'
    assert first == f"check --profile h200 {names} --on-cold fail", run.log
    assert not list(tmp_path.rglob("pwned"))


def test_nightly_workflow_refresh_warms(cli: Cli) -> None:
    """There is no registry here, which is a warning: the image that is there is warmed."""
    cli.manifest(shapes("dense", m_values=[64]))
    run = runner(cli, "schedule", WARM_CACHE_HOST="h200-host", WARM_CACHE_MANIFEST=str(cli.path))
    assert run.job("nightly-refresh.yml", "refresh") is not None
    assert statuses(run) == [0, 0, None, 0], run.log
    assert "warm-cache refresh: warm" in run.summary and "| dense | ✅ warmed |" in run.summary
    cli.left_nothing()
