"""The host's policy: what a manifest may not widen, and which file is one."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from builder.errors import UsageError
from builder.manifest import load, policy
from builder.manifest.fields import Overrides

MANIFEST = """\
schema = 1
[image]
ref = "lmsysorg/sglang:v0.5.23"
setup = ["pip install x"]
[cache]
root = "{root}"
[models]
store = "{store}"
writable = true
[container]
network = "host"
secrets = ["HF_TOKEN", "CI_DEPLOY_KEY"]
[gpus]
acquire = ["drain-runner"]
release = ["undrain-runner", "curl evil"]
[refresh]
metrics = "/etc/passwd"
[[task]]
model = "org/m"
"""
POLICY = """\
schema = 1
[image]
allowed = ["lmsysorg/sglang:v*"]
setup = ["pip install x"]
[cache]
roots = ["{allowed}"]
shared = ["{allowed}/shared", "volume:ci-*"]
[models]
stores = ["{allowed}"]
writable = ["{allowed}"]
[container]
networks = ["host"]
secrets = ["HF_*", "CI_DEPLOY_KEY"]
[gpus]
hooks = ["drain-runner", "undrain-runner", "curl evil"]
[refresh]
metrics = ["/etc"]
"""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with an empty directory, whose policy tests write."""
    monkeypatch.setattr(policy, "PATH", tmp_path / "policy.toml")
    monkeypatch.setattr(policy, "OWNER", os.getuid())
    (tmp_path / "allowed").mkdir()
    return tmp_path


def write_policy(host: Path, *changes: tuple[str, str]) -> None:
    text = POLICY.format(allowed=host / "allowed")
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    policy.PATH.write_text(text)


def write(host: Path, root: str = "", store: str = "", text: str = MANIFEST) -> Path:
    path = host / "m.toml"
    path.write_text(text.format(root=root or host / "allowed" / "jit", store=store or host / "allowed" / "hf"))
    return path


def refused(path: Path, overrides: Overrides = Overrides()) -> list[str]:
    with pytest.raises(UsageError) as caught:
        load.load(path, overrides=overrides)
    assert caught.value.exit_code == 2
    return [str(problem).replace(f"{path.parent}/", "") for problem in caught.value.problems]


def test_policy_missing_anything_is_allowed(host: Path) -> None:
    assert load.load(write(host)).container.network == "host"


def test_policy_allowing_everything_asked_changes_nothing(host: Path) -> None:
    before = load.load(write(host))
    write_policy(host)
    assert load.load(write(host)) == before


@pytest.mark.attack(
    "an image, setup, root, store, network, secret, hook or metrics path that the host's policy does not list",
    by="manifest",
    holds="2: each of them is refused at its line, with that of the policy, and nothing is asked of the engine",
)
def test_policy_refuses_every_field_at_once_with_both_lines(host: Path) -> None:
    policy.PATH.write_text("schema = 1\n[image]\n[cache]\nroots = []\n")
    lines = refused(write(host))
    fields = ["image] ref", "image] setup", "cache] root", "models] store", "models] writable", "container] network"]
    fields += ["container] secrets", "container] secrets", "gpus] acquire", "gpus] release", "gpus] release"]
    fields += ["refresh] metrics"]
    assert [field in line for field, line in zip(fields, lines, strict=True)] == [True] * len(fields), lines
    assert lines[0].startswith("m.toml:3: [image] ref is 'lmsysorg/sglang:v0.5.23', which this host does not allow:")
    assert "policy.toml:2 allows nothing ([image] allowed)" in lines[0]
    assert lines[2].startswith("m.toml:6: ") and "policy.toml:4 allows nothing ([cache] roots)" in lines[2]


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('"lmsysorg/sglang:v*"', '"*@sha256:*"', "[image] ref"),
        ('["pip install x"]', '["pip install *"]', "[image] setup"),
        ('networks = ["host"]', 'networks = ["none", "bridge"]', "'none', 'bridge' ([container] networks)"),
        (', "CI_DEPLOY_KEY"]', "]", "[container] secrets is 'CI_DEPLOY_KEY'"),
        (', "curl evil"]', "]", "[gpus] release is 'curl evil'"),
        ('metrics = ["/etc"]', 'metrics = ["/var/lib/node_exporter"]', "[refresh] metrics"),
    ],
)
def test_policy_lacking_one_value_refuses_that_alone(host: Path, before: str, after: str, said: str) -> None:
    write_policy(host, (before, after))
    (line,) = refused(write(host))
    assert said in line


@pytest.mark.attack(
    "a root or store that leads out of the allowed directories by `..` or a link",
    by="manifest",
    holds="2: paths are compared after all links",
)
def test_policy_path_leading_elsewhere_is_refused(host: Path) -> None:
    write_policy(host)
    (host / "allowed" / "link").symlink_to("/etc")
    lines = refused(write(host, f"{host}/allowed/link", f"{host}/allowed/../victim"))
    assert ["cache] root" in lines[0], "models] store" in lines[1], "models] writable" in lines[2]] == [True] * 3
    assert len(refused(write(host, f"{host}/allowed-not", f"{host}/allowed/hf"))) == 1


