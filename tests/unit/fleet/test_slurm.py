"""What `fleet slurm` prints: words of sbatch and of the shell, and what is wrong with its options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from builder.cli import main as cli
from tests.unit.fleet.test_kubernetes import DIGEST, MANIFEST

Print = Callable[..., str]


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "manifest.toml"
    path.write_text(MANIFEST)
    return path


@pytest.fixture
def script(manifest: Path, capsys: pytest.CaptureFixture[str]) -> Print:
    def printed(*options: str) -> str:
        words = ["fleet", *(options[:1] if options[:1] == ("prolog",) else ("slurm", "--logs", "/shared/it's"))]
        words += ["--manifest", str(manifest), *options[words[1] == "prolog" :]]
        assert cli.main(words, environ={}) == 0
        return capsys.readouterr().out.replace(" \\\n  ", " ")

    return printed


def directives(script: str) -> dict[str, str]:
    words = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    return dict(word.partition("=")[::2] for word in words)


def test_job_has_its_own_node_an_empty_environment_and_a_warning(script: Print) -> None:
    found = directives(script("--partition", "h200", "--account", "ci"))
    assert found["export"] == "NIL"
    assert (found["nodes"], found["gres"], found["partition"], found["account"]) == ("1", "gpu:8", "h200", "ci")
    assert found["signal"] == "B:TERM@60" and "requeue" in found and "exclusive" in found
    assert int(found["time"]) > 50, "more than the run's budget"
    assert found["output"] == "/shared/it's/%x-%N-%j.log"


def test_variables_are_passed_by_name_only(script: Print) -> None:
    text = script("--pass-variable", "HF_TOKEN", "--pass-variable", "DOCKER_HOST")
    assert directives(text)["export"] == "HF_TOKEN,DOCKER_HOST"


@pytest.mark.parametrize(
    "options", [(), ("--push", "reg.example/jit"), ("--runtime", "pyxis"), ("--runtime", "apptainer")]
)
def test_last_command_replaces_the_shell(script: Print, options: tuple[str, ...]) -> None:
    commands = [line for line in script(*options).splitlines() if line and line[0] != "#"]
    assert commands[-1].startswith("exec ")


def test_program_runs_in_the_image_where_the_node_has_no_engine(script: Print) -> None:
    pyxis = script("--runtime", "pyxis", "--program", "/shared/warm-cache", "--image", f"nvcr.io/a/b@{DIGEST}")
    assert "exec srun" in pyxis and f"--container-image=nvcr.io#a/b@{DIGEST}" in pyxis.replace("'", "")
    assert "/data/jit:/jit,/shared/warm-cache:/opt/warm-cache-program:ro" in pyxis
    assert f"WARM_CACHE_IMAGE_ID={DIGEST}" in pyxis and "python3 -m builder warm" in pyxis
    apptainer = script("--runtime", "apptainer")
    assert "exec apptainer exec" in apptainer and "--bind /data/jit:/jit" in apptainer


def test_prolog_ends_well_whatever_happens(script: Print) -> None:
    text = script("prolog", "reg.example/jit", "--deadline", "30s", "--key", "/etc/jit.pem")
    assert text.rstrip().endswith("exit 0")
    assert "timeout -k 5 60 warm-cache pull reg.example/jit" in text
    assert "--fail-open" in text and "--key /etc/jit.pem" in text and "</dev/null || :" in text
    assert "exec" not in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("slurm", "--runtime", "pyxiss"), "--runtime it is 'pyxiss'; did you mean 'pyxis'?"),
        (("slurm", "--runtime", "pyxis", "--push", "reg.example/a"), "--push --runtime pyxis warms inside the serving"),
        (
            ("slurm", "--runtime", "pyxis", "--cache", "volume:jit"),
            "has no engine, and so no named volume: pass --cache",
        ),
        (
            ("slurm", "--gres", "gpu 8", "--partition", "a b"),
            "--partition letters, digits and _.:,- are wanted, found 'a",
        ),
        (("slurm", "--pass-variable", "HF-TOKEN"), "expected the NAME of an environment variable, found 'HF-TOKEN'"),
        (("slurm", "--queue", "gpu"), "--queue is no option of fleet slurm, but of fleet kubernetes"),
        (("slurm", "--program", "here"), "an absolute path on the nodes is wanted, found 'here'"),
        (("slurm",), "--logs the directory for reports and logs is missing; it has to exist on all nodes"),
        (("prolog",), "fleet prolog needs a REF: the cache image, with its registry"),
        (("prolog", "r.example/JIT"), "REF r.example/JIT: "),
        (
            ("prolog", "r.example/jit", "--stream", "nightly"),
            "--stream a stream is a part of a signature: pass --key too",
        ),
        (("slurm", "--push", "r.example/JIT"), "--push r.example/JIT: "),
        pytest.param(
            ("slurm", "--runtime", "pyxis", "--cache", "/data/x,/etc:/mnt"),
            "--cache pyxis would read more than one mount from '/data/x,/etc:/mnt'",
            marks=pytest.mark.attack(
                "a cache root, model store or program has a path that pyxis and apptainer read as several mounts",
                by="manifest",
                holds="2: no script is printed",
            ),
            id="path-of-several-mounts",
        ),
        (("prolog", "reg.example/jit", "--jitter", "x"), '--jitter expected a duration such as "20m"'),
    ],
)
def test_wrong_values_are_named(
    manifest: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], said: str
) -> None:
    assert cli.main(["fleet", *options, "--manifest", str(manifest)], environ={}) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and said in " ".join(captured.err.split())


def test_variables_of_the_other_action_do_not_matter(manifest: Path) -> None:
    words = ["fleet", "slurm", "--manifest", str(manifest), "--logs", "/shared"]
    assert cli.main(words, environ={"WARM_CACHE_QUEUE": "gpu"}) == 0
