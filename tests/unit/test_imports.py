"""What sglang's tests launch, read from files of their shapes (none is executed), against lists of tasks."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from builder.cli.main import main
from builder.manifest import from_tests
from builder.manifest.load import Overrides, load
from builder.manifest.reading import Launch
from builder.manifest.testfiles import Files
from builder.task import Task

FIXTURES = Path(__file__).parent / "fixtures"
TESTS = FIXTURES / "sglang" / "test"
EAGLE = [
    "--speculative-algorithm EAGLE is missing",
    "--speculative-eagle-topk 1 is missing",
    "--speculative-num-draft-tokens 4 is missing",
    "--speculative-num-steps 3 is missing",
]
NOT_DP = ["--dp 8 is not in the test", "--enable-dp-attention is not in the test"]


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    status = main(["import-tests", *map(str, argv)], environ={})
    out, err = capsys.readouterr()
    return status, out, err


def test_what_the_list_beside_the_tests_left_cold(capsys: pytest.CaptureFixture[str]) -> None:
    """One task a model, and the flags that somebody remembered: of seven launches it covers none."""
    status, out, _ = run(capsys, TESTS, "--suite", "8-gpu-h200", "--manifest", FIXTURES / "ancestor.toml", "--json")
    document = json.loads(out)
    assert status == document["exit"] == 10
    assert document["not_understood"] == []
    assert document["error"]["message"] == "7 of 7 launches covered by no task"
    found = {each["test"]: (each["task"], each["differences"]) for each in document["launches"]}
    memory = "--mem-frac {} is missing".format
    assert found == {
        "TestDeepseekV3MTP": ("DeepSeek-V3-0324-tp8", [memory("0.7"), *EAGLE]),
        "TestDeepseekV32DPMTP": ("DeepSeek-V3.2-tp8-dp8", [memory("0.7"), *EAGLE]),
        "TestDeepseekV32TPMTP": ("DeepSeek-V3.2-tp8-dp8", [*NOT_DP, memory("0.7"), *EAGLE]),
        "TestGLM5DPMTP": ("GLM-5-FP8-tp8-dp8", [memory("0.8"), *EAGLE]),
        "TestGLM5TPMTP": ("GLM-5-FP8-tp8-dp8", [*NOT_DP, memory("0.8"), *EAGLE]),
        "TestMiMoV2Flash": (
            "MiMo-V2-Flash-tp4-dp2",
            [
                "--cuda-graph-max-bs-decode 64 is missing",
                "--enable-multi-layer-eagle is missing",
                "--max-running-requests 128 is missing",
                "--mem-fraction-static 0.75 is missing",
                "--page-size 64 is missing",
                *EAGLE,
            ],
        ),
        "TestMiMoV2": (
            "MiMo-V2.5-tp8-dp2",
            [
                "--cuda-graph-max-bs-decode 64 is missing",
                "--enable-multi-layer-eagle is missing",
                "--enable-multimodal is missing",
                "--mem-fraction-static 0.65 is missing",
                '--model-loader-extra-config {"enable_multithread_load": true, "num_threads": 64} is not in the test',
                "--reasoning-parser mimo is missing",
                *EAGLE,
                "SGLANG_ENABLE_UNIFIED_RADIX_TREE=1 is missing",
                "SGLANG_USE_CUDA_IPC_TRANSPORT=1 is missing",
            ],
        ),
    }
    assert document["unneeded"] == [
        "DeepSeek-V3-0324-tp8",
        "DeepSeek-V3.2-tp8-dp8",
        "GLM-5-FP8-tp8-dp8",
        "MiMo-V2-Flash-tp4-dp2",
        "MiMo-V2.5-tp8-dp2",
    ]


def test_the_manifest_that_it_prints_covers_what_it_was_made_of(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, out, err = run(capsys, TESTS)
    assert (status, err) == (0, "")
    path = tmp_path / "m.toml"
    path.write_text(out)
    more = ("--image", "i", "--cache", "/c")
    status, out, err = run(capsys, TESTS, "--manifest", path, *more)
    assert (status, err) == (0, ""), out
    assert out == f"9 of 9 launches in 5 files are covered by {path}; 1 file not for this suite or machine\n"
    manifest = load(path, overrides=Overrides(image="i", cache="/c"))
    assert [(task.label, task.gpus) for task in manifest.tasks if task.gpus != 8] == [("MiMo-V2-Flash-tp4-dp2", 4)]
    # One launch less: its task is needed by nothing.
    status, out, _ = run(capsys, TESTS, "--manifest", path, *more, "--suite", "8-gpu-h200")
    assert status == 0
    assert [line for line in out.splitlines() if line.startswith("no test needs: ")] == [
        "no test needs: sglang-ci-dsv3-test-tp8",
        "no test needs: sglang-ci-dsv3-test-tp8-dp8",
    ]


def test_what_it_prints_can_be_read_whatever_the_words_are(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--a", 'it\'s "so"\n\t\x7f\u2028\U0001f600', "@b", "", "--c=@d", "-1"]
    (tmp_path / "test_it.py").write_text(
        f"{HEAD}popen_launch_server('m/x', 'u', 1, other_args={words!r}, env={{'A': '\\\\n\\x7f'}})\n"
        "popen_launch_server('m/x', 'u', 1, other_args=['\\udcff'])\n"
    )
    status, out, err = run(capsys, tmp_path)
    assert status == 10
    assert "an argument that no program can be given: '\\udcff'" in err
    (tmp_path / "m.toml").write_text(out)
    [task] = load(tmp_path / "m.toml", overrides=Overrides(image="i", cache="/c")).tasks
    assert (list(task.argv), task.env["A"]) == (words, "\\n\x7f")


def test_the_comparison_for_people(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(TESTS)
    status, out, err = run(capsys, "registered/8-gpu/test_dsa_models_mtp.py", "--manifest", FIXTURES / "ancestor.toml")
    assert status == 10
    line = 1 + (TESTS / "registered/8-gpu/test_dsa_models_mtp.py").read_text().split("\n").index(
        "class TestGLM5TPMTP(TestGLM5DPMTP):"
    )
    assert (
        f"not covered: registered/8-gpu/test_dsa_models_mtp.py:{line} TestGLM5TPMTP: zai-org/GLM-5-FP8\n"
        "  the nearest task is GLM-5-FP8-tp8-dp8:\n"
        "    --dp 8 is not in the test\n"
    ) in out
    assert "4 of 4 launches covered by no task. Exit 10." in err


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (["--tp=8", "--a", "1"], ["--a=1", "--tensor-parallel-size", "8"]),
        (["--mem-fraction-static", "0.70"], ["--mem-frac=0.7"]),
        (["--cuda-graph-max-bs", "64"], ["--cuda-graph-max-bs-decode", "64"]),
        (["--x", '{"a":1,"b":2}'], ["--x", '{"b": 2, "a": 1}']),
        (["--dp", "8", "--enable-dp-attention"], ["--attn-dp-size", "8"]),
        (["--port", "1"], ["--host", "0.0.0.0", "--device", "cuda"]),
        (["--x", "1", "--x", "2"], ["--x", "2"]),
        (["--list", "a", "b"], ["--list", "a", "b"]),
    ],
)
def test_spellings_of_the_same(ours: list[str], theirs: list[str]) -> None:
    launch = Launch("org/m", tuple(theirs), (("SWITCH", "True"),), "T", "t.py:1")
    assert from_tests.differences(launch, Task("l", "org/m", "serve", tuple(ours), {"SWITCH": "1"})) == ()


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        (["--tp", "8"], ["--tp", "4"], "--tp is 8, in the test 4"),
        (["--list", "a"], ["--list", "a", "b"], "--list is a, in the test a b"),
        (["--flag"], [], "--flag is not in the test"),
        (["--x", "a"], ["--x"], "--x is a, in the test without value"),
        (["--speculative-num-steps", "3"], ["--speculative-num-draft-tokens", "3"], "--speculative-num-draft-tokens 3"),
    ],
)
def test_what_is_not_the_same(ours: list[str], theirs: list[str], said: str) -> None:
    launch = Launch("org/m", tuple(theirs), (), "T", "t.py:1")
    found = from_tests.differences(launch, Task("l", "org/m", "serve", tuple(ours)))
    assert found and found[0].startswith(said)


# What is not understood


HEAD = "import os\nfrom sglang.test.test_utils import popen_launch_server\n"
CALL = "popen_launch_server('org/m', 'u', timeout=1, other_args={})"


def read(tmp_path: Path, body: str, head: str = HEAD) -> from_tests.Found:
    path = tmp_path / "test_x.py"
    lines = "\n".join(f"        {line}" for line in body.splitlines())
    path.write_text(f"{head}class TestX:\n    model = 'org/m'\n    def test_it(self):\n{lines}\n")
    return from_tests.read([str(path)], None)


@pytest.mark.parametrize(
    ("body", "line", "why"),
    [
        ("args = ['--tp', os.environ['TP']]\n" + CALL.format("args"), 7, "the environment variable TP"),
        ("args = ['--tp', os.environ.get('TP', '8')]\n" + CALL.format("args"), 7, "os.environ.get()"),
        ("if weather():\n    " + CALL.format("['--a']"), 7, "a condition: the name weather"),
        ("args = ['--a']\nif weather():\n    args += ['--b']\n" + CALL.format("args"), 9, "a condition"),
        ("args = ['--a']\nimport helper\nhelper.more(args)\n" + CALL.format("args"), 9, "helper.more() may have"),
        ("while True:\n    " + CALL.format("['--a']"), 7, "a statement of the kind While"),
        ("for size in sizes():\n    " + CALL.format("['--tp', str(size)]"), 7, "the name sizes"),
        (CALL.format("['--tp', self.size]"), 6, "TestX has no size in the files"),
        (CALL.format("[word for line in self.a for word in line]"), 6, "an expression of the kind ListComp"),
        (CALL.format("None, **self.more()"), 6, "TestX has no more in the files"),
        ("import sglang as sgl\nsgl.Engine(model_path='org/m', tp_size=8)", 7, "an Engine is given keywords"),
        ("with started() as server:\n    pass", 8, "started() is a generator"),
        (CALL.format("['--a'], env={'A': os.environ['B']}"), 6, "the environment variable B"),
        (CALL.format("['--a', f'{TestX}']"), 6, "a value in an f-string"),
        (CALL.format("['--a', str(TestX)]"), 6, "a call of str"),
        (CALL.format("['--a'] * 10**12"), 6, "an operation of the kind Pow"),
        (CALL.format("['--a'] * 1000000"), 6, "an operation of the kind Mult"),
        ("a = ['--a']\nfor _ in range(1000):\n    a += a\n" + CALL.format("a"), 9, "a value that is too long"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_said_and_never_guessed(tmp_path: Path, body: str, line: int, why: str) -> None:
    head = HEAD
    if "started" in body:
        head += f"def started():\n    yield {CALL.format([])}\n"
        line = 4
    found = read(tmp_path, body, head)
    assert found.launches == ()
    places = {place.rpartition(":")[2]: said for place, said in found.problems}
    assert list(places) == [str(line)], found.problems
    assert why in places[str(line)]


@pytest.mark.parametrize(
    ("body", "argv"),
    [
        ("tp = 2 * 4\n" + CALL.format("['--tp', f'{tp}', *(['--b'] if tp > 4 else [])]"), "--tp 8 --b"),
        (
            "args = ['--a']\nfor name in ('b', 'c'):\n    args.append('--' + name)\n" + CALL.format("args"),
            "--a --b --c",
        ),
        ("args = '--a 1'.split()\nprint(args)\n" + CALL.format("args[:1] + ['2']"), "--a 2"),
        ("def more(n, m=2):\n    return ['--n', str(n), '--m', str(m)]\n" + CALL.format("more(1)"), "--n 1 --m 2"),
        ("try:\n    " + CALL.format("['--a']") + "\nfinally:\n    pass", "--a"),
        (
            "settings = dict(other_args=['--a'], timeout=unknown())\npopen_launch_server('org/m', 'u', **settings)",
            "--a",
        ),
        ("a, b = '--a', '--b'\n" + CALL.format("[a, b] if os.environ is not None else []"), "--a --b"),
        (CALL.format("['--f', 0.5, '--n', 3]"), "--f 0.5 --n 3"),
    ],
)
def test_what_is_understood(tmp_path: Path, body: str, argv: str) -> None:
    found = read(tmp_path, body)
    assert found.problems == ()
    assert [" ".join(launch.argv) for launch in found.launches] == [argv]


def test_the_environment_of_a_launch(tmp_path: Path) -> None:
    head = HEAD + "from sglang.srt.environ import envs\nfrom unittest.mock import patch\n"
    body = (
        "os.environ['A'] = '1'\n"
        "with envs.B.override(True), patch.dict(os.environ, {'C': 'x'}):\n"
        f"    {CALL.format([])}\n"
        f"{CALL.format('[], env={**os.environ, ' + repr('D') + ': 4}')}"
    )
    found = read(tmp_path, body, head)
    assert found.problems == ()
    assert [dict(launch.env) for launch in found.launches] == [{"A": "1", "B": "1", "C": "x"}, {"A": "1", "D": "4"}]


def test_a_base_that_is_in_none_of_the_files(tmp_path: Path) -> None:
    path = tmp_path / "test_x.py"
    path.write_text("from somewhere import Base\nclass TestX(Base):\n    model = 'org/m'\n")
    found = from_tests.read([str(path)], None)
    assert found.problems == ((f"{path}:2", "TestX: its base Base is in none of the files"),)


def test_nothing_of_a_file_is_executed(tmp_path: Path) -> None:
    sign = tmp_path / "executed"
    code = f"open({str(sign)!r}, 'w')\nraise SystemExit(3)\n"
    assert read(tmp_path, code + CALL.format("['--a']"), code + HEAD) is not None
    assert not sign.exists()


def test_files_that_cannot_be_read_are_all_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def (\n")
    (tmp_path / "nul.py").write_bytes(b"a = '\0'\n")
    (tmp_path / "deep.py").write_text(f"a = {'-' * 100_000}1\n")
    (tmp_path / "loop.py").symlink_to("loop.py")
    os.mkfifo(tmp_path / "pipe.py")
    with (tmp_path / "large.py").open("w") as file:
        file.truncate(1 << 30)
    (tmp_path / "empty").mkdir()
    wanted = {
        **dict.fromkeys(("broken.py", "nul.py", "deep.py"), "it is not Python: "),
        "gone.py": "No such file",
        "loop.py": "symbolic links",
        "pipe.py": "it is no file",
        "large.py": "16 MiB",
    }
    status, _, err = run(capsys, *(tmp_path / name for name in wanted), tmp_path / "empty")
    assert status == 2
    for name, why in wanted.items():
        assert any(name in line and why in line for line in err.splitlines()), err
    assert "no Python file is below it." in err


def test_a_suite_that_no_file_is_of_is_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, TESTS, "--suite", "8-gpu-h20O", "--manifest", FIXTURES / "ancestor.toml")
    assert (status, out) == (2, "")
    assert "launches a server" in err
    assert "not for this suite" in err


def test_help_says_what_the_exit_status_means(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import-tests", "--help"], environ={}) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Exit 0 when every launch is covered and everything was understood, 10 otherwise." in out


def test_fixtures_of_a_checkout_are_found_by_themselves() -> None:
    files = Files([str(TESTS)])
    module = next(each for each in files.given() if each.path.name == "test_mimo_models.py")
    found = files.imported(module, "sglang.test.server_fixtures.mmmu_fixture")
    assert found is not None and not found.given and found.path.name == "mmmu_fixture.py"
    assert files.imported(module, "sglang.test.kits.eval_accuracy_kit") is None
