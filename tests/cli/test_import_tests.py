"""`import-tests --here`, on a checkout of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from builder.cli.main import main
from tests.checkout import Checkout

SUITE = "base-c-test-8-gpu-h200"
ONE = """
class TestOne(CustomTestCase):
    def test_it(self):
        popen_launch_server("org/one", DEFAULT_URL_FOR_TEST, 9, other_args=["--tp", "8", "--nccl-port", "11"])
"""
ENCODER = """
    def test_encoder(self):
        popen_launch_server("org/one", DEFAULT_URL_FOR_TEST, 9, other_args=["--encoder-only"])
"""
MORE = """
    def test_more(self):
        [][0]
        popen_launch_server("org/more", DEFAULT_URL_FOR_TEST, 9)
"""
MANIFEST = """\
schema = 1
[image]
ref = "tiny:1"
[cache]
root = "/data/cache"
[gpus]
count = 8
[defaults]
recipe = "serve"

[[task]]
model = "org/one"
argv = ["--tp", "8"]

[[task]]
model = "org/stale"
"""


class Verb:
    """Runs the verb in this process; the recorder is a child of it."""

    def __init__(self, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.checkout = Checkout(place / "co")
        self.manifest = place / "warm.toml"
        self.manifest.write_text(MANIFEST)
        self._environ = {"HOME": str(place), "PATH": "/usr/bin:/bin", "TMPDIR": str(place)}
        self._capsys = capsys

    def __call__(self, *argv: object, paths: tuple[str, ...] = ("test/registered",)) -> tuple[int, dict[str, Any]]:
        status, out = self.shown("--json", *argv, paths=paths)
        return status, json.loads(out)

    def shown(self, *argv: object, paths: tuple[str, ...] = ("test/registered",)) -> tuple[int, str]:
        found = [str(self.checkout.root / path) for path in paths]
        status = main(["import-tests", *found, "--here", *map(str, argv)], environ=self._environ)
        return status, self._capsys.readouterr().out


@pytest.fixture
def verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Verb:
    return Verb(tmp_path, capsys)


def test_prints_manifest_when_none_is_named(verb: Verb) -> None:
    verb.checkout.test("test_one.py", ONE)
    status, document = verb("--suite", SUITE)
    assert status == 0
    assert 'model = "org/one"' in document["import-tests"]
    assert [each["argv"] for each in document["launches"]] == [["--tp", "8", "--nccl-port", "11"]]


def test_compares_and_names_task_that_no_test_needs(verb: Verb) -> None:
    verb.checkout.test("test_one.py", ONE)
    status, document = verb("--suite", SUITE, "--manifest", verb.manifest)
    assert status == 0
    assert document["unneeded"] == ["stale"]


def test_names_no_unneeded_task_when_a_test_failed(verb: Verb) -> None:
    verb.checkout.test("test_one.py", f"{ONE}{MORE}")
    status, document = verb("--suite", SUITE, "--manifest", verb.manifest)
    assert status == 10
    assert document["unneeded"] == []
    assert [each["state"] for each in document["not_understood"]] == ["failed"]


def test_exits_0_when_a_test_without_launchers_failed(verb: Verb) -> None:
    verb.checkout.test("test_one.py", ONE)
    kernel = "import torch\nregister_cuda_ci(est_time=9, stage='base-c', runner_config='8-gpu-h200')\n"
    kernel = f"from sglang.test.ci.ci_register import register_cuda_ci\n{kernel}def test_it():\n    1 / 0\n"
    verb.checkout.test("test_kernel.py", kernel, head="")
    status, document = verb("--suite", SUITE, "--manifest", verb.manifest)
    assert status == 0
    assert [each["state"] for each in document["problems"]] == ["failed"]
    assert document["unneeded"] == ["stale"]


def test_exits_10_when_no_task_covers_a_launch(verb: Verb) -> None:
    verb.checkout.test("test_two.py", ONE.replace("org/one", "org/two"))
    status, document = verb("--suite", SUITE, "--manifest", verb.manifest)
    assert status == 10
    assert [each["covered"] for each in document["launches"]] == [False]


def test_update_rewrites_tasks_alone(verb: Verb) -> None:
    verb.checkout.test("test_one.py", ONE)
    verb.checkout.test("test_two.py", ONE.replace("org/one", "org/two"))
    status, document = verb("--suite", SUITE, "--update", verb.manifest)
    assert status == 0
    assert document["updated"] == {"kept": 1, "added": 1, "removed": 1}
    text = verb.manifest.read_text()
    assert text.startswith(MANIFEST[: MANIFEST.index('\n[[task]]\nmodel = "org/stale"')])
    assert "org/stale" not in text
    assert verb("--suite", SUITE, "--update", verb.manifest)[1]["updated"] == {"kept": 2, "added": 0, "removed": 0}
    assert verb.manifest.read_text() == text


def test_update_anew_writes_servers_again_and_keeps_the_rest(verb: Verb) -> None:
    verb.checkout.test("test_one.py", ONE)
    command = '[[task]]\nmodel = "org/mine"\nrecipe = "command"\nargv = ["true"]\nsuccess = "x"\n'
    verb.manifest.write_text(f"{MANIFEST}\n{command}")
    status, document = verb("--suite", SUITE, "--update", verb.manifest, "--anew")
    assert status == 0
    assert document["updated"] == {"kept": 1, "added": 1, "removed": 2}
    text = verb.manifest.read_text()
    assert text.startswith(MANIFEST[: MANIFEST.index("[[task]]")])
    assert command in text
    assert f"# Recorded from a checkout of sglang, suite {SUITE}, GPU H200: 1 of 1 launches in 1 file" in text
    assert verb("--suite", SUITE, "--update", verb.manifest, "--anew")[0] == 0
    assert verb.manifest.read_text() == text


def test_launch_that_no_recipe_warms_is_named_and_not_counted(verb: Verb) -> None:
    verb.checkout.test("test_one.py", f"{ONE}{ENCODER}")
    status, document = verb("--suite", SUITE, "--manifest", verb.manifest)
    assert status == 0
    assert [each["why"] for each in document["not_warmable"]] == ["an encoder alone generates no tokens"]
    assert "import-tests" not in document, "a table is for people"
    status, text = verb.shown("--suite", SUITE, "--manifest", verb.manifest)
    assert status == 0
    assert "no recipe warms: test/registered/test_one.py" in text


def test_gpu_is_that_of_the_manifest(verb: Verb) -> None:
    verb.checkout.test("test_one.py", ONE)
    verb.manifest.write_text(MANIFEST.replace("count = 8", 'count = 8\nname = "B200"'))
    assert verb("--suite", SUITE, "--manifest", verb.manifest)[1]["source"]["gpu"] == "B200"
    assert verb("--suite", SUITE, "--manifest", verb.manifest, "--gpu", "H100")[1]["source"]["gpu"] == "H100"


def test_update_removes_no_task_when_a_test_failed(verb: Verb) -> None:
    verb.checkout.test("test_one.py", f"{ONE}{MORE}")
    status, _ = verb("--suite", SUITE, "--update", verb.manifest)
    assert status == 10
    assert verb.manifest.read_text() == MANIFEST


def test_later_run_records_changed_file_alone(verb: Verb) -> None:
    verb.checkout.test("test_one.py", ONE)
    verb.checkout.test("test_two.py", ONE.replace("org/one", "org/two"))
    records = verb.manifest.parent / "records"
    verb("--suite", SUITE, "--records", records)
    before = {path: path.stat().st_mtime_ns for path in records.iterdir()}
    assert len(before) == 2
    verb.checkout.test("test_two.py", ONE.replace("org/one", "org/three"))
    _, document = verb("--suite", SUITE, "--records", records)
    assert {each["model"] for each in document["launches"]} == {"org/one", "org/three"}
    assert sum(path.stat().st_mtime_ns == stamp for path, stamp in before.items()) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--suite", "base-c-test-8-gpu-h20"), "did you mean 'base-c-test-8-gpu-h200'?"),
        (("--gpu", "H20"), "one of H200, H100, B200 is wanted"),
        (("--update", "/missing.toml"), "there is no file /missing.toml; without --update a manifest is printed"),
        (("--update", "/missing.toml", "--profile", "h200"), "exclude each other"),
    ],
)
def test_exits_2_with_what_would_be_right(verb: Verb, argv: tuple[str, ...], message: str) -> None:
    verb.checkout.test("test_one.py", ONE)
    status, document = verb(*argv)
    assert status == 2
    assert message in json.dumps(document["error"])


def test_exits_2_outside_a_checkout(verb: Verb, tmp_path: Path) -> None:
    (tmp_path / "co" / "python").rename(tmp_path / "elsewhere")
    verb.checkout.test("test_one.py", ONE)
    status, document = verb()
    assert status == 2
    assert "is not in a checkout of sglang" in json.dumps(document["error"])


def test_exits_2_without_image_and_without_here(verb: Verb, capsys: pytest.CaptureFixture[str]) -> None:
    verb.checkout.test("test_one.py", ONE)
    assert main(["import-tests", str(verb.checkout.root / "test")], environ={}) == 2
    assert "Pass --image REF" in capsys.readouterr().err


def test_manifest_without_a_cache_is_compared_all_the_same(verb: Verb) -> None:
    verb.checkout.test("test_two.py", ONE.replace("org/one", "org/two"))
    verb.manifest.write_text(MANIFEST.replace('[cache]\nroot = "/data/cache"\n', ""))
    assert verb("--suite", SUITE, "--manifest", verb.manifest)[0] == 10


def test_file_that_is_not_there_is_named_with_its_near_match(verb: Verb, tmp_path: Path) -> None:
    status, document = verb("--update", tmp_path / "warn.toml")
    assert status == 2
    assert document["error"]["message"] == f"--update: there is no file {tmp_path}/warn.toml; did you mean 'warm.toml'?"
    status, document = verb(paths=("none",))
    assert status == 2
    assert [problem["remedy"] for problem in document["error"]["problems"]] == [""]
