"""The plan: tasks against markers, in the manifest's order, and the environments to probe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from builder.cache import marker_writing
from builder.cache.build_proofs import ProofWanted
from builder.cache.families import FAMILIES
from builder.cache.marker_format import Observed
from builder.cache.toolchain import Record
from builder.run.plan import Item, make_plan, probe_env
from builder.task import Task

COMMAND = Task(label="command", model="org/command", recipe="command", argv=("true",), families=())
SERVER = Task(label="model-tp8", model="org/model", recipe="compile-deep-gemm", argv=("--tp", "8"))


def record(**factors: str | None) -> Record:
    names = {factor for family in FAMILIES for factor in family.factors}
    return {
        "schema": 2,
        "factors": {**{name: f"{name} 1" for name in names}, "mount": "/jit", **factors},
        "gpus": [],
        "sglang": {"version": "0.5.23", "commit": "abc", "sources": None},
        "variables": {},
        "observed": {"driver": None, "python": "3.12.3", "problems": []},
    }


def publish(root: Path, task: Task, **more: Any) -> None:
    known: dict[str, Any] = {"claims": [], "entries": {}, "proof": "nothing-claimed", "second_pass_added": None}
    marker = marker_writing.build(
        task, record=record(), config_digest=None, shapes=[], observed=Observed(), **{**known, **more}
    )
    marker_writing.publish(root, marker)


def only(tasks: tuple[Task, ...], root: Path, **options: Any) -> tuple[Item, ...]:
    records = {probe_env(task): record() for task in tasks}
    return make_plan(tasks, records, root=root, **{"store": None, **options}).items


def test_probe_env_has_only_variables_that_change_a_probe() -> None:
    env = {"SGLANG_X": "1", "PATH": "/bin", "CUDA_HOME": "/cuda", "TINY_PLAY": "exit-3"}
    task = Task(label="a", model="a", recipe="command", env=env)
    assert probe_env(task) == (("CUDA_HOME", "/cuda"), ("PATH", "/bin"))
    assert probe_env(COMMAND) == ()


def test_plan_keeps_the_manifests_order(tmp_path: Path) -> None:
    other = Task(label="other", model="org/other", recipe="command", argv=("false",), families=())
    publish(tmp_path, COMMAND)
    plan = make_plan((other, COMMAND), {(): record()}, root=tmp_path, store=None)
    assert [item.warm for item in plan.items] == [False, True]
    assert [item.task.label for item in plan.cold] == ["other"]
    assert [item.judgement.reason for item in plan.items] == ["no-marker", ""]


def test_task_is_judged_by_the_record_of_its_environment(tmp_path: Path) -> None:
    moved = Task(label="moved", model="org/moved", recipe="command", env={"CUDA_HOME": "/other"}, families=("triton",))
    plain = Task(label="plain", model="org/plain", recipe="command", families=("triton",))
    records = {(): record(), (("CUDA_HOME", "/other"),): record(triton="another")}
    first, second = make_plan((plain, moved), records, root=tmp_path, store=None).items
    assert first.record["factors"]["triton"] == "triton 1"
    assert second.record["factors"]["triton"] == "another"


def test_key_changes_with_coverage_only(tmp_path: Path) -> None:
    changed = Task(label="command", model="org/command", recipe="command", argv=("false",), families=())
    later = Task(label="command", model="org/command", recipe="command", argv=("true",), families=(), timeout=5.0)
    keys = [item.key for item in only((COMMAND, changed, later), tmp_path)]
    assert keys[0] == keys[2] != keys[1]
    publish(tmp_path, COMMAND)
    assert (tmp_path / "markers" / f"command-{keys[0]}").is_dir()


def test_digest_is_of_the_first_tasks_toolchain(tmp_path: Path) -> None:
    assert make_plan((), {}, root=tmp_path, store=None).digest == ""
    one = make_plan((COMMAND,), {(): record()}, root=tmp_path, store=None)
    other = make_plan((COMMAND,), {(): record(triton="another")}, root=tmp_path, store=None)
    assert len(one.digest) == 16
    assert one.digest != other.digest


def test_model_without_a_store_is_a_problem_of_its_task(tmp_path: Path) -> None:
    server, command = only((SERVER, COMMAND), tmp_path)
    assert server.config_problem == "no model store: set [models] store"
    assert command.config_problem is None


def test_model_missing_in_the_store_is_a_problem(tmp_path: Path) -> None:
    (item,) = only((SERVER,), tmp_path, store=tmp_path / "store")
    assert item.config_problem is not None
    assert "org/model is not in the store" in item.config_problem


def test_model_in_the_image_needs_no_store(tmp_path: Path) -> None:
    task = Task(label="m", model="/opt/model", recipe="serve")
    (item,) = only((task,), tmp_path)
    assert item.config_problem is None


def test_model_in_the_store_is_identified_by_its_config(tmp_path: Path) -> None:
    home = tmp_path / "store" / "hub" / "models--org--model"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc")
    (home / "snapshots" / "abc").mkdir(parents=True)
    config = home / "snapshots" / "abc" / "config.json"
    config.write_text("{}")
    (item,) = only((SERVER,), tmp_path, store=tmp_path / "store")
    config.write_text('{"layers": 1}')
    (changed,) = only((SERVER,), tmp_path, store=tmp_path / "store")
    assert item.config_problem is None
    assert item.config_digest is not None
    assert item.key != changed.key


def test_strict_judges_weaker_proof_cold(tmp_path: Path) -> None:
    publish(tmp_path, COMMAND)
    assert only((COMMAND,), tmp_path)[0].warm
    (item,) = only((COMMAND,), tmp_path, wanted=ProofWanted(strict=True))
    assert (item.warm, item.judgement.reason) == (False, "unverified")
