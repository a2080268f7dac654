"""What `fleet kubernetes` prints: valid for each Kubernetes, restricted where it restores, and each value checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from builder.cli import main as cli
from tests.unit.fleet.pod_security import baseline_violations, container_violations, pod_violations

VERSIONS = [f"1.{minor}" for minor in range(29, 38)]
DIGEST = "sha256:" + "a1" * 32
MANIFEST = f"""
schema = 1
[image]
ref = "lmsysorg/sglang@{DIGEST}"
[cache]
root = "/data/jit"
[models]
store = "/data/hf"
[gpus]
count = 8
[run]
budget = "50m"
[[task]]
model = "org/one"
recipe = "command"
argv = ["true"]
success = "x"
"""
KEY = "-----BEGIN PUBLIC KEY-----\nMFkw\n-----END PUBLIC KEY-----\n"
EVERYTHING = (
    *("--namespace", "ci", "--queue", "gpu-queue", "--node-selector", "nvidia.com/gpu.product=NVIDIA-H200"),
    *("--toleration", "nvidia.com/gpu:NoSchedule", "--toleration", "dedicated=ci", "--registry-secret", "logins"),
    *("--env-secret", "hf", "--max-unavailable", "20%", "--schedule", "0 3 * * mon-fri", "--user", "1000"),
    *("--name", "h200", "--deadline", "30s", "--jitter", "2m"),
)

Object = dict[str, Any]
Print = Callable[..., dict[str, Object]]


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "manifest.toml"
    path.write_text(MANIFEST)
    return path


@pytest.fixture
def fleet(manifest: Path, capsys: pytest.CaptureFixture[str]) -> Print:
    """``fleet(option, …)``: the printed objects, by kind."""

    def printed(*options: str) -> dict[str, Object]:
        words = ["fleet", "kubernetes", "registry.example/jit", "--manifest", str(manifest)]
        assert cli.main([*words, "--builder-image", "registry.example/builder:1", *options], environ={}) == 0
        listed = json.loads(capsys.readouterr().out)
        assert (listed["apiVersion"], listed["kind"]) == ("v1", "List")
        return {each["kind"]: each for each in listed["items"]}

    return printed


@pytest.fixture
def refused(manifest: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def said(*options: str) -> str:
        assert cli.main(["fleet", "kubernetes", *options], environ={}) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err

    return said


def template(item: Object) -> Object:
    """The pod of an object."""
    spec: Object = item["spec"]
    spec = spec["jobTemplate"]["spec"] if item["kind"] == "CronJob" else spec
    found: Object = spec["template"]["spec"] if "template" in spec else spec
    return found


def containers(item: Object) -> dict[str, Object]:
    pod = template(item)
    return {each["name"]: each for each in chain(pod.get("initContainers", []), pod["containers"])}


def pods(items: dict[str, Object]) -> Iterator[Object]:
    return (template(each) for each in items.values() if each["kind"] != "ConfigMap")


TARGETS = (("hostpath",), ("pvc", "--claim", "jit"), ("emptydir",))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target[0])
@pytest.mark.parametrize("more", [(), EVERYTHING], ids=["least", "everything"])
def test_objects_are_valid_for_every_kubernetes(
    fleet: Print, tmp_path: Path, target: tuple[str, ...], more: tuple[str, ...]
) -> None:
    (tmp_path / "key.pem").write_text(KEY)
    items = fleet("--target", *target, *more, "--key", str(tmp_path / "key.pem"))
    kinds = {"hostpath": {"DaemonSet"}, "pvc": {"Job"}, "emptydir": set[str]()}[target[0]]
    assert set(items) == {"ConfigMap", "CronJob" if more else "Job", "Pod"} | kinds
    for version in VERSIONS:
        for item in items.values():
            kubernetes_validate.validate(item, version, strict=True)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target[0])
def test_restoring_container_is_restricted(fleet: Print, target: tuple[str, ...]) -> None:
    found = 0
    printed = [fleet("--target", *target, "--part", part) for part in ("warm", "restore,check")]
    for item in chain(*(each.values() for each in printed)):
        if item["kind"] == "ConfigMap":
            continue
        pod, its = template(item), containers(item)
        if "restore" in its:
            found += 1
            assert list(container_violations(pod, its["restore"])) == []
            assert its["restore"]["securityContext"]["readOnlyRootFilesystem"] is True
    assert found == 2, "the job that warms restores, and so do the nodes or the pod that uses the cache"


@pytest.mark.parametrize(
    ("target", "violations"), [(TARGETS[0], {"volume type hostPath"}), (TARGETS[1], set()), (TARGETS[2], set())]
)
def test_pods_that_restore_or_use_the_cache_are_restricted_but_for_directories_of_nodes(
    fleet: Print, target: tuple[str, ...], violations: set[str]
) -> None:
    parts = fleet("--target", *target, "--part", "restore,check", "--models-claim", "hf")
    for item in parts.values():
        if item["kind"] != "ConfigMap":
            pod = template(item)
            assert set(pod_violations(pod)) == violations, item["kind"]
            assert [each for name in containers(item).values() for each in container_violations(pod, name)] == []


def test_pod_that_warms_keeps_to_the_baseline(fleet: Print) -> None:
    job = fleet("--part", "warm", "--models-claim", "hf")["Job"]
    pod, its = template(job), containers(job)
    assert list(pod_violations(pod)) == []
    assert [each for container in its.values() for each in baseline_violations(pod, container)] == []
    assert list(its) == ["program", "restore", "warm", "push"]


def test_warm_job_has_deadline_statuses_and_pinned_image(fleet: Print) -> None:
    items = fleet()
    spec, its = items["Job"]["spec"], containers(items["Job"])
    assert spec["activeDeadlineSeconds"] == 50 * 60
    assert spec["ttlSecondsAfterFinished"] > 0
    rules = [(rule["action"], rule.get("onExitCodes", {}).get("values")) for rule in spec["podFailurePolicy"]["rules"]]
    assert rules == [("FailJob", [2, 12]), ("Ignore", [15, 17]), ("Ignore", None)]
    pod = template(items["Job"])
    assert (pod["restartPolicy"], pod["enableServiceLinks"]) == ("Never", False)
    assert all(each["terminationGracePeriodSeconds"] >= 10 for each in pods(items))
    warm = its["warm"]
    assert warm["image"] == f"lmsysorg/sglang@{DIGEST}"
    assert {"name": "WARM_CACHE_IMAGE_ID", "value": DIGEST} in warm["env"]
    assert warm["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    budget = warm["args"][warm["args"].index("--budget") + 1]
    assert 0 < int(budget[:-1]) < 50 * 60, "the run ends by itself ahead of the job"
    assert items["ConfigMap"]["data"] == {"manifest.toml": MANIFEST}
    assert "--jitter" not in its["restore"]["command"], "no other pod begins with it, and it has the GPUs"


def test_daemonset_pulls_verified_and_never_warms(fleet: Print, tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_text(KEY)
    items = fleet("--key", str(tmp_path / "key.pem"), *EVERYTHING)
    restore = items["DaemonSet"]
    words = containers(restore)["restore"]["command"]
    assert words[:3] == ["warm-cache", "pull", "registry.example/jit"]
    assert words[words.index("--fail-open") :][:5] == ["--fail-open", "--deadline", "30s", "--jitter", "120s"]
    assert words[-1] == "/etc/warm-cache-files/cache-key.pem"
    assert items["ConfigMap"]["data"]["cache-key.pem"] == KEY
    assert restore["spec"]["updateStrategy"]["rollingUpdate"] == {"maxUnavailable": "20%"}
    assert not any("nvidia.com/gpu" in str(each.get("resources")) for each in containers(restore).values())
    assert not any("warm" in each["command"] for each in containers(restore).values())
    assert template(restore)["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
        {"key": "dedicated", "operator": "Equal", "value": "ci"},
    ]
    assert template(restore)["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H200"}
    volumes = {volume["name"]: volume for volume in template(restore)["volumes"]}
    assert volumes["cache"]["hostPath"] == {"path": "/data/jit", "type": "Directory"}


def test_secrets_are_references(fleet: Print) -> None:
    items = fleet(*EVERYTHING)
    its = containers(items["CronJob"])
    assert its["warm"]["envFrom"] == [{"secretRef": {"name": "hf"}}]
    assert "envFrom" not in its["push"] and "envFrom" not in its["restore"]
    pod = template(items["CronJob"])
    assert pod["imagePullSecrets"] == [{"name": "logins"}]
    secret = next(volume["secret"] for volume in pod["volumes"] if volume["name"] == "registry")
    assert secret["secretName"] == "logins" and secret["items"][0]["path"] == "config.json"
    assert not any(mount["name"] == "registry" for mount in its["warm"]["volumeMounts"])


def test_kueue_gets_its_label_on_the_job_and_starts_it(fleet: Print) -> None:
    for schedule in ((), ("--schedule", "@daily")):
        item = fleet("--queue", "gpu", *schedule)["CronJob" if schedule else "Job"]
        job = item["spec"]["jobTemplate"] if schedule else item
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpu"
        assert job["spec"]["suspend"] is True


def test_changed_files_change_the_pods(fleet: Print, manifest: Path) -> None:
    def annotation() -> str:
        found = fleet()["DaemonSet"]["spec"]["template"]["metadata"]["annotations"]
        return str(found["io.sglang.warm-cache/files"])

    before = annotation()
    assert annotation() == before
    manifest.write_text(MANIFEST + "# changed\n")
    assert annotation() != before


def test_jobs_use_a_copy_and_never_the_node_s_directory(fleet: Print) -> None:
    pod = fleet()["Pod"]
    its, volumes = containers(pod), {volume["name"]: volume for volume in template(pod)["volumes"]}
    assert volumes["cache"] == {"name": "cache", "emptyDir": {}}
    source = next(mount for mount in its["copy"]["volumeMounts"] if mount["name"] == "source")
    assert source["readOnly"] is True
    assert not any(mount["name"] == "source" for mount in its["sglang"]["volumeMounts"])
    assert "image" not in {kind for volume in volumes.values() for kind in volume}


def test_every_wrong_value_is_named_at_once(refused: Callable[..., str], tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    key.write_text("-----BEGIN EC PRIVATE KEY-----\n")
    said = refused(
        *("r.example/UPPER", "--profile", "h200", "--key", str(key), "--target", "hostpaht", "--user", "0"),
        *("--name", "Upper", "--namespace", "a_b", "--queue", "a b", "--schedule", "61 * * * *", "--claim", "x"),
        *("--node-selector", "gpu", "--toleration", "a:Never", "--max-unavailable", "0%", "--deadline", "0"),
        *("--registry-secret", "A", "--env-secret", "-", "--models-claim", ".", "--jitter", "soon"),
        *("--part", "warm,chekc"),
    )
    for option in (
        *("REF", "--builder-image", "--image", "--key", "--target", "--user", "--name", "--namespace", "--queue"),
        *("--schedule", "--claim", "--node-selector", "--toleration", "--max-unavailable", "--deadline", "--jitter"),
        *("--registry-secret", "--env-secret", "--models-claim", "--part"),
    ):
        assert f"\n  {option} " in said, option
    assert "did you mean 'hostpath'?" in said and "did you mean 'check'?" in said
    assert "'61' is no minute (0 to 59)" in said
    assert "is a private key" in said and "Exit 2." in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "fleet kubernetes needs a REF: the cache image, with its registry"),
        (("a.example/b", "c"), "fleet kubernetes takes no argument 'c'"),
        (("a.example/b", "--target", "pvc"), "--target pvc restores into a claim: pass --claim NAME"),
        (("a.example/b", "--cache", "volume:jit"), "restores into a directory of the nodes: pass --cache DIR"),
        (("a.example/b", "--budget", "0"), "--budget"),
    ],
)
def test_what_is_missing_is_named(
    refused: Callable[..., str], manifest: Path, options: tuple[str, ...], said: str
) -> None:
    words = [*options, "--manifest", str(manifest), "--builder-image", "b:1"]
    assert said.replace("  ", " ") in " ".join(refused(*words).split())


def test_setup_of_the_image_and_a_run_without_limit_are_refused(refused: Callable[..., str], manifest: Path) -> None:
    text = MANIFEST.replace('budget = "50m"', "").replace("[cache]", 'setup = ["true"]\n[cache]')
    manifest.write_text(text)
    said = refused("a.example/b", "--manifest", str(manifest), "--builder-image", "b:1")
    assert "[image] setup is run in a container that an engine builds" in said
    assert "a job without a limit would hold its GPUs for ever" in said
