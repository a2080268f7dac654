"""`import-tests` in a container: what it may not reach, and what a file there costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.checkout import Checkout
from tests.engine.cli import Cli

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

REACH = """
def tried(action):
    try:
        action()
    except Exception as error:
        return type(error).__name__
    return "done"

CAPABILITIES = [line.split()[1] for line in open("/proc/self/status") if line.startswith("CapEff")][0]
FOUND = [
    tried(lambda: open(__file__, "a")),
    tried(lambda: open("/usr/new", "w")),
    CAPABILITIES,
    ",".join(sorted(name for name in os.listdir("/sys/class/net"))),
    str(any(name.startswith("nvidia") for name in os.listdir("/dev"))),
    str("WARM_CACHE_JOB" in os.environ),
]

class TestReach(CustomTestCase):
    def test_it(self):
        popen_launch_server("org/reach", "u", 9, other_args=FOUND)
"""
GOOD = "class TestGood(CustomTestCase):\n    def test_it(self):\n        popen_launch_server('org/good', 'u', 9)\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "co")


def document_of(cli: Cli, checkout: Checkout) -> dict[str, Any]:
    """What the verb printed. Exit 10: the manifest's one task covers nothing."""
    cli.manifest({"model": "org/other", "recipe": "serve"})
    ended = cli.run("import-tests", str(checkout.root / "test"), "--records", "", "--json")
    assert ended.status == 10, ended.said
    return ended.document


def test_record_in_container_reaches_nothing(cli: Cli, checkout: Checkout) -> None:
    checkout.test("test_reach.py", REACH)
    (launch,) = document_of(cli, checkout)["launches"]
    written, root, capabilities, network, gpus, job = launch["argv"]
    assert written in ("OSError", "PermissionError")
    assert root in ("OSError", "PermissionError")
    assert int(capabilities, 16) == 0
    assert network == "lo"
    assert (gpus, job) == ("False", "False")
    assert launch["place"].startswith("test/registered/test_reach.py:")


def test_record_file_ending_its_process_hides_no_other(cli: Cli, checkout: Checkout) -> None:
    for number in range(3):
        checkout.test(f"test_good_{number}.py", GOOD)
    kill = "import ctypes\nfor pid in range(1, 64):\n    ctypes.CDLL(None).kill(pid, 9)\nos._exit(0)\n"
    bad = checkout.test("test_bad.py", kill + GOOD)
    document = document_of(cli, checkout)
    assert len(document["launches"]) == 3
    assert [each["location"] for each in document["not_understood"]] == [f"{bad}:1"]
