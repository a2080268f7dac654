"""Credentials from where `docker login` keeps them: the file, its helpers, and both in any state."""

from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path

import psutil
import pytest

from builder.errors import RegistryRefusedError
from builder.host.deadlines import Deadline
from builder.registry.client import RegistryClient
from builder.registry.credentials import Credentials, find
from tests.registries import StandIn
from tests.registry.test_client import log_in


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The program docker-credential-test on PATH, whose shell script tests write."""
    folder = tmp_path / "bin"
    folder.mkdir()
    path = folder / "docker-credential-test"
    path.write_text("#!/bin/sh\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return path


def configure(folder: Path, **config: object) -> None:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def test_no_login_is_none(docker_config: Path) -> None:
    assert find("r.example") is None
    configure(docker_config, HttpHeaders={"X": "y"})
    assert find("r.example") is None
    configure(docker_config, auths={"r.example": {}})
    assert find("r.example") is None


def test_login_in_the_file(docker_config: Path) -> None:
    log_in(docker_config, "https://r.example/v2/", "me", "s3cret:with:colons")
    assert find("r.example") == Credentials("me", "s3cret:with:colons")
    assert find("other.example") is None
    assert "s3cret" not in repr(find("r.example"))
    configure(docker_config, auths={"r.example": {"identitytoken": "t0ken", "auth": ""}})
    assert find("r.example") == Credentials(identity_token="t0ken")


def test_file_behind_a_link_and_one_that_is_none(docker_config: Path) -> None:
    log_in(docker_config, "r.example", "me", "s3cret")
    (docker_config / "config.json").rename(docker_config / "..data")
    (docker_config / "config.json").symlink_to("..data")
    assert find("r.example") == Credentials("me", "s3cret")
    (docker_config / "config.json").unlink()
    os.mkfifo(docker_config / "config.json")
    with pytest.raises(RegistryRefusedError, match=r"config.json is not a regular file"):
        find("r.example")


def test_login_of_docker_hub_has_its_old_name(docker_config: Path) -> None:
    log_in(docker_config, "https://index.docker.io/v1/", "me", "s3cret")
    assert find("docker.io") == Credentials("me", "s3cret")


@pytest.mark.parametrize("section", [{"credsStore": "test"}, {"credHelpers": {"r.example:5000": "test"}}])
def test_login_of_a_helper(docker_config: Path, helper: Path, section: dict[str, object]) -> None:
    answer = r'{"Username":"%s","Secret":"s3cret"}'
    helper.write_text(f"#!/bin/sh\n[ $1 = get ] && printf '{answer}' $(cat)\n", encoding="utf-8")
    configure(docker_config, auths={"r.example:5000": {}}, **section)
    assert find("r.example:5000") == Credentials("r.example:5000", "s3cret")


def test_helper_gives_a_token_or_nothing(docker_config: Path, helper: Path) -> None:
    configure(docker_config, credsStore="test")
    helper.write_text('#!/bin/sh\necho \'{"Username":"<token>","Secret":"t0ken"}\'\n', encoding="utf-8")
    assert find("r.example") == Credentials(identity_token="t0ken")
    helper.write_text("#!/bin/sh\necho credentials not found in native keychain\nexit 1\n", encoding="utf-8")
    assert find("r.example") is None


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo locked; exit 3", r"failed for r.example \(exit status 3\): locked"),
        ("echo '[]'", "gave no Username and Secret"),
        ('echo \'{"Username": 7, "Secret": "s3cret"}\'', "gave no Username and Secret"),
        ("head -c 3000000 /dev/zero", "gave no Username and Secret"),
    ],
)
def test_helper_that_fails_is_named(docker_config: Path, helper: Path, script: str, said: str) -> None:
    configure(docker_config, credsStore="test")
    helper.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    with pytest.raises(RegistryRefusedError, match=rf"docker-credential-test {said}") as error:
        find("r.example")
    assert "s3cret" not in error.value.message


def test_helper_that_hangs_is_ended_with_what_it_started(docker_config: Path, helper: Path) -> None:
    configure(docker_config, credsStore="test")
    helper.write_text("#!/bin/sh\nsleep 987.5 &\nexec sleep 987.5\n", encoding="utf-8")
    started = time.monotonic()
    with pytest.raises(RegistryRefusedError, match=r"docker-credential-test gave no credentials for r.example within"):
        find("r.example", timeout=0.3)
    assert time.monotonic() - started < 5
    left = [each for each in psutil.process_iter(["cmdline"]) if each.info["cmdline"] == ["sleep", "987.5"]]
    assert [each for each in left if each.status() != psutil.STATUS_ZOMBIE] == []


def test_helper_has_no_longer_than_the_deadline(docker_config: Path, helper: Path, registry_tls: StandIn) -> None:
    configure(docker_config, credsStore="test")
    helper.write_text("#!/bin/sh\nexec sleep 987.5\n", encoding="utf-8")
    reference, ca_file = registry_tls.reference("credentials/late"), registry_tls.ca_file
    started = time.monotonic()
    client = RegistryClient(reference, ca_file=ca_file, deadline=Deadline(2))
    with client, pytest.raises(RegistryRefusedError, match="gave no credentials"):
        client.tags()
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("name", ["none-of-this-name", "../evil", "a b"])
def test_helper_that_is_not_there(docker_config: Path, name: str) -> None:
    configure(docker_config, credsStore=name)
    with pytest.raises(
        RegistryRefusedError, match=r"config.json names the credential helper .* no program docker-cred"
    ):
        find("r.example")


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", "[" * 100_000, '{"auths": {"r.example": 7}}', '{"auths": {"r.example": {"auth": "czNjcmV0"}}}'),
        *('{"auths": [7]}', '{"auths": {"r.example": {"auth": 7}}}', '{"credsStore": 7}', '{"credHelpers": "x"}'),
    ],
)
def test_file_that_is_broken_is_one_error_without_its_content(docker_config: Path, text: str) -> None:
    (docker_config / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(RegistryRefusedError, match=r"config.json (is no|does not have)") as error:
        find("r.example")
    assert "s3cret" not in error.value.message
    assert "czNjcmV0" not in error.value.message
