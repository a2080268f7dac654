"""Every command that a message, a help text or a document recommends, run on a warm root of the tiny image.

What it names is replaced by what is here: the manifest, the root, a job, a registry that does not answer. Of commands
of one verb whose words are all in a longer one, the longer one is run.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from builder.cli.main import main
from builder.cli.statuses import codes
from builder.cli.verbs import VERBS
from tests.checkout import Checkout
from tests.commands import other_programs, recommended
from tests.engine.cli import Cli, shapes

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

#: What is not 0 here, by the command's beginning: the statuses, and why.
STATUS = {
    "sign": ((12, 16), "no registry answers"),
    "push": ((12, 16), "no registry answers"),
    "pull": ((12, 16), "no registry answers"),
    "refresh": ((0, 16), "no registry answers, where one is named to push to"),
    "warm --pull": ((12, 16), "no registry has the tiny image"),
    "warm --here": ((11, 12), "this process has no sglang"),
    "check --here": ((10,), "this process is not what the root was warmed in"),
    "import-tests": ((0, 10), "no task of the manifest is what the checkout launches"),
    "fleet summary": ((0, 2), "its reports are made by runs"),
}

#: Other programs of remedies. None: run below; else why not.
OTHERS = {
    "mkdir": None,
    "chown": None,
    "chmod": None,
    "docker pull": "no registry can be reached",
    "hf download": "the Hugging Face Hub cannot be reached",
    "apt-get install": "it would change this machine",
    "nvidia-ctk runtime": "the NVIDIA container toolkit is not here",
    "nvidia-ctk system": "the NVIDIA container toolkit is not here",
    "chcon": "this kernel has no SELinux",
}
BAKED = "warm-cache-test-bake:1"
#: The order in which a view lives.
_VIEW = ("create", "list", "audit", "promote", "drop")


@pytest.fixture
def machine(cli: Cli) -> Cli:
    """A user with a warm root, a checkout of tests, a snapshot of a job, and a target of here-reset."""
    cli.manifest(shapes(), run={"budget": "55m"})
    cli.warm()
    (cli.place / "models").mkdir()
    checkout = Checkout(cli.place / "checkout")
    checkout.test(
        "test_a.py",
        """
        register_cuda_ci(est_time=9, stage="base-c", runner_config="8-gpu-h200")
        class TestA(CustomTestCase):
            def test_it(self):
                popen_launch_server("org/a", "u", 9)
        """,
    )
    (cli.place / "update.toml").write_bytes(cli.path.read_bytes())
    key = ec.generate_private_key(ec.SECP256R1())
    plain = serialization.NoEncryption()
    form, encoding = serialization.PrivateFormat.PKCS8, serialization.Encoding.PEM
    (cli.place / "key.pem").write_bytes(key.private_bytes(encoding, form, plain))
    public = key.public_key().public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo)
    (cli.place / "key.pub").write_bytes(public)
    return cli


def commands(cli: Cli) -> list[list[str]]:
    place, registry = cli.place, "127.0.0.1:9/jit"
    values = {
        "--manifest": str(cli.path),
        "--profile": str(cli.path),
        "--cache": str(cli.root),
        "--models": str(place / "models"),
        "--image": cli.image,
        "--only": "shapes",
        "--max-size": "200G",
        "--when-idle": "1s",
        "--metrics": str(place / "metrics.prom"),
        "--key": str(place / "key.pem"),
        "--source": str(cli.root),
        "--target": str(place / "own"),
        "--before": str(place / "before.json"),
        "--after": str(place / "before.json"),
        "--update": str(place / "update.toml"),
        "--logs": str(place / "logs"),
        "--push": registry,
        "--pull": registry,
        "--suite": "base-c-test-8-gpu-h200",
    }
    arguments = {
        **{f"view {action}": ["pr-1"] for action in _VIEW if action != "list"},
        **{verb: [f"{registry}:1"] for verb in ("sign", "pull", "fleet kubernetes", "fleet prolog")},
        "push": [registry],
        "fleet summary": [str(place / "report.json")],
        "bake": [BAKED],
        "profiles show": ["h200"],
        "help": ["manifest"],
        "init": [str(place / "new.toml")],
        "import-tests": [str(place / "checkout" / "test")],
        "completion": ["bash"],
    }
    private, public = str(place / "key.pem"), str(place / "key.pub")
    pinned = f"r.example/sglang@sha256:{'0' * 64}"
    every = [
        [
            pinned
            if argv[0] == "fleet" and word == cli.image
            else public
            if argv[0] != "sign" and word == private
            else word
            for word in argv
        ]
        for argv in recommended(values, arguments).values()
    ]
    longest = [one for one in every if not any(set(one) < set(other) and one[0] == other[0] for other in every)]
    return sorted(longest, key=lambda argv: (argv[0] == "view" and _VIEW.index(argv[1]), argv))


def test_recommended_commands_end_with_their_status(machine: Cli, capfd: pytest.CaptureFixture[str]) -> None:
    cli, wrong = machine, []
    before = ["audit", "--here", "--before", str(cli.place / "before.json"), "--cache", str(cli.root)]
    assert main(before, environ=cli.environ) == 0
    found = commands(cli)
    assert len(found) > 25 and {argv[0] for argv in found} >= set(VERBS) - {"push", "pull", "bake", "help"}
    for argv in found:
        line = " ".join(argv)
        capfd.readouterr()
        status = main(
            argv, environ={**cli.environ, "WARM_CACHE_CACHE": str(cli.root)} if "--here" in argv else cli.environ
        )
        said = "".join(capfd.readouterr())
        wanted, _ = next((STATUS[name] for name in STATUS if line.startswith(name)), ((0,), ""))
        if (
            status not in wanted
            or status not in {0, *codes(VERBS[argv[0]])}
            or re.search("^Traceback", said, re.MULTILINE)
        ):
            wrong.append(f"warm-cache {line}: {status}, not one of {wanted}\n{said[-600:]}")
    assert not wrong, "\n\n".join(wrong)
    with cli.engine() as engine:
        engine.remove_image(BAKED)
        assert not cli.containers(engine)


def test_other_programs_that_remedies_name_are_known(tmp_path: Path) -> None:
    assert other_programs() == set(OTHERS), "run it below, or say why it cannot be"
    root = tmp_path / "a" / "root"
    for command in (f"mkdir -p {root}", f"chown -R 1234 {root}", f"chown -R 1234:1234 {root}", f"chmod a+rx {root}"):
        assert command.split()[0] in OTHERS
        subprocess.run(command.split(), check=True)
    assert (root.stat().st_uid, root.stat().st_mode & 0o555) == (1234, 0o555)