def test_policy_allowed_directory_may_itself_be_a_link(host: Path) -> None:
    (host / "disk").mkdir()
    (host / "data").symlink_to(host / "disk")
    write_policy(host, (f'roots = ["{host}/allowed"]', f'roots = ["{host}/data"]'))
    for root in (host / "disk" / "jit", host / "data" / "jit"):
        assert load.load(write(host, str(root))).cache.root == root


def test_policy_holds_for_options_too(host: Path) -> None:
    write_policy(host)
    asked = Overrides(image="evil:1", cache="volume:other", models="/")
    lines = refused(write(host), asked)
    assert [line.partition(":")[0] for line in lines] == ["m.toml", "--image", "--cache", "--models"]
    with pytest.raises(UsageError, match="--cache"):
        load.cache_of("/etc")
    assert load.cache_of(f"{host}/allowed/jit").root == host / "allowed" / "jit"


def test_policy_asks_for_no_cache_where_none_is_used(host: Path) -> None:
    write_policy(host)
    table = re.compile(r"\[cache\]\n(?:[a-z_]+ = .*\n)*")
    assert table.search(MANIFEST)
    without = write(host, text=table.sub("", MANIFEST))
    assert any("there is no cache" in line for line in refused(without))
    assert load.load(without, overrides=Overrides(needs_cache=False)).cache.volume is None


def test_policy_drops_default_secrets_that_it_does_not_list(host: Path) -> None:
    write_policy(host, ('secrets = ["HF_*", "CI_DEPLOY_KEY"]', "secrets = []"))
    text = MANIFEST.replace('secrets = ["HF_TOKEN", "CI_DEPLOY_KEY"]\n', "")
    assert load.load(write(host, text=text)).container.secrets == ()


def test_policy_names_roots_that_jobs_share(host: Path) -> None:
    write_policy(host)
    rules = policy.current()
    assert rules is not None
    assert rules.shares(host / "allowed" / "shared" / "jit") and not rules.shares(host / "allowed" / "jit")
    assert rules.shares(None, "ci-jit") and not rules.shares(None, "release-jit")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("schema = ", "policy.toml:1"),
        ("schema = 2\n", "schema 2 is not known"),
        ("schema = 1\n[cahce]\nroots = []\n", "did you mean 'cache'"),
        ("schema = 1\n[cache]\nroot = []\n", "did you mean 'roots'"),
        ('schema = 1\n[cache]\nroots = ["data"]\n', "expected absolute paths, found 'data'"),
        ("schema = 1\n[image]\nallowed = 7\n", "allowed: expected a list of texts"),
        ("x" * (1 << 20) + "x", "has more than"),
    ],
)
def test_policy_broken_refuses_everything_in_one_sentence(host: Path, text: str, said: str) -> None:
    policy.PATH.write_text(text)
    with pytest.raises(UsageError) as caught:
        policy.current()
    assert said in caught.value.message and caught.value.message.endswith(
        "Nothing is done until root mends or removes it."
    )
    assert not caught.value.problems and "\n" not in caught.value.message


@pytest.mark.attack(
    "the policy, or a directory above it, is another user's or can be written by others, or is a link or a pipe",
    by="other user",
    holds="2: every verb refuses, in one sentence",
)
@pytest.mark.parametrize("kind", ["writable", "foreign", "folder", "link", "pipe", "directory", "not ours"])
def test_policy_that_others_could_have_written_is_refused(
    host: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    write_policy(host)
    if kind == "writable":
        policy.PATH.chmod(0o664)
    elif kind == "folder":
        host.chmod(0o777)
    elif kind in ("foreign", "not ours"):
        if os.getuid() != 0:
            monkeypatch.setattr(policy, "OWNER", os.getuid() + 1)
        else:
            os.chown(policy.PATH if kind == "foreign" else host, 65534, 65534)
    else:
        policy.PATH.rename(host / "real")
        if kind == "link":
            policy.PATH.symlink_to("real")
        elif kind == "pipe":
            os.mkfifo(policy.PATH)
        else:
            policy.PATH.mkdir()
    with pytest.raises(UsageError, match="the policy of this host") as caught:
        load.load(write(host))
    assert "\n" not in caught.value.message


@pytest.mark.attack(
    "the policy is gone from a directory that others can write to, or that is a link to nowhere",
    by="other user",
    holds="2: that is not taken for a host without a policy",
)
@pytest.mark.parametrize("kind", ["writable", "dangling"])
def test_policy_missing_where_others_could_have_removed_it_is_refused(host: Path, kind: str) -> None:
    if kind == "writable":
        host.chmod(0o777)
    else:
        host.rename(host.with_name("elsewhere"))
        host.symlink_to("nowhere")
    with pytest.raises(UsageError, match="the policy of this host"):
        policy.current()
